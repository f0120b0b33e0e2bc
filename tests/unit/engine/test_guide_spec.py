"""Specifications of guides: exactly one form, of bounded size, without torch or llguidance."""

import subprocess
import sys

import pytest
from pydantic import ValidationError

from easyllm.core.config import validate
from easyllm.core.errors import ConfigError
from easyllm.engine.guide_spec import (
    MAX_SCHEMA_DEPTH,
    GuideError,
    GuideSpec,
    check_guided_params,
    depth_exceeds,
    is_gbnf,
)
from easyllm.engine.params import SamplingParams


def nested(depth):
    value = {}
    for _ in range(depth):
        value = {"items": value}
    return value


def test_exactly_one_form_is_given():
    assert GuideSpec(regex="a").kind == "regex"
    assert GuideSpec(json_schema=True).kind == "json_schema"
    assert GuideSpec(json_object=True).kind == "json_object"
    for values in ({}, {"json_object": False}, {"regex": "a", "choice": ("b",)}):
        with pytest.raises(ValidationError, match="exactly one"):
            GuideSpec(**values)


@pytest.mark.parametrize(
    "values",
    [
        {"json_schema": nested(MAX_SCHEMA_DEPTH + 1)},
        {"json_schema": nested(300)},
        {"json_schema": {"description": "x" * 200_000}},
        {"json_schema": {"const": float("nan")}},
        {"json_schema": {"const": object()}},
        {"json_schema": {"const": "\ud800"}},
        {"json_schema": "true"},
        {"regex": ""},
        {"regex": "a" * 10_000},
        {"regex": "\ud800"},
        {"grammar": "x" * 70_000},
        {"choice": ("",)},
        {"choice": ("a",) * 5_000},
        {"choice": ("a" * 5_000,)},
        {"choice": tuple(f"{i:04000}" for i in range(50))},
        {"regexp": "a"},
    ],
    ids=lambda values: next(iter(values)),
)
def test_what_is_too_large_or_not_json_is_refused(values):
    with pytest.raises(ConfigError):
        validate(GuideSpec, values, source="guide")


def test_the_key_depends_on_the_order_of_properties():
    one = {"properties": {"a": {}, "b": {}}}
    other = {"properties": {"b": {}, "a": {}}}
    assert GuideSpec(json_schema=one).key == GuideSpec(json_schema=one).key
    assert GuideSpec(json_schema=one).key != GuideSpec(json_schema=other).key
    assert GuideSpec(regex="a").key != GuideSpec(grammar="a").key


def test_depth_is_counted_without_recursion():
    assert not depth_exceeds(nested(5), 5)
    assert depth_exceeds(nested(6), 5)
    assert depth_exceeds([[[]]], 1)


def test_gbnf_starts_with_its_root():
    assert is_gbnf('root ::= "a"')
    assert is_gbnf('# a comment\n\n  root::= "a"')
    assert not is_gbnf('start: "root ::= "')


def test_a_guided_completion_must_be_able_to_end():
    check_guided_params(SamplingParams())
    with pytest.raises(GuideError, match="leave out ignore_eos"):
        check_guided_params(SamplingParams(ignore_eos=True))


def test_checking_a_guide_loads_neither_torch_nor_llguidance():
    code = (
        "import sys\n"
        "from easyllm.engine.guide_grammar import guide_grammar\n"
        "from easyllm.engine.guide_spec import GuideSpec\n"
        "guide_grammar(GuideSpec(json_schema={'type': 'object'}))\n"
        "print([m for m in ('torch', 'llguidance', 'numpy') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
