"""Optimizers, parameter groups and schedules, as a recipe names them."""

from typing import Annotated, Literal

from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveFloat, Tag, model_validator

from easyllm.core.config import Config, kind_or

Fraction = Annotated[float, Field(ge=0.0, le=1.0)]
BelowOne = Annotated[float, Field(ge=0.0, lt=1.0)]


class AdamWConfig(Config):
    """AdamW (Loshchilov & Hutter 2017, arXiv 1711.05101, algorithm 2).

    `state`: of the moments, `int8` keeps them in blocks of 256 with a scale each (Dettmers et al. 2021, arXiv 2110.02861);
    those of tensors under 4096 elements stay fp32.
    """

    kind: Literal["adamw"] = "adamw"
    learning_rate: PositiveFloat = 2e-4
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    eps: PositiveFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    """Applied to matrices only (embeddings too), never to norms and biases."""
    state: Literal["fp32", "int8"] = "fp32"


class MuonConfig(Config):
    """Muon for the matrices inside the layers: momentum, orthogonalised by Newton-Schulz steps (Jordan et al. 2024); AdamW
    for embeddings, head, norms and biases.

    An update's root mean square is that of AdamW's (Liu et al. 2025, arXiv 2502.16982, section 2.2), so `learning_rate` is
    one that suits AdamW, not the 2e-2 of Jordan's scaling.
    """

    kind: Literal["muon"] = "muon"
    learning_rate: PositiveFloat = 3e-4
    momentum: BelowOne = 0.95
    nesterov: bool = True
    newton_schulz_steps: Annotated[int, Field(ge=1, le=20)] = 5
    weight_decay: NonNegativeFloat = 0.0
    others: AdamWConfig = AdamWConfig(learning_rate=3e-4, betas=(0.9, 0.95))


class SGDConfig(Config):
    """Stochastic gradient descent, with momentum where asked for."""

    kind: Literal["sgd"] = "sgd"
    learning_rate: PositiveFloat = 1e-2
    momentum: BelowOne = 0.0
    nesterov: bool = False
    weight_decay: NonNegativeFloat = 0.0

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> "SGDConfig":
        if self.nesterov and self.momentum == 0:
            raise ValueError("nesterov needs momentum; set momentum to 0.9, say")
        return self


Optimizer = Annotated[
    Annotated[AdamWConfig, Tag("adamw")]
    | Annotated[MuonConfig, Tag("muon")]
    | Annotated[SGDConfig, Tag("sgd")],
    kind_or("adamw"),
]


class ParameterGroup(Config):
    """Parameters with values of their own; the first group whose pattern is found in a name takes it.

    Attributes:
        pattern: a regular expression, looked for anywhere in the parameter's name.
        rate_factor: times the learning rate; 0 freezes.
        weight_decay: instead of the optimizer's (and of the rule that spares norms and biases).
    """

    pattern: str = Field(min_length=1)
    rate_factor: NonNegativeFloat = 1.0
    weight_decay: NonNegativeFloat | None = None


# ---- schedules: the factor on every learning rate at a step; a decay would reach its floor one step after the last


class _Warmup(Config):
    """Linear warm-up over `warmup_steps`, or where those are not given over `warmup_ratio` of all steps."""

    warmup_ratio: Fraction = 0.0
    warmup_steps: NonNegativeInt | None = None


class ConstantConfig(_Warmup):
    """1 after the warm-up."""

    kind: Literal["constant"] = "constant"


class LinearConfig(_Warmup):
    """A straight line from 1 down to `floor`."""

    kind: Literal["linear"] = "linear"
    floor: Fraction = 0.0


class CosineConfig(_Warmup):
    """Half a cosine from 1 down to `floor`."""

    kind: Literal["cosine"] = "cosine"
    warmup_ratio: Fraction = 0.03
    floor: Fraction = 0.0


class WarmupStableDecayConfig(_Warmup):
    """1, then over the last `decay_ratio` of all steps down to `floor` (Hu et al. 2024, arXiv 2404.06395, section 4)."""

    kind: Literal["wsd"] = "wsd"
    decay_ratio: Fraction = 0.1
    floor: Fraction = 0.0
    shape: Literal["linear", "cosine", "sqrt"] = "linear"


class InverseSqrtConfig(_Warmup):
    """√(w / step) after w warm-up steps (Vaswani et al. 2017, arXiv 1706.03762, section 5.3); √(w / (step + w)) with w = 10000
    where there are none."""

    kind: Literal["inverse_sqrt"] = "inverse_sqrt"
    warmup_ratio: Fraction = 0.03


Schedule = Annotated[
    Annotated[CosineConfig, Tag("cosine")]
    | Annotated[ConstantConfig, Tag("constant")]
    | Annotated[LinearConfig, Tag("linear")]
    | Annotated[WarmupStableDecayConfig, Tag("wsd")]
    | Annotated[InverseSqrtConfig, Tag("inverse_sqrt")],
    kind_or("cosine"),
]
