"""Probes: the residual stream is a sum, ablation removes terms, restored states bring answers."""

import json

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.models import load_model, save_model
from easyllm.models.experts import upcycle
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.probe import (
    ablated,
    block_importance,
    causal_trace,
    logit_lens,
    probe_experts,
    read_memories,
    residual_contributions,
)
from easyllm.probe.experts import without_expert
from easyllm.probe.residual import recorded
from easyllm_command import easyllm
from tiny_models import build_tiny

IDS = list(range(5, 25))


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_embedding_attention_and_feed_forwards_sum_to_the_final_residual(model_type):
    model = build_tiny(model_type=model_type)
    final = []
    handle = model.norm.register_forward_pre_hook(lambda _, inputs: final.append(inputs[0]))
    logits = model.logits(IDS)
    handle.remove()
    terms = residual_contributions(model, IDS)
    assert [term.name for term in terms] == ["embedding", *["attention", "feed_forward"] * 2]
    total = sum(term.vector for term in terms)
    torch.testing.assert_close(total, final[0], atol=1e-5, rtol=1e-5)
    if model_type == "llama":  # Gemma 2 caps its logits
        expected = logits[-1].max().item()
        assert sum(term.logit for term in terms) == pytest.approx(expected, rel=1e-4)
    else:
        assert all(term.logit is None for term in terms)


def test_a_post_norm_model_has_no_such_sum():
    config = build_tiny().config
    layers = [layer.model_copy(update={"norm_placement": "post"}) for layer in config.layers]
    model = Decoder(config.changed(layers=tuple(layers), final_norm=False))
    with pytest.raises(ConfigError, match="norms of this model follow the addition"):
        residual_contributions(model, IDS)


def test_the_lens_ends_with_the_models_own_prediction():
    model = build_tiny()
    rows = logit_lens(model, IDS, top=2)
    assert [row.layer for row in rows] == [-1, 0, 1]
    own = model.logits(IDS)[-1].softmax(-1)
    assert rows[-1].token_ids == own.topk(2).indices.tolist()
    assert rows[-1].probabilities == pytest.approx(own.topk(2).values.tolist(), rel=1e-4)
    assert rows[-1].final == pytest.approx(rows[-1].probabilities[0])


def test_an_ablated_block_adds_nothing_and_is_there_again_afterwards():
    model = build_tiny()
    before = model.logits(IDS)
    with ablated(model, [(0, "mixer"), (1, "feed_forward")]), recorded(model) as terms:
        inside = model.logits(IDS)
    assert not torch.allclose(inside, before)
    sizes = {(name, layer): float(vector.norm()) for name, layer, vector in terms}
    assert sizes["attention", 0] == sizes["feed_forward", 1] == 0
    assert sizes["attention", 1] > 0
    assert torch.equal(model.logits(IDS), before)
    found = block_importance(model, IDS)
    assert len(found) == 4
    assert all(each.kl_nats > 0 for each in found)


def test_restoring_the_last_layer_at_the_last_token_brings_the_answer_back():
    model = build_tiny()
    trace = causal_trace(model, IDS, (0, 6), samples=2)
    assert trace.answer == int(model.logits(IDS)[-1].argmax())
    assert trace.corrupted != pytest.approx(trace.clean, rel=1e-2)
    assert trace.restored[-1][-1] == pytest.approx(trace.clean, rel=1e-4)
    # in the last layer, a token other than the last one changes nothing
    assert trace.restored[-1][3] == pytest.approx(trace.corrupted, rel=1e-4)
    with pytest.raises(ConfigError, match="spans tokens 3 to 99"):
        causal_trace(model, IDS, (3, 99))


def test_memories_are_the_terms_of_a_feed_forward():
    model = build_tiny()
    block = model.layers[1].feed_forward
    with recorded(model) as terms:
        model.logits(IDS)
    (out,) = [vector[-1] for name, layer, vector in terms if (name, layer) == ("feed_forward", 1)]
    every = [m for m in read_memories(model, IDS, per_layer=64) if m.layer == 1]
    values = block.down_proj.weight
    total = sum(m.weight * values[:, m.neuron] for m in every)
    torch.testing.assert_close(total, out, atol=1e-4, rtol=1e-4)
    assert [m.size for m in every] == sorted((m.size for m in every), reverse=True)


def test_the_load_of_experts_and_the_loss_without_one():
    model = upcycle(build_tiny(), 3, noise=0.3)
    texts = [IDS, list(range(40, 70))]
    reports = probe_experts(model, texts)
    assert [report.layer for report in reports] == [0, 1]
    for report in reports:
        assert sum(report.load) == pytest.approx(1)
        assert sum(report.first) == pytest.approx(1)
        assert 0 < report.entropy <= 1
    before = model.logits(IDS)
    moe = model.layers[0].feed_forward
    with without_expert(moe, 1):
        routing = []
        context = ForwardContext.packed([len(IDS)], routing=routing)
        model(torch.tensor(IDS), context)
        assert 1 not in routing[0].chosen
        assert not torch.allclose(model.logits(IDS), before)
    assert torch.equal(model.logits(IDS), before)
    with pytest.raises(ConfigError, match="has no experts"):
        probe_experts(build_tiny(), texts)


def test_the_command_prints_figures_and_draws(tmp_path, tiny_folder):
    picture = tmp_path / "p.svg"
    words = [str(tiny_folder), "The quick brown fox", "--subject", "quick"]
    done = easyllm("probe", *words, "--output", str(picture), "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {
        *("tokens", "predicts", "contributions", "lens", "without", "memories", "trace")
    }
    assert picture.read_text().startswith("<svg")
    assert "would predict" in easyllm("probe", *words[:2]).stdout
    refused = easyllm("probe", *words[:2], "--subject", "absent")
    assert refused.returncode == 2
    assert "does not contain the subject 'absent'" in refused.stderr

    model = upcycle(load_model(tiny_folder), 3, noise=0.1)
    from easyllm.models import load_tokenizer

    save_model(model, tmp_path / "moe", tokenizer=load_tokenizer(tiny_folder))
    lines = tmp_path / "lines.txt"
    lines.write_text("hello world\n\nThe lazy dog jumps\n")
    done = easyllm("probe", "experts", tmp_path / "moe", lines, "--json")
    assert [report["layer"] for report in json.loads(done.stdout)] == [0, 1]
