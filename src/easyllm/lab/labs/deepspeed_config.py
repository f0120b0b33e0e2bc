"""DeepSpeed's interface: a plain loop and the engine agree, its JSON is read key by key."""

from typing import Any, ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.batches.packing import pack
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import new_model, small_config, token_chains
from easyllm.parallel.deepspeed_config import read_deepspeed
from easyllm.parallel.deepspeed_values import RecipeValues
from easyllm.plan.deepspeed import plan_ranks
from easyllm.train.initialize import initialize
from easyllm.train.loss_scaler import LossScaler
from easyllm.train.objectives.language_model import LanguageModel

RATE = 1e-2
FILE: dict[str, Any] = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "zero_allow_untested_optimizer": True,
    "wall_clock_breakdown": False,
    "fp16": {
        "enabled": True,
        "loss_scale": 0,
        "initial_scale_power": 16,
        "loss_scale_window": 1000,
        "hysteresis": 2,
        "min_loss_scale": 1,
    },
    "zero_optimization": {
        "stage": 2,
        "overlap_comm": True,
        "contiguous_gradients": True,
        "reduce_bucket_size": 5e8,
        "allgather_bucket_size": 5e8,
    },
}
PARAMETERS, DEVICES = 7_500_000_000, 64


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 3}

    steps: PositiveInt = Field(default=10, le=500, description="Optimizer steps of both loops.")
    window: PositiveInt = Field(
        default=20, le=2000, description="Steps without overflow before the loss scale doubles."
    )


def run(parameters: Parameters) -> Result:
    """Trains with the engine and with a plain loop, and reads a typical configuration."""
    apart, accumulation = _apart(parameters)
    scale = _scales(parameters.window)
    settings = read_deepspeed(FILE, RecipeValues(world=8, batch_size=64))
    fates = {
        fate: sum(key.fate == fate for key in settings.keys)
        for fate in ("honoured", "mapped", "ignored")
    }
    refused = [_is_refused(change) for change in MISTAKES.values()]
    stages = [
        read_deepspeed(
            {"bf16": {"enabled": True}, "zero_optimization": {"stage": stage}},
            RecipeValues(world=DEVICES, batch_size=DEVICES),
        )
        for stage in range(4)
    ]
    plans = [plan_ranks(s, PARAMETERS, layers=32, world=DEVICES) for s in stages]
    return Result(
        numbers=[
            number(
                "apart",
                apart,
                "engine against a plain loop, weights",
                "引擎与普通循环的权重之差",
                2,
            ),
            number("accumulation", accumulation, "micro-batches of a step", "每步的微批数"),
            *(
                number(f"keys_{name}", count, f"keys that are {name}", f"键的处理：{zh}")
                for (name, count), zh in zip(
                    fates.items(), ("照办", "等价实现", "忽略且不影响结果"), strict=True
                )
            ),
            number(
                "refused",
                sum(refused),
                f"of {len(refused)} planted mistakes refused",
                f"{len(refused)} 个错误中被拒绝的个数",
            ),
            number(
                "batch",
                settings.batch_size,
                "batch size, resolved (8 processes)",
                "解析出的批大小（8 个进程）",
            ),
            *(
                number(
                    f"stage_{stage}",
                    plan.total_bytes / 1e9,
                    f"GB per GPU, 7.5B parameters on 64, stage {stage}",
                    f"64 卡上 7.5B 参数每卡 GB，阶段 {stage}",
                )
                for stage, plan in enumerate(plans)
            ),
        ],
        figures=[
            Lines(
                title="Dynamic loss scale of fp16",
                x="step",
                y="scale",
                lines={"scale": scale},
                log_y=True,
            ),
            Bars(
                title="7.5B parameters on 64 GPUs",
                x="ZeRO stage",
                y="GB per GPU",
                groups=["0", "1", "2", "3"],
                series={
                    "weights": [p.weight_bytes / 1e9 for p in plans],
                    "gradients": [p.gradient_bytes / 1e9 for p in plans],
                    "optimizer state": [p.state_bytes / 1e9 for p in plans],
                },
            ),
        ],
        claims=[
            claim(
                (
                    "train_batch_size is micro-batch size × accumulation steps × processes; "
                    "anything else is an error.",
                    "train_batch_size 等于微批大小 × 累积步数 × 进程数，否则报错。",
                ),
                (
                    f"2 × 4 × 8 is resolved to {settings.batch_size}; {sum(refused)} of "
                    f"{len(refused)} mistakes are refused, a wrong batch size among them.",
                    f"2 × 4 × 8 解析为 {settings.batch_size}；{len(refused)} 个错误中拒绝了 "
                    f"{sum(refused)} 个，其中包括错误的批大小。",
                ),
                "reproduced" if settings.batch_size == 64 and all(refused) else "not",
            ),
            claim(
                (
                    "engine.backward and engine.step replace a training loop's own.",
                    "engine.backward 与 engine.step 取代训练循环中的相应步骤。",
                ),
                (
                    f"After {parameters.steps} steps of {accumulation} micro-batches the weights "
                    f"differ by {apart:.0e} from those of a plain loop.",
                    f"{parameters.steps} 步（每步 {accumulation} 个微批）后权重与普通循环相差 "
                    f"{apart:.0e}。",
                ),
                "reproduced" if apart < 1e-6 else "not",
            ),
        ],
    )


MISTAKES: dict[str, dict[str, Any]] = {
    "a batch size that contradicts its factors": {"train_batch_size": 60},
    "an unknown key": {"gradient_acumulation_steps": 4},
    "a stage that does not exist": {"zero_optimization": {"stage": 4}},
    "a stage of auto": {"zero_optimization": {"stage": "auto"}},
    "text for a number": {"gradient_clipping": "one"},
}


def _is_refused(change: dict[str, Any]) -> bool:
    try:
        read_deepspeed(FILE | change, RecipeValues(world=8, batch_size=64))
    except ConfigError:
        return True
    return False


def _apart(parameters: Parameters) -> tuple[float, int]:
    """Returns the largest difference of weights after the engine's and a plain loop's steps."""
    generator = torch.Generator().manual_seed(parameters.seed)
    samples = token_chains(generator, 8 * parameters.steps)
    config = small_config(vocab_size=32, width=32)
    ours, plain = new_model(config, parameters.seed), new_model(config, parameters.seed)
    engine = initialize(
        ours,
        {
            "train_micro_batch_size_per_gpu": 2,
            "gradient_accumulation_steps": 4,
            "gradient_clipping": 1.0,
            "optimizer": {"type": "AdamW", "params": {"lr": RATE, "weight_decay": 0.0}},
        },
    )
    optimizer = torch.optim.AdamW(plain.parameters(), lr=RATE, weight_decay=0.0)
    for step in range(parameters.steps):
        for part in range(4):
            start = 8 * step + 2 * part
            rows = samples[start : start + 2]
            out = LanguageModel().loss(engine.model, pack(rows))
            engine.backward(out.sum / out.num_tokens)
            engine.step()
            other = LanguageModel().loss(plain, pack(rows))
            (other.sum / other.num_tokens / 4).backward()
        torch.nn.utils.clip_grad_norm_(plain.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    pairs = zip(ours.parameters(), plain.parameters(), strict=True)
    gap = max(float((a - b).detach().abs().max()) for a, b in pairs)
    return gap, engine.settings.accumulation


def _scales(window: int) -> list[tuple[float, float]]:
    """Returns the loss scale of 100 steps, of which a few overflow."""
    scaler = LossScaler(initial_scale=2.0**16, window=window, hysteresis=2)
    found = []
    for step in range(100):
        found.append((float(step), scaler.scale))
        scaler.update(step in (3, 4, 5, 60))
    return found


LAB = Lab(
    name="deepspeed-config",
    rows=(46, 48, 51),
    chapter="training",
    title=Text("DeepSpeed's engine and its JSON", "DeepSpeed 引擎与配置文件"),
    seconds=6,
    parameters=Parameters,
    run=run,
)
