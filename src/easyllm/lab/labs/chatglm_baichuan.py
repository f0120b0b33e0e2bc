"""ChatGLM, Llama and Baichuan: the same decoder with other parts, and losses of their own."""

import math
from typing import ClassVar

import torch
from pydantic import Field

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.parameter_bars import parameter_bars
from easyllm.models.describe import describe
from easyllm.nn.config import AttentionConfig
from easyllm.nn.norm_head import unit_rows
from easyllm.ops.cross_entropy import linear_cross_entropy
from easyllm.plan.kv_cache import cache_size
from easyllm.plan.parameters import count_parameters

PUBLISHED = {
    "chatglm-6b": 6_173_286_400,
    "chatglm2-6b": 6_243_584_000,
    "baichuan-7b": 7_000_559_616,
    "baichuan-13b": 13_264_901_120,
    "baichuan2-7b": 7_505_973_248,
    "baichuan2-13b": 13_896_668_160,
    "llama2-7b": 6_738_415_616,
}
MAX_Z = 2e-4


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"models": ("chatglm-6b", "baichuan-7b", "llama2-7b")}

    models: tuple[str, ...] = Field(
        default=tuple(PUBLISHED), min_length=1, max_length=12, description="Published sizes."
    )
    coefficient: float = Field(
        default=MAX_Z, ge=0, le=1, description="Coefficient of the largest logit squared."
    )


def run(parameters: Parameters) -> Result:
    """Counts parameters, and measures what NormHead and the loss on the largest logit do."""
    configs = {name: describe(name) for name in parameters.models}
    counts = {name: count_parameters(config) for name, config in configs.items()}
    known = [name for name in counts if name in PUBLISHED]
    equal = sum(counts[name].total == PUBLISHED[name] for name in known)
    cache = {name: cache_size(c, context=1).bytes_per_token for name, c in configs.items()}
    glm, second = describe("chatglm-6b"), describe("chatglm2-6b")
    scale = glm.layers[0].residual_scale
    attention = second.layers[0].mixer
    assert isinstance(attention, AttentionConfig)
    rotated = getattr(attention.position, "rotary_dim", None) or attention.head_dim
    generator = torch.Generator().manual_seed(parameters.seed)
    head = torch.randn(64, 32, generator=generator) * torch.linspace(0.1, 3, 64)[:, None]
    hidden = torch.randn(256, 32, generator=generator)
    spread = [_spread(hidden @ weight.T) for weight in (head, unit_rows(head))]
    curve, largest = _largest_logit(parameters.coefficient, generator)
    return Result(
        numbers=[
            number("equal", equal, "counts equal to the published ones", "与公布值相等的个数"),
            number("of", len(known), "of", "总数"),
            *(
                number(f"total_{name}", c.total, f"parameters of {name}", f"{name} 的参数量")
                for name, c in counts.items()
            ),
            number(
                "scale",
                scale,
                "ChatGLM-6B: factor of the residual, √(2·28)",
                "ChatGLM-6B：残差系数 √(2·28)",
                6,
            ),
            number(
                "kv_heads", attention.num_kv_heads, "ChatGLM2-6B: KV heads", "ChatGLM2-6B：键值头数"
            ),
            number(
                "rotated",
                rotated,
                f"ChatGLM2-6B: rotated dims of {attention.head_dim}",
                f"ChatGLM2-6B：{attention.head_dim} 维中旋转的维数",
            ),
            number(
                "spread_plain",
                spread[0],
                "largest / smallest spread of a token's logits",
                "各词元 logits 离散度的最大值 / 最小值",
            ),
            number("spread_unit", spread[1], "the same with NormHead", "同上，使用 NormHead"),
            number(
                "largest_plain",
                largest[0],
                "largest logit after 200 steps, plain loss",
                "普通损失训练 200 步后的最大 logit",
            ),
            number(
                "largest_penalised",
                largest[1],
                "the same with the loss on it",
                "同上，加上对它的损失",
            ),
        ],
        figures=[
            parameter_bars(counts),
            Bars(
                title="KV cache",
                x="model",
                y="KiB per token, 16 bit",
                groups=list(cache),
                series={"cache": [value / 1024 for value in cache.values()]},
                log_y=True,
            ),
            Lines(
                title="Largest logit while a head is fitted",
                x="step",
                y="mean largest logit",
                lines=curve,
            ),
        ],
        claims=[
            claim(
                (
                    "The article (zhihu 651747035) compares ChatGLM, Llama and Baichuan: Baichuan "
                    "7B and 13B have 7,000,559,616 and 13,264,901,120 parameters.",
                    "文章（知乎 651747035）比较 ChatGLM、LLaMA 与 Baichuan：Baichuan 7B 与 13B 有 "
                    "7,000,559,616 与 13,264,901,120 个参数。",
                ),
                (
                    f"{equal} of {len(known)} counts are equal to the published ones; ChatGLM-6B's "
                    f"residual factor is {scale:.4f}, that of √56 {math.sqrt(56):.4f}.",
                    f"{len(known)} 个参数量中 {equal} 个与公布值相等；ChatGLM-6B 的残差系数为 "
                    f"{scale:.4f}，√56 为 {math.sqrt(56):.4f}。",
                ),
                "reproduced" if equal == len(known) else "not",
            ),
            claim(
                (
                    "Baichuan 2 scales the rows of its head to unit length and penalises the "
                    "square of the largest logit with 2e-4.",
                    "Baichuan 2 将输出头各行归一到单位长度，并以 2e-4 惩罚最大 logit 的平方。",
                ),
                (
                    f"With NormHead the logits of all tokens spread alike (ratio {spread[1]:.1f} "
                    f"instead of {spread[0]:.0f}); with coefficient {parameters.coefficient:g} the "
                    f"largest logit ends at {largest[1]:.2f} instead of {largest[0]:.2f}.",
                    f"使用 NormHead 时各词元 logits 的离散度相近（比值 {spread[1]:.1f}，原为 "
                    f"{spread[0]:.0f}）；系数 {parameters.coefficient:g} 时最大 logit 为 "
                    f"{largest[1]:.2f}，原为 {largest[0]:.2f}。",
                ),
                "direction",
                (
                    "A head alone, on random inputs; the effect on training at scale is the "
                    "paper's.",
                    "只有一个输出头与随机输入；大规模训练中的效果出自论文。",
                ),
            ),
        ],
    )


def _spread(logits: torch.Tensor) -> float:
    """Returns the largest standard deviation of a token's logits over the smallest."""
    each = logits.std(0)
    return float(each.max() / each.min())


def _largest_logit(
    coefficient: float, generator: torch.Generator
) -> tuple[dict[str, list[tuple[float, float]]], list[float]]:
    """Fits a head to random labels, with and without the loss on the largest logit."""
    hidden = torch.randn(128, 32, generator=generator)
    labels = torch.randint(64, (128,), generator=generator)
    curves: dict[str, list[tuple[float, float]]] = {}
    for name, weight_of in (("cross-entropy", 0.0), ("with the loss", coefficient)):
        weight = torch.zeros(64, 32).requires_grad_(True)
        optimizer = torch.optim.Adam([weight], lr=0.05)
        points = curves.setdefault(name, [])
        for step in range(200):
            optimizer.zero_grad()
            out = linear_cross_entropy(hidden, weight, labels, max_z_loss=weight_of)
            (out.sum / out.num_tokens).backward()
            optimizer.step()
            if step % 10 == 9:
                with torch.no_grad():
                    top = (hidden @ weight.T).max(-1).values.mean()
                points.append((float(step + 1), float(top)))
    return curves, [points[-1][1] for points in curves.values()]


LAB = Lab(
    name="chatglm-baichuan",
    rows=(32,),
    chapter="models",
    title=Text("ChatGLM, Llama and Baichuan compared", "ChatGLM、LLaMA 与 Baichuan 的比较"),
    seconds=6,
    parameters=Parameters,
    run=run,
)
