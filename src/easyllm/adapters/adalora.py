"""AdaLoRA: singular values that are pruned during training, so that ranks go where they matter.

    y = W x + b + s P diag(λ) Q x,   s = α / r₀,   P: [out, r₀],  Q: [r₀, in],  λ: [r₀] zero
    (Zhang et al. 2023, arXiv 2303.10512)

P and Q are kept near orthogonal by a term of the loss, ‖PᵀP - I‖ + ‖QQᵀ - I‖ (mean over all
matrices). A triplet (column of P, λ, row of Q) is scored by the products of smoothed sensitivity
|w ∂L/∂w| and its smoothed uncertainty (eqs. 8-11). The number of triplets kept falls from r₀ a
linear to `rank` a linear on average, along a cubic schedule (eq. 12). λ of the others is set
to zero; they may return until the budget is final.
"""

from collections.abc import Mapping, Sequence
from typing import Literal, Self

import torch
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt
from torch import Generator, Tensor, nn

from easyllm.adapters.adapter import AdapterConfig
from easyllm.adapters.adapter_set import AdapterSet, StepInfo
from easyllm.adapters.file_module import FileModule
from easyllm.adapters.lora import LoRA
from easyllm.adapters.peft_keys import check_keys
from easyllm.adapters.rank_budget import RankBudget
from easyllm.adapters.registry import register_adapter
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.cost import Activation, CostTrace, LinearShape
from easyllm.nn.linear import BaseLinear

LETTERS = ("lora_A", "lora_E", "lora_B")
"""Names of Q, λ and P in peft."""


class AdaLoRAConfig(AdapterConfig):
    """Initial and final ranks of AdaLoRA, and the schedule between them."""

    kind: Literal["adalora"] = "adalora"
    rank: PositiveInt = Field(
        default=8, description="Mean rank of all linears at the end; their sum is met exactly."
    )
    init_rank: PositiveInt | None = Field(
        default=None,
        description="Rank r₀ of every linear at the start; null is one and a half times `rank`.",
    )
    alpha: PositiveFloat = Field(
        default=32.0, description="α; the update is scaled by α / r₀, also after pruning."
    )
    dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Dropout probability on the adapter's input in training.",
    )
    warmup_steps: NonNegativeInt | None = Field(
        default=None, description="Steps before pruning starts; null is a tenth of the run."
    )
    final_steps: NonNegativeInt | None = Field(
        default=None,
        description="Steps after the budget is final; null is three tenths of the run.",
    )
    interval: PositiveInt = Field(default=1, description="Steps between two prunings.")
    sensitivity_decay: float = Field(
        default=0.85, gt=0.0, lt=1.0, description="β₁ of the smoothed sensitivity."
    )
    uncertainty_decay: float = Field(
        default=0.85, gt=0.0, lt=1.0, description="β₂ of the smoothed uncertainty."
    )
    orthogonality: NonNegativeFloat = Field(
        default=0.5, description="Weight of the orthogonality term in the loss."
    )
    kept: dict[str, tuple[bool, ...]] = Field(
        default={},
        description="Triplets kept in each linear, of a finished adapter; set by reading its file.",
    )

    @property
    def start_rank(self) -> int:
        """The rank r₀ of every linear at the start."""
        return -(-3 * self.rank // 2) if self.init_rank is None else self.init_rank

    def rank_of(self, name: str) -> int:
        """Returns the number of triplets that the linear with this name has in memory."""
        return sum(self.kept[name]) if name in self.kept else self.start_rank

    def build(self, name: str, in_features: int, out_features: int) -> "AdaLoRA":
        """Builds the adapter of one linear with uninitialised parameters."""
        scale = self.alpha / (self.start_rank + 1e-5)  # as in peft
        return AdaLoRA(self.rank_of(name), scale, in_features, out_features, dropout=self.dropout)

    def check(self, name: str, in_features: int, out_features: int) -> None:
        """Checks the ranks against one linear.

        Raises:
            ConfigError: the initial rank exceeds that of the weight, or the final rank exceeds it.
        """
        most = min(in_features, out_features)
        if self.start_rank > most:
            raise ConfigError(
                f"adapter.init_rank={self.start_rank} is more than the rank of {name} "
                f"({out_features} x {in_features}), which is at most {most}; lower it, or name the "
                "linear in adapter.exclude"
            )
        if self.rank > self.start_rank:
            raise ConfigError(
                f"adapter.rank={self.rank} is more than adapter.init_rank={self.start_rank}, but "
                "ranks only fall during training; lower it"
            )

    def check_names(self, names: Sequence[str]) -> None:  # noqa: ARG002 - interface
        """Checks that a new adapter has no record of pruned triplets.

        Raises:
            ConfigError: it has.
        """
        if self.kept:
            raise ConfigError(
                "adapter.kept is set by reading the file of a finished adapter; leave it out"
            )

    def check_steps(self, total_steps: int) -> None:
        """Checks that the schedule fits into the run.

        Raises:
            ConfigError: it has no step between warm-up and final phase.
        """
        warmup, final = self.phases(total_steps)
        if warmup >= total_steps - final:
            raise ConfigError(
                f"adapter.warmup_steps={warmup} and adapter.final_steps={final} leave no step for "
                f"pruning in a run of {total_steps} steps; lower them, or train longer"
            )

    def phases(self, total_steps: int) -> tuple[int, int]:
        """Returns the steps before the first pruning and after the last one."""
        warmup = total_steps // 10 if self.warmup_steps is None else self.warmup_steps
        final = 3 * total_steps // 10 if self.final_steps is None else self.final_steps
        return warmup, final

    @classmethod
    def from_peft(cls, description: JsonMapping, modules: Mapping[str, FileModule]) -> Self:
        """Returns the configuration of a peft AdaLoRA file.

        Raises:
            CheckpointError: an unsupported key changes the result, or tensors and `rank_pattern`
                disagree.
        """
        check_keys(description, honoured=HONOURED, neutral=NEUTRAL)
        pattern = {
            str(name).removesuffix(".lora_E"): tuple(kept)
            for name, kept in (description.get("rank_pattern") or {}).items()
        }
        init_rank, kept = description["init_r"], dict[str, tuple[bool, ...]]()
        for ours, module in modules.items():
            if set(module.tensors) != set(LETTERS):
                raise module.unexpected(", ".join(LETTERS))
            its = pattern.get(module.name, (True,) * init_rank)
            rank = len(module.tensors["lora_A"])
            if rank != sum(its):
                raise CheckpointError(
                    f"{module.name} has rank {rank} in the adapter's file and {sum(its)} in its "
                    "rank_pattern; copy the adapter again"
                )
            if not all(its) or len(its) != init_rank:
                kept[ours] = its
        alpha = description.get("lora_alpha") or init_rank
        return cls(
            init_rank=init_rank,
            rank=min(description.get("target_r") or init_rank, init_rank),
            alpha=alpha,
            dropout=description.get("lora_dropout") or 0.0,
            kept=kept,
            targets=tuple(modules) or ("no linear",),
        )


HONOURED = ("init_r", "target_r", "lora_alpha", "lora_dropout", "rank_pattern")
NEUTRAL: JsonObject = {
    # the schedule and the loss term of a finished training
    **dict.fromkeys(("tinit", "tfinal", "deltaT", "beta1", "beta2", "total_step")),
    **dict.fromkeys(("orth_reg_weight", "r", "megatron_core", "runtime_config", "eva_config")),
    "init_lora_weights": (True, False),
    "bias": "none",
    "fan_in_fan_out": (True, False),
    "loftq_config": ({},),
    "use_rslora": False,
    "use_dora": False,
    "lora_bias": False,
    "ensure_weight_tying": (True, False),
    "qalora_group_size": None,
    "alpha_pattern": ({},),
}


class AdaLoRA(LoRA):
    """The AdaLoRA adapter of one linear: a LoRA with A = diag(λ) Q and B = P.

    The arguments are those of `LoRA`; the rank is the number of triplets in memory.

    Attributes:
        lora_A, lora_E, lora_B: Q [r, in], λ [r, 1] and P [out, r], fp32.
        keeps: [r] bool, the triplets whose λ is not forced to zero.
    """

    keeps: Tensor

    def add_parameters(self, rank: int, in_features: int, out_features: int) -> None:
        """Adds Q, λ and P, uninitialised."""
        self.lora_A = nn.Parameter(torch.empty(rank, in_features))
        self.lora_E = nn.Parameter(torch.empty(rank, 1))
        self.lora_B = nn.Parameter(torch.empty(out_features, rank))
        self.register_buffer("keeps", torch.ones(rank, dtype=torch.bool))

    def reset_parameters(self, generator: Generator | None = None) -> None:
        """Initialises P and Q from N(0, 0.02²) and λ to zero, as peft does."""
        nn.init.normal_(self.lora_A, std=0.02, generator=generator)
        nn.init.zeros_(self.lora_E)
        nn.init.normal_(self.lora_B, std=0.02, generator=generator)

    def matrices(self) -> tuple[Tensor, Tensor]:
        """Returns diag(λ) Q [r, in] and P [out, r], in fp32."""
        return self.lora_A * self.lora_E, self.lora_B

    def forward(self, x: Tensor, base: BaseLinear) -> Tensor:
        """Returns `base(x) + s P diag(λ) Q x`, [..., out] for `x: [..., in]`."""
        # all triplets may have been pruned
        return super().forward(x, base) if len(self.lora_A) else base(x)

    def update_factors(self) -> tuple[Tensor, Tensor]:
        """Returns diag(λ) Q [r, in] and s P [out, r] in fp32, without the pruned triplets."""
        down, up = self.matrices()
        return down.float()[self.keeps], self.scale * up.float()[:, self.keeps]

    def orthogonality(self) -> Tensor:
        """Returns ‖QQᵀ - I‖ + ‖PᵀP - I‖, Frobenius norms."""
        identity = torch.eye(len(self.lora_A), device=self.lora_A.device, dtype=self.lora_A.dtype)
        of_q = torch.linalg.matrix_norm(self.lora_A @ self.lora_A.T - identity)
        of_p = torch.linalg.matrix_norm(self.lora_B.T @ self.lora_B - identity)
        total: Tensor = of_q + of_p
        return total

    def cost(
        self, trace: CostTrace, linear: LinearShape, x: Activation, rows: int, name: str
    ) -> None:
        """Records the products x (diag(λ) Q)ᵀ and (…) Pᵀ, and the casts of both matrices."""
        rank = len(self.lora_A)
        if self.dropout is not None:
            x = trace.dropped(x, name)
        down, up = 2 * rows * linear.in_features * rank, 2 * rows * rank * linear.out_features
        cast = trace.cast_bytes(rank * linear.copies)
        trace.keep_all(x)
        # diag(λ) Q is a new fp32 tensor, cast or not
        scaled = rank * linear.copies * linear.in_features
        if x.grad:
            trace.keep(f"{name}.lora_A", cast * linear.in_features or 4 * scaled)
        trace.product("adapters", down, down * (1 + x.grad))
        trace.keep(f"{name}.inner", rows * rank * trace.work.itemsize)
        trace.keep(f"{name}.lora_B", cast * linear.out_features)
        trace.product("adapters", up, 2 * up)

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """Returns Q, λ and P, keyed by their suffixes in peft's file."""
        return {letter: getattr(self, letter) for letter in LETTERS}

    def saved_tensors(self) -> Mapping[str, Tensor]:
        """Returns Q, λ and P without the pruned triplets."""
        return {
            "lora_A": self.lora_A[self.keeps],
            "lora_E": self.lora_E[self.keeps],
            "lora_B": self.lora_B[:, self.keeps],
        }


class AdaLoRASet(AdapterSet):
    """All AdaLoRA modules of a model, whose triplets compete for one budget."""

    config: AdaLoRAConfig
    total_steps: int = 0
    _budget: RankBudget | None = None

    @property
    def modules(self) -> dict[str, AdaLoRA]:
        """The modules by the names of their linears."""
        return {n: a for n, (_, a) in self.linears.items() if isinstance(a, AdaLoRA)}

    @property
    def budget(self) -> RankBudget:
        """The scores and masks of all triplets; created when first needed."""
        if self._budget is None:
            config = self.config
            decays = config.sensitivity_decay, config.uncertainty_decay
            self._budget = RankBudget(self.modules, *decays)
        return self._budget

    def loss(self) -> Tensor | None:
        """Returns the orthogonality term: its weight times the mean over all P and Q."""
        if not self.config.orthogonality or not self.modules:
            return None
        terms = torch.stack([module.orthogonality() for module in self.modules.values()])
        mean: Tensor = terms.sum() / (2 * len(terms))
        return self.config.orthogonality * mean

    def after_backward(self, info: StepInfo) -> None:
        """Keeps the gradients of the step, which the optimizer discards."""
        if info.step < self._last(info.total_steps) - 1:
            self.budget.keep_gradients(info.gradient_scale)

    def after_step(self, info: StepInfo) -> None:
        """Updates the scores and prunes, as the schedule of the run says."""
        total, last = info.total_steps, self._last(info.total_steps)
        self.total_steps = total
        if info.step < last:
            self.budget.update_scores()
        warmup, _ = self.config.phases(total)
        if info.step == last:
            self.budget.prune(self.config.rank * len(self.modules))
        elif info.step > last:
            self.budget.apply()
        elif info.step > warmup and info.step % self.config.interval == 0:
            self.budget.prune(self.kept_after(info.step, total))

    def finish(self) -> bool:
        """Prunes to the final budget, if the run ended or was set back before that."""
        wanted = self.config.rank * len(self.modules)
        kept = sum(int(module.keeps.sum()) for module in self.modules.values())
        if kept <= wanted:
            return False
        self.budget.prune(wanted)
        return True

    def kept_after(self, step: int, total_steps: int) -> int:
        """Returns the number of triplets kept after a step: the cubic schedule (eq. 12)."""
        first = self.config.start_rank * len(self.modules)
        target = self.config.rank * len(self.modules)
        warmup, final = self.config.phases(total_steps)
        if step <= warmup:
            return first
        if step >= total_steps - final:
            return target
        left = 1 - (step - warmup) / (total_steps - final - warmup)
        return int((first - target) * left**3 + target)

    def _last(self, total_steps: int) -> int:
        """The step after which the budget is final."""
        return total_steps - self.config.phases(total_steps)[1]

    def state(self) -> dict[str, Tensor]:
        """Returns the masks and the smoothed scores."""
        return {**super().state(), **self.budget.state()}

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:
        """Returns the AdaLoRA entries of `adapter_config.json`, with the triplets that are kept."""
        config = self.config
        # a schedule that peft accepts, if none has run
        given = (config.warmup_steps or 0) + (config.final_steps or 0)
        total = self.total_steps or 2 * given + 3
        warmup, final = config.phases(total)
        return {
            "init_r": config.start_rank,
            "target_r": config.rank,
            "lora_alpha": config.alpha,
            "lora_dropout": config.dropout,
            "tinit": warmup,
            "tfinal": final,
            "deltaT": config.interval,
            "beta1": config.sensitivity_decay,
            "beta2": config.uncertainty_decay,
            "orth_reg_weight": config.orthogonality,
            "total_step": total,
            "rank_pattern": {
                f"{modules[name]}.lora_E": self._kept(name, module)
                for name, module in self.modules.items()
            },
            "init_lora_weights": True,
            "bias": "none",
            "fan_in_fan_out": False,
        }

    def _kept(self, name: str, module: AdaLoRA) -> list[bool]:
        """The triplets of a linear that are kept, of the initial ones."""
        kept: list[bool] = module.keeps.tolist()
        if name not in self.config.kept:
            return kept
        # a loaded adapter has only those that were kept before
        remaining = iter(kept)
        return [was and next(remaining) for was in self.config.kept[name]]


register_adapter(AdaLoRAConfig, peft_type="ADALORA", adapter_set=AdaLoRASet)

__all__ = ["AdaLoRA", "AdaLoRAConfig", "AdaLoRASet"]
