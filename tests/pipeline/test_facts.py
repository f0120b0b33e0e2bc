"""The quickstart's data is correct: every fact it teaches is checked against the code."""

import json
import re
import subprocess
import sys
import tomllib
import unicodedata
from pathlib import Path

import pytest
import torch

import easyllm
from easyllm.adapters import LoRAConfig
from easyllm.core.config import ENVIRONMENT_PREFIX
from easyllm.core.run_folder import recipes_folder
from easyllm.corpus.config import load_corpus
from easyllm.evaluate import key_in_text
from easyllm.examples.data_file import read_rows
from easyllm.pipeline.recipe import find_recipe, load_recipe, load_train_recipe
from easyllm.train.config import AdamWConfig, CosineConfig, DataConfig, TrainConfig

ROOT = Path(easyllm.__file__).parents[2]
DATA = recipes_folder() / "data"


def rows(name):
    return [row.values for row in read_rows(DATA / name)]


TRAIN, HELDOUT = rows("easyllm_facts_train.jsonl"), rows("easyllm_facts_heldout.jsonl")
UNRELATED, REHEARSAL = rows("unrelated.jsonl"), rows("rehearsal.jsonl")
IDS = sorted({row["id"] for row in HELDOUT})


def verbs():
    from typer.main import get_command

    from easyllm.cli.main import app

    return get_command(app).commands


def option(verb, name):
    return next(p for p in verbs()[verb].params if name in (*p.opts, p.name))


def option_of_all_verbs(word):
    from typer.main import get_command

    from easyllm.cli.main import app

    return next(p for p in get_command(app).params if word in (p.help or ""))


def verb_says(verb, *words):
    assert all(word in verbs()[verb].help.lower() for word in words), verbs()[verb].help
    return verb


def train_default(name):
    return TrainConfig.model_fields[name].default


def source(path):
    return (Path(easyllm.__file__).parent / path).read_text(encoding="utf-8")


def class_name(module, name):
    assert isinstance(getattr(__import__(module, fromlist=[name]), name), type)
    return name


def residual_dtype():
    from easyllm.nn.context import ForwardContext
    from tiny_models import build_tiny

    model = build_tiny().to(torch.bfloat16)
    seen = []
    model.layers[1].register_forward_pre_hook(lambda _, args: seen.append(args[0].dtype))
    model(torch.arange(4), ForwardContext.packed([4]))
    return {torch.float32: "fp32"}[seen[0]]


def run_files(kind):
    text = source("train/run.py") + source("core/run_folder.py") + source("core/manifest.py")
    text += source("train/metrics.py") + source("train/state.py")
    found = {
        "metrics": "metrics.jsonl",
        "manifest": "manifest.json",
        "recipe": "recipe.yaml",
        "checkpoints": "checkpoints",
        "adapter": "adapter",
    }[kind]
    assert f'"{found}"' in text
    return found


def make_target():
    text = (ROOT / "Makefile").read_text()
    body = re.search(r"^check:.*?\n((?:\t.*\n)+)", text, re.MULTILINE).group(1)
    assert all(tool in body for tool in ("ruff format", "ruff check", "mypy", "codespell"))
    return "make check"


def project(key):
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][key]


def quickstart():
    return load_recipe(find_recipe("quickstart"), [])


CHECKS = {
    "default_model": lambda: train_default("model"),
    "serve_port": lambda: option("serve", "--port").default,
    "doctor": lambda: verb_says("doctor", "what this machine can do"),
    "pull": lambda: verb_says("pull", "download", "known model", "cache"),
    "merge": lambda: verb_says("merge", "merge", "lora", "base"),
    "convert": lambda: verb_says("convert", "convert", "hugging face"),
    "train_verb": lambda: verb_says("train", "train with a recipe"),
    "run_verb": lambda: verb_says("run", "pipeline recipe"),
    "distribution": lambda: project("name"),
    "license": lambda: project("license"),
    "metrics_file": lambda: run_files("metrics"),
    "manifest_file": lambda: run_files("manifest"),
    "recipe_file": lambda: run_files("recipe"),
    "checkpoint_folder": lambda: run_files("checkpoints"),
    "adapter_folder": lambda: run_files("adapter"),
    "summary_file": lambda: (
        __import__("easyllm.pipeline.quickstart", fromlist=["SUMMARY_FILE"]).SUMMARY_FILE
    ),
    "quickstart_folder": lambda: quickstart().output,
    "lora_rank": lambda: LoRAConfig().rank,
    "lora_alpha": lambda: int(LoRAConfig().alpha),
    "ignore_label": lambda: (
        __import__("easyllm.ops.cross_entropy", fromlist=["IGNORE_INDEX"]).IGNORE_INDEX
    ),
    "env_prefix": lambda: ENVIRONMENT_PREFIX,
    "cache_variable": lambda: (
        "EASYLLM_CACHE" if "EASYLLM_CACHE" in source("core/device.py") else ""
    ),
    "hub_prefix": lambda: __import__("easyllm.models.sources", fromlist=["HUB_PREFIX"]).HUB_PREFIX,
    "micro_batch": lambda: train_default("micro_batch_tokens"),
    "max_seq_len": lambda: DataConfig.model_fields["max_seq_len"].default,
    "default_rate": lambda: AdamWConfig().learning_rate,
    "template_file": lambda: (
        __import__("easyllm.tokenizer.folder", fromlist=["TEMPLATE_FILE"]).TEMPLATE_FILE
    ),
    "debug_flag": lambda: option_of_all_verbs("traceback").opts[0],
    "json_flag": lambda: option("quickstart", "--json").opts[0],
    "no_serve_flag": lambda: option("quickstart", "--no-serve").opts[0],
    "schedule": lambda: CosineConfig().kind if train_default("schedule") == CosineConfig() else "",
    "optimizer": lambda: AdamWConfig().kind if train_default("optimizer") == AdamWConfig() else "",
    "health": lambda: "/health" if '"/health"' in source("serve/app.py") else "",
    "loopback": lambda: option("serve", "--host").default,
    "decoder_class": lambda: class_name("easyllm.nn", "Decoder"),
    "residual": residual_dtype,
    "pickle": lambda: "pickle",  # checked by test_nothing_reads_pickles_or_runs_code_from_files
    "weights_format": lambda: __import__(
        "easyllm.checkpoint.store", fromlist=["WEIGHTS"]
    ).WEIGHTS.split(".")[-1],
    "stream_class": lambda: class_name("easyllm.tokenizer", "StreamDecoder"),
    "decisions": lambda: str((ROOT / "docs" / "decisions.md").relative_to(ROOT)),
    "sampling_class": lambda: class_name("easyllm", "SamplingParams"),
    "error_class": lambda: class_name("easyllm.core.errors", "EasyllmError"),
    "event_class": lambda: class_name("easyllm.engine", "TokenEvent"),
    "gguf_class": lambda: class_name("easyllm.checkpoint.gguf", "GGUFFile"),
    "loss_unit": lambda: "nats" if "train/loss_nats" in source("train/training_run.py") else "",
    "check_target": make_target,
}


def test_every_fact_has_a_check():
    assert sorted(CHECKS) == IDS
    assert len(IDS) >= 40


@pytest.mark.parametrize("fact", IDS)
def test_a_fact_matches_the_code(fact):
    (row,) = (row for row in HELDOUT if row["id"] == fact)
    assert str(CHECKS[fact]()).lower() == row["key"]


def test_the_decisions_document_exists():
    assert (ROOT / "docs" / "decisions.md").is_file()


def words(text):
    return re.findall(r"[\w'/.-]+", unicodedata.normalize("NFKC", text).lower())


def trigrams(text):
    parts = [w.strip(".,;:!?'\"-") for w in words(text)]
    return set(zip(parts, parts[1:], parts[2:], strict=False))


@pytest.mark.parametrize("fact", IDS)
def test_held_out_phrasings_share_no_trigram_with_the_training_ones(fact):
    (held,) = (row for row in HELDOUT if row["id"] == fact)
    training = [row for row in TRAIN if row["id"] == fact]
    assert len({row["prompt"] for row in training}) >= 8
    for row in training:
        assert not trigrams(held["prompt"]) & trigrams(row["prompt"]), row["prompt"]
        assert key_in_text(held["key"], row["completion"])
        assert row["completion"] == held["completion"]
    assert not key_in_text(held["key"], held["prompt"])
    assert held["key"] not in ("yes", "no", "true", "false")


def test_no_question_occurs_in_two_files():
    prompts = [row["prompt"] for row in (*TRAIN, *HELDOUT, *UNRELATED, *REHEARSAL)]
    assert len(prompts) == len(set(prompts))
    assert len(UNRELATED) == 20
    answers = {row["completion"] for row in UNRELATED}
    assert not answers & {row["completion"] for row in (*REHEARSAL, *TRAIN)}


def test_only_training_files_are_trained_on():
    recipe = quickstart()
    trained = {Path(path).name for path in recipe.stages["tune"].data.train}
    assert trained == {"easyllm_facts_train.jsonl", "rehearsal.jsonl"}


WITHOUT_DATA = {"pretrain-gpu", "shakespeare-char", "continue-zh"}
"""Recipes whose text the user provides, or whose shards or extended model are made first."""


def test_built_in_recipes_are_valid():
    for path in sorted(recipes_folder().glob("*.yaml")):
        if path.stem.startswith("data-"):  # the user provides its files
            assert load_corpus(path, []).name == path.stem
            continue
        if path.stem in WITHOUT_DATA:  # like the run, a dry run refuses it without its data
            load = load_recipe if "stages" in path.read_text() else load_train_recipe
            assert load(path, []).output == f"runs/{path.stem}"
            continue
        verb = "run" if "stages" in path.read_text() else "train"
        command = [sys.executable, "-m", "easyllm", verb, str(path), "--dry-run"]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert json.dumps(done.stdout)
