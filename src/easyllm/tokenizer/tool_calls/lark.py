"""Writing grammars in llguidance's dialect of Lark.

A mark that is a single added token of the tokenizer is written as this token, `<[151657]>`, because
llguidance's free text contains no special tokens; any other mark is written as text.
"""

import json
import re
from collections.abc import Mapping, Sequence

from easyllm.core.json_types import JsonMapping

GAP = "GAP?"
"""Optional whitespace, for example between reasoning and a call."""
_WHITESPACE = r"[ \t\r\n]{1,16}"
_SPACES = r"[ \t\r\n]{0,16}"


class Lark:
    """Rules of a grammar while they are collected.

    Args:
        added: ids of the added tokens by their names.
    """

    def __init__(self, added: Mapping[str, int]) -> None:
        self._added = added
        self._rules = {"TEXT": "/(?s:.*)/", "GAP": f"/{_WHITESPACE}/"}

    def add(self, name: str, body: str, options: str = "") -> str:
        """Adds a rule, or a terminal if the name is in capitals, and returns its name."""
        self._rules[f"{name}{options}"] = body
        return name

    def is_token(self, mark: str) -> bool:
        """Whether a mark is a single added token."""
        return mark in self._added

    def mark(self, mark: str) -> str:
        """Returns the expression of a mark."""
        return f"<[{self._added[mark]}]>" if mark in self._added else quoted(mark)

    def first(self, name: str, text: str) -> str:
        """Adds a terminal for a text, with whitespace before it, that competes with free text.

        llguidance continues the longest terminal, so the text must be a single one, and the free
        text must end where the text does.
        """
        return self.add(name, f"/{_SPACES}{pattern_of(text)}/")

    def up_to(self, name: str, mark: str, free: str = "TEXT") -> str:
        """Adds a rule for free text that ends with the first occurrence of a mark.

        Args:
            name: name of the rule.
            mark: the mark, which is part of the rule.
            free: the terminal of the text; it must not contain the mark if that is a token.
        """
        if self.is_token(mark):
            return self.add(name, f"{free} {self.mark(mark)}")
        return self.add(name, f"{free} {quoted(mark)}", "[lazy]")

    def without(self, name: str, patterns: Sequence[str], base: str = "TEXT") -> str:
        """Adds a terminal for texts of another terminal that match none of the patterns."""
        return self.add(name, " & ".join([base, *(f"~/{pattern}/" for pattern in patterns)]))

    def schema(self, name: str, schema: JsonMapping) -> str:
        """Adds a rule for the JSON values that a schema accepts."""
        own = {key: value for key, value in schema.items() if key != "x-guidance"}
        own["x-guidance"] = {"whitespace_pattern": _WHITESPACE}
        return self.add(name, f"%json {json.dumps(own, ensure_ascii=False)}")

    def text(self, start: str) -> str:
        """Returns the grammar whose first rule is `start`."""
        rules = {"start": start} | self._rules
        return "".join(f"{name}: {body}\n" for name, body in rules.items())


def quoted(text: str) -> str:
    """Returns a string literal of Lark."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def pattern_of(text: str) -> str:
    """Returns a regular expression, for use between slashes, that matches this text alone."""
    escaped = re.sub(r"[\\.+*?()|\[\]{}^$#&~/-]", r"\\\g<0>", text)
    return escaped.replace("\n", r"\n").replace("\r", r"\r").replace("\t", r"\t")


def containing(text: str) -> str:
    """Returns a regular expression that matches every text with this text in it."""
    return f"(?s:.*){pattern_of(text)}(?s:.*)"
