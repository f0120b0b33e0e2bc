"""Configuration: pydantic models read from YAML, the environment and `key.sub=value` overrides.

Order of precedence: defaults < recipe file < `EASYLLM_*` environment < command line.
"""

import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from easyllm.core.environment import ENVIRONMENT_PREFIX, environment_overrides
from easyllm.core.errors import ConfigError, suggest
from easyllm.core.json_types import Json, JsonMapping, JsonObject, TypeForm
from easyllm.core.kinds import Kinds
from easyllm.core.yaml_text import parse_yaml, read_yaml

if TYPE_CHECKING:
    from pydantic_core import ErrorDetails

INT64_MAX = 2**63 - 1


class Config(BaseModel):
    """Base class of all configuration models: immutable, and an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


C = TypeVar("C", bound=BaseModel)


def apply_overrides(values: JsonMapping, words: Iterable[str]) -> JsonObject:
    """Returns `values` with overrides `key.sub=value` applied.

    Values are parsed as YAML (`1e-4`, `true`, `[a, b]`).

    >>> apply_overrides({"optimizer": {"name": "adamw"}}, ["optimizer.learning_rate=1e-4"])
    {'optimizer': {'name': 'adamw', 'learning_rate': 0.0001}}

    Raises:
        ConfigError: a word is not of the form `key=value`.
    """
    result = _deep_copy(values)
    for word in words:
        key, equals, text = word.partition("=")
        if not equals or not key.strip():
            raise ConfigError(_not_an_override(word, key.strip(), result))
        try:
            value = parse_yaml(text) if text else ""
        except yaml.YAMLError:
            value = text
        *parents, leaf = key.strip().split(".")
        place = result
        for parent in parents:
            inner = place.get(parent)
            place[parent] = place = dict(inner) if isinstance(inner, Mapping) else {}
        place[leaf] = value
    return result


def _not_an_override(word: str, key: str, values: JsonMapping) -> str:
    """The error message for a word that has no `=`, or no key before it."""
    if key in values:
        inner = values[key]
        keys = list(inner) if isinstance(inner, Mapping) else []
        form = f"{key}.{keys[0]}=value" if keys else f"{key}=value"
        return f"{word!r} is not an override: it has no value for {key}; write {form}"
    top = key.split(".")[0]
    hint = "" if top in values else suggest(top, values)
    return f"{word!r} is not an override; write key=value or key.sub=value{hint}"


def validate(
    model: type[C],
    values: JsonMapping,
    *,
    source: str,
    overrides: Iterable[str] = (),
    flags: Mapping[str, str] | None = None,
) -> C:
    """Returns `values` validated as a `model`.

    Args:
        source: where the values come from, for error messages.
        overrides: command-line overrides, already applied to `values`. Their mistakes are
            attributed to the command line (and those of `EASYLLM_*` variables to the environment).
        flags: the flags that set the fields, such as `--top-k`; a mistake is then named by its
            flag alone, without the source.

    Raises:
        ConfigError: lists all mistakes at once, each with the key, the value, what was expected,
            and for a misspelled key the closest known one.
    """
    problems = list(_too_large(values))
    try:
        if not problems:
            return model.model_validate(values)
    except ValidationError as error:
        problems = _problems(error)
    raise ConfigError(_describe(problems, model, values, source, list(overrides), flags or {}))


def load_config(model: type[C], path: Path, overrides: Iterable[str] = ()) -> C:
    """Returns a `model` read from a YAML file, the environment and `key.sub=value` overrides.

    Raises:
        SourceError: the file does not exist.
        ConfigError: the file or a value is invalid.
    """
    words = list(overrides)
    values = apply_overrides(read_yaml(path), [*environment_overrides(model), *words])
    return validate(model, values, source=str(path), overrides=words)


def first_difference(there: object, here: object, key: str = "") -> str:
    """Describes the first key at which two JSON-like values differ; empty if they are equal.

    Args:
        there: the stored value.
        here: the new value.
        key: the key of both values, if they are nested.
    """
    if isinstance(there, Mapping) and isinstance(here, Mapping):
        pairs = [(name, there.get(name), here.get(name)) for name in [*here, *there]]
    elif isinstance(there, list | tuple) and isinstance(here, list | tuple):
        if len(there) != len(here):
            return f"{key} has {len(there)} entries there and {len(here)} here"
        pairs = [(str(i), a, b) for i, (a, b) in enumerate(zip(there, here, strict=True))]
    else:
        return "" if there == here else f"{key} is {there!r} there and {here!r} here"
    found = (first_difference(a, b, f"{key}.{name}".strip(".")) for name, a, b in pairs)
    return next((difference for difference in found if difference), "")


def _deep_copy(values: JsonMapping) -> JsonObject:
    return {k: _deep_copy(v) if isinstance(v, Mapping) else v for k, v in values.items()}


def _too_large(value: object, place: tuple[int | str, ...] = ()) -> "Iterator[ErrorDetails]":
    """Yields a problem for each integer outside 64 bits, which tensors and files cannot hold."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _too_large(inner, (*place, str(key)))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _too_large(inner, (*place, index))
    elif isinstance(value, int) and abs(value) > INT64_MAX:
        bound = f"less than or equal to {INT64_MAX}" if value > 0 else f"at least {-INT64_MAX}"
        message = f"Input should be {bound}"
        yield {"type": "less_than_equal", "loc": place, "msg": message, "input": value}


def _describe(
    problems: list["ErrorDetails"],
    model: type[BaseModel],
    values: JsonMapping,
    source: str,
    overrides: list[str],
    flags: Mapping[str, str],
) -> str:
    """The error message: all mistakes, each with its source; a common source is named only once."""
    lines = _lines(problems, model, values, flags)
    givers = _ValueOrigins(model, source, overrides)
    places = [givers.of(problem, values) for problem in problems]
    if len(lines) == 1:
        by_flag = ".".join(_user_path(problems[0], values)) in flags
        return lines[0] if by_flag else f"{places[0]}: {lines[0]}"
    if len(set(places)) == 1:
        return f"{places[0]}: {len(lines)} mistakes\n  - " + "\n  - ".join(lines)
    told = [f"{place}: {line}" for place, line in zip(places, lines, strict=True)]
    return f"{len(lines)} mistakes\n  - " + "\n  - ".join(told)


class _ValueOrigins:
    """Finds where a value was set: the command line, an environment variable, or else the source.

    Args:
        overrides: the command-line overrides.
    """

    def __init__(self, model: type[BaseModel], source: str, overrides: list[str]) -> None:
        self.source = source
        self.words = {tuple(_key(word).split(".")): "command line" for word in overrides}
        for word in environment_overrides(model):
            key = _key(word)
            variable = ENVIRONMENT_PREFIX + key.upper().replace(".", "__")
            self.words.setdefault(tuple(key.split(".")), f"environment variable {variable}")

    def of(self, problem: "ErrorDetails", values: object) -> str:
        """Returns where the value of a problem was set.

        If a combination of values is invalid and some of them were overridden, the result is the
        source together with the names of the overridden values.
        """
        place = tuple(_user_path(problem, values))
        there = place[: _depth(place, values)]
        if problem["type"] == "union_tag_invalid":
            there = (*there, "kind")
        for key, giver in self.words.items():
            if there[: len(key)] == key:
                return giver
        giver_of_all = self._giver_of_all(there, values)
        if giver_of_all is not None:
            return giver_of_all
        changed = [key for key in self.words if key[: len(there)] == there]
        if problem["type"] in ("extra_forbidden", "missing"):  # `kind` decides which keys exist
            changed = [key for key in self.words if key == (*place[:-1], "kind")]
        elif problem["type"] != "value_error":
            return self.source
        within = ", ".join(".".join(key) for key in changed)
        return f"{self.source} with {within} changed" if within else self.source

    def _giver_of_all(self, there: tuple[str, ...], values: object) -> str | None:
        """Where the value at a path was set if overrides set all of its leaves; None otherwise."""
        if not there:
            return None
        for part in there:
            values = values.get(part) if isinstance(values, Mapping) else None
        givers = [
            next((giver for key, giver in self.words.items() if leaf[: len(key)] == key), None)
            for leaf in _leaves(values, there)
        ]
        return None if None in givers else next(iter(givers), None)


def _leaves(value: object, place: tuple[str, ...]) -> Iterator[tuple[str, ...]]:
    """The paths of the leaf values of nested mappings."""
    if not isinstance(value, Mapping):
        yield place
        return
    for key, inner in value.items():
        yield from _leaves(inner, (*place, str(key)))


def _key(word: str) -> str:
    return word.partition("=")[0].strip()


def _depth(place: tuple[str, ...], values: object) -> int:
    """The number of leading keys of `place` that exist in the nested `values`."""
    for depth, part in enumerate(place):
        if not isinstance(values, Mapping) or part not in values:
            return depth
        values = values[part]
    return len(place)


def first_problem(error: ValidationError) -> str:
    """Returns the first mistake as `key.sub: message`, for files that no user wrote by hand."""
    first = error.errors(include_url=False)[0]
    place, message = ".".join(map(str, first["loc"])), first["msg"]
    return f"{place}: {message}" if place else message


def _problems(error: ValidationError) -> list["ErrorDetails"]:
    """The mistakes; pydantic also reports a list as too short if its entries are invalid."""
    return [
        problem
        for problem in error.errors()
        if problem["type"] != "too_short" or len(problem["input"]) < problem["ctx"]["min_length"]
    ]


def _lines(
    problems: Iterable["ErrorDetails"],
    model: type[BaseModel],
    values: JsonMapping,
    flags: Mapping[str, str],
) -> list[str]:
    """One line per mistake: the key or flag, the value and what was expected."""
    lines = []
    for problem in problems:
        written = _user_path(problem, values)
        key = ".".join(written)
        if problem["type"] == "extra_forbidden":
            known = _fields_at(model, problem["loc"][:-1], values)
            outers = _models_at(model, problem["loc"][:-1], values)
            hint = _nested_hint(outers, written, values) or suggest(written[-1], known)
            hint = hint or (f" (known keys: {', '.join(known)})" if known else "")
            lines.append(f"unknown key {key!r}{hint}")
        elif problem["type"] == "missing":
            lines.append(f"missing key {key!r}")
        elif problem["type"] == "union_tag_invalid":
            tag, known_tags = str(problem["ctx"]["tag"]), problem["ctx"]["expected_tags"]
            close = suggest(tag, known_tags.replace("'", "").split(", "))
            lines.append(f"{key}: unknown kind {tag!r}{close}; known kinds are {known_tags}")
        elif problem["type"] == "union_tag_not_found":
            kinds = _kinds_of(_models_at(model, problem["loc"], values))
            line = f"missing key {f'{key}.kind'!r}; known kinds are {kinds}"
            others = [str(name) for name in _value_at(values, written[:-1]) if name != written[-1]]
            if others and written[-1] not in _fields_at(model, problem["loc"][:-1], values):
                line += (
                    f"; other keys next to {key!r}: {', '.join(others)}"
                    f"{suggest(written[-1], others)}"
                )
            lines.append(line)
        else:
            got = repr(problem["input"])
            got = got if len(got) <= 60 else got[:57] + "..."
            message = problem["msg"].removeprefix("Value error, ")
            message = _expected(problem, key, model, values) or message
            prefix = f"{key}={got}: " if key else ""
            prefix = f"{flags[key]} {got}: " if key in flags else prefix
            lines.append(f"{prefix}{message[0].lower()}{message[1:]}")
    return lines


def _nested_hint(outers: list[type[BaseModel]], written: list[str], values: Json) -> str:
    """Says that an unknown key is one of a nested mapping, if it is; empty otherwise."""
    found, here = list[str](), _value_at(values, written[:-1])
    for key, field in [item for outer in outers for item in outer.model_fields.items()]:
        value = here.get(key) if isinstance(here, Mapping) else None
        inner = _registered(field.metadata, value) or _models_in(field.annotation, value)
        if any(written[-1] in each.model_fields for each in inner):
            found.append(repr(".".join((*written[:-1], key, written[-1]))))
    return f" (did you mean {' or '.join(dict.fromkeys(found))}?)" if found else ""


def _expected(
    problem: "ErrorDetails", key: str, model: type[BaseModel], values: JsonMapping
) -> str:
    """What was expected instead of a value of another type, as written in YAML; empty if unknown.

    pydantic's own messages speak of dictionaries, tuples and instances.
    """
    if problem["type"] in ("tuple_type", "list_type"):
        return "expected a list, as [a, b]"
    if problem["type"] not in ("model_type", "model_attributes_type", "kind_type", "dict_type"):
        return ""
    place = problem["loc"]
    kinds = problem["ctx"]["known"] if problem["type"] == "kind_type" else ""
    kinds = kinds or _kinds_of(_models_at(model, place, values))
    if kinds == repr(place[-1]):  # of a union, the variant that was tried
        kinds = _kinds_of(_models_at(model, place[:-1], values))
    if kinds:
        known, given = kinds.replace("'", "").split(", "), problem["input"]
        kind = given if given in known else "NAME"
        is_nested = any(part.isdigit() for part in key.split("."))  # no override reaches it
        override = "" if is_nested else f" ({key}.kind={kind})"
        return f"expected a mapping with one of the kinds {kinds}; write {{kind: {kind}}}{override}"
    fields = _fields_at(model, place, values)
    return f"expected a mapping with keys {', '.join(fields)}" if fields else "expected a mapping"


def _user_path(problem: "ErrorDetails", values: object) -> list[str]:
    """The path as the user wrote it: pydantic also adds the chosen variant of a union to it."""
    place = problem["loc"]
    written: list[str] = []
    here: Json = values
    for index, part in enumerate(place):
        if _holds(here, part):
            here = here[part]
        elif index < len(place) - 1 or problem["type"] != "missing":
            continue
        written.append(str(part))
    return written


def _holds(value: object, part: int | str) -> bool:
    if isinstance(value, Mapping):
        return part in value
    return isinstance(value, list | tuple) and isinstance(part, int) and part < len(value)


def _value_at(values: Json, place: list[str]) -> Json:
    for part in place:
        values = values[int(part) if isinstance(values, list | tuple) else part]
    return values


def _fields_at(model: type[BaseModel], place: tuple[int | str, ...], values: object) -> list[str]:
    """Names of the fields of the nested model at the path `place`."""
    models = _models_at(model, place, values)
    return sorted({name for found in models for name in found.model_fields})


def fields_of_kind(
    model: type[BaseModel], place: tuple[int | str, ...], values: object, kind: str
) -> frozenset[str]:
    """Returns the fields of a nested model of some kind; empty if there is no such kind.

    Args:
        model: the configuration that `values` describe.
        place: the path of the nested model, from the top.
        kind: the kind to look up.
    """
    models = _models_at(model, place, values)
    return frozenset(name for m in models if _tag_matches(m, kind) for name in m.model_fields)


def _models_at(
    model: type[BaseModel], place: tuple[int | str, ...], values: Json
) -> list[type[BaseModel]]:
    """The nested models at the path `place`; of registered kinds, the selected one."""
    candidates: list[type[BaseModel]] = [model]
    is_key = False
    for part in place:
        inside = _holds(values, part)
        values = values[part] if inside else values
        if is_key:  # a key of a mapping: chosen by the user, so it is not the name of a field
            is_key = False
            continue
        following = []
        for candidate in candidates:
            field = candidate.model_fields.get(str(part)) if inside else None
            if field is not None:
                registered = _registered(field.metadata, values)
                following += registered or _models_in(field.annotation, values)
                is_key = is_key or typing.get_origin(field.annotation) is dict
            elif _tag_matches(candidate, part):
                following.append(candidate)
        candidates = following or candidates
    return candidates


def _kinds_of(models: list[type[BaseModel]]) -> str:
    """Names of the models' kinds, formatted as pydantic does."""
    kinds = [field.annotation for m in models if (field := m.model_fields.get("kind"))]
    return ", ".join(repr(name) for kind in kinds for name in typing.get_args(kind))


def _tag_matches(model: type[BaseModel], part: int | str) -> bool:
    if isinstance(part, int) or part == model.__name__:
        return True
    field = model.model_fields.get("kind")
    return field is not None and part in typing.get_args(field.annotation)


def _registered(metadata: Iterable[Any], value: object) -> list[type[BaseModel]]:
    """The variants for a value, if the metadata of an annotated type contains registered kinds."""
    return [m for kinds in metadata if isinstance(kinds, Kinds) for m in kinds.of(value)]


def _models_in(annotation: TypeForm, value: Json) -> list[type[BaseModel]]:
    """The models in a type annotation; for registered kinds, the variants that match the value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    origin: TypeForm = typing.get_origin(annotation)
    if origin is typing.Annotated:
        registered = _registered(annotation.__metadata__, value)
        if registered:
            return registered
    if origin in (typing.Union, types.UnionType) or typing.get_args(annotation):
        return [m for part in typing.get_args(annotation) for m in _models_in(part, value)]
    return []
