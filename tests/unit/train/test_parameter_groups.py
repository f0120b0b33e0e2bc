"""Parameter groups: patterns, separate rates and decay, freezing."""

import math

import pytest
import torch
from torch import nn

from easyllm.core.errors import ConfigError
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig, MuonConfig, ParameterGroup, SGDConfig
from easyllm.train.parameter_groups import build_groups
from optimizer_parameters import ADAMW, SHAPES, backward, make_gradients, make_parameters


def test_matrices_decay_and_norms_and_biases_do_not():
    groups = build_groups(make_parameters(), AdamWConfig(weight_decay=0.1))
    decay = {name: group.weight_decay for group in groups for name in group.names}
    assert decay == {name: 0.1 if len(shape) > 1 else 0.0 for name, shape in SHAPES.items()}


def test_the_first_matching_pattern_applies():
    patterns = [
        ParameterGroup(pattern=r"q_proj\.bias$", weight_decay=0.5),
        ParameterGroup(pattern="mixer", rate_factor=0.1),
        ParameterGroup(pattern="proj", rate_factor=3.0),
    ]
    groups = build_groups(make_parameters(), AdamWConfig(weight_decay=0.1), patterns)
    found = {name: (g.rate_factor, g.weight_decay) for g in groups for name in g.names}
    assert found == {
        "embed_tokens.weight": (1.0, 0.1),
        "layers.0.mixer.q_proj.weight": (0.1, 0.1),
        "layers.0.mixer.q_proj.bias": (1.0, 0.5),
        "layers.0.mixer.position.bias_table": (0.1, 0.1),
        "layers.0.feed_forward.up_proj.weight": (3.0, 0.1),
        "layers.0.feed_forward.down_proj.weight": (3.0, 0.1),
        "norm.weight": (1.0, 0.0),
        "lm_head.weight": (1.0, 0.1),
    }


def test_a_group_has_its_own_rate_and_decay():
    patterns = [ParameterGroup(pattern="lm_head", rate_factor=0.25, weight_decay=0.5)]
    config = SGDConfig(learning_rate=0.1)
    parameters = make_parameters()
    start = {name: p.detach().clone() for name, p in parameters.items()}
    optimizer = MasterOptimizer(parameters, config, patterns)
    gradients = make_gradients(parameters, 0)
    backward(parameters, gradients)
    optimizer.step(0.5)
    for name, p in parameters.items():
        head = name == "lm_head.weight"
        descent = gradients[name] + (0.5 * start[name] if head else 0)
        expected = start[name] - (0.0125 if head else 0.05) * descent
        torch.testing.assert_close(p.detach(), expected)


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("lm_haed", "matches no trained parameter; the closest names are lm_head.weight"),
        ("layers.0.mixer.(", "not a regular expression"),
    ],
)
def test_an_invalid_pattern_is_a_helpful_error(pattern, words):
    with pytest.raises(ConfigError, match=words) as error:
        build_groups(make_parameters(), ADAMW, [ParameterGroup(pattern=pattern)])
    assert repr(pattern) in str(error.value)


def test_a_pattern_shadowed_by_earlier_ones_is_an_error():
    patterns = [ParameterGroup(pattern="layers"), ParameterGroup(pattern="q_proj")]
    with pytest.raises(
        ConfigError, match=r"parameter_groups\.1\.pattern.*more specific pattern first"
    ):
        build_groups(make_parameters(), ADAMW, patterns)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rate_factor_0_freezes(dtype):
    patterns = [ParameterGroup(pattern="embed|lm_head", rate_factor=0.0)]
    masters = {name: p.detach() for name, p in make_parameters().items()}
    parameters = {name: nn.Parameter(p.clone().to(dtype)) for name, p in masters.items()}
    given = {name: p.clone() for name, p in masters.items()}
    optimizer = MasterOptimizer(parameters, ADAMW, patterns, given)
    frozen = {"embed_tokens.weight", "lm_head.weight"}
    assert {name for name, p in parameters.items() if not p.requires_grad} == frozen
    backward(parameters, make_gradients(parameters, 0))
    gradients = make_gradients(parameters, 0)
    norm = math.sqrt(sum(g.square().sum() for n, g in gradients.items() if n not in frozen))
    assert optimizer.grad_norm() == pytest.approx(norm, rel=1e-5)
    optimizer.step(1.0)
    for name, p in parameters.items():
        assert torch.equal(p, masters[name].to(dtype)) == (name in frozen)
    assert not any(name in key for key in optimizer.tensors() for name in frozen)
    if dtype == torch.bfloat16:  # the result contains the given fp32 value, not its bf16 rounding
        final = optimizer.final_state()
        assert final.keys() == parameters.keys()
        assert torch.equal(final["lm_head.weight"], masters["lm_head.weight"])


def test_freezing_everything_is_an_error():
    with pytest.raises(ConfigError, match="nothing is left to train"):
        MasterOptimizer(make_parameters(), ADAMW, [ParameterGroup(pattern=".", rate_factor=0)])


def test_rates_name_every_group_with_a_separate_rate():
    patterns = [
        ParameterGroup(pattern="q_proj", rate_factor=0.1),
        ParameterGroup(pattern="norm", weight_decay=0.1),
        ParameterGroup(pattern="embed", rate_factor=0.0),
    ]
    config = MuonConfig(learning_rate=1e-2, others=AdamWConfig(learning_rate=1e-3))
    rates = MasterOptimizer(make_parameters(), config, patterns).rates(0.5)
    assert rates == pytest.approx(
        {
            "learning_rate": 5e-3,
            "learning_rate/q_proj": 5e-4,
            "learning_rate/q_proj others": 5e-5,
            "learning_rate/others": 5e-4,
        }
    )
    assert MasterOptimizer(make_parameters(), ADAMW).rates(0.5) == {"learning_rate": 5e-3}
