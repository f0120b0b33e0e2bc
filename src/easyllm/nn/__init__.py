"""The decoder and its parts, selected by configuration."""

from easyllm.nn.config import (
    AttentionConfig,
    GLUConfig,
    LayerConfig,
    ModelConfig,
    NoPosition,
    RMSNormConfig,
    Rope,
)
from easyllm.nn.decoder import Decoder

__all__ = [
    "AttentionConfig",
    "Decoder",
    "GLUConfig",
    "LayerConfig",
    "ModelConfig",
    "NoPosition",
    "RMSNormConfig",
    "Rope",
]
