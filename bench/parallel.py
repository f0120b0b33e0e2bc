"""Full fine-tuning steps of SmolLM2 in fp32: one process, two processes, and a peer in two.

    python bench/parallel.py [--tokens 512] [--steps 3] [--rounds 1]
        [--peer accelerate deepspeed] [--record]

Every process has one thread. The steps of one and of two processes take the same batch; `--peer`
also times Accelerate's FSDP2 and DeepSpeed's engine around `transformers` with the same model,
batch, optimizer and ZeRO stage (2 or 3; needs these packages). Printed as one JSON row: seconds
per step (median after one warm-up step, and of `--rounds`, in which all take turns), the speed-up
of two processes, and our time relative to the peer's. DeepSpeed compiles a helper when it is first
used: start it once before a timing.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import machine
import torch

from easyllm.parallel.launch import launch

T = TypeVar("T")
Medians = dict[tuple[str, str, int], dict[str, float]]
"""Seconds per step and loss, by who trains, layout and processes."""
LAYOUTS = ("ddp", "zero2", "fsdp")
STAGES = {"zero2": 2, "fsdp": 3}
SEQUENCE = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--layouts", nargs="*", default=list(LAYOUTS))
    parser.add_argument("--peer", nargs="*", default=[], choices=list(PEERS))
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--rank-of", choices=["ours", *PEERS], help=argparse.SUPPRESS)
    parser.add_argument("--layout", default="ddp", help=argparse.SUPPRESS)
    parser.add_argument("--model", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.rank_of is not None:
        seconds, loss = ({"ours": ours} | PEERS)[options.rank_of](options)
        if os.environ["RANK"] == "0":
            figures = {"seconds": statistics.median(seconds[1:]), "loss": loss}
            options.out.write_text(json.dumps(figures))
        return
    jobs = [("ours", "ddp", 1), *(("ours", layout, 2) for layout in options.layouts)]
    sharded = [layout for layout in options.layouts if layout != "ddp"]
    jobs += [(peer, layout, 2) for peer in options.peer for layout in sharded]
    found: dict[tuple[str, str, int], list[dict[str, float]]] = {job: [] for job in jobs}
    with tempfile.TemporaryDirectory() as folder:
        if options.peer:
            options.model = hugging_face_folder(Path(folder) / "model")
        for _ in range(options.rounds):
            for job in jobs:
                found[job].append(measure(options, *job))
    row = machine.row("parallel", tokens=options.tokens, rounds=options.rounds)
    medians = {
        job: {name: statistics.median(run[name] for run in runs) for name in runs[0]}
        for job, runs in found.items()
    }
    machine.finish(row | compared(medians, options), "parallel", record=options.record)


def compared(medians: Medians, options: argparse.Namespace) -> dict[str, Any]:
    """Returns the figures of all jobs, speed-ups of two processes, and ratios to the peers."""
    found: dict[str, Any] = {"one": medians["ours", "ddp", 1]}
    for layout in options.layouts:
        found[layout] = two = medians["ours", layout, 2]
        found[f"{layout}_speedup"] = round(found["one"]["seconds"] / two["seconds"], 3)
        for peer in options.peer if layout != "ddp" else ():
            found[f"{peer}_{layout}"] = theirs = medians[peer, layout, 2]
            found[f"{layout}_to_{peer}"] = round(two["seconds"] / theirs["seconds"], 3)
            found[f"{layout}_loss_difference_{peer}"] = two["loss"] - theirs["loss"]
    return found


def measure(options: argparse.Namespace, who: str, layout: str, ranks: int) -> dict[str, float]:
    """Returns seconds per step and the first loss of a launch."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "figures.json"
        command = [sys.executable, __file__, "--rank-of", who, "--layout", layout]
        if who in PEERS:
            command += ["--model", str(options.model)]
        command += ["--tokens", str(options.tokens), "--steps", str(options.steps)]
        code, failures = launch([*command, "--out", str(out)], ranks, {"OMP_NUM_THREADS": "1"})
        if code:
            raise SystemExit(failures[0].message())
        found: dict[str, float] = json.loads(out.read_text())
        print(who, layout, ranks, found, file=sys.stderr)
        return found


def hugging_face_folder(folder: Path) -> Path:
    """Writes the model in fp32, as `transformers` reads it."""
    from easyllm.models import load_model, load_tokenizer, save_model

    return save_model(
        load_model("smollm2", dtype="float32"), folder, tokenizer=load_tokenizer("smollm2")
    )


def sequences(options: argparse.Namespace) -> list[list[int]]:
    """The token ids of a step, the same for everyone."""
    generator = torch.Generator().manual_seed(0)
    count = options.tokens // SEQUENCE
    return torch.randint(3, 49152, (count, SEQUENCE), generator=generator).tolist()


def ours(options: argparse.Namespace) -> tuple[list[float], float]:
    from easyllm.batches.packing import pack
    from easyllm.examples.sample import Sample
    from easyllm.models import load_model
    from easyllm.parallel.config import ParallelConfig
    from easyllm.parallel.mesh import join, leave, world_size
    from easyllm.parallel.parallel import parallelize
    from easyllm.train.loop import accumulate, apply_gradients
    from easyllm.train.objectives import LanguageModel
    from easyllm.train.optim import MasterOptimizer
    from easyllm.train.optim_config import AdamWConfig
    from easyllm.train.precision import PrecisionPolicy

    torch.set_num_threads(1)
    model = load_model("smollm2", dtype="float32").requires_grad_(True).train()
    config = ParallelConfig(layout=options.layout)
    parallel, rank, size = None, 0, 1
    if world_size() > 1:
        mesh = join(config)
        rank, size = mesh.data.rank, mesh.data.size
        parallel = parallelize(model, mesh, config)
    trained: dict[str, Any] = dict(model.named_parameters())
    if parallel is not None:
        trained = dict(parallel.sharding.parameters)
    local = None if parallel is None else parallel.local
    optimizer = MasterOptimizer(trained, AdamWConfig(learning_rate=1e-5), local=local)
    rows = [Sample.from_mask(tuple(row)) for row in sequences(options)][rank::size]
    batch, precision, objective = pack(rows), PrecisionPolicy(), LanguageModel()

    def step() -> float:
        loss, _ = accumulate(model, objective, [batch], precision, None, parallel)
        if parallel is not None:
            parallel.reduce(optimizer.set_gradient)
        apply_gradients(optimizer, precision, 1.0, 1.0, loss, None, parallel)
        return loss

    found = timed(options, step, float)
    leave()
    return found


def timed(
    options: argparse.Namespace, step: Callable[[], T], average: Callable[[T], float]
) -> tuple[list[float], float]:
    """Times the steps, the first of which warms up.

    Returns:
        The seconds of each step, and the loss of the first one as `average` returns it from what
        `step` has returned.
    """
    seconds, losses = [], []
    for _ in range(options.steps + 1):
        start = time.perf_counter()
        loss = step()
        seconds.append(time.perf_counter() - start)
        losses.append(average(loss))
    return seconds, losses[0]


def accelerate(options: argparse.Namespace) -> tuple[list[float], float]:
    from accelerate import Accelerator, FullyShardedDataParallelPlugin
    from transformers import LlamaForCausalLM

    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="transformer_based_wrap",
        transformer_cls_names_to_wrap=["LlamaDecoderLayer"],
        reshard_after_forward=options.layout == "fsdp",  # else ZeRO-2
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    model, optimizer = accelerator.prepare(model, optimizer)
    ids = torch.tensor(sequences(options)[accelerator.process_index :: accelerator.num_processes])
    model.train()

    def step() -> torch.Tensor:
        loss = model(input_ids=ids, labels=ids).loss
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return loss.detach()

    return timed(options, step, lambda loss: float(accelerator.reduce(loss, "mean")))


def deepspeed(options: argparse.Namespace) -> tuple[list[float], float]:
    os.environ["DS_ACCELERATOR"] = "cpu"
    import deepspeed as peer
    import torch.distributed as dist
    from transformers import LlamaForCausalLM

    torch.set_num_threads(1)
    peer.init_distributed(dist_backend="gloo")
    rank, size = dist.get_rank(), dist.get_world_size()
    rows = sequences(options)
    values = {
        "train_micro_batch_size_per_gpu": len(rows) // size,
        "gradient_clipping": 1.0,
        "zero_optimization": {"stage": STAGES[options.layout]},
    }
    model = LlamaForCausalLM.from_pretrained(options.model, dtype=torch.float32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)
    engine, *_ = peer.initialize(model=model, optimizer=optimizer, config=values)
    ids = torch.tensor(rows[rank::size])
    engine.train()

    def step() -> torch.Tensor:
        loss = engine(input_ids=ids, labels=ids).loss
        engine.backward(loss)
        engine.step()
        return loss.detach().clone()

    def average(loss: torch.Tensor) -> float:
        dist.all_reduce(loss)
        return float(loss) / size

    return timed(options, step, average)


PEERS = {"accelerate": accelerate, "deepspeed": deepspeed}

if __name__ == "__main__":
    main()
