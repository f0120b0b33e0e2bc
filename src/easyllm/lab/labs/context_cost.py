"""Why contexts were 2K or 4K: what attention and the KV cache cost by length."""

from typing import ClassVar

from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.models.describe import describe
from easyllm.nn.config import AttentionConfig, ModelConfig
from easyllm.ops.paged_attention import element_bytes
from easyllm.plan.compute import forward_flops
from easyllm.plan.kv_cache import cache_size


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"doublings": 4}

    model: str = Field(default="llama2-13b", description="A published size.")
    doublings: PositiveInt = Field(default=8, ge=2, le=12, description="Lengths 1K, 2K, 4K …")
    window: PositiveInt = Field(default=1020, description="Window of the rolling cache, tokens.")
    sinks: PositiveInt = Field(default=4, le=64, description="First tokens kept with the window.")


def run(parameters: Parameters) -> Result:
    """Computes attention's share of the FLOPs and the size of the cache by length."""
    config = describe(parameters.model)
    lengths = [1024 << i for i in range(parameters.doublings)]
    gpt3 = describe("gpt3-175b")
    shares = {
        name: [(float(n), forward_flops(each, [n], counting="full").scores_share) for n in lengths]
        for name, each in (("gpt3-175b", gpt3), (parameters.model, config))
    }
    published = {n: forward_flops(gpt3, [n], counting="full").scores_share for n in (2048, 32768)}
    head_dim = config.hidden_size // _mixer(config).num_heads
    rolling = _with_window(config, parameters.window, parameters.sinks)
    caches = {
        "full, fp16": (config, 2.0),
        "full, int8": (config, element_bytes("int8", head_dim)),
        "full, int4": (config, element_bytes("int4", head_dim)),
        f"{parameters.sinks} sinks + {parameters.window}": (rolling, 2.0),
    }
    sizes = {
        name: [(float(n), cache_size(each, context=n, itemsize=item).total / 1e9) for n in lengths]
        for name, (each, item) in caches.items()
    }
    last = {name: points[-1][1] for name, points in sizes.items()}
    rolled = list(sizes.values())[-1]
    rolls = len({size for n, size in rolled if n >= parameters.window + parameters.sinks}) == 1
    formula = {n: n / (6 * gpt3.hidden_size + n) for n in published}
    exact = all(abs(published[n] - formula[n]) < 1e-12 for n in published)
    return Result(
        numbers=[
            number(
                "share_2k",
                100 * published[2048],
                "attention's share at 2K, h = 12288, %",
                "2K 时注意力的占比，h = 12288，%",
                3,
            ),
            number("share_32k", 100 * published[32768], "the same at 32K, %", "32K 时同上，%"),
            *(
                number(
                    f"cache_{name.split(',')[-1].strip().replace(' ', '_')}",
                    size,
                    f"cache of {lengths[-1]:,} tokens, {name}, GB",
                    f"{lengths[-1]:,} 词元的缓存，{_zh(name)}，GB",
                )
                for name, size in last.items()
            ),
        ],
        figures=[
            Lines(
                title="Share of FLOPs that grows with the square of the length",
                x="tokens",
                y="share of the layers' FLOPs",
                lines=shares,
                log_x=True,
                marks=True,
            ),
            Lines(
                title=f"KV cache of one sequence, {parameters.model}",
                x="tokens",
                y="GB",
                lines=sizes,
                log_x=True,
                log_y=True,
                marks=True,
            ),
        ],
        claims=[
            claim(
                (
                    "Attention's share of the layers' FLOPs is s / (6h + s): 2.7% at 2K for "
                    "h = 12288, 30.8% at 32K.",
                    "注意力占各层 FLOPs 的 s / (6h + s)：h = 12288 时 2K 为 2.7%，32K 为 30.8%。",
                ),
                (
                    f"{published[2048]:.2%} and {published[32768]:.2%}.",
                    f"{published[2048]:.2%} 与 {published[32768]:.2%}。",
                ),
                "reproduced" if exact else "not",
            ),
            claim(
                (
                    "StreamingLLM (arXiv 2309.17453): a window with a few first tokens keeps the "
                    "cache at a constant size.",
                    "StreamingLLM（arXiv 2309.17453）：窗口加少量开头词元使缓存大小不变。",
                ),
                (
                    f"At {lengths[-1]:,} tokens {list(last.values())[-1]:.2f} GB instead of "
                    f"{last['full, fp16']:.1f}; int4 takes {last['full, int4']:.1f}.",
                    f"{lengths[-1]:,} 词元时为 {list(last.values())[-1]:.2f} GB，而非 "
                    f"{last['full, fp16']:.1f} GB；int4 为 {last['full, int4']:.1f} GB。",
                ),
                "reproduced" if rolls and last["full, fp16"] > list(last.values())[-1] else "not",
            ),
        ],
    )


def _zh(name: str) -> str:
    return name.replace("full, ", "完整，").replace("sinks", "个注意力汇")


def _mixer(config: ModelConfig) -> AttentionConfig:
    mixer = config.layers[0].mixer
    assert isinstance(mixer, AttentionConfig)
    return mixer


def _with_window(config: ModelConfig, window: int, sinks: int) -> ModelConfig:
    mixer = _mixer(config).model_copy(update={"window": window, "num_sinks": sinks})
    layers = [layer.model_copy(update={"mixer": mixer}) for layer in config.layers]
    return config.changed(layers=tuple(layers))


LAB = Lab(
    name="context-cost",
    rows=(21, 22),
    chapter="costs",
    title=Text("What a long context costs", "长上下文的代价"),
    seconds=4,
    parameters=Parameters,
    run=run,
)
