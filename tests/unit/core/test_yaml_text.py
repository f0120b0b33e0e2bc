"""YAML of recipes: numbers of YAML 1.2, duplicate keys, aliases and nesting."""

import itertools

import pytest
import yaml

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError
from easyllm.core.yaml_text import dump_yaml, parse_yaml, read_yaml


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-7", -7),
        ("1_000", 1000),
        ("1:30", "1:30"),
        ("1e-4", 1e-4),
        (".5", 0.5),
        ("1.", 1.0),
        ("1.5e3", 1500.0),
        ("'010'", "010"),
        ("1.2.3", "1.2.3"),
        ("0b101", 5),
    ],
)
def test_numbers_are_those_of_yaml_1_2(text, value):
    found = parse_yaml(text)
    assert (found, type(found)) == (value, type(value))


class Text(Config):
    """A configuration of one text."""

    value: str


@pytest.mark.parametrize("value", ["010", "1:30", "1e-4", "0o7", "0x1F", "1_000", ".5", "true"])
def test_text_that_looks_like_a_number_stays_text(value):
    assert parse_yaml(dump_yaml(Text(value=value))) == {"value": value}


BAD = {
    "a key twice": ("a: 1\nb: 2\na: 3\n", "line 3: key 'a' is already in line 1; keep one"),
    "twice, nested": ("a:\n  b: 1\n  b: 2\n", "line 3: key 'b' is already in line 2"),
    "twice in a line": ("a: {b: 1, b: 2}\n", "line 1: key 'b' is already in line 1"),
    "an alias inside its anchor": ("a: &a [*a]\n", "an alias inside its own anchor"),
    "a mapping inside itself": ("a: &a {b: *a}\n", "an alias inside its own anchor"),
    "deep": ("a: " + "[" * 200 + "]" * 200, "nested more than 100 levels deep"),
    "very deep": ("a: " + "[" * 100_000, "nested more than 100 levels deep"),
    "a date that does not exist": ("a: 2024-13-45\n", "quote it if it is text"),
    "too many digits": (f"a: {'9' * 5000}\n", "quote it if it is text"),
    "aliases of aliases": (
        "a: &a [x,x,x,x,x,x,x,x,x]\n"
        + "".join(
            f"{k}: &{k} [{','.join([f'*{p}'] * 9)}]\n" for p, k in itertools.pairwise("abcdefg")
        ),
        "more than 1,000,000 values",
    ),
}


@pytest.mark.parametrize("case", BAD.values(), ids=BAD.keys())
def test_other_yaml_is_refused_in_one_sentence(tmp_path, case):
    text, said = case
    path = tmp_path / "r.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"r\.yaml is not valid YAML") as caught:
        read_yaml(path)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_anchors_and_merge_keys_are_allowed():
    assert parse_yaml("a: &a {x: 1}\nb: {<<: *a, y: 2}\nc: *a\n")["b"] == {"x": 1, "y": 2}
    with pytest.raises(yaml.YAMLError):
        parse_yaml("a: *nothing")
