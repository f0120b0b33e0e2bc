"""One policy-gradient loss; GRPO, Dr. GRPO, DAPO, GSPO, CISPO, RLOO and PPO are choices in it.

    ρ_t = π(y_t) / π_old(y_t)
    token           L_t = max(-A ρ_t, -A clip(ρ_t, 1 - ε_low, 1 + ε_high))          PPO, GRPO
    sequence        the same with ρ_i = exp(mean_t log ρ_t) for all tokens of answer i    GSPO
    clipped_weight  L_t = -A stop_gradient(min(ρ_t, 1 + ε_high)) log π(y_t)              CISPO

    loss = Σ_t w_t L_t / terms        w_t          terms
    grpo                              1 / length   answers
    dr_grpo                           1 / maximum  answers
    dapo                              1            tokens

The three choices are the advantage (`rl/advantages`), the ratio and the averaging. The sum over the
terms of a micro-batch is returned: the loop divides by the terms of the whole step.

Sources: PPO, Schulman et al. 2017, arXiv 1707.06347, eq. 7; GRPO, Shao et al. 2024, arXiv
2402.03300, eq. 3; Dr. GRPO, Liu et al. 2025, arXiv 2503.20783, eq. 2; DAPO, Yu et al. 2025, arXiv
2503.14476, eq. 8 and section 3.1 (clip-higher); GSPO, Zheng et al. 2025, arXiv 2507.18071, eq. 5-7;
CISPO, MiniMax 2025, arXiv 2506.13585, eq. 4-5; dual clip, Ye et al. 2019, arXiv 1912.09729, eq. 5.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor

from easyllm.core.config import Config
from easyllm.rl.kl import MAX_EXPONENT

Averaging = Literal["grpo", "dr_grpo", "dapo"]
RATIO_EDGES = (0.5, 0.8, 1.25, 2.0)
"""Edges of the histogram of importance ratios that is logged."""
RATIO_BINS = ("below_0.5", "0.5_to_0.8", "0.8_to_1.25", "1.25_to_2", "above_2")


class PolicyLossConfig(Config):
    """The ratio, its clipping and the averaging of the policy-gradient loss."""

    ratio: Literal["token", "sequence", "clipped_weight"] = Field(
        default="token",
        description="Importance ratio between the current policy and that of the rollout: per "
        "`token` (PPO, GRPO), the geometric mean of each `sequence` (GSPO), or a "
        "`clipped_weight` of log π without a clipped objective (CISPO).",
    )
    averaging: Averaging = Field(
        default="dapo",
        description="Divisor of the loss: the length of each answer, then the answers (`grpo`); "
        "the maximum length of an answer (`dr_grpo`); or all answer tokens of the step (`dapo`).",
    )
    clip_low: float = Field(
        default=0.2, ge=0.0, le=1.0, description="ε_low: a ratio below 1 - ε_low is clipped."
    )
    clip_high: PositiveFloat = Field(
        default=0.28,
        description="ε_high: a ratio above 1 + ε_high is clipped; above clip_low, rare tokens may "
        "become likelier faster (clip-higher of DAPO).",
    )
    dual_clip: float | None = Field(
        default=None,
        gt=1.0,
        description="Bound on the loss of tokens with a negative advantage, as a multiple of it "
        "(dual clip, usually 3); null sets none.",
    )

    @model_validator(mode="after")
    def _dual_clip_has_an_objective(self) -> "PolicyLossConfig":
        if self.dual_clip is not None and self.ratio == "clipped_weight":
            raise ValueError(
                f"dual_clip={self.dual_clip} bounds a clipped objective, which "
                "ratio=clipped_weight does not have; remove dual_clip"
            )
        return self


@dataclass(frozen=True, slots=True)
class PolicyLoss:
    """The policy-gradient loss of the answer tokens of a batch.

    Attributes:
        per_token: [N] loss of each token before weighting; differentiable.
        clipped: [N] bool, tokens whose gradient the clipping has removed (CISPO: whose weight is
            clipped).
        log_ratio: [N], log π - log π_old, without a gradient.
    """

    per_token: Tensor
    clipped: Tensor
    log_ratio: Tensor


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    lengths: Sequence[int],
    config: PolicyLossConfig,
) -> PolicyLoss:
    """Returns the policy-gradient loss of each answer token.

    Args:
        logprobs: [N] log π of the answer tokens of all sequences, in nats; differentiable.
        old_logprobs: [N] log π_old, of the policy that the ratio compares with.
        advantages: [N].
        lengths: number of answer tokens of each sequence; they sum to N.
        config: the ratio and its clipping.
    """
    raw = logprobs - old_logprobs
    log_ratio = raw if config.ratio != "sequence" else _sequence_means(raw, lengths)
    ratio = torch.exp(log_ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT))
    upper, lower = 1.0 + config.clip_high, 1.0 - config.clip_low
    if config.ratio == "clipped_weight":
        weight = ratio.detach().clamp(max=upper)
        return PolicyLoss(-advantages * weight * logprobs, ratio.detach() > upper, raw.detach())
    plain, limited = -advantages * ratio, -advantages * ratio.clamp(lower, upper)
    loss, clipped = torch.maximum(plain, limited), limited > plain
    if config.dual_clip is not None:
        bound = -advantages * config.dual_clip
        bounded = (advantages < 0) & (loss > bound)
        loss, clipped = torch.where(bounded, bound, loss), clipped | bounded
    return PolicyLoss(loss, clipped.detach(), raw.detach())


def token_weights(
    lengths: Sequence[int], averaging: Averaging, max_tokens: int, like: Tensor
) -> Tensor:
    """Returns the weight of each answer token in the summed loss, [N].

    Args:
        lengths: number of answer tokens with a loss of each sequence.
        averaging: see `PolicyLossConfig`.
        max_tokens: the maximum length of an answer, the divisor of `dr_grpo`.
        like: a tensor of the dtype and device of the result.
    """
    counts = torch.tensor(lengths, device=like.device)
    match averaging:
        case "dapo":
            each = torch.ones(len(lengths), dtype=like.dtype, device=like.device)
        case "dr_grpo":
            each = torch.full((len(lengths),), 1.0 / max_tokens, dtype=like.dtype)
        case "grpo":
            each = 1.0 / counts.clamp(min=1).to(like.dtype)
    return each.to(like.device).repeat_interleave(counts)


def ratio_figures(found: PolicyLoss) -> dict[str, float]:
    """Returns the share of clipped tokens, KL(π_old ‖ π) and the histogram of the ratios."""
    log_ratio = found.log_ratio.clamp(-MAX_EXPONENT, MAX_EXPONENT)
    if not len(log_ratio):
        return {}
    ratio = log_ratio.exp()
    edges = torch.tensor(RATIO_EDGES, dtype=ratio.dtype, device=ratio.device)
    counts = torch.bucketize(ratio, edges).bincount(minlength=len(RATIO_BINS))
    shares = (counts / len(ratio)).tolist()
    return {
        "rl/clip_fraction": float(found.clipped.float().mean()),
        "rl/update_kl_nats": float((ratio - 1.0 - log_ratio).mean()),
        **{f"rl/ratio/{name}": share for name, share in zip(RATIO_BINS, shares, strict=True)},
    }


def _sequence_means(values: Tensor, lengths: Sequence[int]) -> Tensor:
    """Returns the mean of each sequence's values, repeated for its tokens, [N]."""
    parts = values.split(list(lengths))
    return torch.cat([part.mean().expand(len(part)) for part in parts if len(part)] or [values])


__all__ = [
    "RATIO_BINS",
    "Averaging",
    "PolicyLoss",
    "PolicyLossConfig",
    "policy_loss",
    "ratio_figures",
    "token_weights",
]
