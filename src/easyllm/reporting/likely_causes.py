"""Why a run is outside of its band: the likeliest causes, in order."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from easyllm.reporting.expected import LOSS, MEMORY, NORM, SPEED, Watch

Change = tuple[str, object, object]
"""(key, the recipe's value, this run's value)."""
MOST = 3
"""Causes that are named."""
FLAT = 0.05
"""A loss that fell by less than this share of its first value has not fallen."""
FACTOR = 3.0
"""A learning rate that many times as large or small as the recipe's is suspected."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Symptoms:
    """What is unusual.

    Attributes:
        watch: the run so far.
        sides: below (-1), inside (0) or above (1), for each metric that is compared.
        changed: what was changed of the recipe, and matters.
        skipped: steps that changed nothing because a gradient was not finite.
    """

    watch: Watch
    sides: Mapping[str, int]
    changed: Sequence[Change]
    skipped: int = 0

    def side(self, name: str) -> int:
        """Returns the side of a metric; 0 if it is not compared."""
        return self.sides.get(name, 0)

    @property
    def is_flat(self) -> bool:
        """Whether the loss has hardly fallen where the recipe's has."""
        means, first = self.watch.means[LOSS], self.watch.first_loss
        if len(means) < 2 or first is None or not math.isfinite(first):
            return False
        return min(means) > (1 - FLAT) * first and self.side(LOSS) > 0

    @property
    def has_risen(self) -> bool:
        """Whether the loss is above its lowest mean so far, or not finite."""
        means = self.watch.means[LOSS]
        return bool(means) and not means[-1] <= (1 + FLAT) * min(means)

    @property
    def was_inside(self) -> bool:
        """Whether the loss was in the band before."""
        ranges = self.watch.band.by_step.get(LOSS, ())
        means = self.watch.means[LOSS][:-1]
        return any(r.side(m) == 0 for r, m in zip(ranges, means, strict=False))


def likely_causes(symptoms: Symptoms) -> list[str]:
    """Returns up to `MOST` causes with what to do, the likeliest first."""
    found: list[str] = []
    for rule in RULES:
        found += [text for text in rule(symptoms) if text not in found]
    return found[:MOST]


def _learning_rate(symptoms: Symptoms) -> Iterator[str]:
    for key, usual, value in symptoms.changed:
        if not key.endswith("learning_rate"):
            continue
        if not (isinstance(usual, int | float) and isinstance(value, int | float) and usual):
            continue
        factor = float(value) / float(usual)
        high = symptoms.side(LOSS) > 0
        if factor >= FACTOR and high:
            yield f"{key} is {factor:g} times the recipe's: the loss diverges; lower it"
        elif factor >= FACTOR and symptoms.side(NORM) > 0:
            yield f"{key} is {factor:g} times the recipe's, and gradients are large; lower it"
        if high and 0 < factor <= 1 / FACTOR:
            yield f"{key} is {1 / factor:g} times smaller than the recipe's: too slow; raise it"


def _not_finite(symptoms: Symptoms) -> Iterator[str]:
    means = symptoms.watch.means[LOSS]
    if symptoms.skipped or (means and not math.isfinite(means[-1])):
        yield (
            "the loss or a gradient is not finite: the learning rate is too high, or fp16 overflows"
            "; lower optimizer.learning_rate, or train in bf16 or fp32"
        )


def _labels(symptoms: Symptoms) -> Iterator[str]:
    keys = [key for key, _, _ in symptoms.changed]
    if symptoms.side(LOSS) < 0 and "data.train_on" in keys:
        yield (
            "data.train_on was changed: prompts are trained as well, and are easier to predict than"
            " answers; set it back to train on answers alone"
        )
    elif "data.train_on" in keys and symptoms.side(LOSS) > 0:
        yield "data.train_on was changed: other tokens are trained than in the recipe; set it back"


def _low_loss(symptoms: Symptoms) -> Iterator[str]:
    if symptoms.side(LOSS) < 0:
        yield (
            "the answers are in the prompts, or rows occur several times; look at samples with "
            "`easyllm data inspect`, and at the loss on held-out rows"
        )


def _norm_alone(symptoms: Symptoms) -> Iterator[str]:
    if symptoms.side(NORM) > 0 and not symptoms.side(LOSS) and not symptoms.changed:
        yield (
            "gradients are larger than usual, but the loss is not: batches have less variety (rows "
            "occur several times, or fewer are packed); look at samples with `easyllm data inspect`"
        )


def _flat(symptoms: Symptoms) -> Iterator[str]:
    if not symptoms.is_flat:
        return
    if symptoms.side(NORM) < 0:
        yield (
            "gradients are smaller than usual and the loss is flat: what should be trained is "
            "frozen or masked; check adapter.targets and the loss mask (`easyllm data inspect`)"
        )
    yield "the loss has not fallen: the learning rate is too low, or warm-up too long; raise it"


def _diverged(symptoms: Symptoms) -> Iterator[str]:
    if symptoms.side(LOSS) > 0 and symptoms.was_inside and symptoms.has_risen:
        yield (
            "the loss was usual before and rose: the learning rate is too high for this batch size;"
            " lower it, or raise batch_size"
        )


def _stalled(symptoms: Symptoms) -> Iterator[str]:
    if symptoms.side(LOSS) > 0 and symptoms.was_inside and not symptoms.has_risen:
        yield (
            "the loss fell as usual and then stopped: answers do not follow from their prompts; "
            "look at samples with `easyllm data inspect`"
        )


def _from_the_start(symptoms: Symptoms) -> Iterator[str]:
    if symptoms.side(LOSS) <= 0 or symptoms.was_inside or symptoms.is_flat:
        return
    if symptoms.side(NORM) > 0:
        yield (
            "loss and gradients are above the band from the start: the learning rate is too high, "
            "or warm-up too short"
        )
    yield (
        "the loss is high from the start: the text is not what the model knows; check the chat "
        "template, the tokenizer and the rows (`easyllm data inspect`)"
    )


def _changed_keys(symptoms: Symptoms) -> Iterator[str]:
    keys = [key for key, _, _ in symptoms.changed]
    if keys and (symptoms.side(LOSS) or symptoms.side(NORM)):
        yield f"of the recipe, {', '.join(keys[:5])} was changed"


def _slow(symptoms: Symptoms) -> Iterator[str]:
    if symptoms.side(SPEED) < 0:
        yield (
            "slow for this machine: other programs use its cores or memory, or micro batches are "
            "small (micro_batch_tokens)"
        )


def _memory(symptoms: Symptoms) -> Iterator[str]:
    if symptoms.side(MEMORY) > 0:
        yield (
            "more memory than usual: longer sequences or larger micro batches; lower "
            "micro_batch_tokens or data.max_seq_len"
        )


RULES: tuple[Callable[[Symptoms], Iterator[str]], ...] = (
    *(_learning_rate, _not_finite, _labels, _flat, _diverged, _stalled, _from_the_start),
    *(_low_loss, _norm_alone, _changed_keys, _slow, _memory),
)
"""The rules, the most specific first."""

__all__ = ["Change", "Symptoms", "likely_causes"]
