"""SimPO: preference optimisation without a reference (Meng et al. 2024, arXiv 2405.14734, eq. 6).

-log σ(β (l(chosen) - l(rejected)) - γ)      l: mean log-probability per token of the response
"""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat
from torch import Tensor
from torch.nn import functional as F

from easyllm.batches.packing import Batch
from easyllm.train.data_config import PreferenceDataConfig
from easyllm.train.objectives.objective import ObjectiveConfig, register_objective
from easyllm.train.objectives.pairs import PairObjective, Pairs
from easyllm.train.objectives.sequence_logprobs import SequenceLogprobs


class SimPOConfig(ObjectiveConfig):
    """SimPO on pairs or rankings; needs no reference model."""

    kind: Literal["simpo"] = "simpo"
    beta: PositiveFloat = Field(
        default=2.0, description="Factor of the difference of mean log-probabilities."
    )
    gamma: NonNegativeFloat = Field(
        default=1.0,
        description="Target margin between the rewards of both sides; the paper uses 0.2 to 0.8 "
        "times beta.",
    )


class SimPO(PairObjective):
    """The loss of pairs with length-normalised rewards; see the module."""

    def __init__(self, config: SimPOConfig | None = None) -> None:
        self.config = config or SimPOConfig()

    def pair_losses(
        self,
        policy: SequenceLogprobs,
        batch: Batch,  # noqa: ARG002 - in objectives with a reference
        pairs: Pairs,
    ) -> tuple[Tensor, Tensor]:
        """Returns the loss of each pair [N], and rewards β l of each sequence [S]."""
        rewards = self.config.beta * policy.means
        chosen, rejected = pairs.of(rewards)
        return -F.logsigmoid(chosen - rejected - self.config.gamma), rewards


register_objective(SimPOConfig, build=SimPO, data=(PreferenceDataConfig,))

__all__ = ["SimPO", "SimPOConfig"]
