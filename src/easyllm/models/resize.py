"""Growing a model's vocabulary: rows of the embedding and of the output projection, moved together.

A new row is the mean of the rows of the tokens that spelt its text before, so that the model starts from what it knew
(Hewitt 2021, "Initializing New Word Embeddings for Pretrained Language Models"). Old ids keep their logits. The logit
of a mean of rows is the mean of their logits, so a new id never scores above the best of its old pieces, and a row that
only fills up, the mean of all old rows, never above the best old id: the most likely id stays what it was.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from easyllm.core.errors import ConfigError
from easyllm.models.full_weights import require_full_weights
from easyllm.nn.config import ModelConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder

MULTIPLE = 64
"""The vocabulary is filled up to a multiple of this: matrix products like round numbers."""


def resize_embeddings(
    model: Decoder, old_pieces: Mapping[int, tuple[int, ...]], *, multiple_of: int = MULTIPLE
) -> Decoder:
    """Grows the model in place to hold the ids of an extended tokenizer.

    Args:
        old_pieces: for each new id the old ids whose mean its row becomes (`Extension.old_pieces`). Rows the model
            holds from the first new id on belong to no token so far; the new ones take their place.

    Raises:
        ConfigError: the new ids do not follow the model's, or a piece is not among its ids; the model is quantized or
            has an adapter.
    """
    require_full_weights(model, "growing a vocabulary")
    size = grown_vocab_size(model.config, old_pieces, multiple_of=multiple_of)
    model.embed_tokens.weight = _grow(model.embed_tokens.weight, old_pieces, size)
    model.embed_tokens.num_embeddings = size
    if model.lm_head is not None:
        model.lm_head.weight = _grow(model.lm_head.weight, old_pieces, size)
        model.lm_head.out_features = size
    model.config = model.config.changed(vocab_size=size)
    return model


def grown_vocab_size(
    config: ModelConfig, old_pieces: Mapping[int, tuple[int, ...]], *, multiple_of: int = MULTIPLE
) -> int:
    """The vocabulary that `resize_embeddings` leads to; never smaller than it was.

    Raises:
        ConfigError: as there.
    """
    first = min(old_pieces, default=config.vocab_size)
    end = first + len(old_pieces)
    if list(old_pieces) != list(range(first, end)) or first > config.vocab_size:
        raise ConfigError(
            f"new ids {first} to {max(old_pieces)} do not follow the model's {config.vocab_size} ids; "
            "extend the model's own tokenizer"
        )
    if not all(old and min(old) >= 0 and max(old) < first for old in old_pieces.values()):
        raise ConfigError(f"a new id is made of ids outside the old ones, 0 to {first - 1}")
    return max(config.vocab_size, -(-end // multiple_of) * multiple_of)


@torch.no_grad()
def loss_of_text(model: Decoder, token_ids: list[int], *, num_ids: int | None = None) -> float:
    """The mean loss of a text's ids after the first, in nats.

    Args:
        num_ids: the softmax is over so many ids, the first ones; by default over all. Over a grown model's old ids the
            loss is what it was before it grew.
    """
    ids = torch.as_tensor(token_ids, device=model.device)
    hidden = model(ids, ForwardContext.packed([ids.numel()], device=model.device))[:-1]
    total = 0.0
    for rows, targets in zip(hidden.split(64), ids[1:].split(64), strict=True):
        logits = model.head(rows)[:, :num_ids]
        total += float(F.cross_entropy(logits, targets, reduction="sum"))
    return total / max(len(token_ids) - 1, 1)


@torch.no_grad()
def _grow(weight: Tensor, old_pieces: Mapping[int, tuple[int, ...]], size: int) -> nn.Parameter:
    """`[V, D]` to `[size, D]`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    first = min(old_pieces, default=len(weight))
    grown = weight[:first].mean(0, dtype=wide).to(weight.dtype).repeat(size, 1)
    grown[: len(weight)] = weight
    for index, old in old_pieces.items():
        grown[index] = weight[list(old)].to(wide).mean(0)
    return nn.Parameter(grown, requires_grad=weight.requires_grad)
