"""Parameters, FLOPs, days and KV cache of published models, by the formulas and by the plan."""

from typing import ClassVar

from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.models.describe import describe
from easyllm.plan.compute import estimate_time, training_flops
from easyllm.plan.kv_cache import cache_size
from easyllm.plan.parameters import count_parameters

MODELS = ("gpt2", "llama-7b", "llama-13b", "llama-33b", "llama-65b", "gpt3-175b")
DAY = 86400


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"context": 512}

    context: PositiveInt = Field(default=2048, ge=64, le=2048, description="Sequence length.")
    sequences: PositiveInt = Field(default=64, le=4096, description="Sequences in the KV cache.")
    utilisation: float = Field(default=0.45, gt=0, le=1, description="Share of the peak reached.")


def run(parameters: Parameters) -> Result:
    """Compares l(12h² + 13h) + Vh, 6N and 4blh(s + n) with counts from the configurations."""
    configs = {name: describe(name) for name in MODELS}
    counts = {name: count_parameters(config).total for name, config in configs.items()}
    simple = {}
    for name, config in configs.items():
        h, layers = config.hidden_size, config.num_layers
        simple[name] = layers * (12 * h * h + 13 * h) + config.vocab_size * h
    ratios = {name: simple[name] / counts[name] for name in MODELS}
    gpt3 = configs["gpt3-175b"]
    s, h, layers = parameters.context, gpt3.hidden_size, gpt3.num_layers
    flops = training_flops(gpt3, (s,), counting="full")
    formula = layers * (24 * s * h * h + 4 * s * s * h) + 2 * s * h * gpt3.vocab_size
    per_token = flops.model / s / counts["gpt3-175b"]
    days = estimate_time(8 * 300e9 * 175e9, 1024 * 312e12, utilisation=parameters.utilisation) / DAY
    cache = cache_size(gpt3, context=512 + 32, sequences=parameters.sequences)
    llama = cache_size(configs["llama-7b"], context=1).bytes_per_token
    lengths = [128 << i for i in range(9)]
    sizes = {
        f"{name}, {parameters.sequences} sequences": [
            (
                float(n),
                cache_size(configs[name], context=n, sequences=parameters.sequences).total / 1e9,
            )
            for n in lengths
        ]
        for name in ("gpt3-175b", "llama-7b")
    }
    weights = 2 * counts["gpt3-175b"]
    return Result(
        numbers=[
            number("gpt3_parameters", counts["gpt3-175b"], "parameters of GPT-3", "GPT-3 参数量"),
            number(
                "gpt3_formula_ratio",
                ratios["gpt3-175b"],
                "l(12h² + 13h) + Vh / parameters, GPT-3",
                "l(12h² + 13h) + Vh / 参数量，GPT-3",
                6,
            ),
            number(
                "llama7b_formula_ratio",
                ratios["llama-7b"],
                "the same, Llama-7B",
                "同上，Llama-7B",
                6,
            ),
            number(
                "forward_difference",
                flops.forward.total - formula,
                "forward FLOPs less l(24bsh² + 4bs²h) + 2bshV",
                "前向 FLOPs 减去 l(24bsh² + 4bs²h) + 2bshV",
            ),
            number(
                "flops_per_parameter",
                per_token,
                "training FLOPs per token and parameter (6 by the rule)",
                "每词元每参数的训练 FLOPs（经验规则为 6）",
            ),
            number(
                "days",
                days,
                "days of GPT-3 on 1,024 A100 with recomputation (8N)",
                "GPT-3 在 1,024 张 A100 上的天数（含重算，8N）",
            ),
            number(
                "gpt3_cache_per_token",
                cache.bytes_per_token,
                "KV cache of GPT-3, B/token",
                "GPT-3 的 KV 缓存，字节/词元",
            ),
            number(
                "gpt3_cache",
                cache.total,
                f"of {parameters.sequences} sequences of 544, bytes",
                f"{parameters.sequences} 个长 544 的序列，字节",
            ),
            number(
                "llama_cache_per_token",
                llama,
                "KV cache of Llama-7B, B/token",
                "Llama-7B 的 KV 缓存，字节/词元",
            ),
        ],
        figures=[
            Bars(
                title="The formula, as a share of the count",
                x="model",
                y="l(12h² + 13h) + Vh / parameters",
                groups=list(MODELS),
                series={"formula / count": list(ratios.values())},
            ),
            Lines(
                title=f"KV cache (GPT-3's weights: {weights / 1e9:.0f} GB)",
                x="tokens in a sequence",
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
                    "The article (zhihu 624740065): l(12h² + 13h) + Vh parameters; "
                    "l(24bsh² + 4bs²h) + 2bshV forward FLOPs; GPT-3 takes 34 days on 1,024 A100; "
                    "its cache for 64 sequences of 512 + 32 tokens is 164 GB.",
                    "文章（知乎 624740065）：参数量 l(12h² + 13h) + Vh；前向 FLOPs "
                    "l(24bsh² + 4bs²h) + 2bshV；GPT-3 在 1,024 张 A100 上需 34 天；"
                    "64 个 512 + 32 词元的序列的缓存为 164 GB。",
                ),
                (
                    f"The formula gives {ratios['gpt3-175b']:.4f} of GPT-3's count and "
                    f"{ratios['llama-7b']:.4f} of Llama-7B's; forward FLOPs differ by "
                    f"{flops.forward.total - formula}; {days:.1f} days; {cache.total / 1e9:.1f} "
                    "GB.",
                    f"公式给出 GPT-3 参数量的 {ratios['gpt3-175b']:.4f} 倍、Llama-7B 的 "
                    f"{ratios['llama-7b']:.4f} 倍；前向 FLOPs 相差 "
                    f"{flops.forward.total - formula}；"
                    f"{days:.1f} 天；{cache.total / 1e9:.1f} GB。",
                ),
                "reproduced"
                if flops.forward.total == formula and cache.bytes_per_token == 4_718_592
                else "not",
            )
        ],
    )


LAB = Lab(
    name="cost-arithmetic",
    rows=(17,),
    chapter="costs",
    title=Text("Parameters, FLOPs and KV cache by formula", "用公式算参数量、计算量与 KV 缓存"),
    seconds=3,
    parameters=Parameters,
    run=run,
)
