"""`easyllm plan`: for models and recipes, as a table and as JSON."""

import json

import pytest
import yaml

from easyllm_command import easyllm


@pytest.fixture(autouse=True)
def rates(monkeypatch):
    """A machine with known rates."""
    monkeypatch.setattr("easyllm.plan.machine.matmul_rate", lambda *_, **__: 1e12)
    monkeypatch.setattr("easyllm.plan.machine.read_rate", lambda *_, **__: 1e11)
    monkeypatch.setattr("easyllm.train.preflight.matmul_rate", lambda *_, **__: 1e12)


def planned(*words):
    done = easyllm("plan", *words, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_published_size_has_its_published_figures():
    found = planned("mixtral-8x7b", "--context", 4096)
    assert found["parameters_total"] == 46_702_792_704
    assert found["parameters_active"] == 12_879_925_248
    assert found["cache_bytes_per_token"] == 131_072
    assert found["cache_bytes"] == 536_870_912
    assert (found["dtype"], found["cache_dtype"]) == ("bfloat16", "bfloat16")


def test_every_option_changes_the_plan():
    plain = planned("llama2-7b")
    assert plain["context"] == 4096
    assert "training" not in plain
    assert planned("llama2-7b", "--sequences", 3)["cache_bytes"] == 3 * plain["cache_bytes"]
    assert planned("llama2-7b", "--dtype", "float32")["weight_bytes"] == 4 * 6_738_415_616
    int4 = planned("llama2-7b", "--quantize", "int4")
    assert int4["weight_bytes"] == plain["weight_bytes_by_format"]["int4"]
    eight = planned("llama2-7b", "--cache-dtype", "int8")["cache_bytes_per_token"]
    assert eight == 524_288 // 2 * (128 + 4) // 128  # one byte per value, a scale per head of 128
    assert set(planned("llama2-7b", "--train")["training"]) == {"full", "lora_r16"}


def test_every_kind_of_source_gives_the_same_plan(tiny_folder, tmp_path):
    alone = tmp_path / "alone"
    alone.mkdir()
    config = alone / "config.json"
    config.write_text((tiny_folder / "config.json").read_text())
    found = [planned(name) for name in (tiny_folder, alone, config)]  # two of them have no weights
    assert len({json.dumps(x["parameters"]) for x in found}) == 1
    assert planned("smollm2")["parameters"] == planned("smollm2-135m")["parameters"]


def test_the_table_contains_all_figures():
    done = easyllm("plan", "llama2-7b", "--train", "--context", 4096)
    assert done.returncode == 0
    for words in (
        "6,738,415,616",
        "13.48 GB",
        "524,288 bytes",
        "training step, lora_r16",
        " GFLOP ",
    ):
        assert words in done.stdout
    done = easyllm("plan", "llama2-7b", "--context", 9999)
    assert "trained for 4,096 tokens" in done.stdout


def test_a_training_recipe_is_planned(tiny_folder, tmp_path):
    rows, recipe = tmp_path / "rows.jsonl", tmp_path / "recipe.yaml"
    rows.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    data = {"train": ["rows.jsonl"], "max_seq_len": 64}
    recipe.write_text(yaml.safe_dump({"model": str(tiny_folder), "data": data}))
    plan = planned(recipe, "max_steps=3", "epochs=3", "adapter.rank=2")["plans"]["train"]
    assert plan["steps"] == 3
    assert 0 < plan["trained_parameters"] < plan["parameters"]
    assert isinstance(plan["memory_bytes"]["total"], int)
    assert plan["seconds"] >= 0
    table = easyllm("plan", recipe)
    assert table.returncode == 0
    assert "peak in the" in table.stdout
    assert table.stdout.count("━") == 0  # no header
    assert "only 1 step: too few to learn much from; raise epochs" in table.stderr
    stages = {"tune": {"kind": "train", "model": str(tiny_folder), "data": data}}
    pipeline = tmp_path / "pipeline.yaml"
    pipeline.write_text(yaml.safe_dump({"name": "p", "output": "o", "stages": stages}))
    assert planned(pipeline)["plans"].keys() == {"tune"}


WRONG = {
    "an unknown size": (("llama2-8b",), "did you mean 'llama3-8b'?"),
    "a similar size": (("mixtral-8x7",), "did you mean 'mixtral-8x7b'?"),
    "a folder without a model": (("/tmp",), "config.json"),
    "a missing file": (("x.gguf",), "does not exist"),
    "overrides of a model": (("llama2-7b", "epochs=2"), "is a model"),
    "a model's option for a recipe": (
        ("sft-lora", "--context", 5),
        "--context applies to a model",
    ),
    "a switch, too": (("sft-lora", "--train"), "--train applies to a model"),
    "a corpus": (("data-web",), "easyllm data build data-web --dry-run"),
    "a missing recipe": (("none.yaml",), "does not exist"),
    "rows longer than the context": (
        ("llama2-7b", "--train", "--context", 5000),
        "longer than the model's context of 4096",
    ),
    "a rank no matrix has": (("sft-lora", "adapter.rank=100000000"), "at most 576"),
}


@pytest.mark.parametrize("case", WRONG.values(), ids=WRONG.keys())
def test_errors_are_one_sentence(case, tmp_path, monkeypatch):
    words, message = case
    monkeypatch.chdir(tmp_path)
    done = easyllm("plan", *words)
    assert done.returncode == 2, done.stderr
    assert message in done.stderr


@pytest.mark.parametrize(
    "text",
    ["[1", "[]", "{}", '{"model_type": "llama"}', '{"model_type": "llama", "hidden_size": 1e999}'],
)
def test_an_invalid_model_config_is_refused(tmp_path, text):
    path = tmp_path / "config.json"
    path.write_text(text)
    done = easyllm("plan", path)
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
