"""Computes a prompt once for all its responses.

A batch of preference pairs contains the prompt of each pair twice: [p c | p r]. Embeddings, norms,
linears and feed-forward blocks act on rows independently, so they are computed on [p c r], and only
the mixers see complete sequences (`nn.context.SharedRows`). Outputs and gradients are those of the
complete sequences up to rounding.
"""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor

from easyllm.batches.packing import Batch
from easyllm.examples.sample import POSITION_ROWS, AnySample
from easyllm.nn.config import ModelConfig
from easyllm.nn.context import AdapterRows, ForwardContext, SharedRows

ANSWERS, PROMPT = "answers", "prompt"
"""Extras per sequence: the number of sequences in its group, which are adjacent, and the number of
first tokens that all of them have in common; both are 0 for padding."""
LEAST_SAVED = 1 / 16
"""Share of a batch's tokens that a common prefix must save: the rows have to be put together."""


def share_prompts(
    batch: Batch, *, base_only: bool = False
) -> tuple[Tensor, ForwardContext, Tensor]:
    """Returns the rows of a forward pass that computes each shared prompt once.

    Args:
        batch: its extras `answers` and `prompt` describe the groups.
        base_only: disable the model's adapter.

    Returns:
        Token ids [T] of the rows, their context, and the row [T'] of each token of the batch.
    """
    prompts = batch.extras[PROMPT].tolist()
    return _shared(batch, group_sizes(batch), prompts, base_only=base_only)


def share_prefix(batch: Batch) -> tuple[Tensor, ForwardContext, Tensor]:
    """Returns what `share_prompts` does, for one group whose prompt is the `common_prefix`."""
    number = len(batch.lengths)
    return _shared(batch, [number], [batch.common_prefix] * number)


def shared_lengths(batch: Batch) -> tuple[int, ...]:
    """Returns the lengths of the prompts that a forward pass of the batch does not compute again.

    One for each sequence but the first of its group, or nothing if the batch has no groups and too
    short a common prefix. The model may not share prompts: see `shares_prompts`.
    """
    if ANSWERS in batch.extras:
        prompts, found, start = batch.extras[PROMPT].tolist(), list[int](), 0
        for size in group_sizes(batch):
            found += [int(n) for n in prompts[start + 1 : start + size]]
            start += size
        return tuple(found)
    return (batch.common_prefix,) * (len(batch.lengths) - 1) if has_common_prefix(batch) else ()


def has_common_prefix(batch: Batch) -> bool:
    """Returns whether a common prefix is worth being computed once."""
    saved = batch.common_prefix * (len(batch.lengths) - 1)
    return POSITION_ROWS not in batch.extras and saved >= LEAST_SAVED * sum(batch.lengths)


def _shared(
    batch: Batch, groups: Sequence[int], prompts: Sequence[float], *, base_only: bool = False
) -> tuple[Tensor, ForwardContext, Tensor]:
    device = batch.token_ids.device
    row_of, is_first, lengths = list[Tensor](), list[Tensor](), list[int]()
    sequence = num_rows = 0
    for size in groups:
        start = num_rows
        for number in range(size):
            length = batch.lengths[sequence]
            shared = int(prompts[sequence]) if number else 0
            own = length - shared
            row_of += [torch.arange(start, start + shared), torch.arange(num_rows, num_rows + own)]
            is_first += [torch.zeros(shared, dtype=torch.bool), torch.ones(own, dtype=torch.bool)]
            num_rows += own
            sequence += 1
        lengths.append(num_rows - start)
    rows = torch.cat(row_of).to(device)
    tokens = torch.cat(is_first).nonzero().squeeze(1).to(device)
    index = torch.zeros(num_rows, dtype=torch.int64, device=device)
    context = ForwardContext(
        positions=batch.positions[tokens],
        lengths=tuple(lengths),
        adapters=AdapterRows(("",), index) if base_only else None,
        shared=SharedRows(row_of=rows, token_of=tokens, sequences=batch.context()),
    )
    return batch.token_ids[tokens], context, rows


def shares_prompts(config: ModelConfig, num_virtual: int) -> bool:
    """Returns whether a model can compute a prompt once for several responses.

    It cannot if the prompt's hidden states depend on the response, nor if virtual tokens are part
    of every sequence. A capacity of experts depends on which rows are computed together.

    Args:
        config: the model's configuration.
        num_virtual: number of virtual tokens of its adapter.
    """
    return config.is_length_invariant and not config.has_experts and not num_virtual


def num_shared_tokens(samples: Iterable[AnySample]) -> int:
    """Returns the number of tokens in prompts that another sequence of the group computes."""
    return sum(
        int(part.extras.get(PROMPT, 0.0))
        for sample in samples
        for part in sample.parts[1:]
        if ANSWERS in part.extras
    )


def group_sizes(batch: Batch) -> list[int]:
    """Returns the number of sequences of each group; a padding sequence is a group of its own."""
    answers = batch.extras[ANSWERS].tolist()
    sizes = list[int]()
    while (start := sum(sizes)) < len(answers):
        sizes.append(max(1, int(answers[start])))
    return sizes


__all__ = [
    "ANSWERS",
    "PROMPT",
    "group_sizes",
    "has_common_prefix",
    "num_shared_tokens",
    "share_prefix",
    "share_prompts",
    "shared_lengths",
    "shares_prompts",
]
