"""Configuration of norms: RMSNorm, pRMSNorm and LayerNorm."""

from typing import Annotated, Literal

from pydantic import Field, PositiveFloat

from easyllm.core.config import Config


class RMSNormConfig(Config):
    """RMSNorm: x / √(mean(x²) + eps) ⊙ weight (Zhang & Sennrich 2019, arXiv 1910.07467)."""

    kind: Literal["rms_norm"] = "rms_norm"
    eps: PositiveFloat = Field(default=1e-5, description="ε, added to the mean square.")
    unit_offset: bool = Field(
        default=False, description="Whether the stored weight is the difference from 1 (Gemma)."
    )


class PartialRMSNormConfig(Config):
    """pRMSNorm: RMSNorm with the mean square of the first dims alone (arXiv 1910.07467, 4.2)."""

    kind: Literal["partial_rms_norm"] = "partial_rms_norm"
    eps: PositiveFloat = Field(default=1e-5, description="ε, added to the mean square.")
    share: float = Field(
        default=0.0625, gt=0, le=1, description="Share p of the dims in the mean square."
    )


class LayerNormConfig(Config):
    """LayerNorm: (x - mean) / √(var + eps) ⊙ weight + bias (Ba et al. 2016, arXiv 1607.06450)."""

    kind: Literal["layer_norm"] = "layer_norm"
    eps: PositiveFloat = Field(default=1e-5, description="ε, added to the variance.")
    bias: bool = Field(default=True, description="Whether a learned bias is added.")


Norm = Annotated[
    RMSNormConfig | PartialRMSNormConfig | LayerNormConfig, Field(discriminator="kind")
]

__all__ = ["LayerNormConfig", "Norm", "PartialRMSNormConfig", "RMSNormConfig"]
