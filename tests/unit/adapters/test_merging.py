"""Merging into full and quantized weights, with a weight, and undoing it bitwise."""

import pytest
import torch

from easyllm.adapters import LoRAConfig, adapter_of, attach, detach, merge, unmerge
from easyllm.core.errors import ConfigError
from easyllm.models import save_model
from easyllm.quant import FORMATS, StorageFormat, quantize_weights, register_storage
from registered_parts import from_float8_file, to_float8
from tiny_models import build_tiny
from trained_adapters import ADDITIVE, METHODS, attached

IDS = torch.arange(5, 45)


@pytest.fixture
def float8():
    """A format that checkpoints have, registered like a built-in one."""
    format = StorageFormat(
        name="test_float8",
        num_bytes=lambda shape: shape[0] * shape[1],
        quantize=to_float8,
        table="test_float8",
        file_tensors=("weight", "weight_scale", "weight_shape"),
        from_file=from_float8_file,
    )
    register_storage(format)
    yield format
    del FORMATS["test_float8"]


def bits(model):
    """Returns copies of all tensors of a model."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(model, before):
    after = model.state_dict()
    return after.keys() == before.keys() and all(torch.equal(after[n], before[n]) for n in before)


CASES = {
    **METHODS,
    "biases": LoRAConfig(rank=2, bias="all"),
    "rows": LoRAConfig(rank=2, trained_tokens=(7, 9)),
    "whole": LoRAConfig(rank=2, also_trained=("norm", "embed_tokens")),
    "embedding": LoRAConfig(rank=2, targets=("all-linear", "embed_tokens")),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_unmerge_restores_weights_and_adapter_bitwise(case, dtype):
    model = attached(build_tiny(attention_bias=True).to(dtype), CASES[case])
    before, logits, config = bits(model), model.logits(IDS), model.config
    merge(model, reversible=True)
    assert not model.is_adapted
    if dtype == torch.float32:
        torch.testing.assert_close(model.logits(IDS), logits, atol=2e-4, rtol=1e-4)
    assert not same(model, before)
    unmerge(model)
    assert same(model, before)
    assert model.config == config
    assert torch.equal(model.logits(IDS), logits)
    assert adapter_of(model).linears
    with pytest.raises(ConfigError, match="no merge can be undone"):
        unmerge(model)


def test_a_merged_model_can_be_saved_and_several_merges_are_undone_in_reverse(tmp_path):
    model = build_tiny()
    base = model.logits(IDS)
    merge(attached(model, METHODS["lora"]), reversible=True)
    one = model.logits(IDS)
    merge(attached(model, METHODS["dora"], seed=1), reversible=True)
    save_model(model, tmp_path / "m")
    detach(unmerge(model))
    assert torch.equal(model.logits(IDS), one)
    detach(unmerge(model))
    assert torch.equal(model.logits(IDS), base)


def test_a_merge_is_not_undone_if_the_weights_were_replaced_or_an_adapter_came():
    model = merge(attached(build_tiny(), METHODS["lora"]), reversible=True)
    attach(model, LoRAConfig(rank=2))
    with pytest.raises(ConfigError, match="detach it first"):
        unmerge(model)
    detach(model)
    quantize_weights(model, "int8")
    with pytest.raises(ConfigError, match="replaced after the merge"):
        unmerge(model)
    other = merge(attached(build_tiny(), METHODS["lora"]), reversible=True)
    merge(attached(other, METHODS["lora"]))  # undoing the first would undo this one, too
    with pytest.raises(ConfigError, match="reversible=True"):
        unmerge(other)


@pytest.mark.parametrize("place", [0, -1])
def test_a_reversible_merge_that_fails_halfway_leaves_the_model_bitwise(monkeypatch, place):
    model = attached(build_tiny(), METHODS["lora"])
    before, logits = bits(model), model.logits(IDS)
    last = list(adapter_of(model).linears.values())[place][1]
    merged = type(last).merged

    def fails(self, weight, bias):
        if self is last:
            raise RuntimeError("no memory")
        return merged(self, weight, bias)

    with monkeypatch.context() as patch:
        patch.setattr(type(last), "merged", fails)
        with pytest.raises(RuntimeError, match="no memory"):
            merge(model, reversible=True)
    assert same(model, before)
    assert torch.equal(model.logits(IDS), logits)
    merge(model, reversible=True)
    assert torch.equal(unmerge(model).logits(IDS), logits)


def test_named_adapters_are_merged_and_come_back_under_their_name(tmp_path):
    from trained_adapters import as_named

    model = build_tiny()
    as_named(model, tmp_path / "a", METHODS["lora"], "a")
    adapted = model.logits(IDS, adapter="a")
    merge(model, "a", reversible=True)
    torch.testing.assert_close(model.logits(IDS), adapted, atol=2e-4, rtol=1e-4)
    assert torch.equal(unmerge(model).logits(IDS, adapter="a"), adapted)


@pytest.mark.parametrize("weight", [0.5, -1.0, 0.0])
@pytest.mark.parametrize("method", ADDITIVE)
def test_a_weighted_merge_scales_the_update(method, weight):
    model = build_tiny()
    base = {name: layer.weight.clone() for name, layer in model.weight_modules()}
    attached(model, METHODS[method])
    full = {
        name: adapter.merged(base[name], None)[0] - base[name]
        for name, (_, adapter) in adapter_of(model).linears.items()
    }
    merge(model, weight=weight)
    for name, layer in model.weight_modules():
        expected = base[name] + weight * full.get(name, torch.zeros(()))
        torch.testing.assert_close(layer.weight, expected, atol=1e-5, rtol=1e-5)
    assert len(full) == 14


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (METHODS["dora"], r"kind dora: what it changes in layers\.0\.mixer\.q_proj is not"),
        (METHODS["ia3"], "kind ia3"),
        (CASES["rows"], r"changes in embed_tokens"),
        (CASES["whole"], r"trained with embed_tokens\.weight of the base"),
    ],
)
def test_a_weight_is_refused_where_the_update_is_not_additive(config, reason):
    model = attached(build_tiny(), config)
    before = bits(model)
    with pytest.raises(ConfigError, match=reason):
        merge(model, weight=0.5)
    assert same(model, before)


@pytest.mark.parametrize("scheme", ["int8", "int4", "test_float8"])
def test_a_merge_into_quantized_weights_requantizes_them(scheme, float8):
    model = attached(quantize_weights(build_tiny(), scheme), METHODS["lora"])
    formats = {name: layer.storage.format for name, layer in model.weight_modules()}
    plain = quantize_weights(build_tiny(), scheme).logits(IDS)
    adapted = model.logits(IDS)
    with pytest.raises(ConfigError, match="requantize=True"):
        merge(model)
    q_proj = model.layers[0].mixer.q_proj
    expected, _ = q_proj.adapter.merged(q_proj.storage.dense().float(), None)
    before = bits(model)
    merge(model, requantize=True, reversible=True)
    assert {name: layer.storage.format for name, layer in model.weight_modules()} == formats
    step = {"int8": 1 / 127, "int4": 2 / 15, "test_float8": 1 / 14}[scheme]
    rounding = (q_proj.storage.dense() - expected).abs().amax(1) / expected.abs().amax(1)
    assert 0 < rounding.max() < 0.6 * step
    lost = (model.logits(IDS) - adapted).norm() / (plain - adapted).norm()
    assert lost < 0.8  # still far closer to the adapter than to the base
    unmerge(model)
    assert same(model, before)
    assert torch.equal(model.logits(IDS), adapted)


def test_a_format_without_quantize_is_refused_before_anything_changes(float8):
    model = attached(quantize_weights(build_tiny(), "test_float8"), METHODS["lora"])
    before = bits(model)
    del FORMATS["test_float8"]
    register_storage(
        StorageFormat(
            name="test_float8",
            num_bytes=float8.num_bytes,
            file_tensors=float8.file_tensors,
            from_file=float8.from_file,
        )
    )
    with pytest.raises(ConfigError, match="a format of files; quantize the dequantized model"):
        merge(model, requantize=True)
    assert same(model, before)


def test_an_embedding_is_merged_into_a_quantized_table():
    config = LoRAConfig(rank=2, targets=("embed_tokens",), trained_tokens=())
    model = attached(quantize_weights(build_tiny(), "int8"), config)
    table, rows = model.embed_tokens, model.embed_tokens.adapter
    expected, _ = rows.merged(table.storage.dense().float())
    merge(model, requantize=True)
    assert (table.storage.format, model.lm_head.storage.format) == ("int8", "int8")
    rounding = (table.storage.dense() - expected).abs().amax(1) / expected.abs().amax(1)
    assert 0 < rounding.max() < 0.6 / 127
    assert not torch.equal(model.lm_head.storage.dense(), table.storage.dense())
