"""Generates sums as tasks with a known answer, from a seed, in a bare form, English or Chinese.

bare   47+38=                                      85
en     What is 47 + 38? Answer with the number.    85
zh     47 加 38 等于多少？只回答数字。                 85
"""

import random
from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject

Form = Literal["bare", "en", "zh"]
FORMS: dict[str, str] = {
    "bare": "{a}+{b}=",
    "en": "What is {a} + {b}? Answer with the number.",
    "zh": "{a} 加 {b} 等于多少？只回答数字。",
}


class SumsConfig(Config):
    """Which sums are generated."""

    digits: PositiveInt = Field(
        default=2, le=9, description="Number of digits of both summands; the first is not 0."
    )
    carries: Literal["any", "some"] = Field(
        default="any", description="Whether all sums are used, or those with `some` carry only."
    )
    form: Form = Field(
        default="bare", description="Wording: `bare` (47+38=), an English or a Chinese question."
    )


def sums(
    config: SumsConfig, *, count: int, held_out: int, seed: NonNegativeInt
) -> tuple[list[JsonObject], list[JsonObject]]:
    """Returns rows to train on and other rows to evaluate on; no sum is in both.

    Args:
        config: which sums.
        count: number of rows to train on; a sum occurs again after all others have.
        held_out: number of rows to evaluate on, all different.
        seed: seed of the choice.

    Returns:
        Rows with `prompt`, `answer`, `carries`, the number of carries of the addition, and
        `without_carries`, the answer of someone who forgets them (47+38=75).

    Raises:
        ConfigError: more sums are held out than would leave any to train on.
    """
    low, high = 10 ** (config.digits - 1), 10**config.digits
    total, width = (high - low) ** 2, high - low
    draws, rows, seen = random.Random(f"sums/{seed}"), list[JsonObject](), set[int]()
    while len(rows) < held_out + count and len(seen) < total:
        number = draws.randrange(total)
        if number in seen:
            continue
        seen.add(number)
        row = _row(low + number // width, low + number % width, config.form)
        if config.carries == "any" or row["carries"]:
            rows.append(row)
    if held_out >= len(rows):
        raise ConfigError(
            f"data.held_out={held_out} of {len(rows)} sums of {config.digits} digits leaves none "
            "to train on; lower it"
        )
    training = rows[held_out:]
    repeated = [training[i % len(training)] for i in range(count)]
    return repeated, rows[:held_out]


def _row(a: int, b: int, form: Form) -> JsonObject:
    carries, carry, x, y, digits = 0, 0, a, b, ""
    while x or y or carry:
        digits = f"{(x + y) % 10}{digits}" if x or y else digits
        carry = (x % 10 + y % 10 + carry) // 10
        carries += carry
        x, y = x // 10, y // 10
    return {
        "prompt": FORMS[form].format(a=a, b=b),
        "answer": str(a + b),
        "carries": carries,
        "without_carries": str(int(digits)),
    }


__all__ = ["SumsConfig", "sums"]
