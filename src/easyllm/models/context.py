"""Extending the context of a RoPE model at inference time: new positions, unchanged weights."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.nn.config import AttentionConfig, ModelConfig
from easyllm.nn.position_config import (
    DynamicNTKScaling,
    LinearScaling,
    ReRope,
    Rope,
    StreamingRope,
    YarnScaling,
)
from easyllm.nn.rope_scaling import ntk_base

OPTION_METHODS = {
    "window": ("rerope", "leaky", "streaming"),
    "sinks": ("streaming",),
    "factor": ("pi", "ntk", "dynamic", "yarn", "rerope", "leaky"),
}
"""Methods that use each option; `logn` applies to all methods."""
Method = Literal["pi", "ntk", "dynamic", "yarn", "rerope", "leaky", "streaming"]
UNLIMITED_CONTEXT = 2**24
"""Context length, in tokens, that stands for an unlimited one: a text this long is about a hundred
novels."""


class ContextConfig(Config):
    """How to extend the context of a model beyond its trained length."""

    method: Method = Field(
        description="`pi`: position interpolation; `ntk`: larger RoPE base (NTK-aware); `dynamic`: "
        "base that grows with the length (dynamic NTK); `yarn`: YaRN; `rerope`, `leaky`: ReRoPE, "
        "leaky ReRoPE; `streaming`: unlimited generation with attention sinks (StreamingLLM).",
    )
    factor: float = Field(
        default=4.0, ge=1, description="Target context length as a multiple of the trained length."
    )
    window: PositiveInt | None = Field(
        default=None,
        description="`rerope`, `leaky`: window of unmodified positions; by default half the "
        "trained length (best between a quarter and a half). `streaming`: number of most recent "
        "tokens attended to; by default the trained length minus the sinks.",
    )
    sinks: NonNegativeInt = Field(
        default=4,
        description="For `streaming`: number of initial tokens that stay in the KV cache as "
        "attention sinks.",
    )
    logn: bool = Field(
        default=False,
        description="Whether queries are scaled by max(1, log n / log trained length), where n is "
        "the number of visible tokens.",
    )

    @model_validator(mode="after")
    def _every_value_is_used(self) -> "ContextConfig":
        for name, methods in OPTION_METHODS.items():
            usual = type(self).model_fields[name].default
            if self.method not in methods and getattr(self, name) != usual:
                raise ValueError(
                    f"{name} has no effect with method {self.method}, only with "
                    f"{', '.join(methods)}; leave it out"
                )
        return self


def extend_context(config: ModelConfig, context: ContextConfig) -> ModelConfig:
    """Returns `config` with the positions and the maximum length of an extended context.

    Raises:
        ConfigError: a layer does not use unscaled RoPE, the streaming window and the sinks exceed
            the trained length, or the method does not support the model's RoPE variant.
    """
    trained = config.max_seq_len
    layers = []
    for layer in config.layers:
        mixer = layer.mixer
        rope = mixer.position
        if not isinstance(mixer, AttentionConfig) or not isinstance(rope, Rope) or rope.scaling:
            raise ConfigError(
                f"--rope {context.method} needs RoPE without scaling in every layer, got "
                f"{rope.kind} positions{' with scaling' if isinstance(rope, Rope) else ''}; "
                "use the model without --rope"
            )
        changes: JsonObject = {"position": _position(rope, mixer.head_dim, trained, context)}
        if context.method == "streaming":
            changes |= _streaming_window(mixer, trained, context)
        if context.logn:
            changes["logn_length"] = trained
        layers.append(layer.model_copy(update={"mixer": mixer.model_copy(update=changes)}))
    endless = context.method == "streaming"
    return config.changed(
        layers=tuple(layers),
        max_seq_len=UNLIMITED_CONTEXT if endless else int(trained * context.factor),
    )


def _streaming_window(mixer: AttentionConfig, trained: int, context: ContextConfig) -> JsonObject:
    window = context.window or trained - context.sinks
    if mixer.window is not None:
        window = min(window, mixer.window)
    if not 0 < window <= trained - context.sinks:
        raise ConfigError(
            f"a window of {window} tokens plus {context.sinks} attention sinks exceeds the trained "
            f"length of {trained}; lower --window or --sinks"
        )
    return {"window": window, "num_sinks": context.sinks}


def _position(
    rope: Rope, head_dim: int, trained: int, context: ContextConfig
) -> Rope | ReRope | StreamingRope:
    factor = context.factor
    match context.method:
        case "pi":
            return rope.model_copy(update={"scaling": LinearScaling(factor=factor)})
        case "ntk":
            # static NTK is only a larger base, which every tool can read
            base = ntk_base(rope.theta, rope.rotary_dim or head_dim, factor)
            return rope.model_copy(update={"theta": base})
        case "dynamic":
            scaling = DynamicNTKScaling(factor=factor, original_max_seq_len=trained)
            return rope.model_copy(update={"scaling": scaling})
        case "yarn":
            yarn = YarnScaling(factor=factor, original_max_seq_len=trained)
            return rope.model_copy(update={"scaling": yarn})
    if rope.rotary_dim is not None or rope.interleaved:
        raise ConfigError(
            f"--rope {context.method} supports only RoPE that rotates the two halves of the full "
            "head dimension, but this model's RoPE is partial or interleaved; choose another method"
        )
    if context.method == "streaming":
        return StreamingRope(theta=rope.theta)
    leak = factor if context.method == "leaky" else None
    return ReRope(theta=rope.theta, window=context.window or max(1, trained // 2), leak=leak)
