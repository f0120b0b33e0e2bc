"""Where the parameters are: the feed-forward holds two thirds of a layer, and often more."""

from typing import ClassVar

from pydantic import Field

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Result, Text, claim, number
from easyllm.models.describe import describe
from easyllm.plan.parameters import count_parameters

MODELS = ("gpt2", "gpt3-175b", "llama-7b", "llama2-70b", "mistral-7b", "mixtral-8x7b", "qwen2.5-7b")


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"models": ("gpt2", "llama-7b", "llama2-70b")}

    models: tuple[str, ...] = Field(
        default=MODELS, min_length=2, max_length=9, description="Published sizes to compare."
    )


def run(parameters: Parameters) -> Result:
    """Counts the parameters of each model by component."""
    counts = {name: count_parameters(describe(name)) for name in parameters.models}
    layers = {name: c.attention + c.feed_forward for name, c in counts.items()}
    shares = {name: c.feed_forward / layers[name] for name, c in counts.items()}
    mha = [name for name in ("gpt2", "gpt3-175b", "llama-7b") if name in shares]
    far = max((abs(shares[name] - 2 / 3) for name in mha), default=0.0)
    most = max(shares, key=lambda name: shares[name])
    return Result(
        numbers=[
            number(f"share_{name}", share, f"feed-forward share, {name}", f"前馈占比，{name}")
            for name, share in shares.items()
        ],
        figures=[
            Bars(
                title="Parameters by component",
                x="model",
                y="share of all parameters",
                groups=list(counts),
                series={
                    "feed-forward": [c.feed_forward / c.total for c in counts.values()],
                    "attention": [c.attention / c.total for c in counts.values()],
                    "embedding and head": [
                        (c.embedding + c.head) / c.total for c in counts.values()
                    ],
                },
            )
        ],
        claims=[
            claim(
                (
                    "With 4h² parameters of attention and 8h² of feed-forward in a layer, the "
                    "feed-forward holds two thirds.",
                    "一层中注意力有 4h² 个参数、前馈有 8h² 个，因此前馈占三分之二。",
                ),
                (
                    f"With as many KV heads as query heads the share differs from 2/3 by at most "
                    f"{far:.4f}; with grouped queries or experts it is larger, up to "
                    f"{shares[most]:.3f} ({most}).",
                    f"键值头数等于查询头数时，占比与 2/3 至多相差 {far:.4f}；"
                    f"采用分组查询或专家时更大，最高 {shares[most]:.3f}（{most}）。",
                ),
                "reproduced" if far < 0.01 else "direction",
            )
        ],
    )


LAB = Lab(
    name="ffn-share",
    rows=(1,),
    chapter="survey",
    title=Text("Where the parameters are", "参数在哪里"),
    seconds=3,
    parameters=Parameters,
    run=run,
)
