"""Activations: GELU and its approximations, and the width of a gated feed-forward."""

from typing import ClassVar

import torch
from pydantic import Field, PositiveFloat, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.models.describe import describe
from easyllm.nn.config import GLUConfig
from easyllm.ops.activation import ACTIVATIONS, gated
from easyllm.plan.parameters import count_parameters

LLAMAS = ("llama-7b", "llama-13b", "llama-33b", "llama-65b")


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"points": 2001}

    points: PositiveInt = Field(
        default=200_001, ge=101, le=2_000_001, description="Points at which functions are compared."
    )
    reach: PositiveFloat = Field(default=8.0, le=100, description="Compared from -reach to reach.")


def run(parameters: Parameters) -> Result:
    """Compares activations on a grid, and derives the widths of Llama's feed-forward."""
    x = torch.linspace(-parameters.reach, parameters.reach, parameters.points, dtype=torch.float64)
    gelu = ACTIVATIONS["gelu"](x)
    tanh_error = float((gelu - ACTIVATIONS["gelu_tanh"](x)).abs().max())
    # x·σ(1.702 x): a sigmoid gate times x
    sigmoid_error = float((gelu - gated(1.702 * x, x.clone(), "sigmoid")).abs().max())
    widths, shares = {}, {}
    for name in LLAMAS:
        config = describe(name)
        feed_forward = config.layers[0].feed_forward
        assert isinstance(feed_forward, GLUConfig)
        widths[name] = (config.hidden_size, feed_forward.intermediate_size)
        per_layer = count_parameters(config).feed_forward / config.num_layers
        shares[name] = per_layer / (8 * config.hidden_size**2)
    rule = all(inner == _swiglu_width(hidden) for hidden, inner in widths.values())
    drawn = torch.linspace(-4, 4, 161, dtype=torch.float64)
    curves = {
        name: [(float(a), float(b)) for a, b in zip(drawn, ACTIVATIONS[name](drawn), strict=True)]
        for name in ("relu", "gelu", "silu")
    }
    errors = {
        "GELU − tanh form": gelu - ACTIVATIONS["gelu_tanh"](x),
        "GELU − x·σ(1.702x)": gelu - gated(1.702 * x, x.clone(), "sigmoid"),
    }
    every = max(1, parameters.points // 300)
    return Result(
        numbers=[
            number(
                "tanh_error",
                tanh_error,
                "largest |GELU − tanh form|",
                "|GELU − tanh 形式| 的最大值",
                3,
            ),
            number(
                "sigmoid_error",
                sigmoid_error,
                "largest |GELU − x·σ(1.702x)|",
                "|GELU − x·σ(1.702x)| 的最大值",
                3,
            ),
            *(
                number(f"width_{name}", inner, f"SwiGLU width of {name}", f"{name} 的 SwiGLU 宽度")
                for name, (_, inner) in widths.items()
            ),
            *(
                number(
                    f"share_{name}",
                    share,
                    f"{name}: parameters / those of an MLP with 4h",
                    f"{name}：参数量与宽度为 4h 的 MLP 之比",
                )
                for name, share in list(shares.items())[:1]
            ),
        ],
        figures=[
            Lines(title="Activations", x="x", y="f(x)", lines=curves),
            Lines(
                title="Errors of two approximations of GELU",
                x="x",
                y="difference",
                lines={
                    name: [
                        (float(a), float(b))
                        for a, b in zip(x[::every], error[::every], strict=True)
                        if abs(a) <= 5
                    ]
                    for name, error in errors.items()
                },
            ),
        ],
        claims=[
            claim(
                (
                    "Shazeer (arXiv 2002.05202): a GLU has three matrices, so its width is 2/3 of "
                    "4h for equal size; Llama rounds it up to a multiple of 256: 11008, 13824, "
                    "17920, 22016.",
                    "Shazeer（arXiv 2002.05202）：GLU 有三个矩阵，同等规模下宽度取 4h 的 2/3；"
                    "Llama 再向上取整到 256 的倍数：11008、13824、17920、22016。",
                ),
                (
                    f"Widths {', '.join(str(w) for _, w in widths.values())}; the tanh form "
                    f"differs from GELU by {tanh_error:.3g}, x·σ(1.702x) by {sigmoid_error:.3g}.",
                    f"宽度为 {'、'.join(str(w) for _, w in widths.values())}；tanh 形式与 GELU "
                    "相差 "
                    f"{tanh_error:.3g}，x·σ(1.702x) 相差 {sigmoid_error:.3g}。",
                ),
                "reproduced" if rule and abs(tanh_error - 4.73e-4) < 1e-5 else "not",
            )
        ],
    )


def _swiglu_width(hidden: int) -> int:
    return -(-(8 * hidden // 3) // 256) * 256


LAB = Lab(
    name="activations",
    rows=(16,),
    chapter="costs",
    title=Text("From ReLU to SwiGLU", "从 ReLU 到 SwiGLU"),
    seconds=3,
    parameters=Parameters,
    run=run,
)
