"""DDP, ZeRO and FSDP on two processes: the same losses, less memory, known traffic."""

from typing import Any, ClassVar

from pydantic import Field, PositiveInt

from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Result, Text, claim, number
from easyllm.lab.two_ranks import LAYOUTS, run_ranks
from easyllm.parallel.deepspeed_config import read_deepspeed
from easyllm.parallel.deepspeed_values import RecipeValues
from easyllm.plan.deepspeed import plan_ranks

NAMES = dict(zip(LAYOUTS, ("DDP", "ZeRO-1", "ZeRO-2", "ZeRO-3", "FSDP"), strict=True))
BILLIONS = 1_000_000_000
PUBLISHED = {0: 120.0, 1: 31.4, 2: 16.6, 3: 1.88}
"""GB per GPU of 7.5B parameters on 64 GPUs (arXiv 1910.02054, figure 1)."""


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 2, "width": 32}

    steps: PositiveInt = Field(default=8, le=200, description="Optimizer steps.")
    width: PositiveInt = Field(default=64, multiple_of=32, le=512, description="Model width.")
    layers: PositiveInt = Field(default=2, le=8, description="Layers of the model.")
    budget_gb: PositiveInt = Field(default=80, le=1000, description="Memory of a GPU, in GB.")


def run(parameters: Parameters) -> Result:
    """Trains the same model under every layout, and asks which stage fits a budget."""
    found = run_ranks("zero", parameters.model_dump(exclude={"budget_gb"}))
    one = found["one"]["losses"]
    loss_apart = {
        name: max(abs(a - b) for a, b in zip(one, found[layout]["losses"], strict=True))
        for layout, name in NAMES.items()
    }
    apart = {name: found[layout]["apart"] for layout, name in NAMES.items()}
    sent = {name: found[layout]["sent"] for layout, name in NAMES.items()}
    gigabytes = {stage: _per_device(7.5, 64, stage) for stage in range(4)}
    sizes = (1.5, 7.5, 70.0)
    fitting = {size: _first_stage(size, 64, parameters.budget_gb) for size in sizes}
    return Result(
        numbers=[
            number(
                "loss_apart",
                max(loss_apart.values()),
                "largest difference of a loss, nats",
                "损失的最大差异，nats",
                2,
            ),
            number(
                "weight_apart",
                max(apart.values()),
                "largest difference of a weight",
                "权重的最大差异",
                2,
            ),
            *(
                number(
                    f"sent_{layout}",
                    sent[name],
                    f"{name}: elements sent per parameter and step, 2 processes",
                    f"{name}：2 个进程时每步每参数发送的元素数",
                    3,
                )
                for layout, name in NAMES.items()
            ),
            *(
                number(
                    f"gb_{stage}",
                    value,
                    f"GB per GPU, 7.5B on 64, stage {stage}",
                    f"64 卡、7.5B、阶段 {stage} 的每卡 GB",
                    3,
                )
                for stage, value in gigabytes.items()
            ),
            *(
                number(
                    f"fits_{size:g}",
                    stage,
                    f"first stage that fits {size:g}B on 64 × {parameters.budget_gb} GB",
                    f"64 × {parameters.budget_gb} GB 上能放下 {size:g}B 的最低阶段",
                )
                for size, stage in fitting.items()
            ),
        ],
        figures=[
            Bars(
                title="Measured: what each of two processes holds",
                x="layout",
                y="elements per parameter",
                groups=list(NAMES.values()),
                series={
                    "weights": [found[layout]["weights"] for layout in LAYOUTS],
                    "gradients": [found[layout]["gradients"] for layout in LAYOUTS],
                    "each moment": [found[layout]["moments"] for layout in LAYOUTS],
                },
            ),
            Bars(
                title="Sent by each of two processes",
                x="layout",
                y="elements per parameter and step",
                groups=list(NAMES.values()),
                series={"sent": list(sent.values())},
            ),
            Bars(
                title="7.5B parameters on 64 GPUs, without activations",
                x="stage",
                y="GB per GPU",
                groups=[str(stage) for stage in gigabytes],
                series={"GB": list(gigabytes.values())},
                log_y=True,
            ),
        ],
        claims=_claims(loss_apart, apart, sent, gigabytes, fitting, parameters.budget_gb),
    )


def _claims(
    losses: dict[str, float],
    weights: dict[str, float],
    sent: dict[str, float],
    gigabytes: dict[int, float],
    fitting: dict[float, int | None],
    budget: int,
) -> list[Any]:
    close = all(abs(gigabytes[s] - gb) < 0.05 * gb for s, gb in PUBLISHED.items())
    ratio = sent["ZeRO-3"] / sent["DDP"]
    stages = ", ".join(f"{size:g}B: {stage}" for size, stage in fitting.items())
    return [
        claim(
            (
                "ZeRO (arXiv 1910.02054): 7.5B parameters on 64 GPUs take 120 GB each with plain "
                "data parallelism, and 31.4, 16.6 and 1.9 GB with stages 1, 2 and 3.",
                "ZeRO（arXiv 1910.02054）：64 卡上 7.5B 参数，普通数据并行每卡 120 GB，阶段 1、"
                "2、3 "
                "为 31.4、16.6、1.9 GB。",
            ),
            (
                f"{gigabytes[0]:.1f}, {gigabytes[1]:.1f}, {gigabytes[2]:.1f} and "
                f"{gigabytes[3]:.2f} GB; first stages that fit {budget} GB: {stages}.",
                f"{gigabytes[0]:.1f}、{gigabytes[1]:.1f}、{gigabytes[2]:.1f}、{gigabytes[3]:.2f} "
                f"GB；"
                f"能放入 {budget} GB 的最低阶段：{stages}。",
            ),
            "reproduced" if close else "not",
        ),
        claim(
            (
                "ZeRO, section 7: stages 1 and 2 send as much as data parallelism, 2Ψ; stage 3 "
                "sends 3Ψ, half as much again. Figures for N processes have the factor (N − 1)/N. "
                "An article on topic 52 counts stage 1 as 3Φ.",
                "ZeRO 第 7 节：阶段 1、2 的通信量与数据并行相同，为 2Ψ；阶段 3 为 3Ψ，多一半。N "
                "个进程"
                "要乘 (N − 1)/N。第 52 条的一篇文章把阶段 1 算作 3Φ。",
            ),
            (
                f"On two processes {sent['DDP']:.2f}, {sent['ZeRO-1']:.2f}, {sent['ZeRO-2']:.2f} "
                f"and {sent['ZeRO-3']:.2f} elements per parameter: stage 3 sends {ratio:.2f} times "
                f"as much; losses differ by {max(losses.values()):.0e}, weights by "
                f"{max(weights.values()):.0e}.",
                f"两个进程时每参数 {sent['DDP']:.2f}、{sent['ZeRO-1']:.2f}、{sent['ZeRO-2']:.2f}、"
                f"{sent['ZeRO-3']:.2f} 个元素：阶段 3 是 {ratio:.2f} 倍；损失相差 "
                f"{max(losses.values()):.0e}，权重相差 {max(weights.values()):.0e}。",
            ),
            "reproduced" if abs(ratio - 1.5) < 0.05 and max(losses.values()) < 1e-4 else "not",
        ),
    ]


def _per_device(billions: float, devices: int, stage: int) -> float:
    """Returns GB of weights, gradients and optimizer state on each GPU."""
    values = {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}}
    settings = read_deepspeed(values, RecipeValues(world=devices, batch_size=devices))
    plan = plan_ranks(settings, round(billions * BILLIONS), layers=32, world=devices)
    return plan.total_bytes / BILLIONS


def _first_stage(billions: float, devices: int, budget_gb: float) -> int | None:
    """Returns the lowest stage whose state fits into a GPU; None if none does."""
    stages = (s for s in range(4) if _per_device(billions, devices, s) <= budget_gb)
    return next(stages, None)


LAB = Lab(
    name="zero",
    rows=(47, 49, 50, 52),
    chapter="training",
    title=Text("ZeRO and FSDP on two processes", "两个进程上的 ZeRO 与 FSDP"),
    seconds=15,
    parameters=Parameters,
    run=run,
)
