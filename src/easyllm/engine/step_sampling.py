"""Sampling of a step: next tokens of all completions, and log-probabilities of prompt tokens."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyllm.engine.generation import Generation
from easyllm.engine.request import TokenEvent
from easyllm.engine.sampling import Draft, prompt_logprobs, sample_tokens
from easyllm.engine.step import ScheduledChunk


@dataclass(slots=True)
class SampleSlot:
    """A completion whose next tokens are chosen from a step's logits.

    Attributes:
        generation: the completion.
        row: the row of the logits for its next token.
        drafts: its draft tokens; the rows after `row` are theirs, one for each.
    """

    generation: Generation
    row: int
    drafts: tuple[Draft, ...] = ()


def sample_slots(
    slots: Sequence[SampleSlot], logits: Tensor, *, row_by_row: bool
) -> dict[int, list[TokenEvent]]:
    """Chooses the next token of all completions; again for those whose draft token is accepted.

    Args:
        slots: the completions.
        logits: [rows, V], fp32.
        row_by_row: as in `sample_tokens` (deterministic mode).

    Returns:
        The events of each request, by its id.
    """
    events: dict[int, list[TokenEvent]] = {}
    turn, alive = 0, list(slots)
    while alive:
        rows = [slot.row + turn for slot in alive]
        all_rows = rows == list(range(len(logits)))
        drafts = [slot.drafts[turn] if turn < len(slot.drafts) else None for slot in alive]
        samplers = [slot.generation.sampler for slot in alive]
        chosen = logits if all_rows else logits[torch.tensor(rows, device=logits.device)]
        choices = sample_tokens(chosen, samplers, drafts, row_by_row=row_by_row)
        continuing = []
        for slot, choice, draft in zip(alive, choices, drafts, strict=True):
            event = slot.generation.take(choice)
            events.setdefault(event.request_id, []).append(event)
            accepted = draft is not None and draft.token_id == choice.token_id
            if accepted and slot.generation.finish_reason is None:
                continuing.append(slot)
        alive, turn = continuing, turn + 1
    return events


def store_prompt_logprobs(
    generation: Generation,
    piece: ScheduledChunk,
    rows: Tensor,
    *,
    num_virtual: int,
) -> None:
    """Stores the log-probability of the prompt token after each computed one.

    Args:
        generation: the completion that stores them.
        piece: the computed chunk of its prompt.
        rows: logits of the chunk's tokens, [tokens, V].
        num_virtual: number of virtual tokens before the prompt, which have no log-probability.
    """
    sequence, count = generation.sequence, generation.request.params.prompt_logprobs
    assert count is not None, "prompt_rows is set only if prompt_logprobs was requested"
    assert generation.prompt_logprobs is not None, "created together with prompt_rows"
    first = max(0, num_virtual - piece.start)  # first row after the virtual tokens
    end = min(piece.start + len(rows) + 1, sequence.prompt_length)
    positions = range(piece.start + 1 + first, end)
    tokens = [sequence.tokens[position] for position in positions]
    if tokens:
        found = prompt_logprobs(rows[first : first + len(tokens)], tokens, count)
        generation.prompt_logprobs.update(zip(positions, found, strict=True))
    if piece.start + len(rows) >= sequence.prompt_length:
        sequence.prompt_rows = False
