"""Token masks of a batch: computed together, checked, and stacked."""

import logging
from collections.abc import Iterable

import torch
from torch import Tensor

from easyllm.engine.request import MaskComputer, TokenMask

logger = logging.getLogger(__name__)


def compute_together(masks: Iterable[TokenMask]) -> None:
    """Computes the next masks of several completions in as few calls as possible.

    A failure is logged only: `mask` of each completion shows which of them is concerned.
    """
    groups: dict[int, tuple[MaskComputer, list[TokenMask]]] = {}
    for mask in masks:
        computer: MaskComputer | None = getattr(mask, "computer", None)
        if computer is not None:
            groups.setdefault(id(computer), (computer, []))[1].append(mask)
    for computer, members in groups.values():
        try:
            computer.compute(members)
        except Exception:
            logger.exception("token masks could not be computed together")


def checked_words(words: Tensor, vocab_size: int) -> Tensor:
    """Returns a bitmask [⌈V/32⌉] int32 on the CPU; missing words at the end are zero.

    Args:
        words: [⌈V/32⌉] int32, or fewer or more words.
        vocab_size: number V of ids.

    Raises:
        ValueError: the mask has another shape or dtype, or allows ids outside the vocabulary.
    """
    if words.dtype != torch.int32 or words.ndim != 1:
        raise ValueError(
            f"a token mask is {list(words.shape)} {words.dtype}, expected [words] int32"
        )
    full, rest = divmod(vocab_size, 32)
    beyond = words[full:]
    if len(beyond) and bool(beyond.any()):
        low = (1 << rest) - 1  # bits of the last word that are ids
        if int(beyond[0]) & 0xFFFFFFFF & ~low or bool(beyond[1:].any()):
            raise ValueError(f"a token mask allows ids beyond the model's {vocab_size} ids")
    size = full + bool(rest)
    if len(words) < size:
        words = torch.nn.functional.pad(words, (0, size - len(words)))
    return words[:size].cpu()
