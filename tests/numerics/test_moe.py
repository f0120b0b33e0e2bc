"""Mixtures of experts: routing, balancing losses, capacity, and grouped execution."""

import pytest
import torch

from easyllm.nn.config import GLUConfig, MoEConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.moe import MoE, Routing, load_balancing_loss, router_z_loss


def build(**options):
    values = {"num_experts": 4, "experts_per_token": 2, "expert": GLUConfig(intermediate_size=24)}
    layer = MoE(MoEConfig(**values | options), 16, 0)
    generator = torch.Generator().manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return layer.requires_grad_(False)


def one_by_one(layer, x):
    """The definition: applies each token's experts in a loop."""
    out = []
    for token in x:
        logits = layer.router.weight @ token
        weights, chosen = layer.route(logits[None])
        total = sum(
            w * layer.experts[e](token[None], ForwardContext.packed([1]))[0]
            for w, e in zip(weights[0], chosen[0], strict=True)
        )
        if layer.shared is not None:
            shared = layer.shared(token[None], ForwardContext.packed([1]))[0]
            gate = layer.shared_gate(token[None]).sigmoid()[0] if layer.shared_gate else 1
            total = total + gate * shared
        out.append(total)
    return torch.stack(out)


@pytest.mark.parametrize(
    "options",
    [
        {"routing": "topk_softmax"},
        {"normalise": False},
        {"experts_per_token": 1},
        {"shared": GLUConfig(intermediate_size=8)},
        {"shared": GLUConfig(intermediate_size=8), "shared_gate": True},
        {"experts_per_token": 4},
    ],
)
def test_grouped_execution_equals_a_loop_over_tokens(options):
    layer, x = build(**options), torch.randn(33, 16)
    out = layer(x, ForwardContext.packed([33]))
    torch.testing.assert_close(out, one_by_one(layer, x), atol=1e-5, rtol=1e-5)


def test_identical_experts_with_normalised_gates_equal_the_dense_layer():
    layer, x = build(), torch.randn(20, 16)
    for expert in layer.experts[1:]:
        expert.load_state_dict(layer.experts[0].state_dict())
    out = layer(x, ForwardContext.packed([20]))
    torch.testing.assert_close(
        out, layer.experts[0](x, ForwardContext.packed([20])), atol=1e-5, rtol=0
    )


def routing_of(layer, x):
    seen = []
    layer(x, ForwardContext.packed([len(x)], routing=seen))
    return seen[0]


@pytest.mark.parametrize(("k", "expected"), [(1, 1.0), (2, 2.0)])
def test_the_balancing_loss_of_uniform_routing_has_its_published_value(k, expected):
    """Switch's form (k = 1) gives 1 before its coefficient α; HF's top-2 form gives 2."""
    config = build(experts_per_token=k).config
    chosen = torch.stack([(torch.arange(8) + i) % 4 for i in range(k)], dim=1)
    routing = Routing(0, config, torch.zeros(8, 4), chosen, torch.zeros(8, k, dtype=torch.bool))
    torch.testing.assert_close(load_balancing_loss(routing), torch.tensor(expected))
    assert routing.load().tolist() == [0.25] * 4


def test_the_balancing_loss_equals_transformers():
    from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

    routing = routing_of(build(routing="topk_softmax"), torch.randn(50, 16))
    expected = load_balancing_loss_func((routing.logits,), 4, 2)
    torch.testing.assert_close(load_balancing_loss(routing), expected)


def test_the_balancing_loss_balances_the_experts():
    layer = build().requires_grad_(True)
    x = torch.randn(400, 16, generator=torch.Generator().manual_seed(4)) + 0.5
    before = routing_of(layer, x).load()
    optimizer = torch.optim.SGD([layer.router.weight], lr=0.3)
    for _ in range(200):
        optimizer.zero_grad()
        load_balancing_loss(routing_of(layer, x)).backward()
        optimizer.step()
    after = routing_of(layer, x).load()
    assert before.std() > 0.05
    assert after.std() < 0.5 * before.std()


def test_router_z_loss_is_the_mean_squared_log_sum_exp():
    routing = routing_of(build(), torch.randn(9, 16))
    expected = torch.stack([row.logsumexp(0) ** 2 for row in routing.logits]).mean()
    torch.testing.assert_close(router_z_loss(routing), expected)


def test_tokens_beyond_an_experts_capacity_are_dropped():
    layer = build(experts_per_token=1, capacity_factor=1.0)
    layer.router.weight.zero_()
    layer.router.weight[2] = 1.0  # every token with a positive sum is routed to expert 2
    x = torch.rand(12, 16) + 0.1
    seen = []
    out = layer(x, ForwardContext.packed([12], routing=seen))
    capacity = 12 // 4
    assert seen[0].dropped.squeeze(1).tolist() == [False] * capacity + [True] * (12 - capacity)
    assert not out[capacity:].any()  # only the residual remains
    weight = (layer.router.weight @ x[0]).softmax(0)[2] if not layer.config.normalise else 1.0
    torch.testing.assert_close(
        out[:capacity], weight * layer.experts[2](x[:capacity], ForwardContext.packed([capacity]))
    )


def test_first_choices_have_priority_over_second_ones():
    layer = build(experts_per_token=2, capacity_factor=0.5)
    chosen = torch.tensor([[1, 0], [0, 1], [0, 1], [2, 0]])
    # capacity 1: expert 0 is token 1's first choice, and expert 1 is token 0's
    assert layer._overflow(chosen).tolist() == [
        [False, True],
        [False, True],
        [True, True],
        [False, True],
    ]


def test_gradients_reach_chosen_experts_and_the_router():
    layer = build().requires_grad_(True)
    layer(torch.randn(40, 16), ForwardContext.packed([40])).square().sum().backward()
    assert layer.router.weight.grad.abs().sum() > 0
    assert all(expert.down_proj.weight.grad.abs().sum() > 0 for expert in layer.experts)
