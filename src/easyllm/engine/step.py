"""What a forward pass is asked to do, as the scheduler plans it: tokens and page numbers, no tensors."""

from dataclasses import dataclass, field

from easyllm.engine.page_table import Copies


@dataclass(frozen=True, slots=True, kw_only=True)
class Piece:
    """One sequence's part of a pass.

    Attributes:
        sequence_id: under which recurrent states are kept.
        token_ids: the tokens to compute; the first has position `start`.
        pages: of the whole sequence, with room for these tokens.
        num_rows: logits are wanted of so many last tokens (0 while a prompt goes on).
        prefix: first tokens that see each other both ways.
        adapter: the name of the adapter its rows use; empty for the base.
    """

    sequence_id: int
    token_ids: tuple[int, ...]
    start: int
    pages: tuple[int, ...]
    num_rows: int = 1
    prefix: int = 0
    adapter: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One pass, and what must happen before it.

    Attributes:
        pieces: in the order of the packed tokens.
        copies: pages to copy first: destination → source.
        forks: (parent, child) sequences: the child begins with the parent's recurrent states.
        dropped: sequences whose recurrent states are no longer needed (after the forks).
    """

    pieces: tuple[Piece, ...]
    copies: Copies = field(default_factory=dict)
    forks: tuple[tuple[int, int], ...] = ()
    dropped: tuple[int, ...] = ()
