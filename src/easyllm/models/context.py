"""A longer context for a model trained with RoPE, at inference: other positions, the same weights."""

from typing import Annotated, Any, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError
from easyllm.nn.config import (
    AttentionConfig,
    DynamicNTKScaling,
    LinearScaling,
    ModelConfig,
    ReRope,
    Rope,
    StreamingRope,
    YarnScaling,
)
from easyllm.nn.rope_scaling import ntk_base

USED_BY = {
    "window": ("rerope", "leaky", "streaming"),
    "sinks": ("streaming",),
    "factor": ("pi", "ntk", "dynamic", "yarn", "rerope", "leaky"),
}
"""Methods that a value belongs to; `logn` belongs to all."""
Method = Literal["pi", "ntk", "dynamic", "yarn", "rerope", "leaky", "streaming"]
ENDLESS = 2**24
"""Tokens of context that stand for no end: a text of that length is a hundred novels."""


class ContextConfig(Config):
    """Which positions a longer context gets.

    Attributes:
        method: `pi` position interpolation · `ntk` a larger base · `dynamic` a base that follows the length ·
            `yarn` · `rerope`, `leaky` rectified positions · `streaming` first and last tokens only, without end (docs of
            each in nn/config).
        factor: how many times the trained length.
        window: of `rerope` and `leaky`, by default half the trained length (best between a quarter and a half); of
            `streaming` the last tokens that are seen, by default what the sinks leave of the trained length.
        sinks: of `streaming`: the first tokens, which stay.
        logn: queries scaled by max(1, log n / log trained length).
    """

    method: Method
    factor: Annotated[float, Field(ge=1)] = 4.0
    window: PositiveInt | None = None
    sinks: NonNegativeInt = 4
    logn: bool = False

    @model_validator(mode="after")
    def _every_value_is_used(self) -> "ContextConfig":
        for name, methods in USED_BY.items():
            usual = type(self).model_fields[name].default
            if self.method not in methods and getattr(self, name) != usual:
                raise ValueError(
                    f"{name} does nothing with method {self.method}; it belongs to {', '.join(methods)}: leave it out"
                )
        return self


def extend_context(config: ModelConfig, context: ContextConfig) -> ModelConfig:
    """`config` with other positions and a longer context.

    Raises:
        ConfigError: a layer has no plain RoPE to change.
    """
    trained = config.max_seq_len
    layers = []
    for layer in config.layers:
        mixer = layer.mixer
        rope = mixer.position
        if not isinstance(mixer, AttentionConfig) or not isinstance(rope, Rope) or rope.scaling:
            raise ConfigError(
                f"--rope {context.method} needs RoPE without scaling in every layer, got {rope.kind} positions"
                f"{' with scaling' if isinstance(rope, Rope) else ''}; use the model as it is"
            )
        changes: dict[str, Any] = {"position": _position(rope, mixer.head_dim, trained, context)}
        if context.method == "streaming":
            changes |= _streaming_window(mixer, trained, context)
        if context.logn:
            changes["logn_length"] = trained
        layers.append(layer.model_copy(update={"mixer": mixer.model_copy(update=changes)}))
    endless = context.method == "streaming"
    return config.changed(
        layers=tuple(layers), max_seq_len=ENDLESS if endless else int(trained * context.factor)
    )


def _streaming_window(
    mixer: AttentionConfig, trained: int, context: ContextConfig
) -> dict[str, Any]:
    window = context.window or trained - context.sinks
    if mixer.window is not None:
        window = min(window, mixer.window)
    if not 0 < window <= trained - context.sinks:
        raise ConfigError(
            f"a window of {window} tokens and {context.sinks} sinks do not fit the trained length of {trained}; "
            "lower --window or --sinks"
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
            # a larger base is all it is, and every tool reads a base
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
            f"--rope {context.method} turns whole heads in halves; this model's RoPE is partial or interleaved"
        )
    if context.method == "streaming":
        return StreamingRope(theta=rope.theta)
    leak = factor if context.method == "leaky" else None
    return ReRope(theta=rope.theta, window=context.window or max(1, trained // 2), leak=leak)
