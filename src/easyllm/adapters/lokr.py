"""LoKr: an update that is the Kronecker product of a small and a low-rank matrix.

    y = W x + b + s (C ⊗ D) x,   s = α / r,   C: [l, m] zero,   D = D_a D_b: [k, n] of rank r
    out = l k and in = m n, with l ≤ k and m ≤ n as close as divisors allow
    (Yeh et al. 2023, arXiv 2309.14859, section 4.2)

D is a full matrix if r is at least half of its larger side. With `decompose_both`, C has rank r,
too, where that saves parameters. The product is never formed: x is a matrix [m, n], which D and C
multiply from both sides.
"""

import math
from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Generator, Tensor, nn

from easyllm.adapters.adapter import Adapter, AdapterConfig
from easyllm.adapters.file_module import FileModule
from easyllm.adapters.peft_keys import check_keys
from easyllm.adapters.registry import register_adapter
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.cost import Activation, CostTrace, LinearShape
from easyllm.nn.linear import BaseLinear
from easyllm.ops.deterministic import fixed_order_linear

SMALL, LARGE = "lokr_w1", "lokr_w2"
"""peft's names of C and D; their factors end in `_a` and `_b`."""


class LoKrConfig(AdapterConfig):
    """Rank and scale of LoKr adapters, and the sizes of the two matrices."""

    kind: Literal["lokr"] = "lokr"
    rank: PositiveInt = Field(default=8, description="Rank r of the larger matrix.")
    alpha: PositiveFloat = Field(default=8.0, description="α; the update is scaled by α / r.")
    factor: int = Field(
        default=-1,
        ge=-1,
        description="Size of the smaller matrix where it divides a linear's size (peft's "
        "`decompose_factor`); -1 makes the two matrices as equal as possible.",
    )
    decompose_both: bool = Field(
        default=False, description="Whether the smaller matrix is low-rank as well."
    )

    def build(self, name: str, in_features: int, out_features: int) -> "LoKr":  # noqa: ARG002
        """Builds the adapter of one linear with uninitialised parameters."""
        rows, columns = divisors(out_features, self.factor), divisors(in_features, self.factor)
        small, large = (rows[0], columns[0]), (rows[1], columns[1])
        both = self.decompose_both and self.rank < max(small) / 2
        return LoKr(
            small,
            large,
            small_rank=self.rank if both else None,
            large_rank=self.rank if self.rank < max(large) / 2 else None,
            scale=self.alpha / self.rank,
        )

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:  # noqa: ARG002 - interface
        """Returns the LoKr entries of `adapter_config.json`."""
        return {
            "r": self.rank,
            "alpha": self.alpha,
            "decompose_factor": self.factor,
            "decompose_both": self.decompose_both,
            "rank_dropout": 0.0,
            "module_dropout": 0.0,
            "use_effective_conv2d": False,
            "init_weights": True,
        }

    @classmethod
    def from_peft(cls, description: JsonMapping, modules: Mapping[str, FileModule]) -> Self:
        """Returns the configuration of a peft LoKr file.

        Raises:
            CheckpointError: an unsupported key changes the result, or a tensor is missing.
        """
        neutral: JsonObject = {
            **dict.fromkeys(("rank_dropout", "module_dropout", "rank_dropout_scale")),
            "use_effective_conv2d": (True, False),  # concerns convolutions
            "init_weights": (True, False, "lycoris"),
            "rank_pattern": ({},),
            "alpha_pattern": ({},),
        }
        honoured = ("r", "alpha", "decompose_factor", "decompose_both")
        check_keys(description, honoured=honoured, neutral=neutral)
        for module in modules.values():
            found = {name.removesuffix("_a").removesuffix("_b") for name in module.tensors}
            if found != {SMALL, LARGE}:
                raise module.unexpected(f"{SMALL} and {LARGE} or their factors")
        return cls(
            rank=description["r"],
            alpha=description.get("alpha") or description["r"],
            factor=description.get("decompose_factor", -1),
            decompose_both=bool(description.get("decompose_both")),
            targets=tuple(modules) or ("no linear",),
        )


def divisors(size: int, factor: int = -1) -> tuple[int, int]:
    """Returns two numbers whose product is `size`, as peft 0.21.2 chooses them.

    Args:
        size: the number to divide.
        factor: the first of the two, if it divides `size`; otherwise an upper bound on it. -1 gives
            the two that are closest to each other, the smaller one first.
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    most = math.isqrt(size) if factor < 1 else min(factor, math.isqrt(size))
    smaller = next(n for n in range(most, 0, -1) if size % n == 0)
    return smaller, size // smaller


class LoKr(Adapter):
    """The LoKr adapter of one linear.

    Args:
        small, large: shapes (l, m) of C and (k, n) of D.
        small_rank, large_rank: their ranks; None stores the full matrix.
        scale: s.
    """

    passes_input_unchanged = True
    batch_invariant = True

    def __init__(
        self,
        small: tuple[int, int],
        large: tuple[int, int],
        *,
        small_rank: int | None,
        large_rank: int | None,
        scale: float,
    ) -> None:
        super().__init__()
        self.scale, self.columns = scale, small[1]
        for name, shape, rank in ((SMALL, small, small_rank), (LARGE, large, large_rank)):
            if rank is None:
                self.register_parameter(name, nn.Parameter(torch.empty(shape)))
                continue
            self.register_parameter(f"{name}_a", nn.Parameter(torch.empty(shape[0], rank)))
            self.register_parameter(f"{name}_b", nn.Parameter(torch.empty(rank, shape[1])))

    def reset_parameters(self, generator: Generator) -> None:
        """Initialises C, or its first factor, to zero and the others uniformly in ±1/√columns."""
        for name, parameter in self.named_parameters():
            if name in (SMALL, f"{SMALL}_a"):
                nn.init.zeros_(parameter)
            else:
                bound = 1 / math.sqrt(parameter.shape[1])
                nn.init.uniform_(parameter, -bound, bound, generator=generator)

    def factors(self, name: str) -> list[Tensor]:
        """Returns the matrices whose product is C or D: one, or two of low rank."""
        own = dict(self.named_parameters())
        return [own[name]] if name in own else [own[f"{name}_a"], own[f"{name}_b"]]

    def forward(self, x: Tensor, base: BaseLinear) -> Tensor:
        """Returns `base(x) + s (C ⊗ D) x`, [..., out] for `x: [..., in]`."""
        y = base(x)
        exact = base.context is not None and base.context.deterministic
        product = fixed_order_linear if exact else nn.functional.linear
        # rows of two axes: with more, PyTorch's products differ by whether a gradient is needed
        inner = x.reshape(-1, x.shape[-1] // self.columns)  # [T m, n]
        for matrix in reversed(self.factors(LARGE)):
            inner = product(inner, matrix.to(x.dtype))  # [T m, k] at last
        width = inner.shape[1]
        inner = inner.view(-1, self.columns, width).transpose(1, 2).reshape(-1, self.columns)
        for matrix in reversed(self.factors(SMALL)):
            inner = product(inner, matrix.to(x.dtype))  # [T k, l] at last
        update = inner.view(-1, width, inner.shape[1]).transpose(1, 2).reshape(y.shape)
        return torch.add(y, update, alpha=self.scale)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns W + s (C ⊗ D) [out, in] in fp32 and the unchanged bias."""
        small, large = (_product(self.factors(name)).float() for name in (SMALL, LARGE))
        return weight + self.scale * torch.kron(small, large).to(weight.device), bias

    def update_factors(self) -> tuple[Tensor, Tensor] | None:
        """Returns I ⊗ D_b [m r, in] and s C ⊗ D_a [out, m r] in fp32; None if D is full."""
        large = self.factors(LARGE)
        if len(large) == 1:
            return None
        first, second = (matrix.float() for matrix in large)
        small = self.scale * _product(self.factors(SMALL)).float()
        identity = torch.eye(self.columns, device=small.device)
        return torch.kron(identity, second), torch.kron(small, first)

    def cost(
        self, trace: CostTrace, linear: LinearShape, x: Activation, rows: int, name: str
    ) -> None:
        """Records the products with D and C, and the tensors between them."""
        trace.keep_all(x)
        work, vectors, grad = trace.work, rows * self.columns, x.grad
        for own in (LARGE, SMALL):
            for number, matrix in enumerate(reversed(self.factors(own))):
                flops = 2 * vectors * matrix.numel()
                trace.product("adapters", flops, flops * (1 + grad))
                trace.keep(f"{name}.{own}.{number}", vectors * matrix.shape[0] * work.itemsize)
                trace.keep(
                    f"{name}.{own}.{number}.weight",
                    trace.cast_bytes(matrix.numel() * linear.copies),
                )
                grad = True
            vectors = rows * self.factors(LARGE)[0].shape[0]

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """Returns C and D, or their factors, keyed by their suffixes in peft's file."""
        return dict(self.named_parameters())


def _product(factors: list[Tensor]) -> Tensor:
    return factors[0] if len(factors) == 1 else factors[0] @ factors[1]


register_adapter(LoKrConfig, peft_type="LOKR")

__all__ = ["LoKr", "LoKrConfig", "divisors"]
