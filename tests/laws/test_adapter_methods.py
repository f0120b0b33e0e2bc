"""Law 8 for every method: step 0 = base, merged = attached, packed = alone, saved = loaded.

Also: detaching restores the base, only what should be trained has gradients, and rows are bitwise
independent of each other in deterministic mode.
"""

import pytest
import torch

from adapter_kinds import BIASES, SETTINGS, config_of, model_with
from easyllm.adapters import adapter_of, attach, detach, load_adapter, merge, save_adapter
from easyllm.models import hf_module_name
from easyllm.nn.context import AdapterRows, ForwardContext
from easyllm.nn.deterministic import check_deterministic
from easyllm.ops.kernels.build import _library
from easyllm.plan.memory import estimate_training
from tiny_models import build_tiny

IDS = torch.arange(5, 45)
EXACT = [kind for kind in SETTINGS if kind != "pissa"]
"""Methods whose first step is bitwise the base; PiSSA subtracts two equal products."""


def base_logits(**changes):
    return build_tiny(**{**BIASES, **changes}).logits(IDS)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", SETTINGS)
def test_a_new_adapter_leaves_the_outputs_unchanged(kind, tied):
    model, _ = model_with(kind, trained=0, tie_word_embeddings=tied)
    before, after = base_logits(tie_word_embeddings=tied), model.logits(IDS)
    if kind in EXACT and not (tied and kind == "lora, token rows"):  # a product for those logits
        assert torch.equal(after, before)
    torch.testing.assert_close(after, before, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", SETTINGS)
def test_merged_equals_attached(kind, tied):
    model, _ = model_with(kind, trained=0.05, tie_word_embeddings=tied)
    attached = model.logits(IDS)
    assert not torch.allclose(attached, base_logits(tie_word_embeddings=tied), atol=1e-2)
    merged = merge(model)
    assert not merged.is_adapted
    assert not merged.adapter_sets
    torch.testing.assert_close(merged.logits(IDS), attached, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SETTINGS)
def test_packed_sequences_equal_each_alone(kind):
    model, _ = model_with(kind)
    model.double()  # fp32 sums depend on the number of rows of a product, and on the processor
    lengths = [7, 1, 20, 12]
    context = ForwardContext.packed(lengths)
    together = model.head(model(IDS, context), context).split(lengths)
    for part, got in zip(IDS.split(lengths), together, strict=True):
        torch.testing.assert_close(got, model.logits(part), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_saved_adapter_loads_equal_and_detaches_to_the_base(kind, tmp_path):
    model, _ = model_with(kind)
    where = hf_module_name(model)
    save_adapter(model, tmp_path / "a", module_name=where, base="tiny")
    again = build_tiny(**BIASES)
    load_adapter(again, tmp_path / "a", module_name=where)
    torch.testing.assert_close(again.logits(IDS), model.logits(IDS), atol=1e-6, rtol=1e-6)
    assert not any(parameter.requires_grad for parameter in again.parameters())
    save_adapter(again, tmp_path / "b", module_name=where, base="tiny")
    third = build_tiny(**BIASES)
    load_adapter(third, tmp_path / "b", module_name=where)
    assert torch.equal(third.logits(IDS), again.logits(IDS))
    assert torch.equal(detach(again).logits(IDS), base_logits())


@pytest.mark.parametrize("kind", ["lora", "dora", "pissa", "adalora", "ia3"])
def test_adapters_loaded_by_name_apply_to_their_own_sequences(kind, tmp_path):
    model, _ = model_with(kind)
    where = hf_module_name(model)
    held = build_tiny(**BIASES)
    save_adapter(model, tmp_path / "a", module_name=where, base="tiny")
    load_adapter(held, tmp_path / "a", module_name=where, name="one")
    other, _ = model_with("lora, rsLoRA, patterns")
    save_adapter(other, tmp_path / "b", module_name=where, base="tiny")
    load_adapter(held, tmp_path / "b", module_name=where, name="other")
    lengths, names = [7, 13, 9, 11], ["one", "", "other", "one"]
    rows = AdapterRows.of_sequences(names, lengths, device=held.device)
    context = ForwardContext.packed(lengths, adapters=rows)
    together = held.head(held(IDS, context), context).split(lengths)
    alone = {"one": model, "": build_tiny(**BIASES), "other": other}
    for name, part, got in zip(names, IDS.split(lengths), together, strict=True):
        torch.testing.assert_close(got, alone[name].logits(part), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", SETTINGS)
def test_gradients_reach_exactly_what_is_trained(kind):
    model, adapters = model_with(kind)
    trained = adapters.trained_parameters(model)
    loss = model(IDS, ForwardContext.packed([len(IDS)])).square().sum()
    loss.backward()
    with_gradient = {n for n, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == set(trained)
    flat = [name for name in trained if not bool(trained[name].grad.any())]
    # a key's bias adds the same number to all scores of a query
    assert all(name.endswith("k_proj.bias") for name in flat)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", SETTINGS)
def test_the_plan_counts_what_is_trained(kind, tied):
    model, adapters = model_with(kind, trained=0, tie_word_embeddings=tied)
    trained = sum(p.numel() for p in adapters.trained_parameters(model).values())
    plan = estimate_training(
        model.config, adapter=config_of(kind), micro_batch_tokens=64, dtype=torch.float32
    )
    assert plan.gradients == trained * 4
    assert plan.optimizer == trained * 8


@pytest.mark.skipif(_library() is None, reason="there is no C compiler")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", SETTINGS)
def test_rows_do_not_depend_on_the_batch_in_deterministic_mode(kind, dtype):
    model, _ = model_with(kind, hidden_size=96, intermediate_size=224, num_attention_heads=6)
    model = model.to(dtype)
    check_deterministic(model)
    lengths = [1, 17, 2, 20]
    context = ForwardContext.packed(lengths, deterministic=True)
    together = model.head(model(IDS, context), context).split(lengths)
    for part, got in zip(IDS.split(lengths), together, strict=True):
        assert torch.equal(got, model.logits(part, deterministic=True))


@pytest.mark.parametrize("kind", SETTINGS)
def test_a_bf16_base_starts_unchanged_and_has_an_fp32_adapter(kind):
    model = build_tiny(**BIASES).to(torch.bfloat16)
    before = model.logits(IDS)
    adapters = attach(model, config_of(kind))
    own = {parameter.dtype for parameter in adapters.own_parameters()}
    assert own <= {torch.float32}
    if kind in EXACT:
        assert torch.equal(model.logits(IDS), before)
    else:
        torch.testing.assert_close(model.logits(IDS), before, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("kind", SETTINGS)
def test_the_same_seed_starts_with_the_same_values(kind):
    (one, first), (other, second) = model_with(kind, trained=0), model_with(kind, trained=0)
    expected = second.trained_parameters(other)
    for name, parameter in first.trained_parameters(one).items():
        assert torch.equal(parameter, expected[name])
    assert adapter_of(one) is first
