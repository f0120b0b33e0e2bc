"""The Chinese recipes: their data, and a run of each on a tiny model."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

import easyllm as package
from easyllm.core.run_folder import recipes_folder
from easyllm.evaluate import key_in_text
from easyllm.examples.data_file import read_rows
from easyllm.pipeline.recipe import find_recipe, load_recipe, load_train_recipe
from easyllm_command import easyllm

DATA = recipes_folder() / "data"
FILES = ("zh_text.jsonl", "zh_train.jsonl", "zh_heldout.jsonl")
TOOL = Path(package.__file__).parents[2] / "tools" / "zh_data.py"


def rows(folder, name):
    return [row.values for row in read_rows(folder / name)]


def test_the_data_are_small_and_are_what_the_generator_writes(tmp_path):
    assert sum((DATA / name).stat().st_size for name in FILES) < 250_000
    subprocess.run([sys.executable, str(TOOL), "--output", str(tmp_path)], check=True)
    for name in FILES:
        written = [row for row in rows(tmp_path, name) if row["id"] != "docs"]
        assert written == [row for row in rows(DATA, name) if row["id"] != "docs"]


def test_held_out_questions_are_new_and_their_answers_contain_the_key():
    train, heldout = rows(DATA, "zh_train.jsonl"), rows(DATA, "zh_heldout.jsonl")
    assert not {row["prompt"] for row in train} & {row["prompt"] for row in heldout}
    known = {row["completion"] for row in train}
    for row in heldout:
        assert row["completion"] in known
        assert key_in_text(row["key"], row["completion"])


@pytest.mark.parametrize(
    ("key", "text", "found"),
    [
        ("巴黎", "法国的首都是巴黎。", True),
        ("Ag", "银的元素符号是Ag。", True),
        ("Ag", "银的符号是Agx。", False),
        ("8", "氧是8号元素", True),
        ("8", "氧是18号元素", False),
        ("smollm2", "默认模型是smollm2。", True),
    ],
)
def test_a_key_is_found_in_text_without_spaces(key, text, found):
    assert key_in_text(key, text) is found


def test_the_recipes_are_valid_and_named_in_their_pages():
    recipe = load_recipe(find_recipe("continue-zh"), [])
    assert list(recipe.stages) == ["extend", "corpus", "train"]
    assert recipe.stages["extend"].sources == recipe.stages["corpus"].sources
    assert recipe.stages["corpus"].tokenizer == recipe.stages["train"].model == "@extend"
    config = load_train_recipe(find_recipe("sft-zh"), [])
    assert [Path(path).name for path in config.data.train] == ["zh_train.jsonl"]
    docs = TOOL.parents[1] / "docs"
    for name in ("continue-zh", "sft-zh"):
        english, chinese = (docs / f"{name}{end}" for end in (".md", ".zh.md"))
        assert any(line.split()[2] == name for line in commands(english))
        assert commands(english) == commands(chinese)


def commands(page):
    """Returns the commands of a page, without comments."""
    lines = page.read_text(encoding="utf-8").splitlines()
    return [line.split("  #")[0].strip() for line in lines if line.startswith("easyllm ")]


def test_a_tiny_model_is_extended_trained_further_and_fine_tuned(tiny_folder, tmp_path):
    output = tmp_path / "continue-zh"
    extend = (f"stages.extend.model={tiny_folder}", "stages.extend.new=64")
    short = ("stages.train.max_steps=2", "stages.train.data.max_seq_len=128")
    few = ("stages.train.batch_tokens=256", "stages.train.micro_batch_tokens=256")
    samples = ("stages.train.samples.max_tokens=4", "stages.train.data.eval_tokens=512")
    words = (*extend, *short, *few, *samples, f"output={output}", "--json")
    done = easyllm("run", "continue-zh", *words)
    assert done.returncode == 0, done.stderr
    assert "measuring losses on the first 500 characters, 3/3" in done.stderr
    extended = json.loads(done.stdout)["extend"]
    assert (extended["new_pieces"], extended["documents"]) == (64, len(rows(DATA, "zh_text.jsonl")))
    assert extended["loss_over_old_ids_nats"] == pytest.approx(extended["loss_before_nats"], 1e-4)
    manifest = json.loads((output / "extend" / "manifest.json").read_text())
    assert (manifest["kind"], manifest["config"]["num_new"]) == ("extend", 64)
    figures = json.loads(done.stdout)["train"]
    assert figures["steps"] == 2
    assert figures["eval_bits_per_byte"] > 0
    words = (f"model={output / 'train' / 'model'}", f"output={tmp_path / 'sft'}", "max_steps=2")
    done = easyllm("train", "sft-zh", *words, "batch_size=2", "data.max_seq_len=256", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["eval_loss_nats"] > 0


def test_continue_zh_is_planned_before_it_has_run(tiny_folder, tmp_path):
    words = (f"stages.extend.model={tiny_folder}", f"output={tmp_path / 'run'}")
    expected = "train: planned when it starts, as it needs the results of extend, corpus\n"
    plan = easyllm("plan", "continue-zh", *words)
    assert (plan.returncode, plan.stdout) == (0, expected), plan.stderr
    dry = easyllm("run", "continue-zh", "--dry-run", *words)
    assert (dry.returncode, dry.stderr) == (0, expected)
    assert "kind: extend" in dry.stdout
    assert not (tmp_path / "run").exists()


def test_sft_zh_without_its_model_names_the_command_that_writes_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = easyllm("train", "sft-zh", "model=runs/continue-zh/train/model", "output=out")
    assert done.returncode == 2
    assert "`easyllm run continue-zh` writes it" in done.stderr
