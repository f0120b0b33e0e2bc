"""Continuations scored with shared prefixes equal those of each complete sequence alone."""

import pytest
import torch

from easyllm.core.errors import ConfigError
from easyllm.evaluate import continuations
from easyllm.evaluate.continuations import score_continuations, share_prefixes
from tiny_models import build_tiny

EXAMPLES = tuple(range(10, 40))
REQUESTS = [
    *(((*EXAMPLES, 50, 51, q), (60 + c, *range(70, 70 + c))) for q in range(3) for c in range(4)),
    ((5,), (6, 7)),
    (EXAMPLES[:7], (8,)),
    (EXAMPLES, EXAMPLES),
    ((5,), (6, 7)),
]


def alone(model, context, continuation):
    logits = model.logits(list((*context, *continuation)[:-1]))[len(context) - 1 :]
    found = logits.double().log_softmax(-1)
    chosen = found.gather(1, torch.tensor(continuation)[:, None]).squeeze(1)
    return chosen.sum().item(), bool((found.argmax(-1) == torch.tensor(continuation)).all())


@pytest.mark.parametrize("rows", [1024, 60])
@pytest.mark.parametrize("shares", [True, False])
def test_scores_equal_those_of_each_sequence_alone(monkeypatch, rows, shares):
    model = build_tiny()
    assert continuations.can_share_prefixes(model)
    monkeypatch.setattr(continuations, "BATCH_ROWS", rows)
    monkeypatch.setattr(continuations, "HEAD_BYTES", 4 * 320 * 5)
    if not shares:
        monkeypatch.setattr(continuations, "can_share_prefixes", lambda _: False)
    found = dict(score_continuations(model, REQUESTS))
    assert sorted(found) == list(range(len(REQUESTS)))
    for number, request in enumerate(REQUESTS):
        logprob, greedy = alone(model, *request)
        assert found[number].logprob == pytest.approx(logprob, abs=2e-4)
        assert (found[number].greedy, found[number].tokens) == (greedy, len(request[1]))


def test_the_greedy_continuation_is_recognised():
    model = build_tiny()
    context, best = (5, 6, 7), []
    for _ in range(3):
        best.append(int(model.logits([*context, *best])[-1].argmax()))
    found = dict(score_continuations(model, [(context, tuple(best)), (context, (best[0], 0))]))
    assert found[0].greedy
    assert not found[1].greedy


def test_each_prefix_is_one_row(monkeypatch):
    monkeypatch.setattr(continuations, "MIN_SHARED", 1)
    sequences = sorted([(1, 2, 3, 4), (1, 2, 3, 5), (1, 2, 6), (7,)])
    token_ids, context, rows = share_prefixes(sequences, torch.device("cpu"))
    assert token_ids.tolist() == [1, 2, 3, 4, 5, 6, 7]
    assert context.positions.tolist() == [0, 1, 2, 3, 3, 2, 0]
    assert token_ids[rows].tolist() == [t for ids in sequences for t in ids]


def test_a_long_context_loses_its_first_tokens():
    model = build_tiny(max_position_embeddings=16)
    long, short = tuple(range(5, 45)), tuple(range(5, 45))[-15:]
    found = dict(score_continuations(model, [(long, (50, 51)), (short, (50, 51))]))
    assert found[0] == found[1]
    with pytest.raises(ConfigError, match="17 tokens, but the model's context has 16"):
        dict(score_continuations(model, [((5,), tuple(range(17)))]))
    with pytest.raises(ConfigError, match="at least one token"):
        dict(score_continuations(model, [((), (5,))]))
