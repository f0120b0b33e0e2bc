"""FlashAttention's algorithm: exact at every tile size, without the matrix of scores."""

from collections.abc import Callable
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.ops.attention import reference_attention
from easyllm.ops.attention_rule import AttentionRule
from easyllm.ops.tiled_attention import tiled_attention


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"tokens": 96}

    tokens: PositiveInt = Field(default=256, ge=16, le=4096, description="Length of the text.")
    head_dim: PositiveInt = Field(default=64, le=256, description="Width of a head.")
    fast_memory: PositiveInt = Field(
        default=100_000, ge=4096, le=10_000_000, description="Elements of fast memory, M."
    )


def run(parameters: Parameters) -> Result:
    """Compares tiled attention and its gradients with attention that forms the scores."""
    generator = torch.Generator().manual_seed(parameters.seed)
    length, width = parameters.tokens, parameters.head_dim
    q, k, v = torch.randn(3, length, 2, width, generator=generator, dtype=torch.float64)
    rule = AttentionRule(scale=width**-0.5)
    expected, gradient = _with_gradient(reference_attention, q, k, v, rule)
    sizes = [s for s in (7, 16, 64, 128, 500) if s <= 2 * length]
    errors, backward = [], []
    for size in sizes:

        def tiled(
            q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, rule: AttentionRule, size: int = size
        ) -> torch.Tensor:
            return tiled_attention(q, k, v, rule, query_tile=size, key_tile=max(1, size // 2))

        found, its = _with_gradient(tiled, q, k, v, rule)
        errors.append((float(size), max(float((found - expected).abs().max()), 1e-18)))
        backward.append((float(size), max(float((its - gradient).abs().max()), 1e-18)))
    worst = max(y for _, y in [*errors, *backward])
    lengths = [512 << (2 * i) for i in range(4)]
    tile = 64
    memory = {
        "matrix of scores": [(float(n), float(n * n)) for n in lengths],
        "one tile and the running sums": [(float(n), float(tile * tile + 2 * n)) for n in lengths],
    }
    moved = {
        "standard: n·d + n²": [(float(n), float(n * width + n * n)) for n in lengths],
        "tiled: n²·d²/M": [
            (float(n), float(n * n * width * width / parameters.fast_memory)) for n in lengths
        ],
    }
    ratio = moved["standard: n·d + n²"][-1][1] / moved["tiled: n²·d²/M"][-1][1]
    return Result(
        numbers=[
            number(
                "output_error",
                max(y for _, y in errors),
                "largest difference of the output",
                "输出的最大差异",
                2,
            ),
            number(
                "gradient_error",
                max(y for _, y in backward),
                "largest difference of the gradient",
                "梯度的最大差异",
                2,
            ),
            number(
                "moved_ratio",
                ratio,
                f"values moved, standard / tiled, {lengths[-1]:,} tokens",
                f"移动的数值量，标准 / 分块，{lengths[-1]:,} 词元",
                3,
            ),
        ],
        figures=[
            Lines(
                title="Difference from attention with all scores",
                x="tile size",
                y="largest difference, fp64",
                lines={"output": errors, "gradient": backward},
                log_x=True,
                log_y=True,
                marks=True,
            ),
            Lines(
                title="Values held at once, one head",
                x="tokens",
                y="values",
                lines=memory,
                log_x=True,
                log_y=True,
                marks=True,
            ),
        ],
        claims=[
            claim(
                (
                    "FlashAttention (arXiv 2205.14135): tiles with a running maximum and sum give "
                    "the exact result; memory traffic is Θ(N²d²/M) instead of Θ(Nd + N²). The "
                    "article of topic 32 calls it approximate bucketing, which is wrong.",
                    "FlashAttention（arXiv 2205.14135）：分块并维护最大值与和，结果精确；"
                    "访存为 Θ(N²d²/M)，而非 Θ(Nd + N²)。第 32 条的文章称之为近似分桶，这是错误的。",
                ),
                (
                    f"Outputs and gradients differ by {worst:.0e} at most at every tile size.",
                    f"所有分块大小下输出与梯度至多相差 {worst:.0e}。",
                ),
                "reproduced" if worst < 1e-10 else "not",
                (
                    "Exactness is measured; the traffic is the paper's formula.",
                    "精确性是测得的；访存用的是论文的公式。",
                ),
            )
        ],
    )


def _with_gradient(
    function: Callable[..., torch.Tensor],
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    rule: AttentionRule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns the output, and the gradients of its sum of squares by q, k and v."""
    leaves = [x.clone().requires_grad_(True) for x in (q, k, v)]
    out = function(*leaves, rule)
    out.square().sum().backward()
    return out.detach(), torch.cat([x.grad.flatten() for x in leaves if x.grad is not None])


LAB = Lab(
    name="flash-tiling",
    rows=(66,),
    chapter="inference",
    title=Text("FlashAttention: exact attention by tiles", "FlashAttention：分块的精确注意力"),
    seconds=3,
    parameters=Parameters,
    run=run,
)
