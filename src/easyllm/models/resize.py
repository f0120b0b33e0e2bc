"""Extending a model's vocabulary by resizing its embedding and its output projection together.

Each new row is the mean of the rows of the old tokens that encoded the same text, so that training
starts from what the model already knows (Hewitt 2021, "Initializing New Word Embeddings for
Pretrained Language Models"). Old ids keep their logits. The logit of a mean of rows is the mean of
their logits, so a new id never scores higher than the best of its old pieces. Padding rows are the
mean of all old rows and therefore never score higher than the best old id. The most likely id does
not change.
"""

from collections.abc import Mapping, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from easyllm.core.errors import ConfigError
from easyllm.models.full_weights import require_full_weights
from easyllm.nn.config import ModelConfig
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder

MULTIPLE = 64
"""The vocabulary is padded to a multiple of this, because GEMMs are fastest at such sizes."""


def resize_embeddings(
    model: Decoder, old_pieces: Mapping[int, tuple[int, ...]], *, multiple_of: int = MULTIPLE
) -> Decoder:
    """Resizes the model in place to fit the ids of an extended tokenizer.

    Args:
        model: the model to resize.
        old_pieces: for each new id, the old ids whose rows are averaged to initialise it
            (`Extension.old_pieces`). Existing rows from the first new id on are padding rows
            without a token; the new rows overwrite them.
        multiple_of: the new vocabulary size is rounded up to a multiple of this.

    Returns:
        `model` itself.

    Raises:
        ConfigError: the new ids do not directly follow the old ones, or a piece is not an old id;
            or the model is quantized or has an adapter.
    """
    require_full_weights(model, "extending the vocabulary")
    size = resized_vocab_size(model.config, old_pieces, multiple_of=multiple_of)
    model.embed_tokens.weight = _grow(model.embed_tokens.weight, old_pieces, size)
    model.embed_tokens.num_embeddings = size
    if model.lm_head is not None:
        model.lm_head.weight = _grow(model.lm_head.weight, old_pieces, size)
        model.lm_head.out_features = size
    model.config = model.config.changed(vocab_size=size)
    return model


def resized_vocab_size(
    config: ModelConfig, old_pieces: Mapping[int, tuple[int, ...]], *, multiple_of: int = MULTIPLE
) -> int:
    """Returns the vocabulary size after `resize_embeddings`; never smaller than before.

    Raises:
        ConfigError: the new ids do not directly follow the old ones, or a piece is not an old id.
    """
    first = min(old_pieces, default=config.vocab_size)
    end = first + len(old_pieces)
    if list(old_pieces) != list(range(first, end)) or first > config.vocab_size:
        raise ConfigError(
            f"new ids {first} to {max(old_pieces)} do not directly follow the model's "
            f"{config.vocab_size} ids; extend the model's own tokenizer"
        )
    if not all(old and min(old) >= 0 and max(old) < first for old in old_pieces.values()):
        raise ConfigError(
            f"a new id is composed of ids outside the old range 0 to {first - 1}; "
            "extend the model's own tokenizer"
        )
    return max(config.vocab_size, -(-end // multiple_of) * multiple_of)


def loss_of_text(model: Decoder, token_ids: list[int], *, num_ids: int | None = None) -> float:
    """Returns the mean cross-entropy of a text's tokens after the first, in nats per token.

    Args:
        model: the language model.
        token_ids: the ids of the text.
        num_ids: restricts the softmax to the first `num_ids` ids; by default it covers all ids.
            Restricted to the old ids, an extended model has the same loss as before.
    """
    return losses_of_text(model, token_ids, (num_ids,))[0]


@torch.no_grad()
def losses_of_text(
    model: Decoder, token_ids: list[int], num_ids: Sequence[int | None] = (None,)
) -> list[float]:
    """Returns the losses of a text for several values of `num_ids`, from one forward pass.

    Args:
        model, token_ids: as for `loss_of_text`.
        num_ids: the values; None covers all ids.
    """
    ids = torch.as_tensor(token_ids, device=model.device)
    hidden = model(ids, ForwardContext.packed([ids.numel()], device=model.device))[:-1]
    totals = [0.0] * len(num_ids)
    for rows, targets in zip(hidden.split(64), ids[1:].split(64), strict=True):
        logits = model.head(rows)
        for at, end in enumerate(num_ids):
            totals[at] += float(F.cross_entropy(logits[:, :end], targets, reduction="sum"))
    return [total / max(len(token_ids) - 1, 1) for total in totals]


@torch.no_grad()
def _grow(weight: Tensor, old_pieces: Mapping[int, tuple[int, ...]], size: int) -> nn.Parameter:
    """Returns the `[V, D]` matrix extended to `[size, D]`."""
    wide = torch.promote_types(weight.dtype, torch.float32)
    first = min(old_pieces, default=len(weight))
    grown = weight[:first].mean(0, dtype=wide).to(weight.dtype).repeat(size, 1)
    grown[: len(weight)] = weight
    for index, old in old_pieces.items():
        grown[index] = weight[list(old)].to(wide).mean(0)
    return nn.Parameter(grown, requires_grad=weight.requires_grad)
