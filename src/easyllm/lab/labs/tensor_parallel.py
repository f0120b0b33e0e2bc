"""Tensor parallelism on two processes: the same loss, four all-reduces a layer."""

from typing import ClassVar

from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Result, Text, claim, number
from easyllm.lab.two_ranks import VOCABULARY, run_ranks
from easyllm.models.describe import describe
from easyllm.parallel.tensor import tensor_degrees

MODELS = ("llama2-7b", "llama2-70b", "mixtral-8x7b", "qwen2.5-0.5b", "smollm2-135m")


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"width": 32}

    width: PositiveInt = Field(default=64, multiple_of=32, le=512, description="Model width.")


def run(parameters: Parameters) -> Result:
    """Divides a small model between two processes and counts what they exchange."""
    found = run_ranks("tensor", parameters.model_dump() | {"layers": 2})
    apart = abs(found["two"] - found["one"]) / found["tokens"]
    plain, sequence = found["plain"], found["sequence"]
    exchange = found["cross_entropy"]
    gathered = exchange["tokens"] * VOCABULARY
    degrees = {name: tensor_degrees(describe(name)) for name in MODELS}
    reduces = plain.get("all_reduce", 0.0)
    kinds = sorted({*plain, *sequence})
    return Result(
        numbers=[
            number(
                "apart", apart, "difference of the loss, nats per token", "损失之差，nats/词元", 2
            ),
            number(
                "gradient_apart",
                found["gradient_apart"],
                "largest difference of a norm's gradient",
                "归一化层梯度的最大差异",
                2,
            ),
            number(
                "all_reduce",
                reduces,
                "all-reduces per layer, forward and backward",
                "每层前向与反向的 all-reduce 次数",
            ),
            number(
                "sequence_gather",
                sequence.get("all_gather", 0.0),
                "sequence-parallel: all-gathers per layer",
                "序列并行：每层 all-gather 次数",
            ),
            number(
                "sequence_scatter",
                sequence.get("reduce_scatter", 0.0),
                "sequence-parallel: reduce-scatters per layer",
                "序列并行：每层 reduce-scatter 次数",
            ),
            number(
                "cross_entropy",
                exchange["elements"],
                "cross-entropy of 16 tokens: elements exchanged",
                "16 个词元的交叉熵交换的元素数",
            ),
            number("gathered", gathered, "elements of their logits", "这些词元的 logits 元素数"),
            *(
                number(
                    f"degree_{name}",
                    max(each, default=1),
                    f"largest degree of {name}",
                    f"{name} 的最大并行度",
                )
                for name, each in degrees.items()
            ),
        ],
        figures=[
            Bars(
                title="Collectives of one layer, forward and backward",
                x="operation",
                y="calls",
                groups=kinds,
                series={
                    "tensor": [plain.get(kind, 0.0) for kind in kinds],
                    "tensor + sequence": [sequence.get(kind, 0.0) for kind in kinds],
                },
            ),
            Bars(
                title="Degrees that divide a model",
                x="model",
                y="largest degree",
                groups=list(degrees),
                series={"degree": [max(each, default=1) for each in degrees.values()]},
                log_y=True,
            ),
        ],
        claims=[
            claim(
                (
                    "Megatron-LM (arXiv 1909.08053, section 3): the first linear is split by "
                    "columns, the second by rows, heads are divided; a layer needs two all-reduces "
                    "in the forward and two in the backward pass.",
                    "Megatron-LM（arXiv 1909.08053，第 3 节）：第一个线性层按列切分，第二个按行切"
                    "分，"
                    "注意力头分开；每层前向、反向各两次 all-reduce。",
                ),
                (
                    f"{reduces:g} all-reduces per layer; the loss differs by {apart:.0e} nats, the "
                    f"gradients of norms by {found['gradient_apart']:.0e}.",
                    f"每层 {reduces:g} 次 all-reduce；损失相差 {apart:.0e} nats，归一化层梯度相差 "
                    f"{found['gradient_apart']:.0e}。",
                ),
                "reproduced" if reduces == 4 and apart < 1e-5 else "not",
            ),
            claim(
                (
                    "Megatron-LM: with the vocabulary divided, the loss is computed from sums per "
                    "token; its logits are never gathered.",
                    "Megatron-LM：词表切分后，损失由每个词元的若干和算出，不收集 logits。",
                ),
                (
                    f"{exchange['elements']} elements for {exchange['tokens']} tokens of a "
                    f"vocabulary of {VOCABULARY}; the logits have {gathered}.",
                    f"词表 {VOCABULARY}、{exchange['tokens']} 个词元时交换 "
                    f"{exchange['elements']} 个元素；"
                    f"logits 有 {gathered} 个。",
                ),
                "reproduced" if exchange["elements"] < gathered else "not",
            ),
        ],
    )


LAB = Lab(
    name="tensor-parallel",
    rows=(53,),
    chapter="training",
    title=Text("Tensor parallelism, layer by layer", "逐层看张量并行"),
    seconds=12,
    parameters=Parameters,
    run=run,
)
