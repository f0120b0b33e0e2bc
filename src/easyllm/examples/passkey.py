"""Passkey retrieval: a number hidden in a long, repetitive text, which a model is asked for.

The text has a length in tokens of the model's tokenizer, and the number is at a depth, from 0 at
its beginning to 1 at its end (Mohtashami & Jaggi 2023, arXiv 2305.16300, section 4.2). It measures
whether a model uses its whole context, which perplexity by itself does not show.
"""

from collections.abc import Iterator, Sequence
from random import Random

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.tokenizer.tokenizer import Tokenizer

FILLER = "The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
INTRODUCTION = (
    "There is an important number hidden inside a lot of irrelevant text. Find it and memorize it."
)
NEEDLE = "The pass key is {key}. Remember it. {key} is the pass key."
DIGITS = 5


def passkey_rows(
    tokenizer: Tokenizer, lengths: Sequence[int], *, count: int, seed: int = 0
) -> Iterator[JsonObject]:
    """Yields the rows of the evaluation task `passkey`.

    Args:
        tokenizer: counts the tokens of a context.
        lengths: maximum number of tokens of the contexts.
        count: rows for each length, at depths spread evenly from 0 to 1.
        seed: seed of the numbers.

    Returns:
        Rows with `context`, `answer`, `length` (the maximum) and `depth`.

    Raises:
        ConfigError: a length is too short for the needle.
    """
    rng = Random(seed)
    unit = len(tokenizer.encode(f" {FILLER}", special_tokens=False))
    for length in lengths:
        for number in range(count):
            key = str(rng.randrange(10 ** (DIGITS - 1), 10**DIGITS))
            depth = number / (count - 1) if count > 1 else 0.5
            blocks = max(0, (length - len(tokenizer.encode(_context(key, 0, 0)))) // unit)
            while blocks >= 0:
                before = round(blocks * depth)
                context = _context(key, before, blocks - before)
                if len(tokenizer.encode(context)) <= length:
                    break
                blocks -= 1
            if blocks < 0:
                raise ConfigError(
                    f"a context of {length} tokens is too short for a pass key; give at least "
                    f"{len(tokenizer.encode(_context(key, 0, 0)))}"
                )
            yield {"context": context, "answer": key, "length": length, "depth": depth}


def _context(key: str, before: int, after: int) -> str:
    needle = NEEDLE.format(key=key)
    return " ".join([INTRODUCTION, *[FILLER] * before, needle, *[FILLER] * after])


__all__ = ["passkey_rows"]
