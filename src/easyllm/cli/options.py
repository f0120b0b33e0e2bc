"""Command-line flags made from the fields of configuration models.

A flag's type, default, bounds and help text are those of its field, so that each exists once:

    SAMPLING = FlagGroup(SamplingParams, "temperature", "top_k", flags={"top_k": "--k"})

    @with_flags
    def generate(prompt: str, sampling: Annotated[Values, SAMPLING]) -> None:
        ...  # sampling == {"temperature": 1.0, "top_k": 0}

A command receives the values of a group as one mapping and passes it on, so that no flag of a group
can be forgotten on the way.
"""

import inspect
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from functools import wraps
from typing import Annotated, Any, TypeVar

import typer
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from typer.models import OptionInfo

from easyllm.core.json_types import JsonMapping, JsonObject, TypeForm

Values = JsonObject
"""The values of a group's flags, by field."""
C = TypeVar("C", bound=BaseModel)
UNBOUNDED = 2**31 - 1
"""Bounds of at least this size only keep numbers representable; `--help` does not show them."""


def option(
    model: type[BaseModel],
    field: str,
    *names: str,
    needs: str | None = None,
    note: str = "",
    low: float | None = None,
    metavar: str | None = None,
) -> OptionInfo:
    """Returns the `typer.Option` of a field, with its description as help text and its bounds.

    A range with an exclusive bound, which typer does not support, is checked by the model only.

    Args:
        model: the configuration model.
        field: name of the field.
        names: the flag, such as `--top-k`; by default made from the name of the field.
        needs: another flag without which this one has no effect, named in the help text.
        note: a sentence to add to the help text.
        low: the minimum, if it is not that of the field.
        metavar: what the help text shows in place of the value; by default its type.
    """
    info = model.model_fields[field]
    assert info.description, f"{model.__name__}.{field} has a description"
    repeatable = typing.get_origin(info.annotation) is tuple
    text = f"{info.description} {note or ('Repeatable.' if repeatable else '')}".strip()
    if needs is not None:
        text = f"With {needs}: {text[0].lower()}{text[1:]}"
    marks = [*info.metadata, *_metadata(info.annotation)]
    bounds: JsonObject = {}
    if not any(isinstance(mark, Gt | Lt) for mark in marks):
        for mark in marks:
            if isinstance(mark, Ge):
                bounds["min"] = mark.ge
            elif isinstance(mark, Le):
                bounds["max"] = mark.le
    if low is not None:
        bounds["min"] = low
    made: OptionInfo = typer.Option(
        *(names or (f"--{field.replace('_', '-')}",)),
        help=text.replace("[", r"\["),  # not markup
        metavar=metavar,
        **{name: bound for name, bound in bounds.items() if abs(bound) < UNBOUNDED},
    )
    return made


class FlagGroup:
    """Flags for some fields of a model.

    Args:
        model: the configuration model.
        fields: names of its fields, in the order of `--help`.
        flags: names of flags that are not made from the name of their field.
        needs: other flags without which a field's flag has no effect.
        metavars: what the help text shows in place of a field's value.
    """

    def __init__(
        self,
        model: type[BaseModel],
        *fields: str,
        flags: Mapping[str, str] | None = None,
        needs: Mapping[str, str] | None = None,
        metavars: Mapping[str, str] | None = None,
    ) -> None:
        self.model, self.fields = model, fields
        self.flags, self.needs, self.metavars = flags or {}, needs or {}, metavars or {}
        self.defaults: JsonMapping = {}

    def only(self, *fields: str) -> "FlagGroup":
        """Returns the group with only some of its fields."""
        return self._with(fields, self.defaults)

    def starting(self, **defaults: Any) -> "FlagGroup":
        """Returns the group with other defaults than those of the model."""
        return self._with(self.fields, {**self.defaults, **defaults})

    def _with(self, fields: tuple[str, ...], defaults: JsonMapping) -> "FlagGroup":
        group = FlagGroup(
            self.model, *fields, flags=self.flags, needs=self.needs, metavars=self.metavars
        )
        group.defaults = defaults
        return group

    def parameters(self) -> Iterator[inspect.Parameter]:
        """Yields the parameters, with typer annotations, of a function that takes the flags."""
        for field in self.fields:
            info = self.model.model_fields[field]
            names = (self.flags[field],) if field in self.flags else ()
            flag = option(
                self.model,
                field,
                *names,
                needs=self.needs.get(field),
                metavar=self.metavars.get(field),
            )
            default = self.defaults.get(field, info.default)
            yield inspect.Parameter(
                field,
                inspect.Parameter.KEYWORD_ONLY,
                default=None if default == () else default,
                annotation=Annotated[_flag_type(info.annotation), flag],
            )

    def names(self) -> dict[str, str]:
        """Returns the flag of each field, as it is named in messages."""
        return {
            field: self.flags.get(field, f"--{field.replace('_', '-')}").partition("/")[0]
            for field in self.fields
        }

    def values(self, given: JsonObject) -> Values:
        """Removes the group's values from those of a command, and returns them by field."""
        values = {field: given.pop(field) for field in self.fields}
        return {
            field: tuple(value or ()) if self.model.model_fields[field].default == () else value
            for field, value in values.items()
        }


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Returns a command whose parameters of type `Annotated[Values, FlagGroup]` are flags.

    Raises:
        ValueError: two parameters have the same name.
    """
    groups: dict[str, FlagGroup] = {}
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        marks = getattr(parameter.annotation, "__metadata__", ())
        group = next((mark for mark in marks if isinstance(mark, FlagGroup)), None)
        if group is None:
            parameters.append(parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY))
        else:
            groups[name] = group
            parameters += group.parameters()

    @wraps(command)
    def run(**given: Any) -> None:
        command(**{name: group.values(given) for name, group in groups.items()}, **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {each.name: each.annotation for each in parameters}
    return run


def checked_flags(
    model: type[C], values: JsonMapping, *groups: FlagGroup, source: str = "options"
) -> C:
    """Returns the values of flags, validated as a model; a mistake is named by its flag.

    Args:
        model: the configuration model.
        values: the values by field.
        groups: the groups that the values come from.
        source: what a mistake that concerns no single flag is attributed to.

    Raises:
        ConfigError: a value is not valid.
    """
    from easyllm.core.config import validate

    flags = {field: flag for group in groups for field, flag in group.names().items()}
    return validate(model, values, source=source, flags=flags)


def _flag_type(annotation: object) -> TypeForm:
    """Returns the type of a flag: that of its field without constraints; lists for tuples."""
    origin, inner = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is Annotated:
        return _flag_type(inner[0])
    if origin is typing.Literal:  # the model checks which values there are
        return type(inner[0])
    if origin is tuple:
        return list[_flag_type(inner[0])] | None  # type: ignore[misc]
    if origin in (types.UnionType, typing.Union):
        first, *others = (_flag_type(each) for each in inner)
        for each in others:
            first = first | each
        return first
    return annotation


def _metadata(annotation: object) -> Iterator[Any]:
    """Yields the constraints in a type, such as those of `Annotated[int, Field(ge=0)] | None`."""
    for mark in getattr(annotation, "__metadata__", ()):
        yield from getattr(mark, "metadata", (mark,))
    for inner in typing.get_args(annotation):
        yield from _metadata(inner)


__all__ = ["FlagGroup", "Values", "checked_flags", "option", "with_flags"]
