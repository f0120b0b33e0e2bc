"""A model with quantized weights: what changes, what still works, and what it refuses."""

import copy

import pytest
import torch
from pydantic import ValidationError

from easyllm.adapters import attach, merge
from easyllm.adapters.lora import LoRAConfig
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.models import load_model, save_model
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Linear
from easyllm.ops.kernels import build
from easyllm.quant import (
    QuantSpec,
    plan_packed,
    quantizable,
    quantize_weights,
    schemes,
    weight_bytes,
)
from tiny_models import build_tiny

IDS = torch.tensor([5, 9, 300, 17, 2, 2, 41])


def kl(p, q):
    p, q = p.log_softmax(-1), q.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1).mean().item()


def full_weights(model):
    """Returns the model with every quantized weight dequantized."""
    full = build_tiny(tie_word_embeddings=model.lm_head is None)
    state = full.state_dict()
    for name, holder in model.weight_modules():
        state[f"{name}.weight"] = holder.storage.dense()
    full.load_state_dict(state)
    return full


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("scheme", schemes())
def test_logits_equal_those_of_the_dequantized_weights(monkeypatch, scheme, tied):
    model = quantize_weights(build_tiny(tie_word_embeddings=tied), scheme)
    full = full_weights(model)
    near = kl(full.logits(IDS), model.logits(IDS))
    assert near < 0.02
    monkeypatch.setattr(build, "_library", lambda: None)
    torch.testing.assert_close(model.logits(IDS), full.logits(IDS), atol=2e-4, rtol=1e-4)


def test_full_weights_are_freed_but_their_dtype_is_preserved():
    model = quantize_weights(build_tiny(), "int4")
    linears = [m for m in model.layers.modules() if isinstance(m, Linear)]
    assert len(linears) == 14
    assert all(m.weight is None and m.storage.format == "int4" for m in linears)
    assert model.dtype == torch.float32
    assert model.head_weight.shape == (320, 32)
    sizes = [t.numel() * t.element_size() for t in model.state_dict().values()]
    before = sum(p.numel() * 4 for p in build_tiny().parameters())
    assert sum(sizes) < before / 4


@pytest.mark.parametrize("scheme", schemes())
def test_quantized_models_can_be_cast_and_copied(scheme):
    model = quantize_weights(build_tiny(), scheme)
    before = model.logits(IDS)
    assert torch.equal(copy.deepcopy(model).logits(IDS), before)
    half = model.to(torch.bfloat16)
    assert half.logits(IDS).dtype == torch.float32
    assert kl(before, half.logits(IDS)) < 0.05
    other = quantize_weights(build_tiny(seed=1), scheme)
    other.load_state_dict(half.float().state_dict())
    assert kl(before, other.logits(IDS)) < 0.05


def test_an_adapter_learns_on_a_quantized_base():
    model = quantize_weights(build_tiny(), "int4")
    before = model.logits(IDS)
    attach(model, LoRAConfig(rank=4))
    assert torch.equal(model.logits(IDS), before)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=1e-2)
    losses = []
    for _ in range(12):
        hidden = model(IDS[:-1], ForwardContext.packed([len(IDS) - 1]))
        loss = torch.nn.functional.cross_entropy(model.head(hidden), IDS[1:])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
    with pytest.raises(ConfigError, match="merge it into the unquantized model"):
        merge(model)


def test_a_planned_model_has_the_formats_and_shapes_of_a_quantized_one():
    with torch.device("meta"):
        planned = Decoder(build_tiny().config)
    plan_packed(quantizable(planned, "nf4"))
    made = quantize_weights(build_tiny(), "nf4")
    for (name, mine), (_, theirs) in zip(
        planned.weight_modules(), made.weight_modules(), strict=True
    ):
        assert mine.storage.format == theirs.storage.format, name
        assert mine.storage.shape == theirs.storage.shape, name
    assert planned.packed_formats() == {"nf4"}


def test_unsupported_operations_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="int4"):
        quantize_weights(build_tiny(), "int5")
    model = quantize_weights(build_tiny(), "int8")
    with pytest.raises(ConfigError, match="already"):
        quantize_weights(model, "int8")
    with pytest.raises(CheckpointError, match="quantized"):
        save_model(model, tmp_path / "out")
    broken = build_tiny()
    broken.layers[1].mixer.q_proj.weight[0, 0] = float("inf")
    with pytest.raises(ConfigError, match=r"layers.1.mixer.q_proj.weight"):
        quantize_weights(broken, "int4")
    with pytest.raises(ValidationError, match="bits"):
        QuantSpec(bits=5)


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8", "int4"])  # its file is on a grid that int4 recovers
def test_smollm2_stays_within_a_hundredth_of_a_nat(smollm2, smollm2_tokenizer, scheme):
    text = (
        "The first steam engines were built to pump water out of mines. In 1769 James Watt "
        "added a separate "
        "condenser, which kept the cylinder hot and saved three quarters of the coal. Within "
        "thirty years his "
        "engines drove mills, ships and, on iron rails, the first locomotives; cities grew "
        "around them."
    )
    ids = smollm2_tokenizer.encode(text)
    model = quantize_weights(copy.deepcopy(smollm2), scheme)
    assert kl(smollm2.logits(ids), model.logits(ids)) <= 0.01


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantizing_during_loading_equals_quantizing_afterwards(tiny_folder, scheme):
    read = load_model(tiny_folder, dtype="float32", quantize=scheme)
    after = quantize_weights(load_model(tiny_folder, dtype="float32"), scheme)
    state = after.state_dict()
    assert read.state_dict().keys() == state.keys()
    assert all(torch.equal(value, state[name]) for name, value in read.state_dict().items())
    assert torch.equal(read.logits(IDS), after.logits(IDS))
    with torch.device("meta"):
        skeleton = Decoder(read.config)
    held = sum(tensor.nbytes for tensor in state.values())
    assert weight_bytes(skeleton, torch.float32, scheme) == held
