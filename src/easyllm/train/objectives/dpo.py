"""Direct preference optimisation (Rafailov et al. 2023, arXiv 2305.18290) and its variants.

    Δ(y) = log π(y|x) - log π_ref(y|x)      summed over the tokens of the response
    h    = Δ(chosen) - Δ(rejected)          the reward margin is β h

    sigmoid  -(1-ε) log σ(βh) - ε log σ(-βh)                eq. 7; ε > 0 is cDPO (Mitchell 2023)
    robust   (-(1-ε) log σ(βh) + ε log σ(-βh)) / (1-2ε)     arXiv 2403.00409, eq. 7
    hinge    max(0, 1 - βh)                                 SLiC, arXiv 2309.06657, table 1
    ipo      (h̄ - 1/(2β))²                                  arXiv 2310.12036, eq. 17

h̄ is h with means over the tokens of each response in place of sums: the sum would make the target
1/(2β) depend on the length. At the first step h = 0, so the sigmoid loss is ln 2.
"""

from typing import Literal

import torch
from pydantic import Field, PositiveFloat, model_validator
from torch import Tensor
from torch.nn import functional as F

from easyllm.batches.packing import Batch
from easyllm.train.data_config import PreferenceDataConfig
from easyllm.train.objectives.objective import register_objective
from easyllm.train.objectives.pairs import PairObjective, Pairs
from easyllm.train.objectives.reference import (
    ReferenceConfig,
    reference_sums,
    use_reference,
)
from easyllm.train.objectives.sequence_logprobs import SequenceLogprobs

Loss = Literal["sigmoid", "hinge", "ipo", "robust"]


class DPOConfig(ReferenceConfig):
    """Direct preference optimisation on pairs or rankings."""

    kind: Literal["dpo"] = "dpo"
    beta: PositiveFloat = Field(
        default=0.1,
        description="Strength of the implicit KL constraint: a lower β lets the policy move "
        "further from the reference.",
    )
    loss: Loss = Field(
        default="sigmoid",
        description="`sigmoid` is DPO; `hinge` SLiC; `ipo` a squared error on mean "
        "log-probabilities; `robust` is unbiased if a share `label_smoothing` of the labels is "
        "flipped.",
    )
    label_smoothing: float = Field(
        default=0.0,
        ge=0.0,
        lt=0.5,
        description="Assumed share of pairs whose sides are swapped; with `sigmoid` this is cDPO.",
    )

    @model_validator(mode="after")
    def _smoothing_is_used(self) -> "DPOConfig":
        if self.label_smoothing and self.loss in ("hinge", "ipo"):
            raise ValueError(
                f"label_smoothing={self.label_smoothing:g} has no effect with loss={self.loss}; "
                "set loss to sigmoid or robust, or remove label_smoothing"
            )
        return self


class DPO(PairObjective):
    """The loss of pairs relative to a frozen reference model; see the module."""

    def __init__(self, config: DPOConfig | None = None) -> None:
        self.config = config or DPOConfig()
        use_reference(self, self.config)
        self.beta = self.config.beta

    def pair_losses(
        self, policy: SequenceLogprobs, batch: Batch, pairs: Pairs
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of each pair [N], and rewards β Δ of each sequence [S]."""
        ratios = policy.sums - reference_sums(self, batch)
        chosen, rejected = pairs.of(ratios)
        counts = pairs.of(policy.counts.clamp(min=1))
        losses = dpo_losses(
            chosen,
            rejected,
            counts,
            loss=self.config.loss,
            beta=self.beta,
            label_smoothing=self.config.label_smoothing,
        )
        return losses, self.beta * ratios


def dpo_losses(
    chosen: Tensor,
    rejected: Tensor,
    counts: tuple[Tensor, Tensor],
    *,
    loss: Loss = "sigmoid",
    beta: float = 0.1,
    label_smoothing: float = 0.0,
) -> Tensor:
    """Returns the loss of each pair, [N].

    Args:
        chosen, rejected: [N], Δ of both responses in nats.
        counts: [N] each, the number of tokens of both responses; used by `ipo` alone.
        loss, beta, label_smoothing: as in `DPOConfig`.
    """
    if loss == "ipo":
        return (chosen / counts[0] - rejected / counts[1] - 1 / (2 * beta)).square()
    margin = beta * (chosen - rejected)
    if loss == "hinge":
        return torch.relu(1 - margin)
    kept, flipped = -F.logsigmoid(margin), -F.logsigmoid(-margin)
    eps = label_smoothing
    if loss == "robust":
        return ((1 - eps) * kept - eps * flipped) / (1 - 2 * eps)
    return (1 - eps) * kept + eps * flipped


register_objective(DPOConfig, build=DPO, data=(PreferenceDataConfig,))

__all__ = ["DPO", "DPOConfig", "dpo_losses"]
