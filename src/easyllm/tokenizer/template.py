"""Jinja in a sandbox with bounded work: a chat template is data from a stranger.

The sandbox of jinja2 keeps templates from the interpreter's insides; this adds bounds on loop steps, calls and
the size of every text, because a template runs in server threads, where no signal can stop it.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from datetime import datetime
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

from easyllm.core.errors import DataError

MAX_STEPS = 200_000
"""Loop steps and calls one rendering may take."""
MAX_CHARS = 8_000_000
"""Longest text a rendering, or any value in it, may have."""

_BUDGET = "__budget"
_PADDING_METHODS = frozenset(
    {"center", "ljust", "rjust", "zfill", "expandtabs", "format", "format_map", "translate"}
)
_FILTERS = frozenset(
    [
        "abs",
        "batch",
        "capitalize",
        "count",
        "d",
        "default",
        "dictsort",
        "e",
        "escape",
        "first",
        "float",
        "forceescape",
        "groupby",
        "int",
        "items",
        "join",
        "last",
        "length",
        "list",
        "lower",
        "map",
        "max",
        "min",
        "random",
        "reject",
        "rejectattr",
        "replace",
        "reverse",
        "round",
        "safe",
        "select",
        "selectattr",
        "slice",
        "sort",
        "string",
        "sum",
        "title",
        "tojson",
        "trim",
        "truncate",
        "unique",
        "upper",
        "indent",
        "attr",
    ]
)


class TemplateError(DataError):
    """A chat template is broken, refuses its input, or does too much."""


class _Budget:
    """Counts the work of one rendering."""

    def __init__(self) -> None:
        self.steps = 0

    def step(self) -> None:
        self.steps += 1
        if self.steps > MAX_STEPS:
            raise TemplateError(
                f"the chat template takes more than {MAX_STEPS} steps; use shorter input or another template"
            )


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`: what the assistant writes, between two marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        call = self.call_method("_mark", [nodes.ContextReference()])
        return nodes.CallBlock(call, [], [], body).set_lineno(line)

    def _mark(self, context: Context, caller: Callable[[], str]) -> str:
        begin, end = context.get("__marks", ("", ""))
        return f"{begin}{caller()}{end}"


class _LoopControl(Extension):
    """`{% break %}` and `{% continue %}`, which some templates use."""

    tags = {"break", "continue"}  # noqa: RUF012 - jinja2 declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        token = next(parser.stream)
        return nodes.Break() if token.value == "break" else nodes.Continue()


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%", "+"})

    def call(self, context: Context, obj: Any, *args: Any, **kwargs: Any) -> Any:
        budget = context.get(_BUDGET)
        if budget is not None:
            budget.step()
        _check_call(obj, args, kwargs)
        return _bounded(super().call(context, obj, *args, **kwargs))

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if operator == "**":
            raise TemplateError("chat templates may not use the ** operator")
        if operator == "*" and not (_is_number(left) and _is_number(right)):
            times = left if isinstance(left, int) else right
            value = right if isinstance(left, int) else left
            if not isinstance(times, int) or len(value) * times > MAX_CHARS:
                raise TemplateError(f"the chat template makes a value over {MAX_CHARS} characters")
        widths = isinstance(left, str) and any(c.isdigit() or c == "*" for c in left)
        if operator == "%" and widths:
            raise TemplateError("chat templates may not format with widths")
        return _bounded(super().call_binop(context, operator, left, right))


def compile_template(source: str) -> Callable[..., str]:
    """A function that renders `source` with keyword variables.

    Raises:
        TemplateError: on compiling, a syntax error; on rendering, whatever the template does wrong.
    """
    environment = _environment()
    try:
        tree = environment.parse(source)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, "__steps", [], [], None, None)
        template = environment.from_string(tree)
    except (jinja2.TemplateError, RecursionError) as error:
        raise TemplateError(f"the chat template is not valid jinja: {error}") from None

    def render(**variables: Any) -> str:
        size, pieces = 0, []
        try:
            for piece in template.generate({**variables, _BUDGET: _Budget()}):
                size += len(piece)
                if size > MAX_CHARS:
                    raise TemplateError(f"the chat template writes over {MAX_CHARS} characters")
                pieces.append(piece)
        except TemplateError:
            raise
        except Exception as error:  # a template may raise whatever its input makes it raise
            reason = str(error) or type(error).__name__
            raise TemplateError(f"the chat template refuses these messages: {reason}") from None
        return "".join(pieces)

    return render


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, _LoopControl]
    )
    kept = {name: f for name, f in environment.filters.items() if name in _FILTERS}
    for name in ("join", "replace"):
        kept[name] = _checked(kept[name], name)
    environment.filters.clear()
    environment.filters.update(kept)
    environment.filters["tojson"] = _to_json
    environment.filters["indent"] = _indent
    environment.filters["__steps"] = _steps
    environment.globals["raise_exception"] = _raise
    environment.globals["strftime_now"] = lambda layout: datetime.now().strftime(layout)
    for name in ("lipsum", "cycler", "joiner"):
        environment.globals.pop(name, None)
    return environment


@jinja2.pass_context
def _steps(context: Context, items: Iterable[Any]) -> Iterator[Any]:
    """The items of a loop, each counted."""
    budget = context.get(_BUDGET)
    for item in items:
        if budget is not None:
            budget.step()
        yield item


def _check_call(obj: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Refuses calls whose result could be enormous before it is made."""
    owner = getattr(obj, "__self__", None)
    name = getattr(obj, "__name__", "")
    if not isinstance(owner, str):
        return
    if name in _PADDING_METHODS:
        raise TemplateError(f"chat templates may not call the text method {name}")
    if name == "replace" and len(args) > 1:
        _check_size(len(owner) * (len(str(args[1])) + 1))
    if name == "join" and args:
        items = list(args[0])
        _check_size(sum(len(str(i)) for i in items) + len(owner) * len(items))


def _checked(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """The jinja filter `join` or `replace` with a bound on what it makes."""

    def bounded(context: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
        if name == "replace" and len(args) > 1:
            _check_size(len(str(value)) * (len(str(args[1])) + 1))
        if name == "join":
            value = list(value)
            separator = str(args[0]) if args else ""
            _check_size(sum(len(str(i)) for i in value) + len(separator) * len(value))
        return function(context, value, *args, **kwargs)

    # jinja passes the evaluation context to filters marked so, as both of these are
    marked: Callable[..., Any] = jinja2.pass_eval_context(bounded)
    return marked


def _check_size(chars: int) -> None:
    if chars > MAX_CHARS:
        raise TemplateError(f"the chat template makes a value over {MAX_CHARS} characters")


def _bounded(value: Any) -> Any:
    if isinstance(value, str | list | tuple):
        _check_size(len(value))
    return value


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """As HF renders JSON in templates: no HTML escapes, non-ASCII kept."""
    if indent is not None and not 0 <= indent <= 16:
        raise TemplateError(f"tojson(indent={indent}) is out of range 0 to 16")
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _indent(text: str, width: int = 4, first: bool = False, blank: bool = False) -> str:
    if not isinstance(width, int) or not 0 <= width <= 64:
        raise TemplateError(f"indent({width!r}) is out of range 0 to 64")
    from jinja2.filters import do_indent

    return do_indent(text, width, first, blank)


def _raise(message: str) -> None:
    raise TemplateError(f"the chat template refuses these messages: {message}")
