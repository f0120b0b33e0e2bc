"""A Jinja sandbox with bounded time and memory, because a chat template is untrusted input.

The sandbox of jinja2 prevents access to interpreter internals. This module also bounds the work of
a template, because it runs in server threads, where no signal can stop it. Four rules together
bound time and memory:

- Every loop step, call, operator, filter and output is counted, and each one checks the CPU time of
  the thread.
- Every value that a template creates is measured recursively, so no single operation is large, and
  the sum of the sizes bounds the total of a rendering.
- The size of a result that could be large before it can be measured (a repetition, a join, an
  indent) is first computed from its operands.
- Only the listed filters and methods are available.
"""

import inspect
from collections.abc import Callable, Iterable
from typing import Any, cast

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.meta import find_undeclared_variables
from jinja2.parser import Parser
from jinja2.runtime import Context, LoopContext, Macro
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Namespace
from jinja2.visitor import NodeTransformer

from easyllm.core.json_types import JsonObject
from easyllm.tokenizer.template_budget import (
    BUDGET,
    ITEM_SIZE,
    MAX_REASON,
    MAX_SOURCE,
    Budget,
    TemplateError,
    TemplateValue,
    Visit,
    check_replace,
    check_search,
    check_size,
    size_of,
)
from easyllm.tokenizer.template_filters import (
    bounded_filters,
    raise_exception,
    strftime_now,
    written,
)

_TEXT_METHODS = frozenset(
    [
        "capitalize",
        "casefold",
        "count",
        "endswith",
        "find",
        "index",
        "isalnum",
        "isalpha",
        "isascii",
        "isdecimal",
        "isdigit",
        "islower",
        "isnumeric",
        "isspace",
        "istitle",
        "isupper",
        "join",
        "lower",
        "lstrip",
        "partition",
        "removeprefix",
        "removesuffix",
        "replace",
        "rfind",
        "rindex",
        "rpartition",
        "rsplit",
        "rstrip",
        "split",
        "splitlines",
        "startswith",
        "strip",
        "swapcase",
        "title",
        "upper",
    ]
)
_METHODS = _TEXT_METHODS | {"copy", "get", "items", "keys", "values", "cycle", "changed"}
_SLOW_METHODS = frozenset(["strip", "lstrip", "rstrip", "rfind", "rindex", "rsplit", "rpartition"])


class _GenerationTag(Extension):
    """`{% generation %} ... {% endgeneration %}`: encloses the assistant's text in two marks."""

    tags = {"generation"}  # noqa: RUF012 - jinja2 declares it without ClassVar

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

    tags = {"break", "continue"}  # noqa: RUF012 - jinja2 declares it without ClassVar

    def parse(self, parser: Parser) -> nodes.Node:
        token = next(parser.stream)
        return nodes.Break() if token.value == "break" else nodes.Continue()


class _Instrument(NodeTransformer):
    """Wraps operations that bypass jinja's sandbox hooks in filters that count them."""

    def __init__(self) -> None:
        self._num_loops = 0

    def visit_For(self, node: nodes.For) -> list[nodes.Node]:
        self.generic_visit(node)
        node.iter = _filtered(cast("nodes.Expr", node.iter), "__steps")
        number = nodes.Const(self._num_loops, lineno=node.lineno)
        self._num_loops += 1
        if isinstance(node.target, nodes.Name):
            item = nodes.Name(node.target.name, "load", lineno=node.lineno)
            node.body.insert(0, _statement(_filtered(item, "__enter", number)))
        return [node, _statement(_filtered(number, "__leave"))]

    def visit_Operand(self, node: nodes.Operand) -> nodes.Node:
        self.generic_visit(node)
        node.expr = _filtered(node.expr, "__step")
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(nodes.List(node.nodes, lineno=node.lineno), "__concat")

    def visit_Getitem(self, node: nodes.Getitem) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "__made") if isinstance(node.arg, nodes.Slice) else node

    def visit_Tuple(self, node: nodes.Tuple) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "__made") if node.ctx == "load" else node

    def visit_List(self, node: nodes.List | nodes.Dict) -> nodes.Node:
        self.generic_visit(node)
        return _filtered(node, "__made")

    visit_Dict = visit_List


def _filtered(node: nodes.Expr, name: str, *args: nodes.Expr) -> nodes.Filter:
    return nodes.Filter(node, name, list(args), [], None, None, lineno=node.lineno)


def _statement(node: nodes.Expr) -> nodes.ExprStmt:
    return nodes.ExprStmt(node, lineno=node.lineno)


class _Namespace(Namespace):
    """Jinja's `namespace` with a constant `repr`.

    A namespace is mutable and cannot be measured, so its text must not contain its values.
    """

    def __repr__(self) -> str:
        return "<Namespace>"


class _Sandbox(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**", "%", "+"})

    @staticmethod
    def concat(pieces: Iterable[str]) -> str:
        """Joins the output of a macro or block."""
        pieces = list(pieces)
        check_size(sum(map(len, pieces)))
        return cast("str", BUDGET.get().made("".join(pieces)))

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        known = attr in _METHODS or not inspect.isroutine(value)
        return known and super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: object, argument: object) -> TemplateValue:
        BUDGET.get().step()
        return super().getitem(obj, argument)

    def wrap_str_format(self, value: object) -> None:
        """Disables `str.format`, which can pad text; it is rejected like any unknown method."""

    def call(
        self, context: Context, obj: TemplateValue, /, *args: Any, **kwargs: Any
    ) -> TemplateValue:
        budget = BUDGET.get()
        budget.step()
        if isinstance(obj, LoopContext):  # the inner loop of a recursive one
            args = tuple(map(budget.steps_of, args or (kwargs.pop("iterable"),)))
        elif isinstance(obj, Macro) and (obj.catch_varargs or obj.catch_kwargs):
            given = [v for name, v in kwargs.items() if name not in ("_loop_vars", "_block_vars")]
            check_size(size_of([*args, *given]))
        elif isinstance(owner := getattr(obj, "__self__", None), str):
            args = _checked_arguments(owner, obj.__name__, args, kwargs)
            budget.total += len(owner)  # the pieces of a split text add up to its full length
        return budget.made(super().call(context, obj, *args, **kwargs))

    def call_binop(
        self, context: Context, operator: str, left: object, right: object
    ) -> TemplateValue:
        budget = BUDGET.get()
        budget.step()
        if operator == "**":
            raise TemplateError("chat templates may not use the ** operator; use another template")
        if operator == "*":
            for value, times in ((left, right), (right, left)):
                if isinstance(value, str | list | tuple) and isinstance(times, int):
                    check_size((size_of(value) - ITEM_SIZE) * times)
        if operator == "%" and isinstance(left, str):
            if any(c.isdigit() or c == "*" for c in left):
                raise TemplateError(
                    "chat templates may not use % formatting with widths; use another template"
                )
            check_size(left.count("%") * size_of(right))
        return budget.made(super().call_binop(context, operator, left, right))


def compile_template(source: str) -> Callable[..., str]:
    """Compiles a template to a function that renders it with keyword variables.

    Raises:
        TemplateError: the source is not valid Jinja. The returned function raises it if the
            template fails or exceeds a resource limit.
    """
    render = compile_with_visits(source)
    return lambda **variables: render(**variables)[0]


def compile_with_visits(source: str) -> Callable[..., tuple[str, list[Visit]]]:
    """Compiles a template to a function that also returns the visits of its loops.

    The returned function renders the template like that of `compile_template`. A visit records when
    a loop reached one of the `messages`. The characters in the variable `__disguise` are never
    escaped (see `user_text`).
    """
    if len(source) > MAX_SOURCE:
        raise TemplateError(
            f"the chat template is longer than {MAX_SOURCE} characters; use another template"
        )
    environment = _environment()
    try:
        tree = _Instrument().visit(environment.parse(source))
        template = environment.from_string(tree)
    except Exception as error:  # deep nesting raises different exceptions, depending on the place
        reason = str(error)[:MAX_REASON] or type(error).__name__
        raise TemplateError(f"the chat template is not valid Jinja: {reason}") from None

    def render(**variables: Any) -> tuple[str, list[Visit]]:
        disguise = variables.pop("__disguise", "")
        budget, pieces = Budget(variables.get("messages") or (), disguise=disguise), []
        token = BUDGET.set(budget)
        try:
            for piece in template.generate(variables):
                budget.written += len(piece)
                check_size(budget.written)
                pieces.append(piece)
        except TemplateError:
            raise
        except Exception as error:  # a template may raise any exception
            reason = str(error)[:MAX_REASON] or type(error).__name__
            raise TemplateError(f"the chat template rejects these messages: {reason}") from None
        finally:
            BUDGET.reset(token)
        return "".join(pieces), budget.visits

    return render


def variables_of(source: str) -> frozenset[str]:
    """Returns the names of the variables that a template reads, without jinja's and our functions.

    Raises:
        TemplateError: the source is not valid Jinja.
    """
    environment = _environment()
    try:
        names = find_undeclared_variables(environment.parse(source))
    except Exception as error:  # as in `compile_with_visits`
        reason = str(error)[:MAX_REASON] or type(error).__name__
        raise TemplateError(f"the chat template is not valid Jinja: {reason}") from None
    return frozenset(names - environment.globals.keys())


def _environment() -> _Sandbox:
    environment = _Sandbox(
        trim_blocks=True,
        lstrip_blocks=True,
        finalize=written,
        extensions=[_GenerationTag, _LoopControl],
    )
    filters = bounded_filters(environment.filters)
    environment.filters.clear()
    environment.filters |= filters
    environment.globals = {
        "range": environment.globals["range"],
        "dict": dict,
        "namespace": _Namespace,
        "raise_exception": raise_exception,
        "strftime_now": strftime_now,
    }
    return environment


def _checked_arguments(
    owner: str, name: str, args: tuple[Any, ...], kwargs: JsonObject
) -> tuple[Any, ...]:
    """Returns the arguments of the text method `name` after bounding the size of its result."""
    if name == "replace":
        given = dict(zip(("old", "new"), args, strict=False)) | kwargs
        check_replace(owner, given.get("old", ""), given.get("new", ""))
    if name in ("split", "rsplit", "splitlines"):
        between = kwargs.get("sep", args[0] if args else None)
        # without a separator, the split is at whitespace, estimated as one in ten characters
        often = owner.count(between) if isinstance(between, str) else len(owner) // 10
        check_size(len(owner) + ITEM_SIZE * often)
    if name in _SLOW_METHODS:
        for value in (*args, *kwargs.values()):
            check_search(owner, value)
    if name == "join" and args:
        items = list(BUDGET.get().steps_of(args[0]))
        check_size(size_of(items) + len(owner) * len(items))
        return (items, *args[1:])
    return args
