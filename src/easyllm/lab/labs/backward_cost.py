"""The backward pass costs twice the forward pass, and what is left out of that."""

from typing import ClassVar

from pydantic import Field, PositiveInt

from easyllm.adapters.lora import LoRAConfig
from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Result, Text, claim, number
from easyllm.models.describe import describe
from easyllm.plan.compute import TrainingFlops, training_flops


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"tokens": 128}

    model: str = Field(default="smollm2-135m", description="A published size.")
    tokens: PositiveInt = Field(default=1024, le=8192, description="Length of the sequence.")
    rank: PositiveInt = Field(default=8, le=256, description="Rank of the LoRA adapter.")


def run(parameters: Parameters) -> Result:
    """Counts the FLOPs of a training step for the whole model, for LoRA and with recomputation."""
    config, lengths = describe(parameters.model), (parameters.tokens,)
    runs = {
        "all weights": training_flops(config, lengths, input_grad=True),
        "no gradient of the input": training_flops(config, lengths, input_grad=False),
        "LoRA": training_flops(config, lengths, adapter=LoRAConfig(rank=parameters.rank)),
        "full recomputation": training_flops(config, lengths, recompute="full"),
    }
    ratios = {name: each.backward.linears / each.forward.linears for name, each in runs.items()}
    whole, thin = runs["all weights"], runs["LoRA"]
    recomputed = runs["full recomputation"]
    more = recomputed.total / recomputed.model
    zh = {
        "all weights": "全部权重",
        "no gradient of the input": "输入不需要梯度",
        "LoRA": "LoRA",
        "full recomputation": "完全重算",
    }
    return Result(
        numbers=[
            *(
                number(
                    f"ratio_{name.replace(' ', '_').lower()}",
                    ratio,
                    f"backward / forward of linears, {name}",
                    f"线性层后向 / 前向，{zh[name]}",
                    5,
                )
                for name, ratio in ratios.items()
            ),
            number(
                "recompute_factor",
                more,
                "FLOPs with full recomputation / without",
                "完全重算与不重算的 FLOPs 之比",
            ),
            number(
                "lora_step",
                thin.total / whole.total,
                "FLOPs of a LoRA step / a full one",
                "LoRA 一步与全量一步的 FLOPs 之比",
            ),
        ],
        figures=[
            Bars(
                title=f"FLOPs of a training step, {parameters.model}",
                x="what is trained",
                y="as a share of the forward pass",
                groups=list(runs),
                series={
                    "forward": [1.0 for _ in runs],
                    "backward": [_share(each, each.backward.total) for each in runs.values()],
                    "recomputed": [_share(each, each.recomputed.total) for each in runs.values()],
                },
            )
        ],
        claims=[
            claim(
                (
                    "The article (zhihu 675517271): each product of the forward pass needs two in "
                    "the backward pass, one for the input's gradient and one for the weight's, so "
                    "it costs twice as much.",
                    "文章（知乎 675517271）：前向的每个矩阵乘在后向需要两个，"
                    "一个求输入的梯度，一个求权重的梯度，因此代价为两倍。",
                ),
                (
                    f"Exactly {ratios['all weights']:.4f} for the linears of the whole model; "
                    f"{ratios['no gradient of the input']:.4f} if the first input needs no "
                    f"gradient; {ratios['LoRA']:.2f} for LoRA, whose frozen weights need none.",
                    f"整个模型的线性层恰为 {ratios['all weights']:.4f}；第一层输入不需要梯度时为 "
                    f"{ratios['no gradient of the input']:.4f}；LoRA 的冻结权重不需要梯度，"
                    f"为 {ratios['LoRA']:.2f}。",
                ),
                "reproduced" if ratios["all weights"] == 2.0 else "direction",
            )
        ],
    )


def _share(flops: TrainingFlops, part: int) -> float:
    return part / flops.forward.total


LAB = Lab(
    name="backward-cost",
    rows=(20,),
    chapter="costs",
    title=Text("Backward costs twice forward", "后向约为前向的两倍"),
    seconds=3,
    parameters=Parameters,
    run=run,
)
