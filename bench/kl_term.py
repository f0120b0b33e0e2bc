"""PPO-max and GRPO with and without their KL term: reward, exact answers and KL by step.

    python bench/kl_term.py [--steps 80] [--warm-start 900] [--record] [--figures docs/figures]

A model of 0.8 million parameters first learns two-digit sums. Then a reward that has nothing to do
with sums, the share of nines in an answer, is raised by four runs from the same model. `exact`, the
share of right sums, is only measured. With a KL target the reward rises as far as the target
allows; without the term (β = 1e-9, so that KL is measured) all answers become nines.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

import machine
from plot import write_lines

from easyllm.pipeline.recipe import find_recipe, load_train_recipe
from easyllm.rl.rewards import Answer, register_reward
from easyllm.train import TrainConfig, train
from easyllm.train.metrics import read_metrics

TARGET = 2.0
"""KL in nats per answer."""
START = {"grpo": 2.0, "ppo": 0.5}
"""First coefficients. They adapt by at most 2% a rollout, so one that is far too small lets KL run
away before it has grown; in the loss (GRPO) it takes a larger one than in the reward (PPO)."""
EVERY = 10
"""Steps between two evaluations."""


def nines(answer: Answer) -> float:
    """The share of nines among the characters of an answer."""
    return answer.text.count("9") / max(1, len(answer.text))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=80)
    parser.add_argument("--warm-start", type=int, default=900, help="steps on sums")
    parser.add_argument("--record", action="store_true")
    parser.add_argument("--figures", type=Path, help="folder of the figures to draw")
    options = parser.parse_args()
    register_reward("nines", nines)
    curves: dict[str, dict[str, list[tuple[float, float]]]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        train(start_of(folder / "start", options.warm_start), folder / "start")
        for method in ("grpo", "ppo"):
            for kl in (True, False):
                label = f"{'GRPO' if method == 'grpo' else 'PPO-max'}, {'' if kl else 'no '}KL term"
                output = folder / f"{method}-{kl}"
                train(config_of(folder / "start" / "model", method, kl, options.steps), output)
                curves[label] = curves_of(output)
    row = machine.row(
        "kl_term",
        shape={"steps": options.steps, "target_nats": TARGET},
        results={label: last_values(found) for label, found in curves.items()},
    )
    machine.finish(row, "kl_term", record=options.record)
    if options.figures:
        draw(curves, options.figures)


def start_of(output: Path, steps: int) -> TrainConfig:
    """Returns the run in which the model learns sums; its one RL step changes next to nothing."""
    words = (
        f"objective.warm_start.steps={steps}",
        "objective.warm_start.wrong_key=null",
        "max_steps=1",
        "eval_every=0",
        "optimizer.learning_rate=1e-7",
        f"output={output}",
    )
    return load_train_recipe(find_recipe("grpo-arithmetic"), words)


def config_of(model: Path, method: str, kl: bool, steps: int) -> TrainConfig:
    """Returns a run that raises the share of nines."""
    ppo = method == "ppo"
    # a coefficient of 0 would load no reference, and nothing could be measured
    term = {"coefficient": START[method], "target": TARGET} if kl else {"coefficient": 1e-9}
    place = {"estimator": "k1", "place": "reward"} if ppo else {"estimator": "k3", "place": "loss"}
    objective: dict[str, Any] = {
        "kind": method,
        "rewards": [{"function": "nines"}, {"function": "exact", "weight": 0.0}],
        "rollout": {"group_size": 1 if ppo else 8, "max_tokens": 4, "max_running": 128},
        "kl": {**term, **place},
    }
    if ppo:
        objective |= {"preset": "ppo-max"}
        objective["rollout"] |= {"epochs": 2}
    return TrainConfig.model_validate(
        {
            "model": str(model),
            "data": {"kind": "arithmetic", "count": 4000, "held_out": 200, "max_seq_len": 12},
            "objective": objective,
            "optimizer": {"learning_rate": 2e-4, "betas": [0.9, 0.98], "eps": 1e-5},
            "schedule": {"kind": "constant", "warmup_steps": 10},
            "batch_size": 128 if ppo else 16,
            "micro_batch_tokens": 8192,
            "epochs": 100,
            "max_steps": steps,
            "eval_every": EVERY,
            "save_every": 0,
            "precision": "fp32",
        }
    )


def curves_of(run: Path) -> dict[str, list[tuple[float, float]]]:
    """Returns (step, value) of held-out rewards, and of the KL where it is logged."""
    names = ("eval/reward/nines", "eval/reward/exact", "rl/kl_nats")
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
    for line in read_metrics(run):
        for name in names:
            if name in line:
                found[name].append((line["step"], line[name]))
    return found


def last_values(curves: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Returns the first and last value of each curve; of the KL, the mean of the last ten."""
    found = {}
    for name, points in curves.items():
        values = [value for _, value in points]
        short = name.rpartition("/")[2]
        if not values:
            continue
        last = values[-10:] if name == "rl/kl_nats" else values[-1:]
        found |= {f"{short}_first": round(values[0], 4), short: round(sum(last) / len(last), 4)}
    return found


def draw(curves: dict[str, dict[str, list[tuple[float, float]]]], folder: Path) -> None:
    """Draws one figure for each quantity."""
    what = {
        "eval/reward/nines": ("kl-term-reward", "Share of nines on held-out prompts", "reward"),
        "rl/kl_nats": ("kl-term-kl", f"KL from the start, target {TARGET:g}", "nats per answer"),
    }
    for name, (file, title, unit) in what.items():
        lines = {label: found[name] for label, found in curves.items() if found[name]}
        write_lines(folder / f"{file}.svg", title, lines, x_title="step", y_title=unit)


if __name__ == "__main__":
    main()
