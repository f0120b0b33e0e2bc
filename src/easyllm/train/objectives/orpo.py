"""ORPO: SFT and preference optimisation in one loss, without a reference.

    L = -l(chosen) - λ log σ(log odds(chosen) - log odds(rejected))
    odds(y) = p / (1 - p),   p = exp l(y),   l: mean log-probability per token of the response

(Hong et al. 2024, arXiv 2403.07691, eqs. 2 and 4 to 7.)
The first term is the mean over the tokens of each chosen response, and a step's loss the mean over
pairs. The authors' code takes the mean over the tokens of all chosen responses of a batch, prompts
included, which depends on how a step is split into micro-batches.
"""

import math
from typing import Literal

import torch
from pydantic import Field, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from easyllm.batches.packing import Batch
from easyllm.train.data_config import PreferenceDataConfig
from easyllm.train.objectives.objective import ObjectiveConfig, register_objective
from easyllm.train.objectives.pairs import PairObjective, Pairs
from easyllm.train.objectives.sequence_logprobs import SequenceLogprobs

LARGEST = -1e-6
"""Upper bound on a mean log-probability, whose odds are infinite at 0."""


class ORPOConfig(ObjectiveConfig):
    """ORPO on pairs or rankings; needs no reference model and no SFT before it."""

    kind: Literal["orpo"] = "orpo"
    beta: PositiveFloat = Field(
        default=0.1, description="Weight of the odds ratio (λ in the paper) against the SFT loss."
    )


class ORPO(PairObjective):
    """The SFT loss of the chosen side plus the odds-ratio loss; see the module."""

    def __init__(self, config: ORPOConfig | None = None) -> None:
        self.config = config or ORPOConfig()

    def pair_losses(
        self,
        policy: SequenceLogprobs,
        batch: Batch,  # noqa: ARG002 - in objectives with a reference
        pairs: Pairs,
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of each pair [N], and rewards λ l of each sequence [S]."""
        chosen, rejected = pairs.of(policy.means)
        ratio = log_odds(chosen) - log_odds(rejected)
        losses = -chosen - self.config.beta * F.logsigmoid(ratio)
        return losses, self.config.beta * policy.means


def log_odds(logprobs: Tensor) -> Tensor:
    """Returns log(p / (1 - p)) for log p, without computing 1 - p where it would round to 0."""
    x = logprobs.clamp(max=LARGEST)
    near_one = x > -math.log(2)
    # each branch sees only values at which its gradient is finite
    small = torch.log(-torch.expm1(torch.where(near_one, x, -math.log(2))))
    large = torch.log1p(-torch.exp(torch.where(near_one, -math.log(2), x)))
    return x - torch.where(near_one, small, large)


register_objective(ORPOConfig, build=ORPO, data=(PreferenceDataConfig,))

__all__ = ["ORPO", "ORPOConfig", "log_odds"]
