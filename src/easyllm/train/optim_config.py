"""Configuration of optimizers, parameter groups and learning-rate schedules."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, Tag, model_validator

from easyllm.core.config import Config
from easyllm.core.kinds import kind_or

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


class AdamWConfig(Config):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101, algorithm 2)."""

    kind: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat = Field(default=2e-4, description="Peak learning rate.")
    betas: tuple[BelowOne, BelowOne] = Field(
        default=(0.9, 0.999), description="Decay rates β₁ and β₂ of the first and second moments."
    )
    eps: PositiveFloat = Field(default=1e-8, description="ε in the denominator of the update.")
    weight_decay: NonNegativeFloat = Field(
        default=0.0,
        description="Decoupled weight decay; applied only to matrices (embeddings included), never "
        "to norms and biases.",
    )
    state: Literal["fp32", "int8"] = Field(
        default="fp32",
        description="Format of the moments. `int8` quantizes them in blocks of 256 with one scale "
        "each (Dettmers et al. 2021, arXiv 2110.02861); those of tensors with fewer than 4096 "
        "elements stay fp32.",
    )
    paged: bool = Field(
        default=False,
        description="Whether the moments are in a file in the run's folder instead of memory (a "
        "paged optimizer, after Dettmers et al. 2023, arXiv 2305.14314, section 3): the same "
        "weights bit for bit, with less memory. Only on a CPU.",
    )

    @model_validator(mode="after")
    def _pages_fp32_moments(self) -> "AdamWConfig":
        if self.paged and self.state == "int8":
            raise ValueError(
                "paged=true is for moments in fp32, but state=int8 keeps them in memory in one "
                "byte each; remove one of the two"
            )
        return self


class MuonConfig(Config):
    """Muon for the matrices inside the layers; AdamW for embeddings, head, norms and biases.

    Muon orthogonalises the momentum with Newton-Schulz iterations (Jordan et al. 2024). Its updates
    are scaled to the root mean square of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2),
    so `learning_rate` should be one that suits AdamW, not the 2e-2 of Jordan's scaling.
    """

    kind: Literal["muon"] = "muon"
    learning_rate: PositiveFloat = Field(
        default=3e-4, description="Peak learning rate of the matrices."
    )
    momentum: BelowOne = Field(default=0.95, description="Momentum coefficient μ.")
    nesterov: bool = Field(default=True, description="Whether to use Nesterov momentum.")
    newton_schulz_steps: int = Field(
        default=5, ge=1, le=20, description="Number of Newton-Schulz iterations."
    )
    weight_decay: NonNegativeFloat = Field(default=0.0, description="Weight decay of the matrices.")
    others: AdamWConfig = Field(
        default=AdamWConfig(learning_rate=3e-4, betas=(0.9, 0.95)),
        description="AdamW settings for all other parameters.",
    )


class SGDConfig(Config):
    """Stochastic gradient descent, optionally with momentum."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: PositiveFloat = Field(default=1e-2, description="Peak learning rate.")
    momentum: BelowOne = Field(
        default=0.0, description="Momentum coefficient μ; 0 disables momentum."
    )
    nesterov: bool = Field(
        default=False, description="Whether to use Nesterov momentum; needs momentum."
    )
    weight_decay: NonNegativeFloat = Field(
        default=0.0, description="L2 penalty, added to the gradient; applied to matrices only."
    )

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "SGDConfig":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum; set momentum, to 0.9 for example")
        return self


Optimizer = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[MuonConfig, Tag("muon")]
    | Annotated[SGDConfig, Tag("sgd")],
    kind_or("adamw"),
]


def adamw_of(optimizer: AdamWConfig | MuonConfig | SGDConfig) -> AdamWConfig | None:
    """Returns the settings of AdamW in an optimizer: its own, or those of Muon's other weights."""
    match optimizer:
        case AdamWConfig():
            return optimizer
        case MuonConfig():
            return optimizer.others
    return None


class ParameterGroup(Config):
    """Settings for some of the parameters; the first group whose pattern matches a name applies."""

    pattern: str = Field(
        min_length=1, description="Regular expression, searched for anywhere in a parameter's name."
    )
    rate_factor: NonNegativeFloat = Field(
        default=1.0, description="Factor on the learning rate; 0 freezes the parameters."
    )
    weight_decay: NonNegativeFloat | None = Field(
        default=None,
        description="Overrides the optimizer's weight decay, also for norms and biases; null keeps "
        "it.",
    )


# ---- schedules: the factor on the learning rates at a step; a decay would reach its floor one
# step after the last

_WARMUP_RATIO = (
    "Length of the warm-up as a fraction of all steps, rounded up; used if warmup_steps is null."
)
_FLOOR = "Factor on the learning rate at the end of the decay."


class _Warmup(Config):
    """Linear warm-up over `warmup_steps`, or if those are null over `warmup_ratio` of all steps."""

    warmup_ratio: Fraction = Field(default=0.0, description=_WARMUP_RATIO)
    warmup_steps: NonNegativeInt | None = Field(
        default=None,
        description="Length of the warm-up, in optimizer steps; null uses warmup_ratio.",
    )


class ConstantConfig(_Warmup):
    """Constant at 1 after the warm-up."""

    kind: Literal["constant"] = "constant"


class LinearConfig(_Warmup):
    """Linear decay from 1 to `floor`."""

    kind: Literal["linear"] = "linear"
    floor: Fraction = Field(default=0.0, description=_FLOOR)


class CosineConfig(_Warmup):
    """Cosine decay (half a period) from 1 to `floor`."""

    kind: Literal["cosine"] = "cosine"
    warmup_ratio: Fraction = Field(default=0.03, description=_WARMUP_RATIO)
    floor: Fraction = Field(default=0.0, description=_FLOOR)


class WarmupStableDecayConfig(_Warmup):
    """Warmup-stable-decay: constant at 1, then a decay to `floor` over the last steps.

    The decay takes the last `decay_ratio` of all steps (Hu et al. 2024, arXiv 2404.06395,
    section 4).
    """

    kind: Literal["wsd"] = "wsd"
    decay_ratio: Fraction = Field(
        default=0.1, description="Length of the decay as a fraction of all steps."
    )
    floor: Fraction = Field(default=0.0, description=_FLOOR)
    shape: Literal["linear", "cosine", "sqrt"] = Field(
        default="linear",
        description="Shape of the decay: linear, half a cosine period, or 1 - √(progress).",
    )


class InverseSqrtConfig(_Warmup):
    """Inverse square root decay, √(w / step) after w warm-up steps.

    See Vaswani et al. 2017, arXiv 1706.03762, section 5.3. Without a warm-up, the factor is
    √(w / (step + w)) with w = 10000.
    """

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup_ratio: Fraction = Field(default=0.03, description=_WARMUP_RATIO)


Schedule = Annotated[
    Annotated[CosineConfig, Tag("cosine")]
    | Annotated[ConstantConfig, Tag("constant")]
    | Annotated[LinearConfig, Tag("linear")]
    | Annotated[WarmupStableDecayConfig, Tag("wsd")]
    | Annotated[InverseSqrtConfig, Tag("inverse_sqrt")],
    kind_or("cosine"),
]
