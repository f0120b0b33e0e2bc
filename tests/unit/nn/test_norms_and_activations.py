"""Norms, norm placement, activations and gated units against formulas and published figures."""

import math

import pytest
import torch
from torch.nn import functional as F

from easyllm.models.families import FAMILIES
from easyllm.nn.config import (
    AttentionConfig,
    GLUConfig,
    LayerConfig,
    LayerNormConfig,
    MLPConfig,
    ModelConfig,
    RMSNormConfig,
)
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.nn.feed_forward import MLP
from easyllm.nn.glu import GLU
from easyllm.nn.norm import build_norm
from easyllm.ops.activation import ACTIVATIONS, gated

DTYPES = [torch.float64, torch.float32]


def randn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def randomised(module, seed=0):
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=0.4, generator=generator)
    return module.double()


# ---- activations, from ReLU to SwiGLU


def test_the_approximations_of_gelu_have_their_known_errors():
    x = torch.linspace(-10, 10, 2_000_001, dtype=torch.float64)
    exact = x / 2 * (1 + torch.erf(x / math.sqrt(2)))
    torch.testing.assert_close(ACTIVATIONS["gelu"](x), exact, atol=1e-14, rtol=0)
    tanh = (ACTIVATIONS["gelu_tanh"](x) - exact).abs().max().item()
    sigmoid = (x * torch.sigmoid(1.702 * x) - exact).abs().max().item()
    assert (f"{tanh:.2e}", f"{sigmoid:.2e}") == ("4.73e-04", "2.03e-02")


def test_gelu_tanh_equals_its_formula():
    x = torch.linspace(-10, 10, 2001, dtype=torch.float64)
    formula = 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    torch.testing.assert_close(ACTIVATIONS["gelu_tanh"](x), formula, atol=1e-14, rtol=0)


LLAMA_WIDTHS = {
    "llama-7b": 11008,
    "llama-13b": 13824,
    "llama-33b": 17920,
    "llama-65b": 22016,
    "llama2-7b": 11008,
    "llama2-13b": 13824,
}


@pytest.mark.parametrize("name", LLAMA_WIDTHS)
def test_a_gated_width_is_two_thirds_of_four_times_the_hidden_size(name):
    """Three matrices instead of two with equal parameters, rounded up to a multiple of 256."""
    size = FAMILIES["llama"].sizes[name]
    two_thirds = 2 * 4 * size["hidden_size"] // 3
    assert math.ceil(two_thirds / 256) * 256 == size["intermediate_size"] == LLAMA_WIDTHS[name]


# Explicit forms of Shazeer 2020 (arXiv 2002.05202), eqs. 5 and 6.
GATES = {
    "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
    "relu": lambda x: torch.maximum(x, torch.zeros_like(x)),
    "gelu": lambda x: x / 2 * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_tanh": lambda x: x / 2 * (1 + torch.tanh(0.7978845608028654 * (x + 0.044715 * x**3))),
    "silu": lambda x: x / (1 + torch.exp(-x)),
}


def test_every_activation_is_tested_against_its_formula():
    assert set(GATES) == set(ACTIVATIONS)


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_each_gated_unit_equals_its_formula(activation, bias, grad):
    glu = randomised(GLU(GLUConfig(intermediate_size=12, activation=activation, bias=bias), 8))
    glu.requires_grad_(grad)
    x = randn(7, 8)

    def project(linear, x):
        return x @ linear.weight.T + (linear.bias if bias else 0)

    gate = GATES[activation](project(glu.gate_proj, x))
    expected = project(glu.down_proj, gate * project(glu.up_proj, x))
    torch.testing.assert_close(glu(x, ForwardContext.packed([7])), expected)


@pytest.mark.parametrize("activation", GATES)
def test_the_gradient_of_a_gated_unit_equals_that_of_its_formula(activation):
    gate, up, grad = (randn(5, 9, seed=i).requires_grad_(i < 2) for i in range(3))
    ours = torch.autograd.grad(gated(gate, up, activation), (gate, up), grad)
    theirs = torch.autograd.grad(GATES[activation](gate) * up, (gate, up), grad)
    torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("activation", GATES)
@pytest.mark.parametrize("bias", [False, True])
def test_an_ungated_feed_forward_equals_its_formula(activation, bias):
    mlp = randomised(MLP(MLPConfig(intermediate_size=12, activation=activation, bias=bias), 8))
    x = randn(7, 8)
    up = x @ mlp.up_proj.weight.T + (mlp.up_proj.bias if bias else 0)
    down = GATES[activation](up) @ mlp.down_proj.weight.T
    expected = down + (mlp.down_proj.bias if bias else 0)
    torch.testing.assert_close(mlp(x, ForwardContext.packed([7])), expected)


# ---- RMSNorm


def norm_of(config, width=24, seed=3, dtype=torch.float64):
    norm = build_norm(config, width).to(dtype)
    generator = torch.Generator().manual_seed(seed)
    for parameter in norm.parameters():
        torch.nn.init.normal_(parameter, generator=generator)
    return norm


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_norms_equal_torch(dtype, grad):
    x = 3 * randn(4, 5, 24, dtype=dtype) + 1
    rms, layer = norm_of(RMSNormConfig(eps=1e-3), dtype=dtype), norm_of(LayerNormConfig(eps=1e-3))
    plain = norm_of(LayerNormConfig(eps=1e-3, bias=False), dtype=dtype)
    layer = layer.to(dtype)
    for module in (rms, layer, plain):
        module.requires_grad_(grad)
    torch.testing.assert_close(rms(x), F.rms_norm(x, (24,), rms.weight, 1e-3))
    expected = F.layer_norm(x, (24,), layer.weight, layer.bias, 1e-3)
    torch.testing.assert_close(layer(x), expected)
    torch.testing.assert_close(plain(x), F.layer_norm(x, (24,), plain.weight, None, 1e-3))


def test_rms_norm_of_zero_mean_rows_equals_layer_norm_without_bias():
    x = randn(6, 24)
    centred = x - x.mean(-1, keepdim=True)
    rms, layer = norm_of(RMSNormConfig()), norm_of(LayerNormConfig())
    layer.load_state_dict({"weight": rms.weight, "bias": torch.zeros(24)})
    torch.testing.assert_close(rms(centred), layer(centred))
    assert (rms(x) - layer(x)).abs().max() > 1e-2  # they differ if the mean is not zero


@pytest.mark.parametrize("factor", [0.1, 7.0, 1000.0])
def test_rms_norm_is_scale_invariant(factor):
    """Up to eps: it would be exact with eps scaled by factor²."""
    x = randn(6, 24)
    norm = norm_of(RMSNormConfig(eps=1e-8))
    torch.testing.assert_close(norm(factor * x), norm(x), atol=0, rtol=1e-5)
    scaled = norm_of(RMSNormConfig(eps=1e-8 * factor**2))
    torch.testing.assert_close(scaled(factor * x), norm(x), atol=0, rtol=1e-12)


def test_eps_keeps_a_row_of_zeros_at_zero():
    for config in (RMSNormConfig(), RMSNormConfig(unit_offset=True), LayerNormConfig(bias=False)):
        assert not norm_of(config)(torch.zeros(2, 24).double()).any()


@pytest.mark.parametrize("grad", [False, True], ids=["no grad", "grad"])
def test_an_offset_norm_keeps_the_difference_from_one(grad):
    plain, offset = norm_of(RMSNormConfig()), norm_of(RMSNormConfig(unit_offset=True))
    offset.load_state_dict({"weight": plain.weight - 1})
    x = randn(6, 24).requires_grad_(grad)
    torch.testing.assert_close(offset(x), plain(x))
    offset.reset_parameters()
    torch.testing.assert_close(offset(x), F.rms_norm(x, (24,), eps=1e-5))


def test_an_offset_norm_of_bf16_weights_adds_the_one_in_fp32():
    norm = build_norm(RMSNormConfig(unit_offset=True), 24).to(torch.bfloat16)
    torch.nn.init.constant_(norm.weight, 2.0**-12)  # 1 + 2^-12 is 1 in bf16
    x = 256 * torch.ones(1, 24)
    x[0, ::2] = -256
    wide = F.rms_norm(x, (24,), torch.full((24,), 1 + 2.0**-12), 1e-5)
    assert torch.equal(norm(x), wide.to(torch.bfloat16))
    norm.weight.data.fill_(2.0**-8)  # halfway between two bf16 numbers around 1
    expected = F.rms_norm(x, (24,), torch.full((24,), 1 + 2.0**-8), 1e-5).to(torch.bfloat16)
    assert torch.equal(norm(x), expected)


@pytest.mark.parametrize("unit_offset", [False, True], ids=["plain", "offset"])
def test_queries_and_keys_are_normalised_as_configured(unit_offset):
    config = RMSNormConfig(unit_offset=unit_offset)
    mixer = AttentionConfig(num_heads=2, num_kv_heads=2, head_dim=8, qk_norm=config)
    layer = LayerConfig(mixer=mixer, feed_forward=GLUConfig(intermediate_size=8))
    model = Decoder(small_model(layer))
    expected, x = norm_of(config, 8), randn(5, 2, 8)
    for norm in (model.layers[0].mixer.q_norm, model.layers[0].mixer.k_norm):
        norm.load_state_dict(expected.state_dict())
        torch.testing.assert_close(norm.double()(x), expected(x))


# ---- placement of the norms in a layer


def small_model(*layers, hidden_size=16, **options):
    values = {"family": "llama", "vocab_size": 11, "hidden_size": hidden_size, "max_seq_len": 32}
    return ModelConfig(**values | {"layers": layers} | options)


def layer_of(placement, heads=2, width=24):
    mixer = AttentionConfig(num_heads=heads, num_kv_heads=heads, head_dim=8)
    feed_forward = GLUConfig(intermediate_size=width)
    return LayerConfig(mixer=mixer, feed_forward=feed_forward, norm_placement=placement)


def pre(x, f, layer, name):
    return x + f(getattr(layer, f"{name}_norm")(x))


def post(x, f, layer, name):
    return getattr(layer, f"{name}_after_norm")(x + f(x))


def sandwich(x, f, layer, name):
    return x + getattr(layer, f"{name}_post_norm")(f(getattr(layer, f"{name}_norm")(x)))


@pytest.mark.parametrize("formula", [pre, post, sandwich], ids=lambda f: f.__name__)
@pytest.mark.parametrize("norm", [RMSNormConfig(), LayerNormConfig()], ids=["rms", "layer"])
def test_a_layer_equals_the_formula_of_its_norm_placement(formula, norm):
    model = randomised(Decoder(small_model(layer_of(formula.__name__), norm=norm)))
    layer, x = model.layers[0], randn(9, 16)
    context = ForwardContext.packed([9])
    middle = formula(x, lambda x: layer.mixer(x, context), layer, "mixer")
    expected = formula(middle, lambda x: layer.feed_forward(x, context), layer, "feed_forward")
    stream, added = layer(x, context)
    torch.testing.assert_close(stream if added is None else stream + added, expected)
    in_two_terms = layer(x - 1, context, torch.ones_like(x))
    torch.testing.assert_close(sum(term for term in in_two_terms if term is not None), expected)
    norms = {"pre": 2, "post": 2, "sandwich": 4}[formula.__name__]
    assert sum("norm" in name and "mixer." not in name for name, _ in layer.named_parameters()) == (
        norms * (2 if isinstance(norm, LayerNormConfig) else 1)
    )


def last_gradient(placement, depth, seed):
    """Returns the initial gradient norm of the last down projection, with equal scales."""
    layers = (layer_of(placement, heads=4, width=64),) * depth
    model = Decoder(small_model(*layers, hidden_size=32, final_norm=placement != "post"))
    generator = torch.Generator().manual_seed(seed)
    model.reset_parameters(generator=generator)
    for name, parameter in model.named_parameters():
        if "proj" in name:
            torch.nn.init.xavier_normal_(parameter, generator=generator)
    ids, labels = torch.randint(11, (2, 24), generator=generator)
    head = torch.randn(11, 32, generator=generator) / 32**0.5
    hidden = model(ids, ForwardContext.packed([24]))
    F.cross_entropy(F.linear(hidden, head), labels).backward()
    return model.layers[-1].feed_forward.down_proj.weight.grad.norm().item()


def test_the_last_gradient_decreases_with_depth_only_for_pre_norm():
    """As 1/√L, unlike O(1) for post-norm (Xiong et al. 2020, arXiv 2002.04745, theorem 1)."""

    def ratio(placement):
        deep, shallow = (
            sum(last_gradient(placement, depth, seed) for seed in range(4)) for depth in (32, 2)
        )
        return deep / shallow

    assert 0.1 < ratio("pre") < 0.4  # √(2/32) = 0.25; 0.18 was measured
    assert ratio("post") > 0.8  # 1.6 was measured
