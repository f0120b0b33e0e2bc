"""Converts between padded batches, as other libraries exchange them, and the packed layout.

    sequences   a b c        left     0 0 a b c     positions  0 0 0 1 2     right   a b c 0 0
                d e f g h             d e f g h                0 1 2 3 4             d e f g h

    positions = cumsum(mask) - 1, clamped at 0

Left padding puts the last token of every sequence in the last column, so a decoder's next-token
logits are read from that column. With right padding the last column may contain padding, whose
logits are meaningless; `last_rows` finds the last real token for either padding side.
A packed forward pass has no padding, so a padded batch is scored by unpacking it, running one
forward pass and padding the results again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from easyllm.core.errors import DataError
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.ops.cross_entropy import rows_of_chunk, softmax_error

Side = Literal["left", "right"]


@dataclass(frozen=True, slots=True)
class Padded:
    """A padded batch of B sequences; L is the longest length, or the requested one.

    Attributes:
        token_ids: [B, L] int64.
        mask: [B, L] int64, 1 for tokens and 0 for padding.
        positions: [B, L] int64, counted from 0 in each sequence; undefined for padding.
    """

    token_ids: Tensor
    mask: Tensor
    positions: Tensor


def left_pad(
    sequences: Sequence[Sequence[int]], pad_id: int, *, length: int | None = None
) -> Padded:
    """Pads the sequences on the left, as generation needs.

    Args:
        sequences: token ids, or labels (which are padded with `pad_id=-100`).
        length: L; defaults to the length of the longest sequence.

    Raises:
        DataError: there are no sequences, or one is empty or longer than `length`.

    Example:
        >>> left_pad([[5, 6], [7, 8, 9]], pad_id=0).token_ids.tolist()
        [[0, 5, 6], [7, 8, 9]]
    """
    return _pad(sequences, pad_id, length, "left")


def right_pad(
    sequences: Sequence[Sequence[int]], pad_id: int, *, length: int | None = None
) -> Padded:
    """Pads the sequences on the right; arguments and errors are those of `left_pad`."""
    return _pad(sequences, pad_id, length, "right")


def positions_of(mask: Tensor) -> Tensor:
    """Returns the [B, L] position of each token in its sequence, for either padding side."""
    return (mask.long().cumsum(-1) - 1).clamp(min=0)


def unpad(values: Tensor, mask: Tensor) -> tuple[Tensor, tuple[int, ...]]:
    """Concatenates the rows without their padding, and returns their lengths.

    Args:
        values: [B, L, ...] token ids or any other per-token values.
        mask: [B, L], bool or 0 and 1.

    Returns:
        [T, ...] and B lengths that sum to T.

    Raises:
        DataError: the shapes differ, or a row is padding only.
    """
    if mask.ndim != 2 or values.shape[:2] != mask.shape:
        raise DataError(
            f"a mask of shape {list(mask.shape)} does not fit values of shape "
            f"{list(values.shape)}; give [B, L] for values of [B, L, ...]"
        )
    lengths = tuple(mask.bool().sum(1).tolist())
    if 0 in lengths:
        raise DataError(f"row {lengths.index(0)} of the batch is padding only; remove it")
    return values[mask.bool()], lengths


def repad(packed: Tensor, mask: Tensor, *, fill: float = 0) -> Tensor:
    """Scatters [T, ...] per-token values to the tokens of `mask` [B, L]; the inverse of `unpad`.

    Returns:
        [B, L, ...], with `fill` at padding.
    """
    out = packed.new_full((*mask.shape, *packed.shape[1:]), fill)
    out[mask.bool()] = packed
    return out


def last_rows(values: Tensor, mask: Tensor) -> Tensor:
    """Returns the values of each sequence's last token, for either padding side.

    Args:
        values: [B, L, ...] per-token values.
        mask: [B, L], bool or 0 and 1.

    Returns:
        [B, ...].
    """
    columns = torch.arange(mask.shape[1], device=mask.device)
    last = (columns * mask.bool()).amax(1)
    return values[torch.arange(len(last), device=values.device), last.to(values.device)]


@torch.no_grad()
def score_padded(model: Decoder, token_ids: Tensor, mask: Tensor) -> Tensor:
    """Scores each token given the preceding tokens of its row, with one packed forward pass.

    Args:
        token_ids: [B, L].
        mask: [B, L], 1 for tokens and 0 for padding, which may be on either side.

    Returns:
        [B, L] log-probabilities in nats, fp32 (fp64 for an fp64 model); 0 for the first token of
        each row and for padding.

    Raises:
        DataError: the shapes differ, or a row is padding only.
    """
    hidden, ids, lengths = _forward(model, token_ids, mask)
    starts = torch.tensor([0, *lengths], device=ids.device).cumsum(0)[:-1]
    follows = torch.ones_like(ids, dtype=torch.bool)
    follows[starts] = False
    targets = follows.nonzero().squeeze(1)
    rows = rows_of_chunk(
        vocab_size=model.config.vocab_size, itemsize=4, device_type=model.device.type
    )
    losses = [
        softmax_error(model.head(hidden[chunk - 1]), ids[chunk], with_grad=False)[0]
        for chunk in targets.split(rows)
    ]
    scores = torch.zeros(len(ids), dtype=losses[0].dtype, device=ids.device)
    scores[targets] = -torch.cat(losses)
    return repad(scores, mask.to(scores.device))


@torch.no_grad()
def next_logits(model: Decoder, token_ids: Tensor, mask: Tensor) -> Tensor:
    """Returns the next-token logits of each row, [B, V] fp32.

    Arguments and errors are those of `score_padded`.
    """
    hidden, _, lengths = _forward(model, token_ids, mask)
    ends = torch.tensor(lengths, device=hidden.device).cumsum(0) - 1
    return model.head(hidden[ends])


def _forward(
    model: Decoder, token_ids: Tensor, mask: Tensor
) -> tuple[Tensor, Tensor, tuple[int, ...]]:
    """Returns hidden states [T, D] of the packed tokens, their ids [T], and the row lengths."""
    ids, lengths = unpad(token_ids.to(model.device), mask.to(model.device))
    return model(ids, ForwardContext.packed(lengths, device=model.device)), ids, lengths


def _pad(sequences: Sequence[Sequence[int]], pad_id: int, length: int | None, side: Side) -> Padded:
    if not sequences or not all(sequences):
        raise DataError("a batch needs sequences of at least one token each; remove empty ones")
    longest = max(map(len, sequences))
    if length is not None and longest > length:
        raise DataError(
            f"a sequence of {longest} tokens does not fit length={length}; "
            "truncate it or increase length"
        )
    width = length or longest
    token_ids = torch.full((len(sequences), width), pad_id, dtype=torch.int64)
    mask = torch.zeros_like(token_ids)
    for row, sequence in enumerate(sequences):
        columns = slice(width - len(sequence), width) if side == "left" else slice(len(sequence))
        token_ids[row, columns] = torch.tensor(sequence)
        mask[row, columns] = 1
    return Padded(token_ids, mask, positions_of(mask))
