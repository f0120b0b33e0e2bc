"""Micro runs of the policy-gradient objectives: a tiny model, a few answers of a few tokens."""

import json

import easyllm.rl.register  # noqa: F401 - registers the objectives
from easyllm.rl.rewards import REWARDS
from easyllm.train import TrainConfig

PROMPTS = ["hello", "what is the next", "good morning world", "user question"]


def even_tokens(answer):
    """The share of tokens with an even id: easy to raise."""
    return sum(token % 2 == 0 for token in answer.token_ids) / max(1, answer.num_tokens)


REWARDS.setdefault("even_tokens", even_tokens)


def write_prompts(folder):
    path = folder / "prompts.jsonl"
    rows = [{"prompt": prompt, "answer": str(n)} for n, prompt in enumerate(PROMPTS)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def rl_config(folder, model, objective=None, **changes):
    """The configuration of a run of a few steps; `objective` overrides its values."""
    values = {"kind": "grpo", "rewards": [{"function": "even_tokens"}]} | (objective or {})
    group = 1 if values["kind"] == "ppo" else 4
    values["rollout"] = {"group_size": group, "max_tokens": 6} | values.get("rollout", {})
    return TrainConfig.model_validate(
        {
            "model": str(model),
            "data": {
                "kind": "prompts",
                "train": [str(write_prompts(folder))],
                "max_seq_len": 32,
                "template": "none",
            },
            "objective": values,
            "optimizer": {"learning_rate": 1e-2},
            "schedule": {"kind": "constant"},
            "batch_size": 4,
            "micro_batch_tokens": 256,
            "epochs": 100,
            "max_steps": 4,
            "precision": "fp32",
            "save_every": 1,
        }
        | changes
    )


def metrics_of(output):
    """The lines of steps, without what depends on the clock or the machine."""
    from easyllm.train.metrics import read_metrics

    lines = [line for line in read_metrics(output) if "train/loss_nats" in line]
    return [
        {k: v for k, v in line.items() if not k.startswith(("speed/", "memory/"))} for line in lines
    ]
