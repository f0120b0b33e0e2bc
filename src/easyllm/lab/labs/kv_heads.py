"""MHA, GQA and MQA: what fewer key-value heads save, and when pooling them changes nothing."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import new_model, small_config
from easyllm.models.describe import describe
from easyllm.models.grouped_heads import pool_kv_heads
from easyllm.nn.attention import Attention
from easyllm.nn.config import AttentionConfig, ModelConfig
from easyllm.nn.decoder import DecoderLayer
from easyllm.plan.kv_cache import cache_size

HEADS = 8


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"tokens": 16}

    tokens: PositiveInt = Field(default=64, ge=4, le=512, description="Length of the test text.")
    spread: float = Field(
        default=0.05, ge=0, le=2, description="Relative difference of the heads of a group."
    )


def run(parameters: Parameters) -> Result:
    """Pools the KV heads of a small model, and computes the KV cache of Llama-2-70B."""
    groups = [h for h in (8, 4, 2, 1) if HEADS % h == 0]
    equal = [(float(n), _change(parameters, n, 0.0)) for n in groups]
    apart = [(float(n), _change(parameters, n, parameters.spread)) for n in groups]
    large = describe("llama2-70b")
    counts = [64, 32, 16, 8, 4, 2, 1]
    sizes = [cache_size(_with_heads(large, n), context=1).bytes_per_token for n in counts]
    by_count = dict(zip(counts, sizes, strict=True))
    small = describe("smollm2-135m")
    smollm2 = cache_size(small, context=1).bytes_per_token
    return Result(
        numbers=[
            number(
                "mha_bytes",
                by_count[64],
                "KV cache, 64 KV heads (MHA), B/token",
                "KV 缓存，64 个键值头（MHA），字节/词元",
            ),
            number(
                "gqa_bytes",
                by_count[8],
                "KV cache, 8 KV heads (Llama-2-70B), B/token",
                "KV 缓存，8 个键值头（Llama-2-70B），字节/词元",
            ),
            number(
                "smollm2_bytes",
                smollm2,
                "KV cache of SmolLM2-135M, B/token",
                "SmolLM2-135M 的 KV 缓存，字节/词元",
            ),
            number(
                "equal_change",
                max(y for _, y in equal),
                "change of the logits after pooling, equal heads",
                "合并相同的头后 logits 的变化",
                2,
            ),
            number(
                "apart_change",
                apart[1][1],
                "relative change with 8 → 4 heads that differ",
                "头不相同时 8 → 4 的相对变化",
                2,
            ),
        ],
        figures=[
            Lines(
                title="KV cache of Llama-2-70B's shape, fp16",
                x="KV heads",
                y="bytes per token",
                lines={"cache": [(float(n), float(s)) for n, s in by_count.items()]},
                log_x=True,
                log_y=True,
                marks=True,
            ),
            Lines(
                title=f"Pooling {HEADS} KV heads of a small model",
                x="KV heads after pooling",
                y="relative change of the logits",
                lines={"equal in each group": equal, f"apart by {parameters.spread:g}": apart},
                marks=True,
            ),
        ],
        claims=[
            claim(
                (
                    "GQA with 8 of 64 KV heads divides the cache of the 70B shape by 8, from "
                    "2,621,440 to 327,680 bytes a token in fp16.",
                    "64 个头中保留 8 个键值头的 GQA 使 70B 结构的缓存缩小到 1/8："
                    "fp16 下每词元从 2,621,440 到 327,680 字节。",
                ),
                (
                    f"{by_count[64]:,} and {by_count[8]:,} bytes; pooling equal heads changes "
                    f"logits by {max(y for _, y in equal):.0e} only, pooling different ones by "
                    f"{apart[1][1]:.1%}.",
                    f"分别为 {by_count[64]:,} 与 {by_count[8]:,} 字节；合并相同的头只使 logits "
                    f"变化 {max(y for _, y in equal):.0e}，合并不同的头变化 {apart[1][1]:.1%}。",
                ),
                "reproduced" if by_count[64] == 8 * by_count[8] == 2_621_440 else "not",
            )
        ],
    )


def _with_heads(config: ModelConfig, heads: int) -> ModelConfig:
    layers = []
    for layer in config.layers:
        assert isinstance(layer.mixer, AttentionConfig)
        mixer = layer.mixer.model_copy(update={"num_kv_heads": heads})
        layers.append(layer.model_copy(update={"mixer": mixer}))
    return config.changed(layers=tuple(layers))


@torch.no_grad()
def _change(parameters: Parameters, heads: int, spread: float) -> float:
    """Returns the relative change of the logits when the KV heads are pooled to `heads`."""
    model = new_model(small_config(width=16 * HEADS), parameters.seed).eval()
    generator = torch.Generator().manual_seed(parameters.seed)
    for layer in model.layers:
        assert isinstance(layer, DecoderLayer)
        assert isinstance(layer.mixer, Attention)
        for projection in (layer.mixer.k_proj, layer.mixer.v_proj):
            weight = projection.weight.view(heads, HEADS // heads, 16, -1)
            weight.copy_(weight[:, :1].clone().expand_as(weight))
            noise = torch.randn(weight.shape, generator=generator) * weight.std()
            weight.add_(noise, alpha=spread)
    ids = torch.randint(64, (parameters.tokens,), generator=generator)
    before = model.logits(ids)
    after = pool_kv_heads(model, heads).logits(ids)
    return float((after - before).norm() / before.norm())


LAB = Lab(
    name="kv-heads",
    rows=(5,),
    chapter="attention",
    title=Text("Fewer key-value heads: MQA and GQA", "更少的键值头：MQA 与 GQA"),
    seconds=3,
    parameters=Parameters,
    run=run,
)
