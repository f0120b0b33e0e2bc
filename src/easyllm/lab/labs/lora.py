"""LoRA and AdaLoRA: step 0 is the base, a merge changes nothing, and ranks go where they help."""

import copy
from typing import ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.adapters import StepInfo, attach, merge
from easyllm.adapters.adalora import AdaLoRAConfig, AdaLoRASet
from easyllm.adapters.lora import LoRAConfig
from easyllm.core.json_types import JsonObject
from easyllm.examples.sample import Sample
from easyllm.lab.lab import Bars, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import mean_loss, new_model, small_config, token_chains, train_small
from easyllm.models.describe import describe
from easyllm.nn.decoder import Decoder
from easyllm.plan.parts import count_adapter_parameters


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 4, "base_steps": 4, "ranks": (1, 4)}

    ranks: tuple[PositiveInt, ...] = Field(
        default=(1, 2, 4, 8, 16),
        min_length=2,
        max_length=6,
        description="Ranks to compare, at most 32.",
    )
    base_steps: PositiveInt = Field(default=80, le=2000, description="Steps of the base model.")
    steps: PositiveInt = Field(default=60, le=2000, description="Steps of each adapter.")


def run(parameters: Parameters) -> Result:
    """Adapts a small model to another chain of tokens, with adapters of several ranks."""
    generator = torch.Generator().manual_seed(parameters.seed)
    base = new_model(small_config(vocab_size=32, width=32), parameters.seed)
    old, new = token_chains(generator, 8 * parameters.base_steps), token_chains(generator, 600)
    held_out, new = new[:32], new[32:]
    train_small(base, old, steps=parameters.base_steps, batch_size=8, seed=parameters.seed)
    base.eval()
    ids = torch.tensor(held_out[0].token_ids)
    before = base.logits(ids).detach()
    start = mean_loss(base, held_out)
    at_zero, merged_change, curve = 0.0, 0.0, []
    for rank in parameters.ranks:
        model = copy.deepcopy(base).eval()
        adapters = attach(model, LoRAConfig(rank=rank, alpha=2.0 * rank), seed=parameters.seed)
        at_zero = max(at_zero, float((model.logits(ids) - before).detach().abs().max()))
        train_small(
            model,
            new,
            steps=parameters.steps,
            batch_size=8,
            adapters=adapters,
            learning_rate=1e-2,
            seed=parameters.seed,
        )
        curve.append((float(rank), mean_loss(model, held_out)))
        model.eval()
        attached = model.logits(ids).detach()
        change = (merge(model).logits(ids).detach() - attached).abs().max()
        merged_change = max(merged_change, float(change))
    kept, target = _adalora(base, new, parameters)
    gpt3 = {
        r: count_adapter_parameters(
            describe("gpt3-175b"), LoRAConfig(rank=r, targets=("q_proj", "v_proj"))
        )
        for r in (1, 8)
    }
    return Result(
        numbers=[
            number(
                "at_zero",
                at_zero,
                "change of the logits by a new adapter",
                "新适配器引起的 logits 变化",
                2,
            ),
            number(
                "merged",
                merged_change,
                "change of the logits by merging",
                "合并引起的 logits 变化",
                2,
            ),
            number(
                "gpt3_r1",
                gpt3[1],
                "LoRA on q and v of GPT-3, r = 1: parameters",
                "GPT-3 的 q、v 上的 LoRA，r = 1 的参数量",
            ),
            number("gpt3_r8", gpt3[8], "the same, r = 8", "同上，r = 8"),
            number("start", start, "loss on the new data before", "适配前在新数据上的损失"),
            *(
                number(f"loss_r{int(r)}", loss, f"loss with rank {int(r)}", f"秩 {int(r)} 的损失")
                for r, loss in curve
            ),
            number(
                "adalora_kept",
                sum(kept.values()),
                "AdaLoRA: triplets kept at the end",
                "AdaLoRA：最后保留的三元组数",
            ),
            number("adalora_budget", target, "AdaLoRA: budget", "AdaLoRA：预算"),
        ],
        figures=[
            Lines(
                title="LoRA by rank",
                x="rank",
                y="held-out loss, nats",
                lines={"adapted": curve, "base": [(r, start) for r, _ in curve]},
                log_x=True,
                marks=True,
            ),
            Bars(
                title="AdaLoRA: ranks at the end",
                x="linear",
                y="triplets kept",
                groups=list(kept),
                series={"kept": list(kept.values())},
            ),
        ],
        claims=[
            claim(
                (
                    "LoRA (arXiv 2106.09685, section 4.1; table 4): B starts at zero, so nothing "
                    "changes at first; merging adds no latency; q and v of GPT-3 take 4.7 M "
                    "parameters at r = 1 and 37.7 M at r = 8.",
                    "LoRA（arXiv 2106.09685，4.1 节与表 4）：B 从零开始，起初没有变化；"
                    "合并后没有额外延迟；GPT-3 的 q、v 在 r = 1 时为 4.7M 参数，r = 8 时为 37.7M。",
                ),
                (
                    f"A new adapter changes logits by {at_zero:.0e}, merging by "
                    f"{merged_change:.0e}; {gpt3[1]:,} and {gpt3[8]:,} parameters; rank "
                    f"{int(curve[0][0])} reaches {curve[0][1]:.2f}, rank {int(curve[-1][0])} "
                    f"{curve[-1][1]:.2f} from {start:.2f}.",
                    f"新适配器使 logits 变化 {at_zero:.0e}，合并变化 {merged_change:.0e}；参数量 "
                    f"{gpt3[1]:,} 与 {gpt3[8]:,}；损失从 {start:.2f} 降到 {curve[0][1]:.2f}（秩 "
                    f"{int(curve[0][0])}）与 {curve[-1][1]:.2f}（秩 {int(curve[-1][0])}）。",
                ),
                "reproduced"
                if at_zero == 0 and gpt3[1] == 4_718_592 and merged_change < 1e-4
                else "not",
            ),
            claim(
                (
                    "AdaLoRA (arXiv 2303.10512): one budget of ranks is shared by all linears.",
                    "AdaLoRA（arXiv 2303.10512）：所有线性层共享一个秩的预算。",
                ),
                (
                    f"{sum(kept.values())} triplets of a budget of {target}; from "
                    f"{min(kept.values())} to {max(kept.values())} in a linear.",
                    f"预算 {target}，保留 {sum(kept.values())} 个三元组；每个线性层 "
                    f"{min(kept.values())} 到 {max(kept.values())} 个。",
                ),
                "reproduced" if sum(kept.values()) == target else "not",
            ),
        ],
    )


def _adalora(
    base: Decoder, samples: list[Sample], parameters: Parameters
) -> tuple[dict[str, int], int]:
    """Returns the triplets that each linear keeps, and the budget."""
    model = copy.deepcopy(base)
    adapters = attach(model, AdaLoRAConfig(rank=4, init_rank=8), seed=parameters.seed)
    assert isinstance(adapters, AdaLoRASet)
    steps = max(10, parameters.steps)
    _train_adalora(model, adapters, samples, steps, parameters.seed)
    adapters.finish()
    names = {
        name.removeprefix("layers."): int(module.keeps.sum())
        for name, module in adapters.modules.items()
    }
    short = {
        name.replace("mixer.", "").replace("feed_forward.", "").replace("_proj", ""): n
        for name, n in names.items()
    }
    return short, adapters.config.rank * len(names)


def _train_adalora(
    model: Decoder, adapters: AdaLoRASet, samples: list[Sample], steps: int, seed: int
) -> None:
    train_small(
        model,
        samples,
        steps=steps,
        batch_size=8,
        adapters=adapters,
        learning_rate=1e-2,
        seed=seed,
        before_step=lambda step: adapters.after_backward(StepInfo(step=step, total_steps=steps)),
        after_step=lambda step, _: adapters.after_step(StepInfo(step=step, total_steps=steps)),
    )


LAB = Lab(
    name="lora",
    rows=(41,),
    chapter="training",
    title=Text("LoRA and AdaLoRA", "LoRA 与 AdaLoRA"),
    seconds=40,
    parameters=Parameters,
    run=run,
)
