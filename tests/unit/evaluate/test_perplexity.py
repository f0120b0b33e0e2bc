"""Perplexity: each token is scored once with enough context; short texts equal one forward pass."""

import math

import pytest
import torch

from easyllm.batches.corpus_rows import validation_batches
from easyllm.batches.packing import pack
from easyllm.core.errors import ConfigError, DataError
from easyllm.corpus.shards import TokenShards, write_shards
from easyllm.evaluate.perplexity import perplexity, perplexity_of_batches
from easyllm.examples.sample import Sample
from easyllm.nn import Decoder
from easyllm.ops import cross_entropy
from tiny_models import build_tiny

TEXTS = [
    "The quick brown fox, 你好 世界, jumps over.",
    "A language model predicts 😀 the next token from the tokens before it. " * 6,
    "question answer what which",
]


def losses_of(model, ids):
    """Returns -ln p of every token after the first, from one forward pass."""
    logprobs = model.logits(ids)[:-1].double().log_softmax(-1)
    return -logprobs.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1)


def test_short_texts_are_scored_with_one_forward_pass_each(tiny_model, tiny_tokenizer):
    found = perplexity(tiny_model, tiny_tokenizer, TEXTS)
    ids = [tiny_tokenizer.encode(text) for text in TEXTS]
    assert max(map(len, ids)) <= tiny_model.config.max_seq_len
    losses = torch.cat([losses_of(tiny_model, row) for row in ids])
    assert found.tokens == len(losses)
    assert found.loss_nats == pytest.approx(float(losses.mean()), rel=1e-6)
    assert found.perplexity == pytest.approx(math.exp(float(losses.mean())), rel=1e-5)
    firsts = sum(len(tiny_tokenizer.token_text(row[0]).encode()) for row in ids)
    assert found.bytes == sum(len(text.encode()) for text in TEXTS) - firsts
    bits = float(losses.sum()) / math.log(2) / found.bytes
    assert found.bits_per_byte == pytest.approx(bits, rel=1e-6)


@pytest.mark.parametrize(("context", "stride"), [(16, 5), (16, 16), (16, 1), (7, 3), (200, 8)])
def test_windows_score_each_token_once_with_enough_context(
    tiny_model, tiny_tokenizer, context, stride
):
    text = TEXTS[1]
    ids = tiny_tokenizer.encode(text)
    expected, scored, begin = 0.0, 0, 0
    while scored < len(ids) - 1:
        window = ids[begin : begin + context + 1]
        losses = losses_of(tiny_model, window)[scored - begin :]
        others_before = scored - begin + 1
        assert begin == 0 or others_before > context - stride
        expected, scored = expected + float(losses.sum()), scored + len(losses)
        begin += stride
    found = perplexity(tiny_model, tiny_tokenizer, [text], context=context, stride=stride)
    assert found.tokens == scored == len(ids) - 1
    assert found.loss_nats == pytest.approx(expected / scored, rel=1e-6)


def test_results_do_not_depend_on_the_size_of_a_forward_pass(tiny_model, tiny_tokenizer):
    settings = {"context": 24, "stride": 8}
    one = perplexity(tiny_model, tiny_tokenizer, TEXTS, **settings)
    for batch_tokens in (1, 30, 10**6):
        other = perplexity(tiny_model, tiny_tokenizer, TEXTS, batch_tokens=batch_tokens, **settings)
        assert other.loss_nats == pytest.approx(one.loss_nats, rel=1e-6)
        assert (other.tokens, other.bytes) == (one.tokens, one.bytes)


def test_a_uniform_model_has_the_perplexity_of_its_vocabulary_size(tiny_tokenizer):
    model = build_tiny()
    model.embed_tokens.weight.data.zero_()
    assert perplexity(model, tiny_tokenizer, TEXTS).perplexity == pytest.approx(320, rel=1e-5)


def test_batches_are_scored_on_their_labels(tiny_model, tiny_tokenizer, tmp_path):
    documents = [tiny_tokenizer.encode(text) for text in TEXTS]
    write_shards(tmp_path / "s", documents, tiny_tokenizer)
    shards = TokenShards(tmp_path / "s")
    validation = validation_batches(
        shards, tiny_tokenizer, row_tokens=1024, max_tokens=10**6, micro_batch_tokens=1024
    )
    found = perplexity_of_batches(tiny_model, tiny_tokenizer, validation.batches)
    rows = torch.cat([losses_of(tiny_model, ids) for ids in documents])
    assert found.tokens == len(rows)
    assert found.bytes == validation.num_bytes
    assert found.loss_nats == pytest.approx(float(rows.mean()), rel=1e-6)
    masked = pack([Sample((5, 6, 7), (-100, 7, 8))])
    some = perplexity_of_batches(tiny_model, tiny_tokenizer, [masked])
    expected = losses_of(tiny_model, [5, 6, 7, 8])[1:].mean()
    assert some.loss_nats == pytest.approx(float(expected), rel=1e-6)


def test_soft_capped_logits_are_scored_with_the_soft_cap(tiny_tokenizer):
    base = build_tiny(seed=4)
    capped = Decoder(base.config.changed(logit_softcap=2.0)).eval()
    capped.load_state_dict(base.state_dict())
    ids = tiny_tokenizer.encode(TEXTS[0])
    found = perplexity(capped, tiny_tokenizer, TEXTS[:1])
    assert found.loss_nats == pytest.approx(float(losses_of(capped, ids).mean()), rel=1e-6)
    assert found.loss_nats != pytest.approx(float(losses_of(base, ids).mean()), rel=1e-3)


def test_the_logits_of_all_tokens_are_never_in_memory_at_once(
    tiny_model, tiny_tokenizer, monkeypatch
):
    seen = []
    inner = cross_entropy.softmax_error

    def watched(logits, labels, **options):
        seen.append(len(logits))
        return inner(logits, labels, **options)

    monkeypatch.setattr(cross_entropy, "softmax_error", watched)
    monkeypatch.setattr(cross_entropy, "CHUNK_BYTES", 4 * 320 * 10)
    found = perplexity(tiny_model, tiny_tokenizer, TEXTS)
    assert max(seen) == 10
    assert sum(seen) == found.tokens


def test_the_model_is_left_unchanged(tiny_tokenizer):
    model = build_tiny().requires_grad_(True).train()
    perplexity(model, tiny_tokenizer, TEXTS)
    assert model.training
    assert all(p.grad is None for p in model.parameters())


def test_invalid_arguments_are_named(tiny_model, tiny_tokenizer):
    def score(texts=TEXTS, model=tiny_model, **settings):
        return perplexity(model, tiny_tokenizer, texts, **settings)

    for context in (0, 257):
        with pytest.raises(ConfigError, match="must be from 1 to the model's 256 tokens"):
            score(context=context)
    for stride in (0, 17):
        with pytest.raises(ConfigError, match="would leave out tokens or never move"):
            score(context=16, stride=stride)
    for texts in ([], [""], ["a"]):
        with pytest.raises(DataError, match="nothing to score"):
            score(texts)
    layer = tiny_model.config.layers[0]
    seeing = layer.model_copy(update={"mixer": layer.mixer.model_copy(update={"causal": False})})
    config = tiny_model.config.changed(family="easyllm", layers=(seeing, seeing))
    with pytest.raises(ConfigError, match="attends to later tokens"):
        score(model=Decoder(config))
