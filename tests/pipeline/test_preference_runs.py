"""Runs of preference objectives: the shipped recipes, every kind of data, and what is refused."""

import json
import math
import runpy
import shutil
import sys
from pathlib import Path

import pytest

from easyllm.core.errors import ConfigError
from easyllm.models import load_model, save_model
from easyllm.train import train
from easyllm.train.metrics import read_metrics
from easyllm_command import easyllm
from preference_rows import PAIRS, write_rows
from tiny_models import CORPUS
from train_twice import run_config, train_twice

ROOT = Path(__file__).parents[2]
DATA = ROOT / "recipes" / "data"
LABELLED = [
    {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
    for pair in PAIRS
    for side in ("chosen", "rejected")
]
RATED = [
    {"prompt": row["prompt"], "completion": row["completion"], "score": 2.0 * row["label"] - 0.5}
    for row in LABELLED
]
RANKED = [
    {"prompt": row["prompt"], "responses": [row["chosen"], "hello world", row["rejected"]]}
    for row in PAIRS
]
ROWS = {
    "preferences": PAIRS,
    "rankings": RANKED,
    "unpaired_preferences": LABELLED,
    "ratings": RATED,
}


def config_of(tmp_path, base, objective, rows="preferences", /, **changes):
    path = str(write_rows(tmp_path / "rows.jsonl", ROWS[rows]))
    kind = "preferences" if rows == "rankings" else rows
    values = {
        "data": {"kind": kind, "train": [path], "eval": [path], "max_seq_len": 64},
        "objective": {"kind": objective},
        "adapter": {"kind": "lora", "rank": 4},
        "micro_batch_tokens": 128,
        "max_steps": 6,
    }
    return run_config(tmp_path, base, **(values | changes))


@pytest.mark.parametrize(
    ("recipe", "quantize"),
    [
        ("dpo-en", "null"),
        ("dpo-en", "nf4"),
        ("dpo-en", "int8"),
        ("dpo-zh", "null"),
        ("rm-en", "null"),
        ("rm-en", "nf4"),
    ],
)
def test_a_shipped_recipe_trains(recipe, quantize, tiny_folder, tmp_path):
    words = ("data.max_seq_len=256", "max_steps=2", "batch_size=4", f"quantize={quantize}")
    words += ("precision=fp32",)  # bf16 is the default where the processor has units for it
    output = tmp_path / "run"
    done = easyllm("train", recipe, f"model={tiny_folder}", f"output={output}", *words)
    assert done.returncode == 0, done.stderr
    lines = list(read_metrics(output))
    steps = [line for line in lines if "train/loss_nats" in line]
    assert len(steps) == 2
    if recipe != "rm-en":
        assert steps[0]["train/loss_nats"] == pytest.approx(math.log(2), abs=1e-4)
    (evaluated,) = [line for line in lines if "eval/reward_margin" in line]
    assert {"eval/reward_accuracy", "eval/rewards/chosen", "eval/rewards/rejected"} <= set(
        evaluated
    )
    assert load_model(tiny_folder, adapter=output / "adapter") is not None


def test_the_shipped_pairs_are_what_the_generator_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["pair_data.py", "--output", str(tmp_path)])
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    runpy.run_path(str(ROOT / "tools" / "pair_data.py"), run_name="__main__")
    written = sorted(tmp_path.glob("pairs_*.jsonl"))
    assert len(written) == 4
    for path in written:
        assert path.read_bytes() == (DATA / path.name).read_bytes(), path.name
    assert sum(path.stat().st_size for path in written) <= 250_000


@pytest.mark.parametrize("language", ["en", "zh"])
def test_length_does_not_tell_the_shipped_sides_apart(language):
    sets = {}
    for name in ("train", "heldout"):
        text = (DATA / f"pairs_{language}_{name}.jsonl").read_text(encoding="utf-8")
        sets[name] = [json.loads(line) for line in text.splitlines()]
        longer = sum(len(row["chosen"]) > len(row["rejected"]) for row in sets[name])
        assert longer / len(sets[name]) == pytest.approx(0.5, abs=0.02)
    prompts = [{row["prompt"] for row in rows} for rows in sets.values()]
    assert not prompts[0] & prompts[1]


@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        ("kto", "unpaired_preferences"),
        ("orpo", "preferences"),
        ("reward", "rankings"),
        ("reward", "ratings"),
    ],
)
def test_a_killed_run_resumes_bitwise_and_learns(objective, rows, tiny_folder, tmp_path):
    result = train_twice(config_of(tmp_path, tiny_folder, objective, rows), tmp_path)
    assert (result / "adapter_config.json").is_file()
    check_figures(tmp_path / "whole", rows)


@pytest.mark.parametrize(
    ("objective", "rows"),
    [
        ("dpo", "rankings"),
        ("kto", "preferences"),
        ("simpo", "preferences"),
        ("reward", "unpaired_preferences"),
    ],
)
def test_other_kinds_of_data_are_learned_too(objective, rows, tiny_folder, tmp_path):
    train(config_of(tmp_path, tiny_folder, objective, rows), tmp_path / "run")
    check_figures(tmp_path / "run", rows)


def check_figures(output, rows):
    figures = json.loads((output / "manifest.json").read_text())["results"]
    assert math.isfinite(figures["eval_loss_nats"])
    if rows != "ratings":
        assert figures["eval_reward_accuracy"] > 0.6


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_kto_without_an_adapter_needs_a_copy_or_a_cache(reference, tiny_folder, tmp_path):
    config = config_of(
        tmp_path,
        tiny_folder,
        "kto",
        adapter=None,
        objective={"kind": "kto", "reference": reference},
        optimizer={"learning_rate": 3e-3},
    )
    train_twice(config, tmp_path)


def test_a_reward_model_orders_unseen_prompts(tiny_folder, tmp_path):
    def rows(numbers):
        lines = list(dict.fromkeys(CORPUS))
        return [
            {
                "prompt": f"{lines[i % len(lines)][:20]} {i}",
                "chosen": f"Good morning {i}",
                "rejected": f"The lazy dog {i}",
            }
            for i in numbers
        ]

    files = [
        str(write_rows(tmp_path / name, rows(numbers)))
        for name, numbers in (("train.jsonl", range(40)), ("eval.jsonl", range(40, 60)))
    ]
    config = config_of(
        tmp_path,
        tiny_folder,
        "reward",
        data={"kind": "preferences", "train": files[:1], "eval": files[1:], "max_seq_len": 96},
        optimizer={"learning_rate": 1e-2},
        max_steps=20,
    )
    figures = train(config, tmp_path / "run").figures
    assert figures["eval_reward_accuracy"] > 0.9


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([{"prompt": "q", "chosen": "same", "rejected": "same"}], "identical, or have equal"),
        ([{"prompt": " ", "chosen": "a", "rejected": "b"}], "the prompt is empty"),
        ([{"chosen": "a", "rejected": "b"}], "unknown format"),
        ([{"prompt": "q", "chosen": "a"}], "unknown format"),
        ([{"messages": [], "chosen": "a", "rejected": "b"}], "both must continue"),
        ([{"prompt": "q", "completion": "a"}], "unknown format"),
    ],
)
def test_a_file_of_bad_rows_ends_with_one_sentence(rows, message, tiny_folder, tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", rows)
    done = easyllm(
        "train",
        "dpo-en",
        f"model={tiny_folder}",
        "data.max_seq_len=64",
        f"data.train=[{path}]",
        f"output={tmp_path / 'run'}",
    )
    assert done.returncode == 2
    assert message in " ".join(done.stderr.split())
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "run").exists()


def test_dropped_rows_are_counted_before_the_first_step(tiny_folder, tmp_path):
    same = {"prompt": "q", "chosen": "same", "rejected": "same"}
    path = write_rows(tmp_path / "rows.jsonl", [*PAIRS, same])
    done = easyllm(
        "train",
        "dpo-en",
        f"model={tiny_folder}",
        "data.max_seq_len=64",
        f"data.train=[{path}]",
        "data.eval=[]",
        "max_steps=1",
        f"output={tmp_path / 'run'}",
    )
    assert done.returncode == 0, done.stderr
    assert f"{len(PAIRS)} of {len(PAIRS) + 1} rows" in done.stderr
    assert "1 dropped with identical responses" in done.stderr
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    assert manifest["results"]["data"]["dropped_equal"] == 1


def test_a_reference_of_another_tokenizer_is_refused(tiny_folder, tiny_model, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(tiny_folder, other)
    text = (other / "tokenizer.json").read_text(encoding="utf-8")
    assert '"<|endoftext|>"' in text
    (other / "tokenizer.json").write_text(text.replace("<|endoftext|>", "<|another|>"), "utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        if (other / name).is_file():
            config_text = (other / name).read_text(encoding="utf-8")
            (other / name).write_text(config_text.replace("<|endoftext|>", "<|another|>"), "utf-8")
    objective = {"kind": "dpo", "reference_model": str(other)}
    config = config_of(tmp_path, tiny_folder, "dpo", objective=objective)
    with pytest.raises(ConfigError, match="has another tokenizer than model"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("reference", ["live", "cached"])
def test_another_model_may_be_the_reference(reference, tiny_folder, tiny_tokenizer, tmp_path):
    from tiny_models import build_tiny

    save_model(build_tiny(seed=5), tmp_path / "other", tokenizer=tiny_tokenizer)
    objective = {
        "kind": "dpo",
        "reference": reference,
        "reference_model": str(tmp_path / "other"),
    }
    config = config_of(tmp_path, tiny_folder, "dpo", objective=objective, max_steps=1)
    train(config, tmp_path / "run")
    (line,) = [x for x in read_metrics(tmp_path / "run") if "train/loss_nats" in x]
    assert abs(line["train/loss_nats"] - math.log(2)) > 0.01  # not the initial model
    same = objective | {"reference_model": str(tiny_folder)}
    config = config_of(tmp_path, tiny_folder, "dpo", objective=same, max_steps=1)
    train(config, tmp_path / "same")
    (line,) = [x for x in read_metrics(tmp_path / "same") if "train/loss_nats" in x]
    assert line["train/loss_nats"] == pytest.approx(math.log(2), abs=1e-4)
