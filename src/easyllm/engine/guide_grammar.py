"""Texts of grammars for llguidance: from schemas, expressions and choices, and from users.

llguidance reads a variant of Lark in which `%json {...}` stands for a JSON schema. Every guide
becomes such a text, so that all of them are compiled, limited and cached in one way.
"""

import json
import re
from collections.abc import Iterator, Sequence

from easyllm.core.json_types import Json
from easyllm.engine.guide_regex import portable_regex
from easyllm.engine.guide_schema import prepare_schema
from easyllm.engine.guide_spec import GuideError, GuideSpec, is_gbnf

JSON_OPTIONS = {
    "whitespace_flexible": False,
    "item_separator": ", ?",
    "key_separator": ": ?",
    "json_allowed_escapes": 'nrbtf\\"',
}
"""White space is at most one blank after a comma or colon, so that a model can write either of the
two usual forms but no blanks without end. Characters are never written as `\\u` escapes: with
them, llguidance accepts the key `\\u0061` as an additional property next to the property `a`."""
DIRECTIVES = frozenset(("ignore", "import", "json", "regex", "if"))
"""What may follow `%` in a user's grammar; not `%llguidance`, which sets options."""
REFUSED_ATTRIBUTES = {
    "temperature": "set the temperature of the request",
    "max_tokens": "bound the regular expression instead, as in /.{1,100}/",
    "stop": "use suffix, or the attribute lazy",
}
_PIECE = re.compile(
    r"""(?P<comment>(?:\#|//)[^\n]*)
    |(?P<string>"(?:\\.|[^"\\\n])*"i?)
    |(?P<regex>/(?:\\.|[^/\\])+/[imslux]*)
    |(?P<special><[^<>\s]+>)
    |%(?P<directive>[a-z]+)
    |(?P<reference>@[\w-]+)
    |(?P<other>[^"/<%@\#]+|.)""",
    re.VERBOSE | re.DOTALL,
)


def guide_grammar(spec: GuideSpec) -> str:
    """Returns the grammar of a guide; loads llguidance only to convert GBNF.

    Raises:
        GuideError: the guide contains something that cannot be honoured.
    """
    if spec.regex is not None:
        return regex_grammar(spec.regex)
    if spec.choice:
        return choice_grammar(spec.choice)
    if spec.grammar is not None:
        return user_grammar(_as_lark(spec.grammar))
    return schema_grammar({"type": "object"} if spec.json_object else spec.json_schema)


def schema_grammar(schema: Json) -> str:
    """Returns a grammar of the JSON texts that satisfy a schema.

    Raises:
        GuideError: as for `prepare_schema`.
    """
    return f"start: {json_rule(schema)}"


def json_rule(schema: Json) -> str:
    """Returns the part of a grammar, `%json {...}`, that stands for a schema.

    Raises:
        GuideError: as for `prepare_schema`; or the schema accepts nothing.
    """
    prepared = prepare_schema(schema)
    if prepared is False:
        raise GuideError("json_schema is false, which no text satisfies; give another schema")
    options = {} if prepared is True else prepared
    return f"%json {json.dumps({**options, 'x-guidance': JSON_OPTIONS}, ensure_ascii=False)}"


def regex_grammar(regex: str) -> str:
    """Returns a grammar of the texts that match a regular expression as a whole.

    Raises:
        GuideError: the expression is not supported (see `portable_regex`).
    """
    translated = portable_regex(regex, whole=True)
    if not translated:
        raise GuideError("regex matches only the empty text; give one that matches more")
    escaped = re.sub(r"\\.|/", lambda m: "\\/" if m[0] == "/" else m[0], translated, flags=re.S)
    return f"start: REGEX\nREGEX: /{escaped}/"


def choice_grammar(choices: Sequence[str]) -> str:
    """Returns a grammar of the given texts."""
    quoted = [json.dumps(each, ensure_ascii=False).replace("\x7f", "\\u007f") for each in choices]
    return f"start: CHOICE\nCHOICE: {' | '.join(dict.fromkeys(quoted))}"


def user_grammar(lark: str) -> str:
    """Returns a user's grammar, with its schemas checked and rewritten.

    Raises:
        GuideError: it sets options of llguidance or attributes that the engine does not honour,
            names tokens, or contains a schema that cannot be honoured.
    """
    outline = []
    for kind, text in _pieces(lark):
        if kind == "directive" and text not in DIRECTIVES:
            raise GuideError(
                f"the grammar contains %{text}, which is not supported; use only "
                f"{', '.join(f'%{name}' for name in sorted(DIRECTIVES))}",
                keyword=f"%{text}",
            )
        if kind in ("special", "reference"):
            raise GuideError(
                f"the grammar contains {text}, but tokens and other grammars cannot be named; "
                "describe the text itself",
                keyword=text,
            )
        outline.append(text if kind == "other" else " ")
    for name, remedy in REFUSED_ATTRIBUTES.items():
        if re.search(rf"\[[^\]]*\b{name}\s*=", "".join(outline)):
            raise GuideError(
                f"the grammar sets the attribute {name}, which is not supported; {remedy}",
                keyword=name,
            )
    return with_checked_schemas(lark, own=False)


def with_checked_schemas(lark: str, *, own: bool = True) -> str:
    """Returns a grammar in which each `%json` stands for a schema that is honoured exactly.

    Args:
        lark: the grammar.
        own: whether we wrote it, so that the options of its schemas are replaced; a user may not
            set any.

    Raises:
        GuideError: a schema is not JSON, or cannot be honoured.
    """
    parts = list[str]()
    for kind, text in _pieces(lark):
        if kind == "json":
            schema = json.loads(text)
            if own and isinstance(schema, dict):
                schema.pop("x-guidance", None)
            parts[-1] = json_rule(schema)
        else:
            parts.append(f"%{text}" if kind == "directive" else text)
    return "".join(parts)


def _as_lark(grammar: str) -> str:
    """Returns a grammar as Lark, converted if it is GBNF.

    Raises:
        GuideError: it is not valid GBNF.
    """
    if not is_gbnf(grammar):
        return grammar
    from llguidance.gbnf_to_lark import gbnf_to_lark

    try:
        return str(gbnf_to_lark(grammar)).removeprefix("%llguidance {}")
    except Exception as error:  # of any type: it is parsed by plain Python code
        raise GuideError(f"the GBNF grammar is invalid: {error}; correct it") from error


def _pieces(lark: str) -> Iterator[tuple[str, str]]:
    """Yields the pieces of a grammar as (kind, text); the schema after `%json` has kind `json`."""
    at = 0
    while at < len(lark):
        found = _PIECE.match(lark, at)
        assert found is not None, "every character is a piece"
        kind = found.lastgroup or "other"
        yield kind, found[kind]
        at = found.end()
        if found["directive"] in ("json", "regex"):
            end = _json_end(lark, at)
            yield ("json" if found["directive"] == "json" else "string"), lark[at:end]
            at = end


def _json_end(lark: str, at: int) -> int:
    """Returns where the JSON value that begins at `at`, after white space, ends.

    Raises:
        GuideError: there is no JSON value.
    """
    start = at + len(lark[at:]) - len(lark[at:].lstrip())
    try:
        return json.JSONDecoder().raw_decode(lark, start)[1]
    except (ValueError, RecursionError) as error:
        raise GuideError(
            f"the grammar has no valid JSON after %json or %regex ({error}); correct it",
            keyword="%json",
        ) from error
