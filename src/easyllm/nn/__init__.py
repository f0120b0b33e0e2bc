"""The decoder and its parts, selected by configuration."""

from easyllm.nn.config import AttentionConfig, GLUConfig, LayerConfig, ModelConfig, RMSNormConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.encoder_decoder import EncoderDecoder, build_model
from easyllm.nn.position_config import NoPosition, Rope

__all__ = [
    "AttentionConfig",
    "Decoder",
    "EncoderDecoder",
    "GLUConfig",
    "LayerConfig",
    "ModelConfig",
    "NoPosition",
    "RMSNormConfig",
    "Rope",
    "build_model",
]
