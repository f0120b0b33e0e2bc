"""The doctor: reads the metrics of a run and says why it does not learn, and what to change.

It knows policy-gradient runs, and preference and reward runs; checks whose metrics a run does not
have are left out. The thresholds are usual ranges, not laws: a run outside of them may be fine, but
is worth a look.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from operator import mul
from pathlib import Path

from easyllm.core.json_types import JsonObject
from easyllm.rl.doctor_pairs import accuracy, chosen_falls, loss_exploded, margin
from easyllm.rl.finding import FEW_STEPS, Finding
from easyllm.rl.history import WINDOW, History, read_history

FP32_MISMATCH, HALF_MISMATCH = 0.02, 0.06
"""Mean differences between the log-probabilities of sampler and trainer, in nats per token, above
which more than rounding is at work. In bf16 one step of a logit of 8 to 16 is 0.06."""


Check = Callable[[History], Finding | None]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The result of all checks.

    Attributes:
        findings: what is unusual, the most likely cause first.
        checked: the names of the checks whose metrics the run has.
    """

    findings: list[Finding]
    checked: list[str]

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return {
            "healthy": not self.findings,
            "findings": [each.as_dict() for each in self.findings],
            "checked": self.checked,
        }


def diagnose(run: Path) -> Diagnosis:
    """Checks a run, finished or not.

    Args:
        run: the output folder of the run.

    Raises:
        DataError: the folder has no metrics.
    """
    return examine(read_history(run))


def report(run: Path) -> JsonObject:
    """Returns the diagnosis of a run as JSON values, for `easyllm.reporting`."""
    return diagnose(run).as_dict()


def examine(history: History) -> Diagnosis:
    """Checks the metrics of a run."""
    findings, checked = [], []
    for name, (metrics, check) in CHECKS.items():
        if all(history.has(metric) for metric in metrics):
            checked.append(name)
            found = check(history)
            findings += [] if found is None else [found]
    return Diagnosis(findings, checked)


def _above(
    name: str, metric: str, bound: float, usual: str, change: str, *, at_end: bool = True
) -> Check:
    """Returns a check that a metric's mean, at the end or over the run, is not above a bound."""

    def check(history: History) -> Finding | None:
        value = history.last(metric) if at_end else history.mean(metric)
        return Finding(name, metric, value, usual, change) if value > bound else None

    return check


def _kl_sign(history: History) -> Finding | None:
    """The gradient of the KL penalty must point back to the reference."""
    pull = history.mean("rl/kl_pull")
    if history.last("rl/kl_per_token_nats") <= 1e-6 or pull >= 0:
        return None
    return Finding(
        "kl_sign",
        "rl/kl_pull",
        pull,
        "above 0",
        "the KL penalty pushes the policy away from the reference: its sign is wrong; the "
        "coefficient must be positive, and the estimate log π - log π_ref, not the reverse",
    )


def _learning_rate(history: History) -> Finding | None:
    """One update must change the policy a little."""
    rise = history.largest_rise("rl/kl_per_token_nats")
    if history.has("rl/kl_nats"):
        # per token of the longest answers: KL per token also rises when answers become shorter
        longest = max(history.values("rl/length_tokens"), default=1.0)
        rise = min(rise, history.largest_rise("rl/kl_nats") / max(1.0, longest))
    bounds = {
        "rl/update_kl_nats": (max(history.values("rl/update_kl_nats"), default=0.0), 0.2),
        "rl/kl_per_token_nats": (rise, 0.6),
    }
    for metric, (value, bound) in bounds.items():
        if value > bound:
            return _too_fast(metric, value, "below 0.05 nats per token and update")
    entropies = history.values("rl/entropy")
    jumps = [abs(b - a) for a, b in pairwise(entropies)]
    largest = max(jumps, default=0.0)
    if largest > 0.5 and largest > 0.4 * max(entropies):
        return _too_fast("rl/entropy", largest, "changes by less than 0.1 nats per step")
    return None


def _too_fast(metric: str, value: float, usual: str) -> Finding:
    return Finding(
        "learning_rate",
        metric,
        value,
        usual,
        "one update changes the policy too much; lower optimizer.learning_rate (for LoRA 1e-5 to "
        "1e-4, for all weights 1e-7 to 1e-5 are usual; models from scratch up to 3e-4)",
    )


def _entropy(history: History) -> Finding | None:
    """The entropy must neither vanish nor explode."""
    first, last = history.first("rl/entropy"), history.last("rl/entropy")
    if len(history.values("rl/entropy")) < FEW_STEPS or first <= 0:
        return None
    if last < 0.2 * first:
        change = (
            "the policy has collapsed to few answers, so that a group's answers are equal; raise "
            "loss.clip_high or the temperature, lower the learning rate, or raise kl.coefficient"
        )
    elif last > 2.0 * first:
        change = "the policy becomes random; lower the learning rate, or raise kl.coefficient"
    else:
        return None
    return Finding("entropy", "rl/entropy", last, f"0.2 to 2 times the first, {first:.3g}", change)


def _ratios(history: History) -> Finding | None:
    """Nearly all importance ratios must be near 1."""
    value = history.last("rl/ratio/below_0.5") + history.last("rl/ratio/above_2")
    if value <= 0.05:
        return None
    return Finding(
        "importance_ratios",
        "rl/ratio/below_0.5 + rl/ratio/above_2",
        value,
        "below 0.01",
        "many tokens have become twice or half as likely since the rollout; lower the learning "
        "rate, rollout.epochs or rollout.minibatches",
    )


def _mismatch(history: History) -> Finding | None:
    """Sampler and trainer must have the same log-probabilities, up to the rounding of the dtype."""
    value, exact = history.last("rl/mismatch_nats"), history.dtype == "float32"
    if value <= (FP32_MISMATCH if exact else HALF_MISMATCH):
        return None
    return Finding(
        "mismatch",
        "rl/mismatch_nats",
        value,
        "0 in deterministic mode; below 0.005 nats in fp32, below 0.05 in half precision",
        "sampler and trainer disagree; set mismatch.correction=truncate, sample without "
        "quantization, or set rollout.deterministic",
    )


def _length(history: History) -> Finding | None:
    """Answers must not grow or shrink without bound."""
    first, last = history.first("rl/length_tokens"), history.last("rl/length_tokens")
    if len(history.values("rl/length_tokens")) < FEW_STEPS or first <= 0:
        return None
    if 0.5 <= last / first <= 2.0:
        return None
    longer = last > first
    change = (
        "answers grow: look at samples; averaging=grpo rewards long wrong answers (use dapo or "
        "dr_grpo), or set length_limit.penalty_tokens"
        if longer
        else "answers shrink: the reward may be had for short ones; look at samples"
    )
    return Finding("length_drift", "rl/length_tokens", last, f"near the first, {first:.3g}", change)


def _components(history: History) -> Finding | None:
    """No component of the reward may fall while the sum rises."""
    names = [name for name in history.series if name.startswith("rl/reward/")]
    if len(history.values("rl/reward")) < FEW_STEPS or len(names) < 2:
        return None
    if history.last("rl/reward") <= history.first("rl/reward"):
        return None
    for name in names:
        first, last = history.first(name), history.last(name)
        if first - last > 0.1 * max(abs(first), 0.1):
            return Finding(
                "reward_components",
                name,
                last,
                f"not below its first value, {first:.3g}",
                "the sum of rewards rises while this component falls: the policy trades one for "
                "the other; raise this component's weight, or look for a loophole in the others",
            )
    return None


def _reward(history: History) -> Finding | None:
    """The reward must not fall."""
    first, last = history.first("rl/reward"), history.last("rl/reward")
    spread = history.mean("rl/reward_std") or abs(first)
    if len(history.values("rl/reward")) < FEW_STEPS or last >= first - 0.25 * max(spread, 1e-3):
        return None
    return Finding(
        "reward_falls",
        "rl/reward",
        last,
        f"rises from its first value, {first:.3g}",
        "the policy gets worse; lower the learning rate, and answer more prompts per step",
    )


def _explained_variance(history: History) -> Finding | None:
    """The critic must predict better than a constant."""
    shares, spread = history.values("rl/explained_variance"), history.values("rl/reward_std")
    value = history.last("rl/explained_variance")
    if len(spread) == len(shares):
        # pooled over the last third: where rewards hardly differ, there is little to explain
        last = -max(1, len(shares) // WINDOW)
        weights = [each * each for each in spread[last:]]
        value = sum(map(mul, weights, shares[last:])) / max(sum(weights), 1e-12)
    if len(shares) < FEW_STEPS or value >= 0.0:
        return None
    return Finding(
        "explained_variance",
        "rl/explained_variance",
        value,
        "0.2 to 1",
        "the critic predicts worse than a constant; raise critic.rate_factor or critic.warm_up, "
        "and check that the rewards are normalised",
    )


def _prompts_cut(history: History) -> Finding | None:
    """Prompts must not lose their beginning."""
    value = history.mean("rl/prompt_cut_share")
    return _cut(value, "rl/prompt_cut_share") if value > 0.02 else None


def rows_cut(history: History) -> Finding | None:
    """Rows must not be truncated, as the manifest counts them."""
    rows, cut = history.data.get("rows"), history.data.get("cut")
    if not isinstance(rows, int) or not isinstance(cut, int) or not rows:
        return None
    return _cut(cut / rows, "data.cut / data.rows") if cut / rows > 0.02 else None


def _cut(value: float, metric: str) -> Finding:
    return Finding(
        "prompts_truncated",
        metric,
        value,
        "0",
        "prompts or answers are truncated to the length limit, so that the model does not see what "
        "it is asked; raise data.max_seq_len, or drop long rows (data.overlong=drop)",
    )


CHECKS: dict[str, tuple[tuple[str, ...], Check]] = {
    "prompts_truncated": (("rl/prompt_cut_share",), _prompts_cut),
    "no_eos": (
        ("rl/truncated_share",),
        _above(
            "no_eos",
            "rl/truncated_share",
            0.95,
            "below 0.2",
            "nearly no answer ends with an EOS token: check the chat template and the model's EOS "
            "ids, raise rollout.max_tokens, or set length_limit.missing_eos_penalty",
            at_end=False,
        ),
    ),
    "truncated": (
        ("rl/truncated_share",),
        _above(
            "truncated",
            "rl/truncated_share",
            0.5,
            "below 0.2",
            "many answers reach the maximum length; raise rollout.max_tokens, or set "
            "length_limit.penalty_tokens",
        ),
    ),
    "equal_rewards": (
        ("rl/equal_groups_share",),
        _above(
            "equal_rewards",
            "rl/equal_groups_share",
            0.8,
            "below 0.5",
            "the answers of nearly every group have the same reward, so that nothing is learned; "
            "choose easier or harder prompts, raise group_size or the temperature, grade the "
            "reward, or set equal_groups=resample",
        ),
    ),
    "kl_sign": (("rl/kl_pull", "rl/kl_per_token_nats"), _kl_sign),
    "learning_rate": (("rl/entropy",), _learning_rate),
    "loss_exploded": (("train/loss_nats", "rewards/chosen"), loss_exploded),
    "kl": (
        ("rl/kl_per_token_nats",),
        _above(
            "kl",
            "rl/kl_per_token_nats",
            1.0,
            "below 0.1 nats per token",
            "the policy is far from the reference, where a reward model knows nothing; raise "
            "kl.coefficient, set kl.target, or stop earlier",
        ),
    ),
    "entropy": (("rl/entropy",), _entropy),
    "masked": (
        ("rl/masked_share",),
        _above(
            "masked",
            "rl/masked_share",
            0.9,
            "below 0.5",
            "most tokens have no loss: see equal_groups, length_limit.truncated and mismatch",
        ),
    ),
    "importance_ratios": (("rl/ratio/below_0.5", "rl/ratio/above_2"), _ratios),
    "clip_fraction": (
        ("rl/clip_fraction",),
        _above(
            "clip_fraction",
            "rl/clip_fraction",
            0.3,
            "0.01 to 0.2",
            "most of the gradient is clipped away; lower the learning rate, rollout.epochs or "
            "rollout.minibatches",
        ),
    ),
    "mismatch": (("rl/mismatch_nats",), _mismatch),
    "explained_variance": (("rl/explained_variance",), _explained_variance),
    "length_drift": (("rl/length_tokens",), _length),
    "reward_components": (("rl/reward",), _components),
    "reward_falls": (("rl/reward",), _reward),
    "reward_failures": (
        ("rl/reward_failures",),
        _above(
            "reward_failures",
            "rl/reward_failures",
            0.0,
            "0",
            "a reward function raised or returned NaN; the console shows the samples",
        ),
    ),
    "reward_accuracy": (("eval/reward_accuracy",), accuracy),
    "reward_margin": (("eval/reward_margin",), margin),
    "chosen_falls": (("rewards/chosen",), chosen_falls),
    "rows_truncated": ((), rows_cut),
}
"""Each check with the metrics that it needs, the most likely causes first."""


__all__ = ["CHECKS", "Diagnosis", "Finding", "diagnose", "examine", "report"]
