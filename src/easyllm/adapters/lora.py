"""LoRA: a frozen weight plus a trained low-rank update B A.

    y = W x + s B A x,   A: [r, in] uniform,  B: [out, r] zero
    (Hu et al. 2021, arXiv 2106.09685, eq. 3)

The scale s is α / r, or α / √r with rank stabilisation (rsLoRA; Kalajdzievski 2023,
arXiv 2312.03732). B is initialised to zero, so the first step sees exactly the base model.
"""

import logging
import math
from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import Tensor, nn

from easyllm.adapters.adapter import (
    NUMBERED,
    Adapter,
    AdapterConfig,
    FileModule,
    ends_with,
)
from easyllm.adapters.peft_keys import check_keys, matches
from easyllm.adapters.registry import register_adapter
from easyllm.core.errors import CheckpointError, ConfigError, suggest
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.cost import Activation, CostTrace, LinearShape
from easyllm.nn.linear import BaseLinear
from easyllm.nn.moe import ROUTERS
from easyllm.ops.deterministic import tiled_linear

logger = logging.getLogger(__name__)


class LoRAConfig(AdapterConfig):
    """Rank, scale and targets of LoRA adapters."""

    kind: Literal["lora"] = "lora"
    rank: PositiveInt = Field(
        default=16, description="Rank r of every linear that matches no key of rank_pattern."
    )
    alpha: PositiveFloat = Field(
        default=32.0,
        description="α of every linear that matches no key of alpha_pattern; the update is scaled "
        "by α / r.",
    )
    dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Dropout probability on the adapter's input in training.",
    )
    rslora: bool = Field(
        default=False,
        description="Whether the scale is α / √r instead of α / r (rsLoRA; Kalajdzievski 2023, "
        "arXiv 2312.03732).",
    )
    rank_pattern: dict[str, PositiveInt] = Field(
        default={},
        description="Ranks of individual linears, keyed by a linear's full name or by its trailing "
        "part; the first match applies.",
    )
    alpha_pattern: dict[str, PositiveFloat] = Field(
        default={},
        description="Values of α of individual linears, keyed by a linear's full name or by its "
        "trailing part; the first match applies.",
    )

    def rank_of(self, name: str) -> int:
        """Returns the rank r for the linear with this name."""
        return next((r for end, r in self.rank_pattern.items() if ends_with(name, end)), self.rank)

    def scale_of(self, name: str) -> float:
        """Returns the scale s for the linear with this name."""
        alphas = (a for end, a in self.alpha_pattern.items() if ends_with(name, end))
        alpha, rank = next(alphas, self.alpha), self.rank_of(name)
        return alpha / math.sqrt(rank) if self.rslora else alpha / rank

    def build(self, name: str, in_features: int, out_features: int) -> "LoRA":
        """Builds the adapter of one linear with uninitialised parameters."""
        return LoRA(
            self.rank_of(name),
            self.scale_of(name),
            in_features,
            out_features,
            dropout=self.dropout,
        )

    def check(self, name: str, in_features: int, out_features: int) -> None:
        """Checks that the adapter's rank does not exceed the rank of the linear's weight.

        Raises:
            ConfigError: the rank is too large; routers are exempt.
        """
        rank, most = self.rank_of(name), min(in_features, out_features)
        # all-linear includes routers, which have few outputs; they are allowed
        if rank > most and not name.endswith(ROUTERS):
            leaf = name.rsplit(".", 1)[-1]
            raise ConfigError(
                f"adapter.rank={rank} is more than the rank of {leaf} ({out_features} x "
                f"{in_features}), which is at most {most}; lower adapter.rank, or leave {leaf} out "
                "of adapter.targets"
            )

    def differs_by_layer(self) -> bool:
        """Returns whether layers of the same shape may have different ranks, scales or targets."""
        names = (*self.rank_pattern, *self.alpha_pattern)
        return super().differs_by_layer() or any(NUMBERED.search(name) for name in names)

    def check_names(self, names: Sequence[str]) -> None:
        """Checks that each key of `rank_pattern` and `alpha_pattern` matches an adapted linear.

        Raises:
            ConfigError: a key matches no adapted linear.
        """
        for key in ("rank_pattern", "alpha_pattern"):
            for end in getattr(self, key):
                if not any(ends_with(name, end) for name in names):
                    leaves = sorted({name.rsplit(".", 1)[-1] for name in names})
                    raise ConfigError(
                        f"adapter.{key} names {end!r}, which is not an adapted linear"
                        f"{suggest(end, leaves)}; use one of {', '.join(leaves)}"
                    )

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:
        """Returns the LoRA entries of `adapter_config.json`, patterns by the file's full names."""
        ranks = {theirs: self.rank_of(ours) for ours, theirs in modules.items()}
        given = [end for end in self.alpha_pattern if any(ends_with(ours, end) for ours in modules)]
        alphas = {
            theirs: alpha
            for ours, theirs in modules.items()
            for alpha in [
                next((self.alpha_pattern[e] for e in given if ends_with(ours, e)), self.alpha)
            ]
            if alpha != self.alpha
        }
        return {
            "r": self.rank,
            "lora_alpha": self.alpha,
            "lora_dropout": self.dropout,
            "use_rslora": self.rslora,
            "rank_pattern": {name: rank for name, rank in ranks.items() if rank != self.rank},
            "alpha_pattern": alphas,
            "fan_in_fan_out": False,
        }

    @classmethod
    def from_peft(cls, description: JsonMapping, modules: Mapping[str, FileModule]) -> Self:
        """Returns the configuration of a peft LoRA file, with a rank and α for each module.

        Raises:
            CheckpointError: an unsupported key changes the result, or tensors and configuration
                disagree.
        """
        check_keys(description, honoured=_HONOURED, neutral=_NEUTRAL)
        rank, alpha = description["r"], description["lora_alpha"]
        ranks, alphas = dict[str, int](), dict[str, float]()
        several = dict[str, list[float]]()
        for ours, module in modules.items():
            if set(module.tensors) != {"lora_A.weight", "lora_B.weight"}:
                raise CheckpointError(
                    f"{module.name} has {', '.join(sorted(module.tensors))} in the adapter's file, "
                    "expected lora_A.weight and lora_B.weight; copy the adapter again"
                )
            of_file = len(module.tensors["lora_A.weight"])
            said = matches(description.get("rank_pattern"), module.name) or [rank]
            if of_file not in said:
                raise CheckpointError(
                    f"{module.name} has rank {of_file} in the adapter's file and {said[0]} in its "
                    "configuration; copy the adapter again"
                )
            if of_file != rank:
                ranks[ours] = of_file
            its_alphas = matches(description.get("alpha_pattern"), module.name) or [alpha]
            if its_alphas[0] != alpha:
                alphas[ours] = its_alphas[0]
            if len(set(its_alphas)) > 1:
                several[module.name] = its_alphas
        if several:
            name, values = next(iter(several.items()))
            logger.warning(
                "the adapter's alpha_pattern has several values for %s (%s) and %d more modules; "
                "using the first, as peft does, but peft sorts the patterns when it saves, so it "
                "may differ from the value used in training",
                name,
                ", ".join(map(str, values)),
                len(several) - 1,
            )
        return cls(
            rank=rank,
            alpha=alpha,
            dropout=description.get("lora_dropout") or 0.0,
            rslora=bool(description.get("use_rslora")),
            rank_pattern=ranks,
            alpha_pattern=alphas,
            targets=tuple(modules),
        )


_HONOURED = ("r", "lora_alpha", "lora_dropout", "use_rslora", "rank_pattern", "alpha_pattern")
_NEUTRAL: JsonObject = {
    # initialisation, irrelevant once values are loaded; schemes that also change the base are
    # rejected
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal", "mica"),
    "bias": "none",
    "use_dora": False,
    "use_qalora": False,
    "lora_bias": False,
    "fan_in_fan_out": (True, False),  # concerns the base's layout, not the file's matrices
    "qalora_group_size": None,  # unused without use_qalora
    "megatron_core": None,
    "runtime_config": None,  # where tensors are placed while computing
    "loftq_config": ({},),
    "ensure_weight_tying": (True, False),  # tying follows from the file's tensors
    "eva_config": None,  # initialisation
}
"""Keys of peft's LoRA that are ignored at these values; None accepts any value."""


class LoRA(Adapter):
    """The LoRA adapter of one linear.

    A and B are stored in fp32; their matrix products (GEMMs) run in the input's dtype.

    Args:
        rank, scale: r and s.
        in_features, out_features: shape of the adapted linear.
        dropout: dropout probability on the adapter's input in training.
    """

    passes_input_unchanged = True
    batch_invariant = True

    def __init__(
        self,
        rank: int,
        scale: float,
        in_features: int,
        out_features: int,
        *,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.scale = scale
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank))
        self.dropout = nn.Dropout(dropout) if dropout else None

    def reset_parameters(self, generator: torch.Generator | None = None) -> None:
        """Initialises A uniformly in ±1/√in (as PyTorch's linear and `peft` do) and B to zero."""
        bound = 1 / math.sqrt(self.lora_A.shape[1])
        nn.init.uniform_(self.lora_A, -bound, bound, generator=generator)
        nn.init.zeros_(self.lora_B)

    def forward(self, x: Tensor, base: BaseLinear) -> Tensor:
        """Returns `base(x) + s · B A x` [..., out] for `x: [..., in]`."""
        y = base(x)
        if self.dropout is not None:
            x = self.dropout(x)
        down, up = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        if base.context is not None and base.context.deterministic:
            return y + self.scale * tiled_linear(tiled_linear(x, down), up)
        inner = x @ down.T  # [T, r]
        return torch.addmm(y, inner, up.T, alpha=self.scale)

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns W + s B A [out, in] in fp32 and the unchanged bias."""
        return weight + self.delta().to(weight.device), bias

    def loss_factors(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns x' and W' such that x' W'ᵀ is the adapted output.

        Dropout applies to the adapter's input only, so with dropout the two factors are the
        concatenations [x, drop(x) Aᵀ] and [W, s B] along the last axis.
        """
        if self.dropout is None or not self.training:
            return super().loss_factors(x, weight)
        inner = self.dropout(x) @ self.lora_A.to(x.dtype).T
        up = (self.scale * self.lora_B).to(weight.dtype)
        return torch.cat([x, inner], dim=1), torch.cat([weight, up], dim=1)

    def delta(self) -> Tensor:
        """Returns s B A [out, in] in fp32, which merging adds to the weight."""
        return (self.lora_B.float() @ self.lora_A.float()) * self.scale

    def cost(
        self, trace: CostTrace, linear: LinearShape, x: Activation, rows: int, name: str
    ) -> None:
        """Records the GEMMs x Aᵀ and (x Aᵀ) Bᵀ, and the casts of A and B to the dtype of x."""
        rank = len(self.lora_A)
        if self.dropout is not None:
            if x.grad:
                trace.keep(f"{name}.noise", x.nbytes)
            x = Activation(f"{name}.dropped", x.nbytes, x.grad)
        down, up = 2 * rows * linear.in_features * rank, 2 * rows * rank * linear.out_features
        cast = trace.cast_bytes(rank * linear.copies)
        trace.keep_all(x)
        if x.grad:
            trace.keep(f"{name}.lora_A", cast * linear.in_features)
        trace.product("adapters", down, down * (1 + x.grad))
        trace.keep(f"{name}.inner", rows * rank * trace.work.itemsize)
        trace.keep(f"{name}.lora_B", cast * linear.out_features)
        trace.product("adapters", up, 2 * up)

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """Returns A and B, keyed by their suffixes in peft's file."""
        return {"lora_A.weight": self.lora_A, "lora_B.weight": self.lora_B}


register_adapter(LoRAConfig, peft_type="LORA")

__all__ = ["LoRA", "LoRAConfig"]
