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
        Rows with `prompt`, `answer` and `carries`, the number of carries of the addition.

    Raises:
        ConfigError: more sums are held out than would leave any to train on.
    """
    low, high = 10 ** (config.digits - 1), 10**config.digits
    total = (high - low) ** 2
    if held_out >= total:
        raise ConfigError(
            f"data.held_out={held_out} of {total} sums of {config.digits} digits leaves none to "
            "train on; lower it"
        )
    draws = random.Random(f"sums/{seed}")
    wanted = min(total, held_out + count)
    numbers = draws.sample(range(total), wanted)
    pairs = [(low + n // (high - low), low + n % (high - low)) for n in numbers]
    rows = [_row(a, b, config.form) for a, b in pairs]
    training = rows[held_out:]
    repeated = [training[i % len(training)] for i in range(count)]
    return repeated, rows[:held_out]


def _row(a: int, b: int, form: Form) -> JsonObject:
    carries, carry, x, y = 0, 0, a, b
    while x or y or carry:
        carry = (x % 10 + y % 10 + carry) // 10
        carries += carry
        x, y = x // 10, y // 10
    prompt = FORMS[form].format(a=a, b=b)
    return {"prompt": prompt, "answer": str(a + b), "carries": carries}


__all__ = ["SumsConfig", "sums"]
