"""Every part states its cost next to its forward; a new one needs no other changes."""

import pytest
import torch
from torch import nn

from easyllm.models.describe import describe
from easyllm.nn import (
    attention,
    feed_forward,
    glu,
    linear_attention,
    moe,
    norm,
    position,
    relative,
    rotary,
)
from easyllm.nn.cost import CostTrace, Work, saved_bytes
from easyllm.nn.decoder import DecoderLayer
from easyllm.nn.linear import Linear
from easyllm.plan import count_parameters, plan_model
from easyllm.plan.compute import forward_flops
from easyllm.plan.linears import model_linears
from easyllm.plan.parts import _layers_of, layers_of, outside_of
from easyllm.plan.trace import trace_model

MODULES = (attention, feed_forward, glu, linear_attention, moe, norm, position, relative, rotary)
NOT_IN_LAYERS = {"LearnedEmbedding", "SinusoidalEmbedding", "NoEmbeddingPosition"}
"""Positions added to the embedding, whose saved tensors `_indices` in the plan counts."""
PARTS = [
    part
    for module in MODULES
    for part in vars(module).values()
    if isinstance(part, type) and issubclass(part, nn.Module) and part.__module__ == module.__name__
]


@pytest.mark.parametrize("part", [p for p in PARTS if p.__name__ not in NOT_IN_LAYERS])
def test_every_part_states_its_cost(part):
    assert callable(getattr(part, "cost", None))


class Bottleneck(nn.Module):
    """An unknown part: up(down(x)), nothing else."""

    def __init__(self, hidden_size):
        super().__init__()
        self.narrow = Linear(hidden_size, 7)
        self.wide = Linear(7, hidden_size, bias=True)

    def forward(self, x, context):
        return self.wide(self.narrow(x))

    def cost(self, trace, x):
        inner = trace.linear(self.narrow, "narrow", x, part="feed_forward")
        return trace.linear(self.wide, "wide", inner, part="feed_forward")

    def inner_elements(self, rows):
        return 7 * rows


class Silent(nn.Module):
    """A part that states no cost."""


@pytest.fixture
def replaced(monkeypatch):
    """Replaces every feed-forward, and unregisters the parts afterwards."""

    def replace(make):
        monkeypatch.setattr(
            "easyllm.nn.decoder.build_feed_forward", lambda config, hidden_size, layer: make()
        )
        forget()

    yield replace
    forget()


def forget():
    """Empties what plans keep of a configuration's layers."""
    _layers_of.cache_clear()
    model_linears.cache_clear()


def test_a_new_part_is_planned_by_its_own_cost(replaced):
    config = describe("smollm2-135m")
    before, usual = count_parameters(config), forward_flops(config, [10])
    replaced(lambda: Bottleneck(config.hidden_size))
    width, layers = config.hidden_size, config.num_layers
    count, flops = count_parameters(config), forward_flops(config, [10])
    assert count.feed_forward == layers * (2 * 7 * width + width)
    assert count.attention == before.attention
    assert flops.feed_forward == layers * 2 * 10 * 2 * 7 * width
    assert flops.attention == usual.attention
    assert {linear.name for linear in model_linears(config)} >= {"narrow", "wide"}
    assert plan_model(config, context=64, train=True).training[0].memory.total > 0


def test_activations_of_a_new_part_are_those_saved_by_autograd(replaced):
    """x and the inner tensor of a bottleneck, required by its two linears."""
    config = describe("smollm2-135m")
    replaced(lambda: Bottleneck(config.hidden_size))
    trace = trace_model(config, trace_work(tokens=10))
    assert saved_bytes(trace.layers[0].fed) == 10 * (config.hidden_size + 7) * 2


def trace_work(tokens):
    from easyllm.nn.cost import Work as TapeWork

    return TapeWork(lengths=(tokens,), labelled=tokens)


def test_a_part_without_a_cost_is_named(replaced):
    replaced(Silent)
    with pytest.raises(NotImplementedError, match="Silent has no method cost"):
        forward_flops(describe("smollm2-135m"), [10])


def test_equal_layers_share_one_module_without_weights():
    config = describe("llama2-70b")
    layers = layers_of(config)
    assert len(layers) == 80
    assert len(set(layers)) == 1
    assert {p.device.type for p in layers[0].parameters()} == {"meta"}
    assert {p.device.type for m in outside_of(config) for p in m.parameters()} == {"meta"}


def test_the_cost_of_a_single_layer_can_be_traced():
    config = describe("smollm2-135m")
    layer = DecoderLayer(config.layers[0], config, 0)
    trace = CostTrace(Work(lengths=(5, 3), labelled=8))
    x = trace.made("x", 2 * config.hidden_size, grad=True)  # fp32
    found, out = layer.cost(trace, x)
    assert (out.name, out.nbytes, out.grad) == ("x", x.nbytes, True)
    assert not trace.events
    assert found.before
    assert found.fed
    assert isinstance(layer.mixer.o_proj.weight, torch.Tensor)
