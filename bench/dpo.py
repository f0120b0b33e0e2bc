"""LoRA DPO on SmolLM2: pairs/s and peak memory, with the prompt of a pair computed once and twice.

    python bench/dpo.py [--pairs 12] [--rounds 2] [--precision bf16] [--peer PYTHON] [--record]

One epoch at batch size 2, at most 512 tokens a sequence, LoRA of rank 8 on all linears; the
reference pass of every step is counted, loading the model is not. Each measurement is a process
of its own, and they take turns. `--peer` is the interpreter of an environment with TRL, whose
trainer is measured on the same pairs with and without precomputed reference log-probabilities
(`peers/trl_dpo.py`, which counts building the trainer too); with `--precision bf16` both also with
its own mixed precision.
"""

import argparse
import itertools
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import machine

ITEMS = ("shared", "separate")
PEERS = ("trl", "trl_precomputed")
"""TRL without and with `precompute_ref_log_probs`."""
FP32, BF16 = "bf16=False", "bf16=True"
"""A setting of TRL's trainers, as it stands in the scripts under `peers`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=machine.SHARED / "data" / "dpo_en_demo.json")
    parser.add_argument("--pairs", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--peer", type=Path, help="Python with TRL")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--item", choices=ITEMS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.item:
        print(json.dumps(measure(options)))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.peer:
            machine.easyllm("convert", "smollm2", f"{folder}/model")
        for _ in range(options.rounds):
            for item in ITEMS:
                given = [word for word in sys.argv[1:] if word != "--record"]
                command = [sys.executable, __file__, "--item", item, *given]
                found.setdefault(item, []).append(machine.figures_of(command))
            if options.peer:
                scripts = peer_scripts("trl_dpo.py", Path(folder), options.precision)
                for (suffix, script), precompute in itertools.product(scripts.items(), range(2)):
                    files = [f"{folder}/model", options.data]
                    command = [options.peer, script, *files, options.pairs, precompute]
                    rows = found.setdefault(PEERS[precompute] + suffix, [])
                    rows.append(machine.figures_of(command))
    results = {
        item: {
            "pairs_per_s": round(statistics.median(row["pairs_s"] for row in rows), 4),
            "rss_mb": max(row["rss_mb"] for row in rows),
        }
        for item, rows in found.items()
    }
    shape = {"pairs": options.pairs, "precision": options.precision}
    row = machine.row("dpo", shape=shape, results=results)
    machine.finish(row, "dpo", record=options.record)


def peer_scripts(name: str, folder: Path, precision: str) -> dict[str, Path]:
    """Returns the scripts of a peer by the suffix of their names: in fp32, and in bf16 if asked."""
    script = machine.SHARED / "peers" / name
    if precision == "fp32":
        return {"": script}
    text = script.read_text("utf-8")
    assert FP32 in text, f"{name} has no {FP32}"
    other = folder / name
    other.write_text(text.replace(FP32, BF16), "utf-8")
    return {"": script, "_bf16": other}


def measure(options: argparse.Namespace) -> dict[str, Any]:
    """Runs an epoch in this process."""
    import torch
    from paired import peak_rss_mb

    from easyllm.train import TrainConfig, train
    from easyllm.train.metrics import read_metrics
    from easyllm.train.objectives import sequence_logprobs

    torch.set_num_threads(2)
    if options.item == "separate":
        sequence_logprobs.can_share = lambda *_, **__: False
    rows = json.loads(options.data.read_text("utf-8"))[: options.pairs]
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "pairs.json"
        data.write_text(json.dumps(rows), "utf-8")
        config = TrainConfig.model_validate(
            {
                "model": "smollm2",
                "data": {"kind": "preferences", "train": [str(data)], "max_seq_len": 512},
                "objective": {"kind": "dpo", "beta": 0.1},
                "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
                "optimizer": {"learning_rate": 5e-5},
                "batch_size": 2,
                "micro_batch_tokens": 1024,
                "precision": options.precision,
                "save_every": 0,
            }
        )
        start = time.perf_counter()
        result = train(config, Path(folder) / "run")
        wall = time.perf_counter() - start
        losses = [
            x["train/loss_nats"] for x in read_metrics(result.output) if "train/loss_nats" in x
        ]
    return {
        "pairs_s": len(rows) / result.figures["seconds"],
        "wall_s": round(wall, 1),
        "rss_mb": round(peak_rss_mb()),
        "losses": losses[:3],
    }


if __name__ == "__main__":
    main()
