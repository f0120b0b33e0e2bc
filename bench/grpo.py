"""A GRPO step on SmolLM2 with LoRA: seconds a step, and peak memory.

    python bench/grpo.py [--steps 3] [--rounds 2] [--precision bf16] [--peer PYTHON] [--record]

8 prompts, 8 answers each, at most 64 tokens, LoRA of rank 8 on all linears, one update per rollout,
no KL term; the reward is the share of digits. A step is rollouts, rewards and update; the first
one, which builds the engine, is not counted. Each measurement is a process of its own, and they
take turns. `--peer` is the interpreter of an environment with TRL, whose GRPOTrainer is measured on
the same prompts (`peers/trl_grpo.py`); with `--precision bf16` also in its own mixed precision.
"""

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import machine
from dpo import peer_scripts


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--peer", type=Path, help="Python with TRL")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--item", choices=["easyllm"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.item:
        print(json.dumps(measure(options.steps, options.precision)))
        return
    found: dict[str, list[dict[str, Any]]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if options.peer:
            machine.easyllm("convert", "smollm2", f"{folder}/model")
        for _ in range(options.rounds):
            ours = [sys.executable, __file__, "--item", "easyllm", "--steps", options.steps]
            ours += ["--precision", options.precision]
            found.setdefault("easyllm", []).append(machine.figures_of(ours))
            if options.peer:
                scripts = peer_scripts("trl_grpo.py", Path(folder), options.precision)
                for suffix, script in scripts.items():
                    command = [options.peer, script, f"{folder}/model", options.steps]
                    found.setdefault(f"trl{suffix}", []).append(machine.figures_of(command))
    results = {
        item: {
            "step_s": round(statistics.median(s for row in rows for s in row["step_s"][1:]), 2),
            "rss_mb": max(row["rss_mb"] for row in rows),
        }
        for item, rows in found.items()
    }
    shape = {"prompts": 8, "answers": 8, "tokens": 64, "precision": options.precision}
    machine.finish(machine.row("grpo", shape=shape, results=results), "grpo", record=options.record)


def measure(steps: int, precision: str) -> dict[str, Any]:
    """Takes some steps in this process."""
    import torch
    from paired import peak_rss_mb

    import easyllm.rl.register  # noqa: F401 - registers the objective
    from easyllm.train import TrainConfig, train
    from easyllm.train.metrics import read_metrics

    torch.set_num_threads(2)
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "prompts.jsonl"
        texts = [f"Count from {i} to {i + 20}, numbers only." for i in range(64)]
        data.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts), "utf-8")
        config = TrainConfig.model_validate(
            {
                "model": "smollm2",
                "data": {"kind": "prompts", "train": [str(data)], "max_seq_len": 128},
                "objective": {
                    "kind": "grpo",
                    "rewards": [{"function": "digits"}],
                    "rollout": {"group_size": 8, "max_tokens": 64},
                    "log_entropy": False,
                },
                "adapter": {"kind": "lora", "rank": 8, "alpha": 16},
                "optimizer": {"learning_rate": 1e-5},
                "batch_size": 8,
                "micro_batch_tokens": 2048,
                "max_steps": steps,
                "precision": precision,
                "save_every": 0,
            }
        )
        result = train(config, Path(folder) / "run")
        lines = [x for x in read_metrics(result.output) if "train/loss_nats" in x]
    return {
        "step_s": [round(x["train/tokens"] / x["speed/tokens_per_s"], 2) for x in lines],
        "rss_mb": round(peak_rss_mb()),
        "rewards": [round(x["rl/reward"], 4) for x in lines],
    }


if __name__ == "__main__":
    main()
