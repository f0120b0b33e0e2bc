"""Mistakes that once gave a traceback or a misleading message: one sentence, exit code 2."""

import json
import math
import os
import shlex
import shutil
import subprocess
import sys

import pytest

from easyllm.adapters import LoRAConfig, attach, save_adapter
from easyllm.checkpoint.store import read_tensors, write_tensors
from easyllm.core.environment import misspelled_variables
from easyllm.models import hf_module_name, load_model
from easyllm.models.load import OpenSource
from easyllm.train.config import TrainConfig
from easyllm_command import GOOD, RECIPE, easyllm


@pytest.fixture
def rows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text(GOOD)
    return path


@pytest.fixture
def recipe(tmp_path, tiny_folder, rows):
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_folder, data=rows, output=tmp_path / "run"))
    return path


def refused(done, *words):
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "internal error" not in done.stderr
    for word in words:
        assert word in done.stderr, done.stderr


MISTAKES = {
    "schedule=constant": ("'linear', 'wsd'", "write {kind: constant} (schedule.kind=constant)"),
    "optimizer=adamw": ("'muon', 'sgd'", "(optimizer.kind=adamw)"),
    "optimizer=3": ("(optimizer.kind=NAME)",),
    "adapter=lora": ("dora", "(adapter.kind=lora)"),
    "early_stopping=3": ("expected a mapping with keys min_delta, patience",),
    "data.train=3": ("expected a list, as [a, b]",),
    "seed=99999999999999999999": ("less than or equal to 9223372036854775807",),
    "seed=-99999999999999999999": ("at least -9223372036854775807",),
    "optimizer.betas=[99999999999999999999, 0]": ("optimizer.betas.0=", "9223372036854775807"),
    "micro_batch_tokens=9223372036854775807": ("less than or equal to 2147483647",),
    "epochs=1e300": ("less than or equal to 1000000000",),
    "device=meta": ("'meta' is not supported; use auto, cpu, cuda or cuda:N",),
    "device=mps": ("'mps' is not supported",),
    "device=cpu:1": ("'cpu:1' is not supported",),
}


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(("word", "said"), MISTAKES.items(), ids=MISTAKES.keys())
def test_a_mistake_in_a_recipe_is_told(recipe, tmp_path, word, said, dry):
    refused(easyllm("train", recipe, word, *(["--dry-run"] if dry else [])), *said)
    assert not (tmp_path / "run").exists()


def test_a_list_of_strings_may_be_one_string(recipe, rows):
    words = ("samples.prompts=hi", f"retention={rows}", f"data.eval={rows}")
    done = easyllm("train", recipe, *words, "eval_every=1", "--dry-run", "--json")
    assert done.returncode == 0, done.stderr
    values = json.loads(done.stdout)["recipe"]
    assert values["samples"]["prompts"] == ["hi"]
    assert values["retention"] == values["data"]["eval"] == [str(rows)]


def test_a_device_is_refused_for_stages_that_wait(tmp_path, recipe, tiny_folder, rows):
    text = f"""
name: r
output: {tmp_path / "run"}
stages:
  first: {{kind: convert, model: {tiny_folder}}}
  second: {{kind: train, model: "@first", device: "cuda:99", data: {{train: [{rows}]}}}}
"""
    recipe.write_text(text)
    for words in ((), ("--dry-run",)):
        refused(easyllm("run", recipe, *words), "device 'cuda:99' was requested")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "row",
    [{"prompt": "a", "completion": "\ud800"}, {"prompt": "a", "completion": "b", "\udfff": 1}],
)
def test_an_unpaired_surrogate_is_refused_with_its_place(recipe, rows, tiny_folder, tmp_path, row):
    rows.write_text(GOOD + json.dumps(row) + "\n")
    for words in (
        ("train", recipe),
        ("eval", tiny_folder, rows),
        ("eval", tiny_folder, rows, "--json"),
        ("data", "inspect", rows, "--model", tiny_folder),
        ("data", "chosen", rows, tmp_path / "chosen.jsonl"),
    ):
        refused(easyllm(*words), "rows.jsonl:", "" if "chosen" in words else "unpaired surrogate")
    rows.write_text(json.dumps({"prompt": "a", "chosen": "\ud800", "rejected": "c"}) + "\n")
    done = easyllm("data", "chosen", rows, tmp_path / "chosen.jsonl")
    refused(done, "rows.jsonl:1 contains an unpaired surrogate")
    assert not (tmp_path / "chosen.jsonl").exists()


def test_conversations_have_no_chosen_response(rows, tmp_path):
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    rows.write_text(json.dumps(pair) + "\n" + GOOD)
    done = easyllm("data", "chosen", rows, tmp_path / "chosen.jsonl")
    refused(done, "rows.jsonl:2 is a conversation, expected a pair")
    assert not (tmp_path / "chosen.jsonl").exists()


def test_inspect_names_its_own_flag(rows, tiny_folder):
    rows.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    done = easyllm("data", "inspect", rows, "--model", tiny_folder, "--split-turns")
    refused(done, "(--split-turns)")
    assert "train_on" not in done.stderr


@pytest.mark.parametrize("host", ["nosuchhost.invalid", "192.0.2.1", "a" * 70 + ".invalid"])
def test_an_unknown_host_is_not_blamed_on_the_port(tiny_folder, host):
    done = easyllm("serve", tiny_folder, "--host", host)
    refused(done, "choose another with --host")
    assert "--port" not in done.stderr


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ('{"peft_type": "LORA", "base_model_name_or_path": null}', "does not name its base model"),
        ("[1]", "does not contain a JSON object"),
    ],
)
def test_an_adapter_without_a_base_is_told(tiny_folder, tmp_path, content, said):
    model = load_model(tiny_folder)
    attach(model, LoRAConfig(rank=2))
    folder = tmp_path / "adapter"
    save_adapter(model, folder, module_name=hf_module_name(model), base=str(tiny_folder))
    (folder / "adapter_config.json").write_text(content)
    refused(easyllm("generate", folder, "x"), said)


def test_a_misspelled_variable_is_warned_about(recipe):
    done = easyllm("train", recipe, "--dry-run", EASYLLM_OPTIMZER__LEARNING_RATE="1")
    assert done.returncode == 0
    assert "did you mean EASYLLM_OPTIMIZER__LEARNING_RATE?" in done.stderr
    others = {"EASYLLM_CACHE": "/x", "EASYLLM_STAGES__A__SEED": "1", "EASYLLM_TEST_INSTALL": "1"}
    assert misspelled_variables(TrainConfig, others | {"EASYLLM_SEED": "1", "PATH": "x"}) == []


@pytest.mark.parametrize("value", ["0", "", "false", "off", "No"])
def test_debug_can_be_switched_off_by_a_variable(value):
    done = easyllm("chat", "nosuchmodel", EASYLLM_DEBUG=value)
    refused(done, "error: model 'nosuchmodel' is not known")


@pytest.mark.parametrize("words", [("--debug",), ()])
def test_debug_shows_the_traceback_and_keeps_the_exit_code(words):
    done = easyllm("chat", "nosuchmodel", *words, **({} if words else {"EASYLLM_DEBUG": "1"}))
    assert done.returncode == 2
    assert "Traceback" in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: model 'nosuchmodel' is not known")


def test_any_character_can_be_printed_in_ascii(recipe):
    command = [sys.executable, "-m", "easyllm", "train", str(recipe), "--dry-run", "--json"]
    environment = os.environ | {"PYTHONIOENCODING": "ascii"}
    word = "samples.prompts=[é😀你]"
    done = subprocess.run([*command, word], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["recipe"]["samples"]["prompts"] == ["é😀你"]
    done = subprocess.run([*command[:-1], word], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert "\\u4f60" in done.stdout


WORDS = {
    "dtype ''": ("the name of the model is empty; give a folder",),
    "plan ''": ("the name of the model is empty",),
    "plan --evening 0h": ("--evening '0h' is not a duration above 0",),
    "plan smollm2 --fit=-5GB": ("--fit '-5GB' is not a size of memory above 0",),
    "plan llama2-7b --gpus 99999999xH100-80GB": (
        "has 99,999,999 GPUs; give at least 1 and at most",
    ),
    "plan llama2-7b --batch 0 --gpus 8xH100-80GB": ("error: --batch 0: input should be greater",),
    "plan llama2-7b --ds-config nosuch/dir": (
        "configuration 'nosuch/dir' cannot be read as JSON (No such file or directory)",
    ),
    "plan {folder}/empty.txt": (
        "empty.txt' is a file that describes no model; give a config.json",
        "plan also takes a recipe, such as sft-lora, and a number of parameters",
    ),
    "prompt lint {folder}": ("is a folder; give a file such as mine.md",),
    "prompt lint {folder}/binary.txt": ("it is not UTF-8 text",),
    "train {folder}": ("is a folder; give a YAML file",),
    "train {folder}/binary.yaml": ("is not valid YAML: it is not UTF-8 text; correct it",),
    "generate smollm2 ''": ("error: the prompt is empty; give a text",),
    "generate smollm2 x --cache-gb 0": ("error: --cache-gb 0.0: input should be greater than 0",),
    "chat smollm2 --cache-gb nan": ("error: --cache-gb nan: input should be a finite number",),
    "serve smollm2 --max-running 0": ("error: --max-running 0: input should be greater than 0",),
    "generate smollm2 x --cache-dtype int3": ("cache_dtype 'int3' is not known; use one of",),
    "generate smollm2 x --draft nosuch": ("model 'nosuch' is not known",),
    "eval {folder}/m --task gsm8k --data {folder}": ("' is a folder; give the file with the data",),
    "eval {folder}/m --task {folder}/nosuch.yaml --data {folder}": (
        "nosuch.yaml' does not exist; name a YAML file",
    ),
    "eval smollm2 --task perplexity --data {folder}/binary.txt": ("not text, or UTF-16",),
    "eval smollm2 --task perplexity --data {folder}/empty.txt": ("has no text; give a file of",),
    "eval smollm2 --task perplexity --data {folder}": ("is a folder; give a file of texts",),
    "eval smollm2 --data {folder}/binary.txt": ("binary.txt:1 is not JSON",),
    "eval smollm2 --task gsm8k --shots 1 --data {folder}/rows.jsonl --output {folder}": (
        "exists and is not an evaluation; give a new folder",
    ),
    "reason smollm2 ''": ("error: a question is empty",),
    "reason smollm2 x --method few-shot": ("few-shot needs examples",),
    "reason smollm2 x --system nosuch": ("prompt 'nosuch' is not known",),
    "reason smollm2 --data {folder}/rows.jsonl --method few-shot --examples {folder}/rows.jsonl "
    "--select 1": ("--select-on 16 leaves none of the 2 questions",),
    "lab rope-distance theta=abc": ("error: command line: theta='abc'",),
    "lab rope-distance output={folder}": ("holds something else than lab rope-distance",),
}


@pytest.mark.parametrize("words", WORDS)
def test_a_mistake_of_a_command_is_told_in_its_only_line(tmp_path, words, monkeypatch):
    (tmp_path / "empty.txt").touch()
    for name in ("binary.txt", "binary.yaml"):
        (tmp_path / name).write_bytes(bytes(range(256)))
    (tmp_path / "rows.jsonl").write_text('{"question": "2 + 2?", "answer": "#### 4"}\n' * 2)

    def load(*_, **__):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(OpenSource, "model", load)
    done = easyllm(*shlex.split(words.format(folder=tmp_path)))
    refused(done, *WORDS[words])
    assert "on_error" not in done.stderr  # a key that these commands do not have
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1


def test_weights_that_are_not_finite_are_told_with_their_name(tiny_folder, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(tiny_folder, broken)
    tensors, metadata = read_tensors(broken / "model.safetensors")
    name = next(iter(tensors))
    tensors[name].view(-1)[0] = math.nan
    write_tensors(broken / "model.safetensors", tensors, metadata)
    (tmp_path / "text.txt").write_text("The quick brown fox.")
    for words in (
        ("generate", broken, "hello"),
        ("eval", broken, "--task", "perplexity", "--data", tmp_path / "text.txt"),
        ("convert", broken, tmp_path / "out.gguf", "--type", "f16"),
    ):
        refused(easyllm(*words), f"{name} of {broken} contains NaN or infinite values; copy")
    assert not (tmp_path / "out.gguf").exists()
