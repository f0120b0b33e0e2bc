"""What a user is told to do next works as printed; JSON output contains JSON alone."""

import json
import shlex

import pytest
import yaml

from easyllm.pipeline.recipe import find_recipe
from easyllm_command import GOOD, RECIPE, easyllm

PAIR = {"prompt": "a", "chosen": "good", "rejected": "bad"}


@pytest.fixture
def recipe(tiny_folder, tmp_path):
    data = tmp_path / "rows.jsonl"
    data.write_text(GOOD)
    path = tmp_path / "recipe.yaml"
    path.write_text(RECIPE.format(model=tiny_folder, data=data, output=tmp_path / "run"))
    return path


def next_steps(text):
    """Returns the commands that the end of a run prints, by name."""
    lines = text.split("\nnext:\n")[1].split("\n\n")[0].splitlines()
    return {name: rest.strip() for name, rest in (line.split(maxsplit=1) for line in lines if line)}


def run(command, **options):
    program, *words = shlex.split(command)
    assert program == "easyllm"
    done = easyllm(*words, **options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_steps_after_a_training_can_be_run_as_printed(recipe, tiny_folder, tmp_path):
    output = tmp_path / "run"
    done = easyllm("train", recipe)
    assert done.returncode == 0, done.stderr
    steps = next_steps(done.stdout)
    assert list(steps) == ["chat", "serve", "evaluate", "merge", "report"]
    assert run(f"{steps['chat']} --temperature 0 --max-tokens 4", stdin="hello\n")
    assert "loss (nats/token)" in run(steps["evaluate"])
    assert run(steps["merge"]).endswith(f"\n{output / 'merged'}\n")
    assert steps["serve"] == f"easyllm serve base={tiny_folder} tuned={output / 'adapter'}"
    assert steps["report"] == f"open {output / 'report.html'}"
    assert (output / "report.html").is_file()


def test_a_full_training_is_chatted_with_as_a_model_and_json_stays_json(recipe, tmp_path):
    output = tmp_path / "full"
    done = easyllm("train", recipe, "adapter=null", f"output={output}")
    steps = next_steps(done.stdout)
    assert steps["chat"] == f"easyllm chat {output / 'model'}"
    assert "merge" not in steps
    done = easyllm("train", recipe, f"output={tmp_path / 'json'}", "--json")
    assert json.loads(done.stdout)["steps"] > 0


def test_an_adapter_that_cannot_be_merged_has_no_step_for_it(recipe, tmp_path):
    words = ("adapter={kind: prefix, num_virtual_tokens: 2}", "max_steps=1")
    done = easyllm("train", recipe, *words, f"output={tmp_path / 'prefix'}")
    assert done.returncode == 0, done.stderr
    steps = next_steps(done.stdout)
    assert list(steps) == ["chat", "serve", "evaluate", "report"]
    assert run(f"{steps['chat']} --temperature 0 --max-tokens 4", stdin="hello\n")


def test_a_pipeline_and_the_quickstart_end_with_the_last_model_they_made(
    tiny_folder, tmp_path, monkeypatch
):
    values = yaml.safe_load(find_recipe("quickstart").read_text())
    for name in ("heldout", "unrelated"):
        row = {"prompt": "a", "completion": "b", "key": "b"}
        (tmp_path / f"{name}.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "train.jsonl").write_text(GOOD * 4)
    for stage in values["stages"].values():
        if stage["model"] == "smollm2":
            stage["model"] = str(tiny_folder)
        if stage["kind"] == "evaluate":
            stage["data"] = {"heldout": "heldout.jsonl", "unrelated": "unrelated.jsonl"}
    values["stages"]["tune"] |= {"data": {"train": ["train.jsonl"], "max_seq_len": 64}}
    path, output = tmp_path / "quickstart.yaml", tmp_path / "run"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    monkeypatch.setattr("easyllm.pipeline.quickstart.find_recipe", lambda _: path)
    merged = output / "merged"
    for words in (("run", path), ("quickstart", "--no-serve")):
        done = easyllm(*words, f"output={output}")
        assert done.returncode == 0, done.stderr
        assert next_steps(done.stdout) == {
            "chat": f"easyllm chat {merged}",
            "serve": f"easyllm serve base={tiny_folder} tuned={merged}",
            "report": f"open {output / 'tune' / 'report.html'}",
        }
    json.loads(easyllm("run", path, f"output={output}", "--json").stdout)


def test_preference_data_given_to_sft_is_refused_with_a_conversion_that_works(recipe, tmp_path):
    pairs, chosen = tmp_path / "pairs.jsonl", tmp_path / "chosen.jsonl"
    talk = [
        {"role": r, "content": c} for r, c in (("user", "x"), ("assistant", "y"), ("user", "z"))
    ]
    rows = [
        PAIR,
        {"prompt": talk, "chosen": "good", "rejected": "bad"},
        {"prompt": "q", "completion": "right", "label": True},
        {"prompt": "q", "completion": "wrong", "label": False},
    ]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for words in (("--dry-run",), ()):
        done = easyllm("train", recipe, f"data.train=[{pairs}]", *words)
        assert done.returncode == 2
        assert "objective.kind=dpo data.kind=preferences" in done.stderr
        assert "`easyllm data chosen FILE NEW.jsonl`" in done.stderr
    assert "3 conversations" in run(f"easyllm data chosen {pairs} {chosen}")
    texts = [json.loads(line)["messages"] for line in chosen.read_text().splitlines()]
    assert [messages[-1]["content"] for messages in texts] == ["good", "good", "right"]
    assert [m.get("weight") for m in texts[1]] == [None, 0, None, None]
    done = easyllm("train", recipe, f"data.train=[{chosen}]", "--json")
    assert json.loads(done.stdout)["data"]["samples"] == 3
    again = easyllm("data", "chosen", pairs, chosen)
    assert (again.returncode, "already exists" in again.stderr) == (2, True)
