"""The loss mask of an encoded conversation: which tokens are trained."""

from collections.abc import Iterable
from typing import Protocol

from easyllm.tokenizer.turns import Span


class KnowsSpecialIds(Protocol):
    """What the end of a turn needs of a tokenizer."""

    @property
    def special_ids(self) -> frozenset[int]:
        """Ids of the special (control) tokens."""

    @property
    def eos_id(self) -> int | None:
        """The id of the EOS token, or None."""


def mask_of(offsets: list[Span], spans: Iterable[Span]) -> list[bool]:
    """Returns for each token whether it overlaps one of the spans."""
    ordered, mask = sorted(spans), list[bool]()
    first = 0  # all earlier spans end before the token
    for a, b in offsets:
        while first < len(ordered) and ordered[first][1] <= a:
            first += 1
        start, end = ordered[first] if first < len(ordered) else (b, b)
        mask.append((a < end and b > start) or (a == b and start <= a < end))
    return mask


def end_turns(
    text: str,
    ids: list[int],
    mask: list[bool],
    offsets: list[Span],
    spans: list[Span],
    tokenizer: KnowsSpecialIds,
) -> None:
    """Adjusts the mask in place so that each turn ends with its end-of-turn token.

    The end-of-turn token is the last special token of the turn, if only whitespace follows it
    there; the text after it is masked. If the turn has none, the special token directly after the
    turn is used (in templates where the next role tag ends the turn). If nothing follows, an EOS is
    appended.
    """
    special = tokenizer.special_ids
    for start, end in spans:
        inside = [i for i, (a, b) in enumerate(offsets) if mask[i] and a >= start and b <= end]
        if not inside:
            continue
        ends = [i for i in inside if ids[i] in special]
        if ends and not text[offsets[ends[-1]][1] : end].strip():
            for i in inside:
                if i > ends[-1]:
                    mask[i] = False
            continue
        following = inside[-1] + 1
        if following < len(ids):
            if ids[following] in special:
                mask[following] = True
        elif tokenizer.eos_id is not None:
            ids.append(tokenizer.eos_id)
            mask.append(True)
            offsets.append((end, end))
