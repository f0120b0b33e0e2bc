"""Patterns that select modules by name."""

import pytest

from easyllm.adapters import LoRAConfig, attach
from easyllm.adapters.targets import check_patterns, differs_by_layer, name_matches
from easyllm.core.errors import ConfigError
from tiny_models import build_tiny

NAMES = [
    f"layers.{layer}.{block}"
    for layer in range(12)
    for block in ("mixer.q_proj", "mixer.k_proj", "feed_forward.up_proj")
]


def selected(pattern):
    return [name for name in NAMES if name_matches(name, pattern)]


@pytest.mark.parametrize(
    ("pattern", "count"),
    [
        ("q_proj", 12),
        ("mixer.q_proj", 12),
        ("layers.0.mixer.q_proj", 1),
        ("layers.1.mixer.*", 2),  # not layers 10 and 11
        ("layers.[0-3].*", 12),
        ("*_proj", 36),
        ("layers.1?.mixer.q_proj", 2),
        ("*q_proj", 12),
        ("q_pro?", 12),
        ("proj", 0),  # a part of a word is no match
        ("pro?", 0),  # nor with a wildcard
        ("q", 0),
        ("layers.0", 0),
        ("layers.*.up_proj", 12),
    ],
)
def test_a_pattern_is_a_name_its_end_or_has_wildcards(pattern, count):
    assert len(selected(pattern)) == count


def test_a_dot_in_a_pattern_is_not_a_wildcard():
    assert not name_matches("layersx0xmixer", "layers.0.mixer")
    assert not name_matches("layersx0.mixer.q_proj", "layers.0.*")


def test_a_long_pattern_of_wildcards_takes_linear_time():
    assert not name_matches("a" * 5000, "*a" * 40 + "b")


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        (["q_proj", "all-linear"], False),
        (["layers.0.mixer.q_proj"], True),
        (["mixer.*"], True),
        (["0.mixer"], True),
        (["up_proj2"], False),
    ],
)
def test_patterns_with_numbers_or_wildcards_may_differ_by_layer(patterns, expected):
    assert differs_by_layer(patterns) == expected


def test_a_pattern_that_matches_nothing_is_refused_with_near_names():
    with pytest.raises(ConfigError, match=r"adapter\.targets 'qproj' matches no linear.*'q_proj'"):
        check_patterns(["k_proj", "qproj"], NAMES, key="adapter.targets", what="linear")
    check_patterns(["k_proj", "layers.[0-9].*"], NAMES, key="adapter.targets", what="linear")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"targets": ("q_proj", "o_porj")}, "adapter target 'o_porj' .*did you mean 'o_proj'"),
        ({"targets": ("layers.[5-9].*",)}, "matches no linear layer"),
        ({"exclude": ("dwn_proj",)}, "adapter.exclude 'dwn_proj' .*did you mean 'down_proj'"),
        ({"also_trained": ("nrm",)}, "also_trained names 'nrm'"),
        ({"rank_pattern": {"o_prj": 2}}, "adapter.rank_pattern 'o_prj'"),
        ({"alpha_pattern": {"*.7.*": 2}}, r"adapter.alpha_pattern '\*\.7\.\*'"),
    ],
)
def test_every_name_in_the_settings_must_exist(changes, words):
    with pytest.raises(ConfigError, match=words):
        attach(build_tiny(), LoRAConfig(rank=2, **changes))


def test_excluded_and_fully_trained_linears_are_not_adapted():
    config = LoRAConfig(rank=2, exclude=("layers.0.*", "k_proj"), also_trained=("v_proj",))
    adapters = attach(build_tiny(), config)
    leaves = {name.removeprefix("layers.1.").split(".")[1] for name in adapters.linears}
    assert {name.split(".")[1] for name in adapters.linears} == {"1"}
    assert leaves == {"q_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}
    assert adapters.base_parameters == (
        "layers.0.mixer.v_proj.weight",
        "layers.1.mixer.v_proj.weight",
    )
