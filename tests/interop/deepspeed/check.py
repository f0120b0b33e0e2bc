"""One recipe and one ds_config.json, trained by this package's layouts and by DeepSpeed's engine.

Two processes on the CPU (gloo), fp32: losses, gradient norms, evaluations and final weights.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from figures import Figures
from local_server import save_tiny
from safetensors.torch import load_file

from easyllm.train import TrainConfig
from easyllm.train.metrics import read_metrics

STEPS, LOSS, NORM, WEIGHT = 20, 1e-5, 1e-4, 1e-5
ADAMW = {
    "type": "AdamW",
    "params": {"lr": 2e-3, "betas": [0.9, 0.95], "weight_decay": 0.1, "torch_adam": True},
}
BASE = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": False},
    "optimizer": ADAMW,
}
STAGE3 = {
    "stage": 3,
    "reduce_bucket_size": "auto",
    "stage3_prefetch_bucket_size": "auto",
    "stage3_param_persistence_threshold": 100,
    "stage3_gather_16bit_weights_on_model_save": False,
}
ADAM = {"type": "Adam", "params": {"lr": 2e-3, "weight_decay": 0.2, "torch_adam": True}}
SCHEDULER = {
    "type": "WarmupDecayLR",
    "params": {"warmup_max_lr": 3e-3, "warmup_num_steps": 4, "total_num_steps": STEPS},
}
LORA = {"adapter": {"kind": "lora", "rank": 4, "alpha": 8, "also_trained": ["norm"]}}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "stage 0": (BASE | {"zero_optimization": {"stage": 0}}, {}),
    "stage 1": (BASE | {"zero_optimization": {"stage": 1}}, {}),
    "stage 2": (BASE | {"zero_optimization": {"stage": 2, "overlap_comm": True}}, {}),
    "stage 3": (BASE | {"zero_optimization": STAGE3}, {}),
    "stage 2, LoRA": (BASE | {"zero_optimization": {"stage": 2}}, LORA),
    # decays weights (AdamW), without gradient_clipping, with a schedule
    "Adam, no clipping key": (
        {k: v for k, v in BASE.items() if k != "gradient_clipping"}
        | {"optimizer": ADAM, "scheduler": SCHEDULER, "zero_optimization": {"stage": 2}},
        {},
    ),
    "no optimizer": (
        {"zero_optimization": {"stage": 1}, "train_batch_size": 7 * 2},
        {"batch_size": 14, "optimizer": {"kind": "sgd", "learning_rate": 0.3, "momentum": 0.8}},
    ),
}
REFUSED = {
    "quantized weights": (["quantize=nf4", "adapter.kind=lora"], "quantize=nf4"),
    "checkpoints": (["save_every=5"], "save_every=0"),
    "DPO": (["objective.kind=dpo", "data.kind=preferences"], "objective.kind=dpo"),
    "int8 moments": (["optimizer.state=int8"], "optimizer.state=int8"),
}


def main() -> int:
    figures = Figures("torch", "deepspeed")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows(folder / "rows.jsonl", 40, seed=1)
        rows(folder / "held.jsonl", 6, seed=2)
        save_tiny(folder / "model")
        for name, (file, changes) in CASES.items():
            figures.run(name, lambda n=name, f=file, c=changes: compare(figures, folder, n, f, c))
        figures.run("bf16", lambda: rounded(figures, folder))
        for name, (words, part) in REFUSED.items():
            figures.run(name, lambda n=name, w=words, p=part: refused(figures, folder, n, w, p))
    return figures.end()


def rows(file: Path, count: int, *, seed: int) -> None:
    """Writes rows of very different lengths, so that ranks and micro-batches are unequal."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
    words = [f"{n % 10} is {'even' if n % 2 == 0 else 'odd'}," for n in range(40)]
    lines = [
        json.dumps({"prompt": f"count to {n}:", "completion": " ".join(words[:n])}) for n in lengths
    ]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def compare(
    figures: Figures, folder: Path, name: str, file: dict[str, Any], changes: dict[str, Any]
) -> None:
    """Trains by both backends, and compares what they have logged and saved."""
    work = folder / name.replace(" ", "-").replace(",", "")
    recipe(folder, work, file, changes)
    runs = [train(work, backend) for backend in ("torch", "deepspeed")]
    ours, theirs = (read_metrics(run) for run in runs)
    mine, other = (column(each, "train/loss_nats") for each in (ours, theirs))
    figures.equal(f"{name}: steps", [len(mine), len(other)], [STEPS, STEPS])
    figures.true(f"{name}: learns", mine[-1] < 0.8 * mine[0], f"{mine[0]:.3f} to {mine[-1]:.3f}")
    figures.at_most(f"{name}: losses", difference(mine, other), LOSS)
    norms = (column(each, "train/grad_norm") for each in (ours, theirs))
    figures.at_most(f"{name}: gradient norms, relative", relative(*norms), NORM)
    held = (column(each, "eval/loss_nats") for each in (ours, theirs))
    figures.at_most(f"{name}: evaluations", difference(*held), LOSS)
    part = "adapter/adapter_model" if "adapter" in changes else "model/model"
    weights = [load_file(run / f"{part}.safetensors") for run in runs]
    figures.equal(f"{name}: tensors", sorted(weights[0]), sorted(weights[1]))
    most = max(float((t - weights[1][n]).abs().max()) for n, t in weights[0].items())
    figures.at_most(f"{name}: final weights", most, WEIGHT)


def rounded(figures: Figures, folder: Path) -> None:
    """bf16: DeepSpeed starts its fp32 master weights from the weights that it has rounded."""
    file = BASE | {"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}
    work = folder / "bf16"
    recipe(folder, work, file, {"precision": "bf16"})
    runs = [train(work, backend) for backend in ("torch", "deepspeed")]
    mine, other = (column(read_metrics(run), "train/loss_nats") for run in runs)
    figures.at_most("bf16: losses", difference(mine, other), 0.05)
    saved = load_file(runs[1] / "model" / "model.safetensors")
    wide = {n: t for n, t in saved.items() if t.dtype == torch.float32}
    exact = all(torch.equal(t, t.bfloat16().float()) for t in wide.values())
    figures.true("bf16: the master weights are saved", bool(wide) and not exact)


def refused(figures: Figures, folder: Path, name: str, words: list[str], part: str) -> None:
    """A recipe that the backend cannot train ends with one sentence that names the one that can."""
    work = folder / "refused"
    recipe(folder, work, BASE | {"zero_optimization": {"stage": 1}}, {})
    text = (work / "ds_config.json").read_text(encoding="utf-8")
    values = json.loads(text)
    del values["optimizer"]
    (work / "ds_config.json").write_text(json.dumps(values), encoding="utf-8")
    done = command(work, "refused", ["backend=deepspeed", *words])
    sentence = done.stderr.strip().splitlines()[-1] if done.stderr.strip() else ""
    right = done.returncode == 2 and part in done.stderr and "backend=torch" in done.stderr
    figures.true(f"refused: {name}", right, f"{done.returncode}: {sentence[:160]}")


def recipe(folder: Path, work: Path, file: dict[str, Any], changes: dict[str, Any]) -> None:
    """Writes recipe.yaml and ds_config.json into `work`."""
    work.mkdir(exist_ok=True)
    values = {
        "model": str(folder / "model"),
        "data": {
            "train": [str(folder / "rows.jsonl")],
            "eval": [str(folder / "held.jsonl")],
            "max_seq_len": 256,
        },
        "batch_size": 7 * 2,
        "micro_batch_tokens": 200,
        "max_steps": STEPS,
        "epochs": 50,
        "clip_norm": 0.3,
        "precision": "fp32",
        "save_every": 0,
        "eval_every": 10,
    }
    (work / "ds_config.json").write_text(json.dumps(file), encoding="utf-8")
    values |= changes
    TrainConfig.model_validate(values)
    (work / "recipe.yaml").write_text(json.dumps(values), encoding="utf-8")


def train(work: Path, backend: str) -> Path:
    """Returns the folder of a run in two processes."""
    done = command(work, backend, [f"backend={backend}"])
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return work / backend


def command(work: Path, output: str, words: list[str]) -> "subprocess.CompletedProcess[str]":
    line = [sys.executable, "-m", "easyllm", "train", str(work / "recipe.yaml")]
    line += [f"deepspeed={work / 'ds_config.json'}", f"output={work / output}", *words]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*line, "--nproc", "2"], capture_output=True, text=True, env=environment, check=False
    )


def column(metrics: list[dict[str, Any]], key: str) -> list[float]:
    return [float(each[key]) for each in metrics if key in each]


def difference(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(first, second, strict=True))


def relative(first: list[float], second: list[float]) -> float:
    return max(abs(a - b) / abs(a) for a, b in zip(first, second, strict=True))


if __name__ == "__main__":
    sys.exit(main())
