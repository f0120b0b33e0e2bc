"""VeRA: fixed random matrices that all linears share, scaled by two trained vectors each.

    y = W x + b + λ_b ⊙ B (λ_d ⊙ A x),   A: [r, in],  B: [out, r] fixed,  λ_b zero,  λ_d constant
    (Kopiczko et al. 2023, arXiv 2310.11454, eq. 2)

A and B have the size of the widest linear; a narrower one uses their first columns and rows.
"""

import math
from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, NonNegativeInt, PositiveInt
from torch import Generator, Tensor, nn

from easyllm.adapters.adapter import Adapter, AdapterConfig
from easyllm.adapters.adapter_set import AdapterSet
from easyllm.adapters.file_module import FileModule
from easyllm.adapters.peft_keys import check_keys
from easyllm.adapters.registry import register_adapter
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.cost import Activation, CostTrace, LinearShape
from easyllm.nn.linear import BaseLinear
from easyllm.ops.deterministic import fixed_order_linear

FILE_A, FILE_B = "base_model.vera_A", "base_model.vera_B"
VECTORS = ("vera_lambda_b", "vera_lambda_d")


class VeRAConfig(AdapterConfig):
    """Rank of the shared matrices, their seed, and the start of λ_d."""

    kind: Literal["vera"] = "vera"
    rank: PositiveInt = Field(
        default=256,
        description="Rank r of the shared matrices; only r + out numbers are trained per linear.",
    )
    start: float = Field(default=0.1, description="Initial value of all elements of λ_d.")
    dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Dropout probability on the adapter's input in training.",
    )
    projection_seed: NonNegativeInt = Field(
        default=0,
        lt=2**63,
        description="Seed of the shared matrices (peft's `projection_prng_key`).",
    )
    save_projection: bool = Field(
        default=True,
        description="Whether files hold the shared matrices, so that they do not depend on the "
        "random numbers of a PyTorch version.",
    )

    def build(self, name: str, in_features: int, out_features: int) -> "VeRA":  # noqa: ARG002
        """Builds the adapter of one linear with uninitialised parameters."""
        return VeRA(self.rank, self.start, in_features, out_features, dropout=self.dropout)

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:  # noqa: ARG002 - interface
        """Returns the VeRA entries of `adapter_config.json`."""
        return {
            "r": self.rank,
            "vera_dropout": self.dropout,
            "d_initial": self.start,
            "projection_prng_key": self.projection_seed,
            "save_projection": self.save_projection,
            "bias": "none",
            "fan_in_fan_out": False,
            "init_weights": True,
        }

    @classmethod
    def from_peft(cls, description: JsonMapping, modules: Mapping[str, FileModule]) -> Self:
        """Returns the configuration of a peft VeRA file.

        Raises:
            CheckpointError: an unsupported key changes the result, or a tensor is missing.
        """
        neutral: JsonObject = {
            "bias": "none",
            "fan_in_fan_out": (True, False),
            "init_weights": (True, False),
            "layers_to_transform": None,
            "layers_pattern": None,
        }
        honoured = ("r", "vera_dropout", "d_initial", "projection_prng_key", "save_projection")
        check_keys(description, honoured=honoured, neutral=neutral)
        for module in modules.values():
            if set(module.tensors) != set(VECTORS):
                raise module.unexpected(" and ".join(VECTORS))
        return cls(
            rank=description["r"],
            start=description.get("d_initial", 0.1),
            dropout=description.get("vera_dropout") or 0.0,
            projection_seed=description.get("projection_prng_key") or 0,
            save_projection=description.get("save_projection", True),
            targets=tuple(modules) or ("no linear",),
        )


class VeRA(Adapter):
    """The VeRA adapter of one linear.

    Args:
        rank: r.
        start: initial value of λ_d.
        in_features, out_features: shape of the adapted linear.
        dropout: dropout probability on the adapter's input in training.

    Attributes:
        shared_A, shared_B: the shared matrices [r, widest in] and [widest out, r]; set by the
            adapter set.
    """

    passes_input_unchanged = True
    batch_invariant = True
    shared_A: Tensor
    shared_B: Tensor

    def __init__(
        self, rank: int, start: float, in_features: int, out_features: int, *, dropout: float = 0.0
    ) -> None:
        super().__init__()
        self.start_value, self.in_features, self.out_features = start, in_features, out_features
        self.vera_lambda_b = nn.Parameter(torch.empty(out_features))
        self.vera_lambda_d = nn.Parameter(torch.empty(rank))
        self.dropout = nn.Dropout(dropout) if dropout else None
        for name in ("shared_A", "shared_B"):
            self.register_buffer(name, torch.empty(0), persistent=False)

    def reset_parameters(self, generator: Generator) -> None:  # noqa: ARG002 - both are constant
        """Initialises λ_b to zero and λ_d to its start value."""
        nn.init.zeros_(self.vera_lambda_b)
        nn.init.constant_(self.vera_lambda_d, self.start_value)

    def _matrices(self) -> tuple[Tensor, Tensor]:
        """diag(λ_d) A [r, in] and B [out, r] of this linear."""
        down = self.vera_lambda_d[:, None] * self.shared_A[:, : self.in_features]
        return down, self.shared_B[: self.out_features]

    def forward(self, x: Tensor, base: BaseLinear) -> Tensor:
        """Returns `base(x) + λ_b ⊙ B (λ_d ⊙ A x)`, [..., out] for `x: [..., in]`."""
        y = base(x)
        if self.dropout is not None:
            x = self.dropout(x)
        down, up = self.shared_A[:, : self.in_features], self.shared_B[: self.out_features]
        down, up = down.to(x.dtype), up.to(x.dtype)
        inner_scale, outer_scale = self.vera_lambda_d.to(x.dtype), self.vera_lambda_b.to(x.dtype)
        if base.context is not None and base.context.deterministic:
            inner = inner_scale * fixed_order_linear(x, down.contiguous())
            return y + outer_scale * fixed_order_linear(inner, up)
        return torch.addcmul(y, outer_scale, (inner_scale * (x @ down.T)) @ up.T)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns W + diag(λ_b) B diag(λ_d) A [out, in] in fp32 and the unchanged bias."""
        down, up = self._matrices()
        update = self.vera_lambda_b[:, None] * (up.float() @ down.float())
        return weight + update.to(weight.device), bias

    def update_factors(self) -> tuple[Tensor, Tensor] | None:
        """Returns diag(λ_d) A [r, in] and diag(λ_b) B [out, r] in fp32."""
        down, up = self._matrices()
        return down.float(), self.vera_lambda_b[:, None] * up.float()

    def cost(
        self, trace: CostTrace, linear: LinearShape, x: Activation, rows: int, name: str
    ) -> None:
        """Records the two products, whose matrices are not trained, and what they save."""
        rank = self.vera_lambda_d.numel()
        if self.dropout is not None:
            x = trace.dropped(x, name)
        down, up = 2 * rows * linear.in_features * rank, 2 * rows * rank * linear.out_features
        trace.product("adapters", down, down * x.grad)
        trace.keep(f"{name}.inner", rows * rank * trace.work.itemsize)
        trace.product("adapters", up, up)
        trace.keep(f"{name}.outer", rows * linear.out_features * trace.work.itemsize)

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """Returns λ_b and λ_d, keyed by their suffixes in peft's file."""
        return {"vera_lambda_b": self.vera_lambda_b, "vera_lambda_d": self.vera_lambda_d}


class VeRASet(AdapterSet):
    """All VeRA modules of a model, and the two matrices that they share."""

    def __init__(self, config: VeRAConfig, **parts: object) -> None:
        super().__init__(config, **parts)  # type: ignore[arg-type]
        self.modules = [a for _, a in self.linears.values() if isinstance(a, VeRA)]
        if not self.modules:
            return
        widest_in = max(module.in_features for module in self.modules)
        widest_out = max(module.out_features for module in self.modules)
        generator = torch.Generator().manual_seed(config.projection_seed)
        device = self.modules[0].vera_lambda_b.device
        self.matrices = {
            FILE_A: shared_matrix(config.rank, widest_in, generator).to(device),
            FILE_B: shared_matrix(widest_out, config.rank, generator).to(device),
        }
        for module in self.modules:
            module.shared_A, module.shared_B = self.matrices[FILE_A], self.matrices[FILE_B]

    def own_tensors(self) -> dict[str, Tensor]:
        """Returns the shared matrices by their names in peft's file, if files hold them."""
        config = self.config
        assert isinstance(config, VeRAConfig), "registered with this set"
        return dict(self.matrices) if config.save_projection and self.modules else {}


def shared_matrix(rows: int, columns: int, generator: Generator) -> Tensor:
    """Returns a matrix [rows, columns] drawn as peft draws it: Kaiming uniform, ±√(6 / columns)."""
    bound = math.sqrt(3.0) * math.sqrt(2.0) / math.sqrt(columns)
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)


register_adapter(VeRAConfig, peft_type="VERA", adapter_set=VeRASet)

__all__ = ["VeRA", "VeRAConfig", "VeRASet", "shared_matrix"]
