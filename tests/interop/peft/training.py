"""Training from the same start on the same data: the losses of 20 steps."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from exchange import DEFAULTS, Case, base_model, randomise_norms, reopened
from figures import Figures
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoKrConfig,
    MissConfig,
    OFTConfig,
    VeraConfig,
    get_peft_model,
    get_peft_model_state_dict,
)
from torch.nn import functional as F

import easyllm.adapters as ours
from easyllm.adapters import (
    AdaLoRAConfig,
    AdapterConfig,
    AdapterSet,
    DoRAConfig,
    LoRAConfig,
    StepInfo,
    attach,
)
from easyllm.adapters import IA3Config as OurIA3Config
from easyllm.models import hf_module_name, load_model
from easyllm.nn import Decoder
from easyllm.nn.context import ForwardContext

STEPS, ROWS, LENGTH, BOUND = 20, 3, 24, 1e-4
TARGETS = ("q_proj", "v_proj", "down_proj")
OURS: dict[str, Any] = {"targets": TARGETS, "alpha": 9}
RANKS = {"init_r": 6, "target_r": 2, "tinit": 3, "tfinal": 5, "deltaT": 2, "total_step": STEPS}
CASES: dict[str, tuple[AdapterConfig, Case]] = {
    "LoRA": (LoRAConfig(rank=4, **OURS), Case()),
    "LoRA, all biases": (
        LoRAConfig(rank=4, **OURS, bias="all"),
        Case(family="qwen2", adapter={"bias": "all"}),
    ),
    "LoRA, token rows, tied": (
        LoRAConfig(rank=4, **OURS, trained_tokens=(9, 7, 40)),
        Case(adapter={"trainable_token_indices": [9, 7, 40]}, base={"tie_word_embeddings": True}),
    ),
    "LoRA, embedding, tied": (
        LoRAConfig(rank=4, alpha=9, targets=("q_proj", "embed_tokens")),
        Case(
            adapter={"target_modules": ["q_proj", "embed_tokens"]},
            base={"tie_word_embeddings": True},
        ),
    ),
    "DoRA": (DoRAConfig(rank=4, **OURS), Case(adapter={"use_dora": True})),
    "DoRA, Qwen2": (DoRAConfig(rank=4, **OURS), Case(adapter={"use_dora": True}, family="qwen2")),
    "IA3": (
        OurIA3Config(targets=("q_proj", "v_proj", "down_proj")),
        Case(method=IA3Config),
    ),
    "VeRA": (ours.VeRAConfig(rank=8, targets=TARGETS), Case(method=VeraConfig)),
    "OFT": (ours.OFTConfig(block_size=8, targets=TARGETS), Case(method=OFTConfig)),
    "MiSS": (ours.MiSSConfig(rank=8, targets=TARGETS), Case(method=MissConfig)),
    "LoKr": (ours.LoKrConfig(rank=3, alpha=5, targets=TARGETS), Case(method=LoKrConfig)),
    "AdaLoRA": (
        AdaLoRAConfig(init_rank=6, rank=2, warmup_steps=3, final_steps=5, interval=2, **OURS),
        Case(method=AdaLoraConfig, adapter=RANKS),
    ),
}


def compare(figures: Figures, work: Path) -> None:
    """Prints the largest difference of the losses of each method."""
    print(f"trained from the same start: largest difference of {STEPS} losses in nats")
    for name, (config, case) in CASES.items():
        figures.run(name, lambda n=name, o=config, c=case: parity(figures, n, o, c, work / n))


def parity(figures: Figures, name: str, config: AdapterConfig, case: Case, folder: Path) -> None:
    """Compares the losses of peft and of this project, and the ranks that remain."""
    torch.manual_seed(0)
    made = base_model(case)
    randomise_norms(made)
    made.save_pretrained(folder / "base")
    # without task_type, peft 0.21.2 leaves AdaLoRA's orthogonality term out of the loss
    settings = {"task_type": "CAUSAL_LM", **DEFAULTS[case.method], **case.adapter}
    theirs = get_peft_model(reopened(case, folder), case.method(**settings)).train()
    model = load_model(folder / "base", dtype="float32").train()
    adapters = attach(model, config)
    copy_start(adapters, model, get_peft_model_state_dict(theirs))
    data = torch.randint(3, 60, (STEPS, ROWS, LENGTH), generator=torch.Generator().manual_seed(1))
    expected = train_theirs(theirs, data)
    got = train_ours(model, adapters, data)
    figures.at_most(name, max(abs(a - b) for a, b in zip(got, expected, strict=True)), BOUND)
    if expected[0] - min(expected) < 0.05:
        raise ValueError("the losses do not fall, so the figure says nothing")
    if isinstance(config, AdaLoRAConfig):
        where = hf_module_name(model)
        own = adapters.to_peft({n: where(n) for n in adapters.linears})["rank_pattern"]
        pattern = theirs.peft_config["default"].rank_pattern
        final = {n.replace(".default", ""): kept for n, kept in pattern.items()}
        figures.equal(f"{name}, triplets that remain", own, final)


@torch.no_grad()
def copy_start(adapters: AdapterSet, model: Decoder, start: dict[str, torch.Tensor]) -> None:
    """Copies the initial values of peft's adapter."""
    where = hf_module_name(model)
    for name, (_, adapter) in adapters.adapted.items():
        for ending, parameter in adapter.file_tensors().items():
            parameter.copy_(start[f"base_model.model.{where(name)}.{ending}"])


def train_theirs(model: Any, data: torch.Tensor) -> list[float]:
    """Returns the losses of peft's model."""
    ranks = getattr(model.base_model, "update_and_allocate", None)

    def loss(rows: torch.Tensor) -> torch.Tensor:
        value: torch.Tensor = model(input_ids=rows, labels=rows).loss
        return value

    def after(step: int) -> None:
        if ranks is not None:
            ranks(step)

    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    return losses(trained, data, loss, lambda _: None, after)


def train_ours(model: Decoder, adapters: AdapterSet, data: torch.Tensor) -> list[float]:
    """Returns the losses of this project's model, with the orthogonality term of AdaLoRA."""

    def loss(rows: torch.Tensor) -> torch.Tensor:
        context = ForwardContext.packed([LENGTH] * ROWS)
        out = model.head(model(rows.flatten(), context), context).view(ROWS, LENGTH, -1)
        value = F.cross_entropy(out[:, :-1].flatten(0, 1), rows[:, 1:].flatten())
        term = adapters.loss()
        return value if term is None else value + term

    def before(step: int) -> None:
        adapters.after_backward(StepInfo(step=step - 1, total_steps=STEPS))

    def after(step: int) -> None:
        adapters.after_step(StepInfo(step=step, total_steps=STEPS))

    trained = list(adapters.trained_parameters(model).values())
    return losses(trained, data, loss, before, after)


def losses(
    trained: list[torch.nn.Parameter],
    data: torch.Tensor,
    loss: Callable[[torch.Tensor], torch.Tensor],
    before: Callable[[int], None],
    after: Callable[[int], None],
) -> list[float]:
    """Trains with AdamW and returns the loss of each step; the first step is step 1."""
    optimizer = torch.optim.AdamW(trained, lr=5e-3, weight_decay=0.01)
    found = []
    for step, rows in enumerate(data, start=1):
        value = loss(rows)
        value.backward()
        before(step)
        optimizer.step()
        after(step)
        optimizer.zero_grad()
        found.append(float(value.detach()))
    return found
