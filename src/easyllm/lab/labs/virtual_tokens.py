"""P-Tuning and prefix tuning: virtual tokens, trained on a frozen model, then folded."""

import copy
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import Field, PositiveInt

from easyllm.adapters import attach, load_adapter, save_adapter
from easyllm.adapters.prefix import PrefixTuningConfig
from easyllm.adapters.prompt import PromptTuningConfig
from easyllm.adapters.ptuning import PTuningConfig
from easyllm.core.json_types import JsonObject
from easyllm.lab.lab import Bars, Lab, LabConfig, Lines, Result, Text, claim, number
from easyllm.lab.small_models import (
    mean_loss,
    new_model,
    small_config,
    smoothed,
    token_chains,
    train_small,
)
from easyllm.models.hf_names import hf_module_name
from easyllm.plan.parts import count_adapter_parameters

if TYPE_CHECKING:
    from easyllm.adapters.adapter import AdapterConfig


class Parameters(LabConfig):
    """Parameters of the lab."""

    quick_values: ClassVar[JsonObject] = {"steps": 2, "base_steps": 2}

    tokens: PositiveInt = Field(default=8, le=64, description="Virtual tokens.")
    base_steps: PositiveInt = Field(default=80, le=2000, description="Steps of the base model.")
    steps: PositiveInt = Field(default=60, le=2000, description="Steps of each method.")


def run(parameters: Parameters) -> Result:
    """Adapts a frozen model to new data with three kinds of virtual tokens."""
    generator = torch.Generator().manual_seed(parameters.seed)
    base = new_model(small_config(vocab_size=32, width=32), parameters.seed)
    old = token_chains(generator, 8 * parameters.base_steps)
    new = token_chains(generator, 8 * parameters.steps + 24)
    held_out, new = new[:24], new[24:]
    train_small(base, old, steps=parameters.base_steps, batch_size=8, seed=parameters.seed)
    weights = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    count = parameters.tokens
    methods: dict[str, AdapterConfig] = {
        "prompt": PromptTuningConfig(num_virtual_tokens=count),
        "P-Tuning": PTuningConfig(num_virtual_tokens=count, encoder_hidden_size=32),
        "prefix": PrefixTuningConfig(num_virtual_tokens=count),
        "prefix, MLP": PrefixTuningConfig(
            num_virtual_tokens=count, projection=True, encoder_hidden_size=32
        ),
    }
    losses, last, moved, folds = {}, {}, 0.0, {}
    ids = torch.tensor(held_out[0].token_ids)
    for name, config in methods.items():
        model = copy.deepcopy(base)
        adapters = attach(model, config, seed=parameters.seed)
        found = train_small(
            model,
            new,
            steps=parameters.steps,
            batch_size=8,
            learning_rate=1e-2,
            adapters=adapters,
            seed=parameters.seed,
        )
        losses[name], last[name] = smoothed(found), mean_loss(model, held_out)
        model.eval()
        state = model.state_dict()
        moved = max(moved, *(float((state[n] - w).abs().max()) for n, w in weights.items()))
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            path = save_adapter(
                model, Path(folder) / "a", module_name=hf_module_name(model), base="small"
            )
            twin = copy.deepcopy(base).eval()
            load_adapter(twin, path, module_name=hf_module_name(twin))
            folds[name] = float((twin.logits(ids) - model.logits(ids)).abs().max())
    wide = small_config(layers=24, width=1024)
    published = count_adapter_parameters(wide, PrefixTuningConfig(num_virtual_tokens=10))
    start = mean_loss(base, held_out)
    return Result(
        numbers=[
            number(
                "prefix_parameters",
                published,
                "prefix of 10 tokens, 24 layers, 1,024 wide: parameters (n·L·2·d)",
                "10 个词元的前缀，24 层、宽 1,024：参数量（n·L·2·d）",
            ),
            number("moved", moved, "change of the base weights", "基座权重的变化", 2),
            number(
                "fold_error",
                max(folds.values()),
                "folded file against the encoder, logits",
                "折叠后的文件与编码器之差（logits）",
                2,
            ),
            number("start", start, "loss on the new data before", "适配前在新数据上的损失"),
            *(
                number(
                    f"loss_{name.replace(', ', '_').lower()}",
                    loss,
                    f"loss after, {name}",
                    f"适配后的损失，{name}",
                )
                for name, loss in last.items()
            ),
        ],
        figures=[
            Lines(title="Training on new data", x="step", y="loss, nats", lines=losses),
            Bars(
                title="Held-out loss",
                x="method",
                y="nats",
                groups=["base", *last],
                series={"loss": [start, *last.values()]},
            ),
        ],
        claims=[
            claim(
                (
                    "Prefix tuning (arXiv 2101.00190): keys and values of every layer, n·L·2·d "
                    "parameters; the MLP of training is dropped afterwards. P-Tuning "
                    "(arXiv 2103.10385): inputs computed by an encoder.",
                    "前缀微调（arXiv 2101.00190）：每层的键和值，n·L·2·d 个参数，训练用的 MLP "
                    "之后丢弃；"
                    "P-Tuning（arXiv 2103.10385）：由编码器计算输入。",
                ),
                (
                    f"{published:,} parameters; base weights moved by {moved:g}; folding changes "
                    f"logits by {max(folds.values()):.0e}; from {start:.2f} prompt tuning reaches "
                    f"{last['prompt']:.2f}, P-Tuning {last['P-Tuning']:.2f}, prefixes "
                    f"{last['prefix']:.2f}, and {last['prefix, MLP']:.2f} through an MLP.",
                    f"{published:,} 个参数；基座权重变化 {moved:g}；折叠使 logits 变化 "
                    f"{max(folds.values()):.0e}；损失从 {start:.2f} 降到：提示微调 "
                    f"{last['prompt']:.2f}，P-Tuning {last['P-Tuning']:.2f}，前缀 "
                    f"{last['prefix']:.2f}，经 MLP 的前缀 {last['prefix, MLP']:.2f}。",
                ),
                "reproduced"
                if published == 491_520 and moved == 0 and max(folds.values()) < 1e-4
                else "not",
            )
        ],
    )


LAB = Lab(
    name="virtual-tokens",
    rows=(44, 45),
    chapter="training",
    title=Text("P-Tuning and prefix tuning", "P-Tuning 与前缀微调"),
    seconds=40,
    parameters=Parameters,
    run=run,
)
