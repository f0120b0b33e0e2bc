"""Effect of each of the trainer's optimizations, enabled cumulatively: tokens/s and peak memory.

    python bench/savings.py [--tokens 2048] [--steps 3] [--record]

Full fine-tuning of SmolLM2 on Alpaca rows, with one process per table line, in the table's order:
padded rows and PyTorch's own layers first, then one more optimization per line. Padding tokens are
not counted.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import machine
import torch
from torch import Tensor
from torch.nn import functional as F

from easyllm.batches.packing import Batch, pack
from easyllm.core.device import bf16_is_fast
from easyllm.examples.sample import Sample

LADDER = ("padding", "packing", "kernels", "chunked_loss", "bf16", "fused_optimizer", "recompute")
COMPILE = "compile"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--data", type=Path, default=machine.SHARED / "data" / "alpaca_en_demo.json"
    )
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--line", help="run this line and print its figures")
    options = parser.parse_args()
    if options.line:
        print(json.dumps(measure(options.line.split(","), options)))
        return
    # without native bf16 instructions, bf16 GEMMs are many times slower
    fast = bf16_is_fast(torch.device("cpu"))
    ladder = tuple(step for step in LADDER if step != "bf16" or fast)
    lines = [ladder[: i + 1] for i in range(len(ladder))] + [(*ladder[:-1], COMPILE)]
    results = [{"added": line[-1], **in_a_process(line)} for line in lines]
    row = machine.row("savings", shape={"tokens": options.tokens}, results=results)
    machine.finish(row, "savings", record=options.record)


def in_a_process(line: tuple[str, ...]) -> dict[str, float]:
    environment = os.environ | ({} if "kernels" in line else {"EASYLLM_KERNELS": "0"})
    command = [sys.executable, __file__, "--line", ",".join(line), *sys.argv[1:]]
    command = [word for word in command if word != "--record"]
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout.splitlines()[-1])


def measure(line: list[str], options: argparse.Namespace) -> dict[str, float]:
    """Returns non-padding tokens per second (median without the first step) and peak memory."""
    from easyllm.models import load_model
    from easyllm.nn.recompute import recompute_activations
    from easyllm.train.optim import MasterOptimizer
    from easyllm.train.optim_config import AdamWConfig

    torch.set_num_threads(2)
    model = load_model("smollm2", dtype="float32")
    masters = None
    if "bf16" in line:
        masters = {name: p.detach() for name, p in model.named_parameters()}
        model = model.to(torch.bfloat16)
    model.requires_grad_(True).train()
    if "recompute" in line:
        recompute_activations(model, "full")
    if COMPILE in line:
        for layer in model.layers:
            layer.feed_forward.compile(dynamic=True)
    step: Callable[[], None]
    if "fused_optimizer" in line:
        ours = MasterOptimizer(dict(model.named_parameters()), AdamWConfig(), masters=masters)

        def step() -> None:
            ours.clip(ours.grad_norm(), 1.0)
            ours.step(1.0)

    else:
        step = plain_adamw(model, masters)
    steps = prepared(options, padded="packing" not in line)
    seconds, tokens = [], []
    for batch in steps:
        start = time.perf_counter()
        loss_of(model, batch, chunked="chunked_loss" in line).backward()
        step()
        seconds.append(time.perf_counter() - start)
        tokens.append(batch.num_trained)
    rates = [n / s for n, s in zip(tokens[1:], seconds[1:], strict=True)]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "tokens_per_s": round(statistics.median(rates), 1),
        "peak_rss_gb": round(peak / 1e9, 2),
        "first_step_s": round(seconds[0], 1),
        "step_s": round(statistics.median(seconds[1:]), 2),
    }


def plain_adamw(model: torch.nn.Module, masters: dict[str, Tensor] | None) -> Callable[[], None]:
    """Returns a step of PyTorch's AdamW, one tensor at a time, with fp32 masters if needed."""
    own = dict(model.named_parameters())
    moved = own if masters is None else {n: torch.nn.Parameter(m) for n, m in masters.items()}
    optimizer = torch.optim.AdamW(moved.values(), lr=2e-4, foreach=False)

    def step() -> None:
        if masters is not None:
            for name, parameter in own.items():
                moved[name].grad = parameter.grad.float()
        torch.nn.utils.clip_grad_norm_(moved.values(), 1.0)
        optimizer.step()
        with torch.no_grad():
            for name, parameter in own.items():
                parameter.grad = None
                if masters is not None:
                    parameter.copy_(moved[name])
        optimizer.zero_grad()

    return step


def loss_of(model: torch.nn.Module, batch: Batch, *, chunked: bool) -> Tensor:
    """Returns the mean loss per trained token."""
    from easyllm.train.objectives import LanguageModel

    if chunked:
        return LanguageModel().loss(model, batch).sum / batch.num_trained
    logits = model.head(model(batch.token_ids, batch.context()))
    return F.cross_entropy(logits, batch.labels)


def prepared(options: argparse.Namespace, *, padded: bool) -> list[Batch]:
    """Batches of about so many tokens; padded ones hold fewer real tokens in as many rows."""
    from easyllm.examples.conversations import read_conversations
    from easyllm.examples.prepare import prepare_conversations
    from easyllm.models import load_tokenizer

    samples, _ = prepare_conversations(
        read_conversations(options.data),
        load_tokenizer("smollm2"),
        max_seq_len=512,
        overlong="cut",
        train_on="all",
        split_turns=False,
    )
    batches, group = [], list[Sample]()
    for sample in samples:
        wide = max(len(s.token_ids) for s in [*group, sample])
        size = (
            wide * (len(group) + 1) if padded else sum(len(s.token_ids) for s in [*group, sample])
        )
        if size > options.tokens:
            batches.append(
                pack(
                    [fill(s, max(len(g.token_ids) for g in group)) for s in group]
                    if padded
                    else group
                )
            )
            group = []
        group.append(sample)
        if len(batches) == options.steps + 1:
            return batches
    return batches


def fill(sample: Sample, length: int) -> Sample:
    """Returns the sample with padding appended, which is masked out of the loss."""
    padding = length - len(sample.token_ids)
    return Sample((*sample.token_ids, *(0,) * padding), (*sample.labels, *(-100,) * padding))


if __name__ == "__main__":
    main()
