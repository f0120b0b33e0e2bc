"""AdaLoRA's scores of triplets, and the pruning of all but a given number of them.

I = |w ∂L/∂w|,  Ī ← β₁ Ī + (1 - β₁) I,  U ← β₂ U + (1 - β₂) |I - Ī|,  s = Ī U
S_k = s(λ_k) + mean s(column k of P) + mean s(row k of Q)
(Zhang et al. 2023, arXiv 2303.10512, eqs. 6 and 8-11)
"""

from collections.abc import Mapping
from typing import Protocol

import torch
from torch import Tensor, nn


class Triplets(Protocol):
    """The triplets of one linear (`adalora.AdaLoRA`)."""

    lora_A: nn.Parameter
    lora_E: nn.Parameter
    lora_B: nn.Parameter
    keeps: Tensor


class RankBudget:
    """Scores all triplets of a model and prunes them to a budget.

    Args:
        modules: the triplets of each linear, by its name.
        sensitivity_decay, uncertainty_decay: β₁ and β₂.
    """

    def __init__(
        self,
        modules: Mapping[str, Triplets],
        sensitivity_decay: float,
        uncertainty_decay: float,
    ) -> None:
        self.modules = dict(modules)
        self.decays = sensitivity_decay, uncertainty_decay
        self._parameters = {
            f"{name}.{letter}": parameter
            for name, m in self.modules.items()
            for letter, parameter in (
                ("lora_A", m.lora_A),
                ("lora_E", m.lora_E),
                ("lora_B", m.lora_B),
            )
        }
        self.sensitivity = {n: torch.zeros_like(p) for n, p in self._detached()}
        self.uncertainty = {n: torch.zeros_like(p) for n, p in self._detached()}
        self._gradients: dict[str, Tensor] = {}

    def _detached(self) -> list[tuple[str, Tensor]]:
        return [(name, parameter.detach()) for name, parameter in self._parameters.items()]

    @torch.no_grad()
    def keep_gradients(self, scale: float) -> None:
        """Copies the gradients of the step, times `scale`, for `update_scores`."""
        self._gradients = {
            name: parameter.grad * scale
            for name, parameter in self._parameters.items()
            if parameter.grad is not None
        }

    @torch.no_grad()
    def update_scores(self) -> None:
        """Updates the smoothed scores, with the weights after the step as in the paper's code."""
        first, second = self.decays
        for name, parameter in self._detached():
            if name not in self._gradients:
                continue
            now = (parameter * self._gradients[name]).abs()
            mean, spread = self.sensitivity[name], self.uncertainty[name]
            mean.mul_(first).add_(now, alpha=1 - first)
            spread.mul_(second).add_((now - mean).abs(), alpha=1 - second)
        self._gradients = {}

    @torch.no_grad()
    def scores(self) -> dict[str, Tensor]:
        """Returns the scores S [r] of the triplets of each linear."""

        def of(name: str, letter: str) -> Tensor:
            return self.sensitivity[f"{name}.{letter}"] * self.uncertainty[f"{name}.{letter}"]

        return {
            name: of(name, "lora_E").flatten()
            + of(name, "lora_A").mean(1)
            + of(name, "lora_B").mean(0)
            for name in self.modules
        }

    @torch.no_grad()
    def prune(self, budget: int) -> None:
        """Keeps exactly the `budget` best triplets of all linears.

        Of triplets with equal scores, the first ones are kept.
        """
        scores = self.scores()
        together = torch.cat([scores[name].float().cpu() for name in self.modules])
        best = torch.sort(together, descending=True, stable=True).indices[:budget]
        kept = torch.zeros(len(together), dtype=torch.bool)
        kept[best] = True
        sizes = [len(scores[name]) for name in self.modules]
        for module, mask in zip(self.modules.values(), kept.split(sizes), strict=True):
            module.keeps.copy_(mask)
        self.apply()

    @torch.no_grad()
    def apply(self) -> None:
        """Sets λ of the pruned triplets to zero."""
        for module in self.modules.values():
            module.lora_E.masked_fill_(~module.keeps[:, None], 0.0)

    def state(self) -> dict[str, Tensor]:
        """Returns the smoothed scores, for a checkpoint."""
        scores = {"sensitivity": self.sensitivity, "uncertainty": self.uncertainty}
        return {
            f"{kind}.{name}": tensor
            for kind, tensors in scores.items()
            for name, tensor in tensors.items()
        }


__all__ = ["RankBudget", "Triplets"]
