"""PiSSA: LoRA that starts from the largest singular values of the weight instead of from zero.

    W ≈ U Σ Vᵀ:   s B₀ A₀ = U_r Σ_r V_rᵀ,   A₀ = √(Σ_r / s) V_rᵀ,   B₀ = U_r √(Σ_r / s)
    y = (W - s B₀ A₀) x + s B A x,   B = B₀ and A = A₀ at the start
    (Meng et al. 2024, arXiv 2404.02948, section 3)

The paper replaces the base by the residual W - s B₀ A₀. Here the base stays as it is and the
product with B₀ A₀ is subtracted: the same function, on full and on quantized bases, and the saved
adapter is an ordinary LoRA of rank 2r with A' = [A; A₀] and B' = [B, -B₀] that fits the original
base. A file that needs a residual base depends on recomputing the same singular vectors.
"""

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, NonNegativeInt, model_validator
from torch import Generator, Tensor

from easyllm.adapters.lora import LoRA
from easyllm.adapters.low_rank import LowRankConfig
from easyllm.adapters.registry import register_adapter
from easyllm.core.json_types import JsonObject
from easyllm.nn.linear import Linear


class PiSSAConfig(LowRankConfig):
    """Rank, scale and targets of LoRA adapters that start from singular vectors."""

    kind: Literal["pissa"] = "pissa"
    iterations: NonNegativeInt | None = Field(
        default=4,
        description="Power iterations of the randomised singular value decomposition; null "
        "computes the exact one, which takes far longer.",
    )

    adapts_embeddings: ClassVar[bool] = False

    @model_validator(mode="after")
    def _starts_at_no_zero(self) -> Self:
        if self.rate_ratio != 1:
            raise ValueError(
                f"rate_ratio={self.rate_ratio:g} applies to the matrix that starts at zero, and "
                "with pissa none does; leave it out, or use kind=lora"
            )
        return self

    def build(self, name: str, in_features: int, out_features: int) -> "PiSSA":
        """Builds the adapter of one linear with uninitialised parameters."""
        adapter = self.build_as(PiSSA, name, in_features, out_features)
        adapter.iterations = self.iterations
        return adapter

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:
        """Returns the entries of a LoRA of twice the rank and the same scale."""
        grown = 2**0.5 if self.rslora else 2.0
        doubled = self.model_copy(
            update={
                "rank": 2 * self.rank,
                "alpha": grown * self.alpha,
                "rank_pattern": {name: 2 * r for name, r in self.rank_pattern.items()},
                "alpha_pattern": {name: grown * a for name, a in self.alpha_pattern.items()},
            }
        )
        return LowRankConfig.to_peft(doubled, modules)


class PiSSA(LoRA):
    """The PiSSA adapter of one linear; the arguments are those of `LoRA`.

    Attributes:
        start_A, start_B: A₀ [r, in] and B₀ [out, r], constant.
        iterations: power iterations of the decomposition; None computes the exact one.
    """

    start_A: Tensor
    start_B: Tensor
    iterations: int | None = None

    def add_parameters(self, rank: int, in_features: int, out_features: int) -> None:
        """Adds A, B, A₀ and B₀, uninitialised."""
        super().add_parameters(rank, in_features, out_features)
        self.register_buffer("start_A", torch.empty(rank, in_features))
        self.register_buffer("start_B", torch.empty(out_features, rank))

    @torch.no_grad()
    def start(self, layer: Linear, generator: Generator) -> None:
        """Initialises A and B from the largest singular values of the layer's weight.

        If the rank is more than that of the weight (a router's), the rest starts as in LoRA.
        """
        weight = layer.storage.dense().float()
        rank = min(len(self.lora_A), *weight.shape)
        u, s, v = largest_singular(weight, rank, self.iterations, generator)
        root = (s / self.scale).sqrt()
        self.lora_A[:rank] = root[:, None] * v
        self.lora_B[:, :rank] = u * root
        self.start_A.copy_(self.lora_A)
        self.start_B.copy_(self.lora_B)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Returns [A; A₀] [2r, in] and [B, -B₀] [out, 2r]."""
        return torch.cat([self.lora_A, self.start_A]), torch.cat([self.lora_B, -self.start_B], 1)

    def saved_tensors(self) -> Mapping[str, Tensor]:
        """Returns the matrices of a LoRA of rank 2r that fits the original base."""
        down, up = self.matrices()
        return {"lora_A.weight": down, "lora_B.weight": up}


def largest_singular(
    weight: Tensor, rank: int, iterations: int | None, generator: Generator
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the largest singular values and vectors of a matrix.

    Args:
        weight: [out, in], fp32.
        rank: the number r of singular values.
        iterations: power iterations of the randomised method (Halko et al. 2009, arXiv 0909.4061,
            algorithm 4.4); None computes the exact decomposition.
        generator: draws the random start vectors, on the CPU.

    Returns:
        U [out, r], S [r] in descending order, and Vᵀ [r, in].
    """
    smaller = min(weight.shape)
    width = min(smaller, rank + 10)  # 10 further vectors, as section 4.2 there advises
    if iterations is None or width >= smaller:
        u, s, v = torch.linalg.svd(weight, full_matrices=False)
        return u[:, :rank], s[:rank], v[:rank]
    start = torch.randn(weight.shape[1], width, generator=generator).to(weight)
    basis, _ = torch.linalg.qr(weight @ start)
    for _ in range(iterations):
        other, _ = torch.linalg.qr(weight.T @ basis)
        basis, _ = torch.linalg.qr(weight @ other)
    u, s, v = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    return (basis @ u)[:, :rank], s[:rank], v[:rank]


register_adapter(PiSSAConfig, peft_type="LORA", reads=lambda _: False)

__all__ = ["PiSSA", "PiSSAConfig", "largest_singular"]
