"""A sliding window: what a layer sees, what layers together see, and a cache that rolls."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Grid, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import new_model, small_config
from easyllm.models.describe import describe
from easyllm.nn.config import AttentionConfig
from easyllm.nn.decoder import Decoder
from easyllm.ops.attention import visible
from easyllm.ops.attention_rule import AttentionRule
from easyllm.plan.kv_cache import cache_size
from easyllm.verify.laws import through_cache


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"layers": 2, "tokens": 24}

    window: PositiveInt = Field(default=6, ge=2, le=64, description="Window of the small model.")
    layers: PositiveInt = Field(default=4, le=16, description="Layers of the small model.")
    tokens: PositiveInt = Field(default=48, ge=16, le=512, description="Length of the text.")


@torch.no_grad()
def run(parameters: Parameters) -> Result:
    """Changes one token at a time, and sees which positions notice; rolls the cache."""
    window, length = parameters.window, parameters.tokens
    generator = torch.Generator().manual_seed(parameters.seed)
    ids = torch.randint(64, (length,), generator=generator)
    model = _model(parameters)
    before = model.logits(ids)
    changed = ids.clone()
    changed[0] = (changed[0] + 1) % 64
    moved = (model.logits(changed) - before).abs().amax(-1)
    reached = int((moved > 0).nonzero().max())
    span = parameters.layers * (window - 1)
    pieces = [length // 2, *[1] * (length - length // 2)]
    cache_error = float((through_cache(model, ids, pieces) - before).abs().max())
    rule = AttentionRule(scale=1.0, window=window)
    positions = torch.arange(16)
    mask = visible(positions, positions, rule).int().tolist()
    mistral = describe("mistral-7b")
    mixer = mistral.layers[0].mixer
    assert isinstance(mixer, AttentionConfig)
    assert mixer.window is not None
    layers = [
        each.model_copy(update={"mixer": mixer.model_copy(update={"window": None})})
        for each in mistral.layers
    ]
    full = mistral.changed(layers=tuple(layers))
    lengths = [1024 << i for i in range(6)]
    sizes = {
        name: [(float(n), cache_size(config, context=n).total / 2**30) for n in lengths]
        for name, config in (("window of 4,096", mistral), ("full attention", full))
    }
    saved = cache_size(full, context=32_768).total / cache_size(mistral, context=32_768).total
    return Result(
        numbers=[
            number(
                "reached",
                reached,
                "last position that notices a change of token 0",
                "能察觉第 0 个词元变化的最后位置",
            ),
            number("span", span, "layers × (window − 1)", "层数 ×（窗口 − 1）"),
            number(
                "cache_error",
                cache_error,
                "rolling cache against one forward pass",
                "滚动缓存与一次前向之差",
                2,
            ),
            number(
                "mistral_span",
                mistral.num_layers * mixer.window,
                "layers × window of Mistral 7B",
                "Mistral 7B 的层数 × 窗口",
            ),
            number(
                "saved",
                saved,
                "full / rolling cache at 32K tokens",
                "32K 词元时完整缓存 / 滚动缓存",
            ),
        ],
        figures=[
            Grid(title=f"A window of {window}", x="key", y="query", values=mask),
            Lines(
                title=f"Token 0 changed: {parameters.layers} layers, window {window}",
                x="position",
                y="largest change of a logit",
                lines={"change": [(float(i), float(v)) for i, v in enumerate(moved)]},
                marks=True,
            ),
            Lines(
                title="KV cache of Mistral 7B",
                x="tokens",
                y="GiB",
                lines=sizes,
                log_x=True,
                log_y=True,
                marks=True,
            ),
        ],
        claims=[
            claim(
                (
                    "Mistral 7B (arXiv 2310.06825, section 2): after k layers information can "
                    "move by k × W tokens, 131K for 32 layers of 4,096; at 32K tokens the rolling "
                    "cache is 8 times smaller.",
                    "Mistral 7B（arXiv 2310.06825，第 2 节）：k 层之后信息可移动 k × W 个词元，"
                    "32 层、窗口 4,096 时为 131K；32K 词元时滚动缓存缩小到 1/8。",
                ),
                (
                    f"A change of token 0 reaches position {reached} = {parameters.layers} × "
                    f"({window} − 1); the rolling cache equals one forward pass within "
                    f"{cache_error:.0e}; Mistral's is {saved:g} times smaller at 32K.",
                    f"第 0 个词元的变化传到位置 {reached} = {parameters.layers} ×（{window} − 1）；"
                    f"滚动缓存与一次前向相差 {cache_error:.0e}；32K 时 Mistral 的缓存缩小 "
                    f"{saved:g} 倍。",
                ),
                "reproduced" if reached == min(span, length - 1) and saved == 8 else "not",
                (
                    "A window of W includes the token itself, so each layer moves W − 1 tokens.",
                    "窗口 W 包含词元自身，因此每层移动 W − 1 个词元。",
                ),
            )
        ],
    )


def _model(parameters: Parameters) -> Decoder:
    config = small_config(layers=parameters.layers, width=32)
    layers = []
    for layer in config.layers:
        assert isinstance(layer.mixer, AttentionConfig)
        mixer = layer.mixer.model_copy(update={"window": parameters.window})
        layers.append(layer.model_copy(update={"mixer": mixer}))
    model = new_model(config.changed(family="easyllm", layers=tuple(layers)), parameters.seed)
    model.reset_parameters(std=0.3, generator=torch.Generator().manual_seed(parameters.seed))
    return model.eval()


LAB = Lab(
    name="sliding-window",
    rows=(30,),
    chapter="models",
    title=Text("Mistral's sliding window", "Mistral 的滑动窗口"),
    seconds=4,
    parameters=Parameters,
    run=run,
)
