"""Equal loss curves to `transformers.Trainer`, on a tiny model and with the same order of data.

Covers AdamW, the cosine schedule, gradient clipping and gradient accumulation.
"""

import dataclasses
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainerCallback, TrainingArguments

from easyllm.batches.loader import Loader
from easyllm.train.config import TrainConfig
from easyllm.train.metrics import read_metrics
from easyllm.train.run import train

STEPS, BATCH, MICRO = 50, 8, 4


class Rows(torch.utils.data.Dataset):
    """Padded rows in the order in which our loader yields them."""

    def __init__(self, samples, order):
        self.samples, self.order = samples, order
        self.width = 1 + max(len(sample.token_ids) for sample in samples)

    def __len__(self):
        return len(self.order)

    def __getitem__(self, index):
        sample = self.samples[self.order[index]]
        ids = [*sample.token_ids, max(sample.labels[-1], 0)]  # nothing attends to the last id
        labels = [-100, *sample.labels]
        room = self.width - len(ids)
        return {
            "input_ids": torch.tensor(ids + [0] * room),
            "attention_mask": torch.tensor([1] * len(ids) + [0] * room),
            "labels": torch.tensor(labels + [-100] * room),
        }


class Curve(TrainerCallback):
    def __init__(self):
        self.losses, self.norms = [], []

    def on_log(self, args, state, control, logs=None, **rest):
        if "grad_norm" in logs:
            self.losses.append(logs["loss"])
            self.norms.append(float(logs["grad_norm"]))


class InOrder(Trainer):
    def _get_train_sampler(self, *args, **rest):
        return torch.utils.data.SequentialSampler(self.train_dataset)


@pytest.fixture(scope="module")
def rows(tmp_path_factory, tiny_tokenizer):
    folder = tmp_path_factory.mktemp("hf-trainer")
    generator = torch.Generator().manual_seed(0)
    words = [
        "the",
        "quick",
        "brown",
        "fox",
        "jumps",
        "over",
        "lazy",
        "dog",
        "hello",
        "world",
        "good",
        "morning",
    ]
    rows = []
    for number in range(40):
        picks = torch.randint(len(words), (3 + number % 3,), generator=generator).tolist()
        rows.append({"prompt": words[number % 12][:3], "completion": words[picks[0]][:4]})
    file = folder / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def test_the_loss_curve_equals_transformers_trainer(rows, tiny_folder, tmp_path, monkeypatch):
    seen = {}
    build = Loader.__init__

    def spy(self, samples, **rest):
        build(self, samples, **rest)
        seen["loader"] = self

    monkeypatch.setattr(Loader, "__init__", spy)
    config = TrainConfig.model_validate(
        {
            "model": str(tiny_folder),
            "data": {"train": [str(rows)], "max_seq_len": 64},
            "optimizer": {"learning_rate": 3e-3, "betas": [0.9, 0.999], "weight_decay": 0.0},
            "schedule": {"kind": "cosine", "warmup_steps": 5, "floor": 0.0},
            "batch_size": BATCH,
            "micro_batch_tokens": 64,
            "epochs": 10,
            "max_steps": STEPS,
            "clip_norm": 1.0,
            "precision": "fp32",
            "save_every": 0,
            "seed": 3,
        }
    )
    train(config, tmp_path / "ours")
    ours = [line for line in read_metrics(tmp_path / "ours") if "train/loss_nats" in line]

    loader = seen["loader"]
    order = [i for epoch in range(10) for i in loader._epoch_order(epoch)]
    model = AutoModelForCausalLM.from_pretrained(tiny_folder, attn_implementation="eager")
    curve = Curve()
    arguments = TrainingArguments(
        output_dir=str(tmp_path / "theirs"),
        per_device_train_batch_size=MICRO,
        gradient_accumulation_steps=BATCH // MICRO,
        max_steps=STEPS,
        learning_rate=3e-3,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        weight_decay=0.0,
        max_grad_norm=1.0,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
        remove_unused_columns=False,
    )
    InOrder(
        model=model, args=arguments, train_dataset=Rows(loader.samples, order), callbacks=[curve]
    ).train()
    assert len(curve.losses) == len(ours) == STEPS
    for mine, loss, norm in zip(ours, curve.losses, curve.norms, strict=True):
        assert mine["train/loss_nats"] == pytest.approx(loss, abs=1e-5)
        assert mine["train/grad_norm"] == pytest.approx(norm, rel=1e-3)


def test_the_table_of_names_contains_existing_names():
    table = (Path(__file__).parents[2] / "docs" / "from-transformers.md").read_text("utf-8")
    rows = [line.split("|")[1:5] for line in table.splitlines() if line.startswith("| `")]
    assert len(rows) > 20
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    elsewhere = {"DataCollator", "EarlyStoppingCallback", "patience", "threshold"}
    removed = {"warmup_ratio", "group_by_length"}  # removed in version 5, but still known to users
    for left, _, right, _ in rows:
        for name in re.findall(r"`([a-z_]+)(?:=[^`]*)?`", left):
            assert name in theirs | elsewhere | removed, f"TrainingArguments has no {name}"
        for path in re.findall(r"`([a-z_]+(?:\.[a-z_]+)*)(?::[^`]*)?`", right):
            head = path.split(".")[0]
            assert head in {*TrainConfig.model_fields, *VALUES}, f"TrainConfig has no {path}"


VALUES = {
    *("cosine", "linear", "constant", "inverse_sqrt", "wsd", "warmup_stable_decay", "sgd", "muon"),
    *("bf16", "selective", "metrics", "report", "num_items_in_batch"),
}
