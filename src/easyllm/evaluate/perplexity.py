"""Perplexity and bits per byte of a model on text.

    loss = Σ -ln p(token | tokens before it)
    perplexity = exp(loss / tokens)
    bits per byte = loss / ln 2 / bytes

Perplexity is per token, so it is comparable only between models with the same tokenizer; bits per
byte is comparable between all models. A text longer than the context is scored with a sliding
window that advances by `stride`; each window scores the tokens that no earlier window has scored:

    stride 4, context 8     |a b c d e f g h|                predicts b … i
                                    |e f g h i j k l|        predicts j … m

Each token scored after the first window thus has more than context - stride (here 4) tokens of
context.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass

import torch

from easyllm.batches.packing import Batch, pack
from easyllm.core.errors import CheckpointError, ConfigError, DataError
from easyllm.core.json_types import JsonObject
from easyllm.corpus.token_bytes import token_bytes
from easyllm.examples.sample import Sample
from easyllm.nn.decoder import Decoder
from easyllm.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.objectives.losses import LossOutput, MeanLoss, bits_per_byte, evaluate_loss

BATCH_TOKENS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Perplexity:
    """Perplexity of a text.

    Attributes:
        loss_nats: mean loss per scored token in nats.
        perplexity: exp(loss_nats).
        bits_per_byte: summed loss in bits divided by the number of scored bytes; None if there are
            no scored bytes.
        tokens, bytes: number of scored tokens and bytes. The first token of a text has no context
            and is not scored; if the tokenizer adds a BOS token, that is the first token.
    """

    loss_nats: float
    perplexity: float
    bits_per_byte: float | None
    tokens: int
    bytes: int

    def as_dict(self) -> JsonObject:
        """Returns the fields as a dict."""
        return asdict(self)


def perplexity(
    model: Decoder,
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    context: int | None = None,
    stride: int | None = None,
    batch_tokens: int = BATCH_TOKENS,
) -> Perplexity:
    """Computes the perplexity of texts, each scored independently.

    Args:
        model: the model.
        tokenizer: its tokenizer; special tokens that it adds to a text (BOS) are added.
        texts: the texts; the iterable is consumed once.
        context: tokens per window; by default the model's full context.
        stride: step from one window to the next, in tokens; by default half the context. A smaller
            stride is slower, but gives each token more context (a model with unlimited context
            would give the same result for any stride).
        batch_tokens: approximate number of tokens per forward pass; windows are packed.

    Raises:
        ConfigError: the window or stride is out of range, or the model is not causal.
        DataError: there is nothing to score, because no text has a second token.

    Example:
        >>> perplexity(model, tokenizer, [open("wiki.txt").read()]).bits_per_byte  # doctest: +SKIP
        0.93
    """
    context, stride = window_of(model, context, stride)
    sizes, num_bytes = token_bytes(tokenizer), 0

    def windows() -> Iterator[Sample]:
        nonlocal num_bytes
        for text in texts:
            ids = tokenizer.encode(text)
            if ids:
                num_bytes += len(text.encode("utf-8", "replace")) - int(sizes[ids[0]])
            yield from _windows(ids, context, stride)

    loss = _mean_loss(model, map(pack, _grouped(windows(), batch_tokens)))
    return _result(loss, num_bytes)


def window_of(model: Decoder, context: int | None, stride: int | None) -> tuple[int, int]:
    """Returns the window and the stride of `perplexity`, by default those of its arguments.

    Raises:
        ConfigError: one is out of range.
    """
    longest = model.config.max_seq_len - model.num_virtual_tokens
    context = longest if context is None else context
    if not 1 <= context <= longest:
        raise ConfigError(f"context={context} must be from 1 to the model's {longest} tokens")
    stride = max(1, context // 2) if stride is None else stride
    if not 1 <= stride <= context:
        raise ConfigError(
            f"stride={stride} would leave out tokens or never move; set it from 1 to "
            f"context={context}"
        )
    return context, stride


def perplexity_of_batches(
    model: Decoder, tokenizer: Tokenizer, batches: Iterable[Batch]
) -> Perplexity:
    """Computes the perplexity of packed sequences over their labels.

    For example, of the validation rows of token shards.

    Raises:
        ConfigError: the model is not causal.
        DataError: there are no labels.
    """
    sizes, num_bytes = torch.from_numpy(token_bytes(tokenizer)), 0

    def counted() -> Iterator[Batch]:
        nonlocal num_bytes
        for batch in batches:
            num_bytes += int(sizes[batch.labels[batch.labels != IGNORE_INDEX].cpu()].sum())
            yield batch

    loss = _mean_loss(model, counted())
    return _result(loss, num_bytes)


def _windows(ids: list[int], context: int, stride: int) -> Iterator[Sample]:
    """Yields the windows of a text as samples that label every token but the first exactly once."""
    targets = ids[1:]
    begin = scored = 0
    while scored < len(targets):
        end = min(begin + context, len(targets))
        labels = [IGNORE_INDEX] * (scored - begin) + targets[scored:end]
        yield Sample(tuple(ids[begin:end]), tuple(labels))
        scored, begin = end, begin + stride


def _grouped(samples: Iterable[Sample], max_tokens: int) -> Iterator[list[Sample]]:
    """Groups samples, in order, up to `max_tokens` tokens; a longer sample forms its own group."""
    group, filled = list[Sample](), 0
    for sample in samples:
        if group and filled + len(sample.token_ids) > max_tokens:
            yield group
            group, filled = [], 0
        group.append(sample)
        filled += len(sample.token_ids)
    if group:
        yield group


def _mean_loss(model: Decoder, batches: Iterable[Batch]) -> MeanLoss:
    """Returns the loss over all labels; the logits of all tokens are never in memory at once."""
    if not all(layer.mixer.causal for layer in model.config.layers):
        raise ConfigError(
            "the model attends to later tokens, so its perplexity is undefined; use a causal model"
        )
    weight = model.head_weight.detach()

    def loss(model: Decoder, batch: Batch) -> LossOutput:
        hidden, factor = model.loss_factors(model(batch.token_ids, batch.context()), weight)
        softcap = model.config.logit_softcap
        out = linear_cross_entropy(hidden, factor, batch.labels, softcap=softcap)
        return LossOutput(out.sum, out.num_tokens)

    return evaluate_loss(model, batches, loss)


def _result(loss: MeanLoss, num_bytes: int) -> Perplexity:
    if loss.num_terms == 0:
        raise DataError("there is nothing to score: no text has a second token; give longer texts")
    if math.isnan(loss.nats):
        raise CheckpointError(
            "the loss is NaN: the model computes values that are not finite; copy its files again, "
            "or load it in float32 if they are whole"
        )
    return Perplexity(
        loss_nats=loss.nats,
        perplexity=math.exp(loss.nats) if loss.nats < 700 else math.inf,
        bits_per_byte=bits_per_byte(loss.sum, num_bytes) if num_bytes else None,
        tokens=loss.num_terms,
        bytes=num_bytes,
    )
