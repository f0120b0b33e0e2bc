"""The plan of a forward pass: tokens and page numbers chosen by the scheduler, no tensors."""

from dataclasses import dataclass, field

from easyllm.engine.page_table import Copies


@dataclass(frozen=True, slots=True, kw_only=True)
class ScheduledChunk:
    """The part of one sequence in a forward pass.

    Attributes:
        sequence_id: id under which recurrent states are stored.
        token_ids: the tokens to compute.
        start: position of the first of these tokens.
        pages: pages of the entire sequence, with space for these tokens.
        num_logit_rows: number of last tokens whose logits are needed (0 until the last chunk of a
            prompt).
        prefix: number of first tokens with bidirectional attention among them (prefix LM).
        adapter: name of the adapter that its rows use; empty for the base model.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    num_logit_rows: int = 1
    prefix: int = 0
    adapter: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One forward pass, and the cache operations to execute before it.

    Attributes:
        pieces: parts of the sequences, in the order of the packed tokens.
        copies: pages to copy: destination → source.
        forks: (parent, child) sequence ids; the child starts with the parent's recurrent states.
        dropped: ids of sequences whose recurrent states are deleted, after the forks.
    """

    pieces: tuple[ScheduledChunk, ...]
    copies: Copies = field(default_factory=dict)
    forks: tuple[tuple[int, int], ...] = ()
    dropped: tuple[int, ...] = ()
