"""`easyllm eval --task` with items, `--compare`, `easyllm prompt` and `easyllm reason`."""

import json

import pytest

from easyllm_command import easyllm

TASK = 'kind: choice\nprompt: "{{question}}"\nmetrics: [accuracy, ece]\nshots: 1\n'


@pytest.fixture
def files(tmp_path):
    task, data = tmp_path / "mine.yaml", tmp_path / "data.jsonl"
    task.write_text(TASK)
    rows = [
        {"question": f"which {n}?", "choices": ["fox", "dog"], "answer": "AB"[n % 2]}
        for n in range(5)
    ]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(task), str(data)


def test_a_task_is_evaluated_resumed_and_compared(tiny_folder, files, tmp_path):
    task, data = files
    one, two = tmp_path / "one", tmp_path / "two"
    run = ["eval", tiny_folder, "--task", task, "--data", data, "--json", "--output"]
    done = easyllm(*run, one, "--limit", "3")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["scores"][0].keys() >= {
        *("name", "value", "standard_error", "n", "unparsed", "truncated"),
        *("model", "template_hash", "prompt_hash", "shots", "thinking"),
    }
    assert result["scores"][0]["n"] == 3
    assert json.loads(easyllm(*run, one, "--limit", "3").stdout) == result
    other = easyllm(*run, two, "--limit", "3", "--choices", "generated", "--max-tokens", "3")
    assert json.loads(other.stdout)["choices"] == "generated"
    compared = easyllm("eval", "--compare", one, two, "--json")
    assert [s["name"] for s in json.loads(compared.stdout)["scores"]] == ["accuracy"]
    assert "p" in easyllm("eval", "--compare", one, two).stdout
    refused = easyllm(*run, one, "--limit", "3", "--shots", "2")
    assert refused.returncode == 2
    assert "holds another evaluation" in refused.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--task", "gsm8"], "did you mean 'gsm8k'"),
        (["--task", "humaneval"], "lacks 'prompt', 'test', 'entry_point'"),
        (["--thinking"], "no response in which the model could think"),
        (["--shots", "9"], "lower --shots"),
        (["--choices", "either"], "by likelihood or generated"),
        (["--temperature", "1"], "generates nothing; leave out --temperature"),
        (["--context", "4"], "--context concerns perplexity"),
        (["--references", "x"], "leave out --references"),
    ],
)
def test_mistakes_are_one_sentence(tiny_folder, files, words, message):
    task, data = files
    words = words if "--task" in words else ["--task", task, *words]
    done = easyllm("eval", tiny_folder, "--data", data, *words)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stdout == ""


def test_prompts_are_written_checked_and_filled(tmp_path):
    path = tmp_path / "mine.md"
    assert "translator-zh" in easyllm("prompt", "new").stdout
    assert easyllm("prompt", "new", path, "--from", "translator").returncode == 0
    assert "exists" in easyllm("prompt", "new", path).stderr
    found = easyllm("prompt", "lint", path, "Source=English", "--json")
    assert found.returncode == 1
    assert {f["rule"] for f in json.loads(found.stdout)["faults"]} == {"unresolved-variable"}
    text = easyllm("prompt", "render", path, "Source=English", "Target=French", "--flat").stdout
    assert "into French" in text
    assert "NAME=VALUE" in easyllm("prompt", "render", path, "Source").stderr


def test_reasoning_reports_accuracy_votes_and_tokens(tiny_folder, tmp_path):
    data = tmp_path / "data.jsonl"
    rows = [{"question": f"{n} + 1", "answer": f"so #### {n + 1}"} for n in range(3)]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["reason", tiny_folder, "--max-tokens", "4", "--json"]
    found = json.loads(easyllm(*words, "--data", data, "--samples", "2").stdout)
    assert found["scores"][0]["n"] == 3
    assert [each["right"] for each in found["answers"]] == ["1", "2", "3"]
    assert 0 < found["generated_tokens"] == sum(each["tokens"] for each in found["answers"])
    shots = ["--method", "few-shot", "--examples", data]
    found = json.loads(easyllm(*words, "2 + 2", *shots).stdout)
    assert found["examples"] == 3
    for extra, message in (
        ([], "one question, or --data FILE"),
        (["2 + 2", "--method", "few-shot"], "needs examples"),
        (["2 + 2", "--select", "2"], "give both"),
    ):
        done = easyllm(*words, *extra)
        assert (done.returncode, message in done.stderr) == (2, True), done.stderr
