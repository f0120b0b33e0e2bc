"""Regular expressions with the same meaning in JSON Schema, Python, JavaScript and llguidance.

A pattern of JSON Schema is one of ECMA-262; a Python program checks it with `re`; llguidance reads
the dialect of Rust. The three differ in silence: `\\d` may match `３`, `[a--b]` may be a difference
of sets, `.` may match a carriage return. `portable_regex` translates a pattern to Rust's dialect
such that whatever matches the result matches the pattern in both Python and JavaScript. Constructs
that the dialects read differently, or that no automaton can follow, are refused.
"""

import re

from easyllm.engine.guide_spec import GuideError

NARROW = {
    "d": "0-9",
    "w": "0-9A-Za-z_",
    "s": r"\t\n\v\f\r ",
    "D": r"[^\p{Nd}]",
    "W": r"[^\p{L}\p{N}_]",
    "S": r"[^\s\x1c-\x1f\u{feff}]",
}
"""What every dialect includes in a class, as items of a class in Rust's dialect."""
WIDE = {
    "d": r"\p{Nd}",
    "w": r"\p{L}\p{N}_",
    "s": r"\s\x1c-\x1f\u{feff}",
    "D": "[^0-9]",
    "W": "[^0-9A-Za-z_]",
    "S": r"[^\t\n\v\f\r ]",
}
"""What some dialect includes in a class: what a negated class must exclude."""
ANY_CHARACTER = r"[^\n\r\u{2028}\u{2029}]"
QUANTIFIER = re.compile(r"\{(\d+)(,(\d*))?\}")
CLASSES = frozenset(NARROW)
CONTROLS = frozenset("nrtfv")
REFUSED_ESCAPES = {
    "b": r"the word boundary \b",
    "B": r"the word boundary \B",
    "A": r"\A (write ^)",
    "Z": r"\Z (write $)",
    "z": r"\z (write $)",
    "k": r"the backreference \k",
    "c": r"\c (write \x01 ...)",
}
REFUSED_GROUPS = {
    "?=": "the lookahead (?=...)",
    "?!": "the lookahead (?!...)",
    "?<=": "the lookbehind (?<=...)",
    "?<!": "the lookbehind (?<!...)",
    "?P=": "the backreference (?P=...)",
    "?>": "the atomic group (?>...)",
    "?(": "the conditional group (?(...)",
    "?#": "the comment (?#...)",
}


def portable_regex(pattern: str, *, whole: bool = False) -> str:
    """Returns a pattern in Rust's dialect that matches only what `pattern` matches everywhere.

    >>> portable_regex(r"^\\d+.$")
    '^[0-9]+[^\\\\n\\\\r\\\\u{2028}\\\\u{2029}]$'

    Args:
        pattern: the pattern, in the common part of ECMA-262 and Python's `re`.
        whole: whether the pattern is to match a whole text, so that anchors at the ends of its
            alternatives are dropped; otherwise it is searched for, as JSON Schema defines.

    Raises:
        GuideError: a construct of the pattern is not supported, or differs between dialects.
    """
    return _Translator(pattern, whole=whole).run()


def narrows(pattern: str) -> bool:
    """Whether `portable_regex` gives a pattern that matches less than the original may.

    Raises:
        GuideError: as for `portable_regex`.
    """
    translator = _Translator(pattern, whole=False)
    translator.run()
    return translator.narrowed


class _Translator:
    """Reads a pattern from left to right.

    Attributes:
        at: index of the next character.
        depth: number of open groups.
        repeatable: whether a quantifier may follow.
        fresh: whether an alternative of the whole pattern begins here.
        narrowed: whether the translation may match less than the pattern.
    """

    def __init__(self, pattern: str, *, whole: bool) -> None:
        self.pattern, self.whole = pattern, whole
        self.at, self.depth, self.repeatable, self.fresh = 0, 0, False, True
        self.narrowed = False

    def run(self) -> str:
        parts = []
        while self.at < len(self.pattern):
            parts.append(self.item())
        if self.depth:
            raise self.refusal("a group that is not closed")
        return "".join(parts)

    def refusal(self, what: str) -> GuideError:
        return GuideError(
            f"the regular expression {_short(self.pattern)} contains {what} at character "
            f"{self.at + 1}, which is not supported; write it without",
            keyword="pattern",
        )

    def peek(self, text: str) -> bool:
        return self.pattern.startswith(text, self.at)

    def take(self, count: int = 1) -> str:
        text = self.pattern[self.at : self.at + count]
        if len(text) < count:
            raise self.refusal("an incomplete escape or class")
        self.at += count
        return text

    def item(self) -> str:
        """Returns the translation of the next item of a sequence."""
        character = self.pattern[self.at]
        if character in "*+?" or (character == "{" and QUANTIFIER.match(self.pattern, self.at)):
            return self.quantifier()
        if character in "^$":
            return self.anchor()
        self.repeatable = character not in "(|"
        self.fresh = character == "|" and self.depth == 0
        if character == "(":
            return self.group()
        if character == "[":
            return self.character_class()
        if character == "\\":
            return self.escape()
        if self.peek("{,"):
            raise self.refusal("{, (Python reads {,n} as {0,n}, JavaScript as text)")
        self.at += 1
        if character == ")":
            self.depth -= 1
            if self.depth < 0:
                raise self.refusal("a ) without (")
        if character == ".":
            self.narrowed = True
            return ANY_CHARACTER
        return f"\\{character}" if character in "{}]" else character

    def quantifier(self) -> str:
        if not self.repeatable:
            raise self.refusal("a quantifier after nothing that it could repeat")
        found = QUANTIFIER.match(self.pattern, self.at)
        text = found[0] if found else self.pattern[self.at]
        self.at += len(text)
        if self.peek("?"):  # lazy: the texts that match are the same
            self.at += 1
        elif self.peek("+"):
            raise self.refusal("a possessive quantifier")
        self.repeatable = False
        return text

    def anchor(self) -> str:
        character = self.pattern[self.at]
        last = self.depth == 0 and self.pattern[self.at + 1 : self.at + 2] in ("", "|")
        outer = self.fresh if character == "^" else last
        if self.whole and not outer:
            raise self.refusal(f"the anchor {character} inside the expression")
        self.at += 1
        self.repeatable = self.fresh = False
        return "" if self.whole else character

    def group(self) -> str:
        rest = self.pattern[self.at + 1 :]
        refused = next(
            (name for start, name in REFUSED_GROUPS.items() if rest.startswith(start)), ""
        )
        if refused:
            raise self.refusal(refused)
        opening = re.match(r"\((?:\?:|\?P?<[A-Za-z_]\w*>|\?i:|(?!\?))", self.pattern[self.at :])
        if opening is None and self.at == 0 and self.peek("(?i)"):
            self.fresh = True
            return self.take(4)
        if opening is None:
            raise self.refusal("flags other than (?i) at the start and (?i:...)")
        self.depth += 1
        text = self.take(len(opening[0]))
        return text if text in ("(?:", "(?i:") else "("

    def escape(self) -> str:
        """Returns the translation of an escape outside a class."""
        name = self.pattern[self.at + 1 : self.at + 2]
        if name and name in CLASSES:
            self.at += 2
            self.narrowed = True
            items = NARROW[name]
            return items if name.isupper() else f"[{items}]"
        if name in REFUSED_ESCAPES:
            raise self.refusal(REFUSED_ESCAPES[name])
        return self.single_escape()

    def single_escape(self) -> str:
        """Returns the translation of an escape that stands for a character or a property."""
        name = self.take(2)[1]
        if name in CONTROLS:
            return f"\\{name}"
        if name == "x":
            return f"\\x{self.hexadecimal(2)}"
        if name == "u":
            return self.unicode_escape()
        if name in "pP":
            found = re.compile(r"\{[\w=]+\}").match(self.pattern, self.at)
            if found is None:
                raise self.refusal(f"\\{name} without a property in braces")
            return f"\\{name}{self.take(len(found[0]))}"
        if name.isdigit():
            raise self.refusal(f"\\{name} (a backreference, or an octal escape)")
        if name.isascii() and name.isalpha():
            raise self.refusal(f"the unknown escape \\{name}")
        return f"\\{name}" if name.isascii() and name.isprintable() and name != " " else name

    def unicode_escape(self) -> str:
        if self.peek("{"):
            found = re.compile(r"\{[0-9A-Fa-f]{1,6}\}").match(self.pattern, self.at)
            digits = self.take(len(found[0]))[1:-1] if found else ""
        else:
            digits = self.hexadecimal(4)
        value = int(digits, 16) if digits else -1
        if not 0 <= value <= 0x10FFFF or 0xD800 <= value <= 0xDFFF:
            raise self.refusal(r"a \u escape of a surrogate (write the character itself)")
        return f"\\u{{{digits}}}"

    def hexadecimal(self, count: int) -> str:
        digits = self.take(count)
        if not re.fullmatch(r"[0-9A-Fa-f]+", digits):
            raise self.refusal("an escape without hexadecimal digits")
        return digits

    def character_class(self) -> str:
        self.at += 1
        negated = self.peek("^")
        self.at += negated
        if self.peek("]"):
            raise self.refusal("an empty class (write \\] for a bracket)")
        items = []
        while not self.peek("]"):
            items.append(self.class_item(negated))
        self.at += 1
        return f"[{'^' if negated else ''}{''.join(items)}]"

    def class_item(self, negated: bool) -> str:
        """Returns the translation of the next character, range or escape of a class."""
        name = self.pattern[self.at + 1 : self.at + 2]
        if self.peek("\\") and name and name in CLASSES:
            self.at += 2
            self.narrowed = True
            return (WIDE if negated else NARROW)[name]
        low = self.class_character()
        follows = self.pattern[self.at + 1 : self.at + 3]
        is_range = self.peek("-") and follows[:1] not in ("]", "")
        if not is_range or (follows[0] == "\\" and follows[1:] in CLASSES):
            return low
        self.at += 1
        return f"{low}-{self.class_character()}"

    def class_character(self) -> str:
        if self.peek("\\"):
            if self.peek("\\b"):
                self.at += 2
                return r"\x08"
            return self.single_escape()
        if re.match(r"\[[:.=]", self.pattern[self.at :]):
            raise self.refusal("a class named as [:alpha:]")
        character = self.take()
        return f"\\{character}" if character in "[]&~-^|" else character


def _short(pattern: str) -> str:
    return repr(pattern if len(pattern) <= 60 else f"{pattern[:57]}...")
