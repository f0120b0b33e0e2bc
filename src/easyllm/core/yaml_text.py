"""YAML to values and back: numbers as in YAML 1.2, and no key twice in a mapping."""

import re
from collections.abc import Hashable
from pathlib import Path

import yaml
from pydantic import BaseModel

from easyllm.core.errors import ConfigError, SourceError, read_failure
from easyllm.core.json_types import Json, JsonObject

MAX_DEPTH, MAX_VALUES = 100, 1_000_000
"""Bounds on nesting and on the number of values, aliases expanded."""


def read_yaml(path: Path, *, what: str = "recipe") -> JsonObject:
    """Returns the mapping stored in a YAML file.

    Args:
        path: the file.
        what: what it should describe, for messages.

    Raises:
        SourceError: the file does not exist.
        ConfigError: the file is not valid YAML, or its content is not a mapping.
    """
    if path.is_dir():
        raise SourceError(f"{what} {str(path)!r} is a folder; name a YAML file")
    if not path.is_file():
        raise SourceError(f"{what} {str(path)!r} does not exist; name a YAML file")
    try:
        content = parse_yaml(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(read_failure(error).split())
        raise ConfigError(f"{path} is not valid YAML: {reason}; correct it") from None
    if not isinstance(content, dict):
        raise ConfigError(
            f"{path} contains a {type(content).__name__}, expected a mapping of keys to values"
        )
    return content


def parse_yaml(text: str) -> Json:
    """Returns the value that a YAML text describes.

    >>> parse_yaml("a: [1e-4, 010, 0x10, '010']")
    {'a': [0.0001, 10, 16, '010']}

    Raises:
        yaml.YAMLError: the text is not valid YAML, has a key twice, contains itself through an
            alias, or is nested too deeply or too large.
    """
    try:
        value = yaml.load(text, Loader=_Loader)
    except RecursionError:
        raise yaml.YAMLError(f"nested more than {MAX_DEPTH} levels deep; write it flat") from None
    except ValueError as error:  # a date that does not exist, or a number with too many digits
        raise yaml.YAMLError(f"{str(error).partition(';')[0]}; quote it if it is text") from None
    _check_size(value)
    return value


def dump_yaml(config: BaseModel) -> str:
    """Returns the configuration, including all defaults, as YAML that loads to an equal value."""
    values = config.model_dump(mode="json")
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    return text


def _check_size(value: object) -> None:
    """Raises if a value contains itself, is nested too deeply, or too large with its aliases."""
    count, level = 0, [value]
    for _ in range(MAX_DEPTH):
        inner: list[object] = []
        for each in level:
            if isinstance(each, dict):
                inner += each.values()
            elif isinstance(each, list):
                inner += each
            if count + len(inner) > MAX_VALUES:
                raise yaml.YAMLError(
                    f"more than {MAX_VALUES:,} values, aliases included; write fewer aliases"
                )
        count, level = count + len(inner), inner
        if not level:
            return
    raise yaml.YAMLError(
        f"nested more than {MAX_DEPTH} levels deep, or an alias inside its own anchor; write it "
        "flat"
    )


class _Loader(yaml.SafeLoader):
    """Parses numbers as in YAML 1.2, and refuses a key that occurs twice in a mapping.

    In YAML 1.1, `1e-4` is a string, `010` is 8 and `1:30` is 90.
    """

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Json]:
        """Returns the mapping of a node.

        Raises:
            yaml.YAMLError: a key occurs twice.
        """
        lines: dict[tuple[str, str], int] = {}
        for key, _ in node.value if isinstance(node, yaml.MappingNode) else ():
            if not isinstance(key, yaml.ScalarNode) or key.tag == "tag:yaml.org,2002:merge":
                continue
            name, line = (key.tag, key.value), key.start_mark.line + 1
            if name in lines:
                raise yaml.YAMLError(
                    f"line {line}: key {key.value!r} is already in line {lines[name]}; keep one"
                )
            lines[name] = line
        return super().construct_mapping(node, deep)

    def construct_yaml_int(self, node: yaml.ScalarNode) -> int:
        """Returns an integer: decimal, or with the prefix `0x`, `0o` or `0b`."""
        text = self.construct_scalar(node).replace("_", "")
        sign, digits = (text[0], text[1:]) if text[0] in "+-" else ("", text)
        base = {"0x": 16, "0o": 8, "0b": 2}.get(digits[:2], 10)
        return int(sign + (digits if base == 10 else digits[2:]), base)


class _Dumper(yaml.SafeDumper):
    """Quotes strings that `_Loader` would parse as numbers."""


_INT = "tag:yaml.org,2002:int"
_NUMBERS = {
    _INT: re.compile(r"^[-+]?([0-9][0-9_]*|0x[0-9a-fA-F_]+|0o[0-7_]+|0b[01_]+)$"),
    "tag:yaml.org,2002:float": re.compile(
        r"^([-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*)([eE][-+]?[0-9]+)?"
        r"|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN))$"
    ),
}
for _resolver in (_Loader, _Dumper):
    _resolver.yaml_implicit_resolvers = {
        first: [(tag, pattern) for tag, pattern in resolvers if tag not in _NUMBERS]
        for first, resolvers in _resolver.yaml_implicit_resolvers.items()
    }
    for _tag, _pattern in _NUMBERS.items():
        _resolver.add_implicit_resolver(_tag, _pattern, list("-+.0123456789"))
_Loader.add_constructor(_INT, _Loader.construct_yaml_int)


__all__ = ["dump_yaml", "parse_yaml", "read_yaml"]
