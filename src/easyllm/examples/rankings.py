"""Rankings of two or more responses to one prompt; a preference pair is a ranking of two.

    {"prompt": ..., "responses": [best, ..., worst]}
    {"prompt": ..., "responses": [...], "scores": [4.5, 2, 4.5]}    equal scores are not compared
    any form of a pair (`preferences`)

A ranking of K responses contains up to K(K-1)/2 pairs. They stay together in one batch, so each
response is computed once (Ouyang et al. 2022, arXiv 2203.02155, section 3.5).
"""

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from easyllm.core.errors import DataError
from easyllm.core.json_types import Json, JsonObject
from easyllm.core.progress import track
from easyllm.corpus.files.row import Row
from easyllm.examples.conversations import read_system, row_kind, unknown_format
from easyllm.examples.data_file import read_rows
from easyllm.examples.preferences import PAIR_FORMS, PreferencePair, preference
from easyllm.examples.prepare import Encoded, PreparationStats, TooLong, check_samples
from easyllm.examples.responses import (
    encode_responses,
    is_response,
    read_prompt,
    read_response,
)
from easyllm.examples.tools import read_tools
from easyllm.examples.unsupported_keys import check_keys
from easyllm.tokenizer.messages import Message
from easyllm.tokenizer.tokenizer import Tokenizer

RANKING_FORMS = f"""{PAIR_FORMS}
  ranking              {{"prompt": "...", "responses": ["best", "...", "worst"]}}, optionally with \
"scores" """


@dataclass(frozen=True, slots=True)
class Ranking:
    """A prompt with K responses; a response of a lower rank is better.

    Attributes:
        prompt: messages in front of every response.
        responses: K lists of messages.
        ranks: K ranks, counted from 0; equal ranks are not compared.
        tools: the tools that the prompt offers.
        location: location of the row.
        format: detected format of the row.
        margin: how much better the first of two responses is, for reward models; None if not given.
    """

    prompt: list[Message]
    responses: list[list[Message]]
    ranks: tuple[int, ...]
    tools: list[JsonObject] | None
    location: str
    format: str = "ranking"
    margin: float | None = None


@dataclass(frozen=True, slots=True)
class EncodedRanking:
    """K sequences with their ranks; their first `num_prompt` ids are the shared prompt."""

    sequences: tuple[Encoded, ...]
    ranks: tuple[int, ...]
    num_prompt: int
    margin: float | None = None


def read_rankings(path: Path) -> Iterator[Ranking]:
    """Yields the rankings and preference pairs in a data file.

    Raises:
        DataError: a row is malformed or neither of the two; the message gives its location.
    """
    yield from rankings(read_rows(path))


def rankings(rows: Iterable[Row]) -> Iterator[Ranking]:
    """Yields rows as rankings; the format of each row is detected from its keys.

    Raises:
        DataError: as in `read_rankings`.
    """
    for row in rows:
        if row_kind(row.values) == "preference":
            yield of_pair(preference(row))
        elif isinstance(row.values.get("responses"), list):
            yield _ranking(row)
        else:
            raise unknown_format(row, RANKING_FORMS)


def of_pair(pair: PreferencePair) -> Ranking:
    """Returns a preference pair as a ranking of two responses."""
    return Ranking(
        pair.prompt,
        [pair.chosen, pair.rejected],
        (0, 1),
        pair.tools,
        pair.location,
        pair.format,
        pair.margin,
    )


def prepare_rankings(
    given: Iterable[Ranking],
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    overlong: TooLong = "cut",
) -> tuple[list[EncodedRanking], PreparationStats]:
    """Encodes rankings with the tokenizer's chat template.

    Of several identical responses to a prompt only the best-ranked one is kept. A row without two
    different responses, or with a response of which no token is within the length limit, is dropped
    and counted.

    Args:
        given: the rankings.
        tokenizer: the model's tokenizer.
        max_seq_len: maximum number of ids in a sequence.
        overlong: what to do with a row that has a longer sequence: `cut` truncates the sequences at
            the end, `drop` removes the row.

    Raises:
        DataError: the template rejects a row (the message gives its location), or no trainable
            rows remain.
    """
    account, kept = PreparationStats(), list[EncodedRanking]()
    for ranking in track(given, "preparing", unit="row"):
        encoded = _encode(ranking, tokenizer, account, max_seq_len, overlong)
        if encoded is not None:
            kept.append(encoded)
    check_samples(account, max_seq_len)
    return kept, account


def _encode(
    ranking: Ranking,
    tokenizer: Tokenizer,
    account: PreparationStats,
    max_seq_len: int,
    overlong: TooLong,
) -> EncodedRanking | None:
    account.formats[ranking.format] += 1
    order = sorted(range(len(ranking.ranks)), key=ranking.ranks.__getitem__)
    found = encode_responses(
        ranking.prompt,
        [ranking.responses[number] for number in order],
        ranking.tools,
        ranking.location,
        tokenizer,
        account,
        max_seq_len=max_seq_len,
        overlong=overlong,
    )
    if found is None:
        return None
    sequences, num_prompt = found
    ranks = dict[tuple[int, ...], int]()  # of different sequences, best first
    unique = list[Encoded]()
    for encoded, number in zip(sequences, order, strict=True):
        ids = tuple(encoded.token_ids)
        if ids not in ranks:
            ranks[ids] = ranking.ranks[number]
            unique.append(encoded)
    if len(set(ranks.values())) < 2:  # nothing to compare
        account.discount(*sequences)
        account.dropped_equal += 1
        return None
    account.discount_tokens(*(e for e in sequences if not any(e is kept for kept in unique)))
    return EncodedRanking(tuple(unique), tuple(ranks.values()), num_prompt, ranking.margin)


def _ranking(row: Row) -> Ranking:
    check_keys(row, "ranking")
    values: list[Json] = row.values["responses"]
    if len(values) < 2:
        raise DataError(
            f"{row.location}: responses has {len(values)} entries, expected at least 2 to compare"
        )
    if not any(row.values.get(key) for key in ("prompt", "question")):
        raise DataError(
            f"{row.location} has responses but no prompt; give the prompt that they answer"
        )
    prompt = read_prompt(row)
    responses = [
        read_response(row, value, f"responses[{number}]") for number, value in enumerate(values)
    ]
    for number, response in enumerate(responses):
        if not is_response(prompt, response):
            raise DataError(
                f"{row.location}: responses[{number}] is not a response; give text, or an "
                "assistant message"
            )
    ranks = _ranks(row, len(values))
    return Ranking(prompt or read_system(row), responses, ranks, read_tools(row), row.location)


def _ranks(row: Row, count: int) -> tuple[int, ...]:
    """Returns the rank of each response: its place in the list, or that of its score."""
    scores = row.values.get("scores")
    if scores is None:
        return tuple(range(count))
    numbers: Sequence[Json] = scores if isinstance(scores, list) else ()
    right = len(numbers) == count and all(
        isinstance(x, int | float) and not isinstance(x, bool) and math.isfinite(x) for x in numbers
    )
    if not right:
        raise DataError(
            f"{row.location}: scores is {scores!r}, expected a list of {count} finite numbers, "
            "one per response, of which higher is better"
        )
    levels = sorted(set(numbers), reverse=True)
    return tuple(levels.index(number) for number in numbers)


__all__ = [
    "EncodedRanking",
    "Ranking",
    "of_pair",
    "prepare_rankings",
    "rankings",
    "read_rankings",
]
