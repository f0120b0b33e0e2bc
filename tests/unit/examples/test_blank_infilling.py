"""GLM's blank infilling: the published figure, the spans, the tokens."""

import json
from itertools import pairwise
from random import Random

import pytest
import torch

from easyllm.batches.packing import pack
from easyllm.core.errors import ConfigError, DataError
from easyllm.examples.blank_infilling import (
    MAX_SPAN,
    BlankMixture,
    BlankTokens,
    document_span,
    infilled,
    poisson_spans,
    prepare_blanks,
    sentence_spans,
)
from easyllm.nn.context import block_position_rows
from tiny_models import build_tiny

M, S, E = 90, 91, 92
TOKENS = BlankTokens(mask=M, sentence_mask=93, document_mask=94, start=S, end=E)
NO_LOSS = -100


def test_the_figure_of_the_paper():
    """x3, and x5 x6, of six tokens are masked and generated in the other order."""
    sample = infilled([1, 2, 3, 4, 5, 6], [(2, 3), (4, 6)], [1, 0], M, TOKENS)
    assert sample.token_ids == (1, 2, M, 4, M, S, 5, 6, S, 3)
    assert sample.labels == (*[NO_LOSS] * 5, 5, 6, E, 3, E)
    rows = torch.tensor(sample.extras["position_rows"])
    assert (rows[:, 0] + 1).tolist() == [1, 2, 3, 4, 5, 5, 5, 5, 3, 3]  # the paper counts from 1
    assert rows[:, 1].tolist() == [0, 0, 0, 0, 0, 1, 2, 3, 1, 2]


def test_a_batch_has_the_rows_and_the_prefix_of_the_corrupted_text():
    samples = [
        infilled([1, 2, 3, 4, 5, 6], [(2, 3), (4, 6)], [1, 0], M, TOKENS),
        infilled([7, 8, 9], [(1, 3)], [0], M, TOKENS),
    ]
    batch = pack(samples)
    mask = build_tiny().config.changed(prompt_mask="prefix_before_last")
    context = batch.context(mask=mask)
    assert context.prefix_lengths == (5, 2)
    assert context.position_rows.T.tolist() == [
        list(p) for s in samples for p in s.extras["position_rows"]
    ]
    # one masked span at the end is a prompt and its answer
    second = block_position_rows(batch.positions[10:], (5,), (2,))
    assert second.T.tolist() == [list(p) for p in samples[1].extras["position_rows"]]


@pytest.mark.parametrize("length", [1, 2, 7, 100, 2000])
def test_spans_cover_the_ratio_and_are_apart(length):
    rng = Random(0)
    for _ in range(50):
        spans = poisson_spans(length, ratio=0.15, mean=3.0, rng=rng)
        assert spans[0][0] >= 0
        assert spans[-1][1] <= length
        assert all(a[1] < b[0] for a, b in pairwise(spans))
        sizes = [end - start for start, end in spans]
        assert all(1 <= size <= MAX_SPAN for size in sizes)
        assert sum(sizes) == max(1, round(0.15 * length)) or length < 10


def test_lengths_follow_the_poisson_distribution_without_zero():
    rng, sizes = Random(1), []
    for _ in range(300):
        spans = poisson_spans(1000, ratio=0.15, mean=3.0, rng=rng)
        sizes += [end - start for start, end in spans[:-1]]  # the last may be cut
    assert sum(sizes) / len(sizes) == pytest.approx(3 / (1 - 2.718281828**-3), rel=0.05)


def test_sentences_and_documents():
    rng = Random(0)
    for _ in range(50):
        spans = sentence_spans([10, 14, 30, 40], ratio=0.15, rng=rng)
        assert set(spans) <= {(0, 10), (10, 14), (14, 30), (30, 40)}
        assert spans == sorted(spans)
        assert sum(end - start for start, end in spans) >= 6
        start, end = document_span(40, rng=rng)
        assert end == 40
        assert 0 <= start <= 20


MIXTURE = BlankMixture(ratio=0.3, mean_span=3.0, sentences=0.3, documents=0.3, copies=4, seed=0)


def test_rows_become_samples_whose_text_can_be_restored(tmp_path, tiny_tokenizer):
    backend = tiny_tokenizer.backend
    with pytest.raises(ConfigError, match=r"\[MASK\], which the tokenizer lacks"):
        BlankTokens.of(tiny_tokenizer)
    file = tmp_path / "a.jsonl"
    texts = ["The quick brown fox. It jumps over the dog! 你好，世界。再见", "hello " * 60]
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    names = ["[MASK]", "[sMASK]", "[gMASK]", "sop", "eop"]
    copy = type(tiny_tokenizer)(type(backend).from_str(backend.to_str()), tiny_tokenizer.special)
    copy.backend.add_special_tokens(names)
    tokens = BlankTokens.of(copy)
    samples, stats = prepare_blanks([file], copy, MIXTURE, text_key="text", max_seq_len=64)
    assert stats.rows == 2
    assert len(samples) == stats.samples > 8
    masks = {tokens.mask, tokens.sentence_mask, tokens.document_mask}
    known = [copy.encode(text, special_tokens=False) for text in texts]
    seen = set()
    for sample in samples:
        ids, positions = list(sample.token_ids), sample.extras["position_rows"]
        text = ids[: ids.index(tokens.start)]
        spans = {}
        for i, token in enumerate(ids):
            if token == tokens.start:
                end = next((j for j in range(i + 1, len(ids)) if ids[j] == tokens.start), len(ids))
                spans[positions[i][0]] = ids[i + 1 : end]
        seen.update(masks & set(text))
        whole = [
            t for p, token in enumerate(text) for t in (spans[p] if token in masks else [token])
        ]
        assert any(whole == ids[i : i + len(whole)] for ids in known for i in range(len(ids)))
    assert seen == masks
    with pytest.raises(DataError, match="has no text under 'body'"):
        prepare_blanks([file], copy, MIXTURE, text_key="body", max_seq_len=64)
