"""The contrastive objective: its loss, any division into micro-batches, masked copies."""

import json

import pytest
import torch

from easyllm.batches.packing import split_by_tokens
from easyllm.core.errors import DataError
from easyllm.train.data_config import TextPairsConfig
from easyllm.train.loop import accumulate
from easyllm.train.objectives import Contrastive, ContrastiveConfig
from tiny_models import build_tiny

ROWS = [
    {"query": "green tea?", "positive": "Tea that is not fermented."},
    {"query": "deep sea", "positive": "The ocean.", "negatives": ["A pond.", "A cup."]},
    {"query": "what is green tea", "positive": "Tea that is not fermented."},
    {"query": "hello", "positive": "good morning world"},
]


@pytest.fixture
def samples(tmp_path, tiny_tokenizer):
    file = tmp_path / "pairs.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    data = TextPairsConfig(train=[str(file)])
    found, account = Contrastive().prepare(data, [file], tiny_tokenizer)
    assert (account.rows, account.samples, len(found[1].parts)) == (4, 4, 4)
    return found


def vectors_of(model, texts, tokenizer):
    found = []
    for text in texts:
        ids = torch.tensor(tokenizer.encode(text))
        from easyllm.nn.context import ForwardContext

        found.append(model(ids, ForwardContext.packed([len(ids)])).mean(0))
    return torch.nn.functional.normalize(torch.stack(found), dim=-1)


def test_the_loss_is_a_softmax_over_candidates_without_copies_of_the_positive(
    samples, tiny_model, tiny_tokenizer
):
    objective = Contrastive(ContrastiveConfig(temperature=0.1))
    batch = objective.collate(samples)
    found = objective.loss(tiny_model, batch.padded_to_multiple(64))
    queries = vectors_of(tiny_model, [r["query"] for r in ROWS], tiny_tokenizer)
    texts = [r["positive"] for r in ROWS] + ROWS[1]["negatives"]
    scores = queries @ vectors_of(tiny_model, texts, tiny_tokenizer).T / 0.1
    scores[0, 2] = scores[2, 0] = float("-inf")
    wanted = torch.nn.functional.cross_entropy(scores, torch.arange(4), reduction="sum")
    torch.testing.assert_close(found.sum, wanted, atol=1e-4, rtol=1e-4)
    assert found.num_tokens == 4
    right = (scores.argmax(1) == torch.arange(4)).float().mean()
    assert found.metrics["accuracy"] == pytest.approx(float(right))


@pytest.mark.parametrize("tokens", [20, 60])
def test_gradients_do_not_depend_on_the_micro_batches(samples, tokens):
    grads, losses = [], []
    for size in (10**6, tokens):
        model = build_tiny().double().requires_grad_(True)
        objective = Contrastive()
        batches = [objective.collate(group) for group in split_by_tokens(samples, size)]
        assert (len(batches) > 1) == (size == tokens)
        loss, metrics = accumulate(model, objective, batches)
        losses.append((loss, metrics["accuracy"]))
        grads.append([p.grad for p in model.parameters() if p.grad is not None])
    assert losses[0] == pytest.approx(losses[1])
    for one, other in zip(*grads, strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=1e-5)


def test_evaluation_ranks_among_all_candidates(samples, tiny_model):
    objective = Contrastive()
    whole = objective.evaluate_samples(tiny_model, samples, 10**6)
    split = objective.evaluate_samples(tiny_model, samples, 20)
    assert whole == pytest.approx(split, rel=1e-4)
    assert set(whole) == {"loss_nats", "recall_at_1", "mrr"}
    assert whole["recall_at_1"] <= whole["mrr"] <= 1


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"query": "a"}, "no text under 'positive'"),
        ({"query": " ", "positive": "b"}, "no text under 'query'"),
        ({"query": "a", "positive": "b", "negatives": "c"}, "expected a list of texts"),
    ],
)
def test_rows_without_their_texts_are_refused(tmp_path, tiny_tokenizer, row, reason):
    file = tmp_path / "pairs.jsonl"
    file.write_text(json.dumps(row))
    data = TextPairsConfig(train=[str(file)])
    with pytest.raises(DataError, match=reason):
        Contrastive().prepare(data, [file], tiny_tokenizer)
