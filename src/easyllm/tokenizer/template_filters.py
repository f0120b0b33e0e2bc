"""Filters and functions that a chat template may call, each counted and bounded in size."""

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import datetime
from typing import Any, cast

import jinja2
from jinja2.filters import do_indent, make_attrgetter
from jinja2.runtime import Context

from easyllm.tokenizer.template_budget import (
    BUDGET,
    MAX_REASON,
    MAX_SPLIT_CHARS,
    TemplateError,
    TemplateValue,
    check_replace,
    check_search,
    check_size,
    size_of,
)

_FILTERS = frozenset(
    [
        "abs",
        "attr",
        "capitalize",
        "count",
        "d",
        "default",
        "e",
        "escape",
        "first",
        "float",
        "forceescape",
        "int",
        "last",
        "length",
        "lower",
        "random",
        "reverse",
        "safe",
        "string",
        "truncate",
        "upper",
    ]
)
_LETTER_FILTERS = frozenset(
    [
        "dictsort",
        "groupby",
        "items",
        "list",
        "map",
        "max",
        "min",
        "reject",
        "rejectattr",
        "select",
        "selectattr",
        "sort",
        "title",
        "unique",
    ]
)


def bounded_filters(built_in: Mapping[str, Callable[..., Any]]) -> dict[str, Callable[..., Any]]:
    """Returns the filters of a template by name.

    Args:
        built_in: jinja's filters; of these, only the listed ones are used.
    """
    known = {n: f for n, f in built_in.items() if n in _FILTERS | _LETTER_FILTERS}
    known |= {"indent": _indent, "join": _join, "replace": _replace}
    known |= {"tojson": _to_json, "trim": _trim}
    counted = {name: _counted(name, function) for name, function in known.items()}
    return counted | {
        "__steps": _steps,
        "__step": _step,
        "__made": _made,
        "__concat": _concat,
        "__enter": _enter,
        "__leave": _leave,
    }


@jinja2.pass_context
def written(_context: Context, value: object) -> str:
    """Returns the text that `{{ value }}` writes."""
    budget = BUDGET.get()
    budget.step()
    return cast("str", budget.made(value if isinstance(value, str) else str(value)))


def strftime_now(layout: str) -> str:
    """Returns the current local time in a `strftime` format."""
    if len(layout) > 100:
        raise TemplateError(
            "the chat template function strftime_now accepts a format of at most 100 characters"
        )
    return datetime.now().strftime(layout)


def raise_exception(message: str) -> None:
    """Raises a TemplateError with a message of the template."""
    raise TemplateError(f"the chat template rejects these messages: {str(message)[:MAX_REASON]}")


def _counted(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a filter whose calls are counted and whose results are measured."""
    wanted = getattr(function, "jinja_pass_arg", None)
    first = {
        "context": lambda context: (context,),
        "eval_context": lambda context: (context.eval_ctx,),
        "environment": lambda context: (context.environment,),
    }.get(wanted.name if wanted else "", lambda _context: ())

    def counted(context: Context, value: object, /, *args: Any, **kwargs: Any) -> TemplateValue:
        budget = BUDGET.get()
        budget.step()
        if name in _LETTER_FILTERS and isinstance(value, str) and len(value) > MAX_SPLIT_CHARS:
            raise TemplateError(
                f"the chat template filter {name} accepts texts of at most {MAX_SPLIT_CHARS} "
                "characters"
            )
        result = function(*first(context), value, *args, **kwargs)
        if isinstance(result, Iterator):  # evaluated eagerly, so that its items are measured
            return iter(budget.made(list(budget.steps_of(result))))
        return budget.made(result)

    marked: Callable[..., Any] = jinja2.pass_context(counted)
    return marked


def _steps(items: Iterable[Any]) -> Iterator[Any]:
    return BUDGET.get().steps_of(items)


@jinja2.pass_context  # prevents jinja from calling it at compile time
def _enter(_context: Context, item: object, loop: int) -> None:
    BUDGET.get().enter(loop, item)


@jinja2.pass_context
def _leave(_context: Context, loop: int) -> None:
    BUDGET.get().leave(loop)


def _step(value: object) -> TemplateValue:
    BUDGET.get().step()
    return value


def _made(value: object) -> TemplateValue:
    return BUDGET.get().made(_step(value))


def _concat(values: list[Any]) -> str:
    """Implements the operator `~`."""
    check_size(size_of(values))
    return cast("str", _made("".join(map(str, values))))


@jinja2.pass_environment
def _join(
    environment: jinja2.Environment,
    items: Iterable[Any],
    d: str = "",
    attribute: str | int | None = None,
) -> str:
    if attribute is not None:
        items = map(make_attrgetter(environment, attribute), items)
    texts, size, d = [], 0, str(d)
    for item in _steps(items):
        texts.append(str(item))
        size += len(texts[-1]) + len(d)
        check_size(size)
    return d.join(texts)


def _replace(text: TemplateValue, old: str, new: str, count: int = -1) -> str:
    text, old, new = str(text), str(old), str(new)
    check_replace(text, old, new)
    return cast("str", text.replace(old, new, count))


def _trim(text: TemplateValue, chars: str | None = None) -> str:
    text = str(text)
    check_search(text, chars)
    return cast("str", text.strip(chars))


def _to_json(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Renders JSON as HF does in templates: no HTML escapes, non-ASCII characters unescaped."""
    if indent is not None and not 0 <= indent <= 16:
        raise TemplateError("the chat template filter tojson accepts an indent from 0 to 16")
    if separators is not None and sum(map(len, separators)) > 16:
        raise TemplateError(
            "the chat template filter tojson accepts separators of at most 16 characters in total"
        )
    encoder = json.JSONEncoder(
        ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )
    if indent is None:
        return _kept(encoder.encode(value))
    pieces, size = [], 0
    for piece in encoder.iterencode(value):  # deeply nested values are mostly indentation
        size += len(piece)
        check_size(size)
        pieces.append(piece)
    return _kept("".join(pieces))


def _kept(encoded: str) -> str:
    """Returns JSON in which the characters that stand for others are not escaped."""
    for character in BUDGET.get().disguise:
        encoded = encoded.replace(f"\\u{ord(character):04x}", character)
    return encoded


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    if not isinstance(width, int) or not 0 <= width <= 64:
        raise TemplateError("the chat template filter indent accepts a width from 0 to 64")
    check_size(len(text) + width * (len(text.splitlines()) + 1))
    return do_indent(text, width, first, blank)
