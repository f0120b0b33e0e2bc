"""`easyllm tokenizer`: what each command writes and prints, and one clear sentence per error."""

import io
import json
import re
import subprocess
import sys

import pytest
import typer
from typer.testing import CliRunner

from easyllm.cli.tokenizer import register
from easyllm.core.errors import CheckpointError, ConfigError, DataError, OutputError, SourceError
from easyllm.models import load_model, load_tokenizer
from easyllm.tokenizer import Tokenizer

ENGLISH = "low lower lowest\nnew newer newest\nit isn't low, it is lower\n" * 5
CHINESE = "语言模型预测词元，模型用词元训练。\n分词器把文本切成词元，词元是编号。\n" * 5


def run(*words, stdin=None):
    """Returns what a command prints; a user error is raised."""
    app = typer.Typer(pretty_exceptions_enable=False)
    register(app)
    done = CliRunner().invoke(app, ["tokenizer", *map(str, words)], input=stdin)
    if isinstance(done.exception, Exception):
        raise done.exception
    return done.stdout


@pytest.fixture
def texts(tmp_path):
    """Files of English and Chinese texts."""
    (tmp_path / "en.txt").write_text(ENGLISH, encoding="utf-8")
    (tmp_path / "zh.jsonl").write_text(
        "".join(json.dumps({"body": line}) + "\n" for line in CHINESE.splitlines()),
        encoding="utf-8",
    )
    return tmp_path / "en.txt", tmp_path / "zh.jsonl"


def test_the_error_for_a_wrong_text_key_names_the_option(texts, tmp_path):
    _, rows = texts
    (tmp_path / "empty.jsonl").write_text('{"text": 3}\n')
    (tmp_path / "table.csv").write_text("body\nlow lower\n")
    (tmp_path / "broken.jsonl").write_text("{\n")
    for file, expected in (
        (
            rows,
            r"zh\.jsonl:1: no key 'text' \(keys: body\); name the key of the text with --text-key$",
        ),
        (
            "empty.jsonl",
            r"empty\.jsonl:1: 'text' is of type int; name the key of the text with --text-key$",
        ),
        (
            "table.csv",
            r"no column 'text' \(columns: body\); set text_key to one of them \(--text-key\)$",
        ),
        ("broken.jsonl", r"broken\.jsonl:1: not JSON .*; fix or remove it$"),
    ):
        with pytest.raises(DataError, match=expected):
            run("train", tmp_path / file, "-o", tmp_path / "tok", "--vocab-size", 300)
    assert not (tmp_path / "tok").exists()
    with pytest.raises(DataError, match="--text-key"):
        run("report", "smollm2", "--text", f"zh={rows}")


def test_train_writes_a_tokenizer_that_encode_reads(texts, tmp_path):
    out = tmp_path / "tok"
    words = ("train", *texts, "--text-key", "body", "-o", out, "--vocab-size", 300)
    result = json.loads(run(*words, "--chat-template", "chatml", "--special", "<sep>", "--json"))
    tokenizer = Tokenizer.from_folder(out)
    size = {"vocab_size": tokenizer.vocab_size}
    size |= {} if tokenizer.vocab_size == 300 else {"vocab_size_asked": 300}
    assert result == {"kind": "bpe", **size, "output": str(out)}
    assert tokenizer.id_of("<sep>") == 0
    assert "<|im_start|>" in tokenizer.chat_template.source
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["config"]["vocab_size"] == 300
    assert set(manifest["inputs"]) == {"en.txt", "zh.jsonl"}
    shown = json.loads(run("encode", out, "lower 词元<sep>", "--json"))
    assert shown["ids"] == tokenizer.encode("lower 词元<sep>")
    assert "".join(shown["pieces"]).startswith("lower ")
    assert json.loads(run("encode", out, "--json", stdin="lower 词元<sep>")) == shown
    assert f"{len(shown['ids'])} tokens" in run("encode", out, "lower 词元<sep>")


@pytest.mark.parametrize("kind", ["wordpiece", "unigram", "wordlevel", "characters"])
def test_train_supports_every_kind(texts, tmp_path, kind):
    printed = run(
        "train", texts[0], "--lines", "-o", tmp_path / "tok", "--kind", kind, "--vocab-size", 400
    )
    assert re.search(rf"kind +{kind}\n", printed)
    assert json.loads(run("encode", tmp_path / "tok", "low lower", "--json"))["ids"]


def test_a_vocabulary_smaller_than_requested_is_reported(texts, tmp_path, capfd):
    words = ("train", texts[0], "-o", tmp_path / "tok", "--vocab-size", 32000, "--json")
    app = typer.Typer(pretty_exceptions_enable=False)
    register(app)
    done = CliRunner().invoke(app, ["tokenizer", *map(str, words)])
    figures = json.loads(done.stdout)
    assert figures["vocab_size"] < figures["vocab_size_asked"] == 32000
    assert f"yields {figures['vocab_size']:,} ids, fewer than vocab_size=32,000" in done.stderr


@pytest.mark.parametrize("size", [999_999_999, 2**22 + 1, 0, -5])
def test_a_vocabulary_too_large_for_memory_is_refused_in_one_sentence(texts, tmp_path, size):
    words = ["tokenizer", "train", texts[0], "-o", tmp_path / "tok", "--vocab-size", size]
    command = [sys.executable, "-m", "easyllm", *map(str, words)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "vocab_size" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "tok").exists()


def test_options_from_a_file_can_be_overridden_on_the_command_line(texts, tmp_path):
    (tmp_path / "t.yaml").write_text("vocab_size: 300\nmodel: {digits: groups}\nbos: <s>\n")
    words = ("train", texts[0], "-o", tmp_path / "tok", "--config", tmp_path / "t.yaml")
    run(*words, "--set", "model.pattern=qwen2", "--set", "add_bos=true", "--vocab-size", 280)
    config = json.loads((tmp_path / "tok" / "manifest.json").read_text())["config"]
    assert (config["model"]["digits"], config["model"]["pattern"]) == ("groups", "qwen2")
    assert (config["vocab_size"], config["add_bos"]) == (280, True)
    shown = json.loads(run("encode", tmp_path / "tok", "low", "--json"))
    assert shown["pieces"][0] == "<s>"
    assert (
        json.loads(run("encode", tmp_path / "tok", "low", "--plain", "--json"))["ids"]
        == shown["ids"][1:]
    )


def test_the_same_files_give_the_same_tokenizer_file(texts, tmp_path):
    for name in ("a", "b"):
        run("train", texts[0], "-o", tmp_path / name, "--vocab-size", 300, "--kind", "unigram")
    files = [(tmp_path / name / "tokenizer.json").read_bytes() for name in ("a", "b")]
    assert files[0] == files[1]


def test_report_compares_tokenizers_side_by_side(texts, tmp_path):
    run("train", texts[0], "-o", tmp_path / "tok", "--vocab-size", 300, "--kind", "wordlevel")
    words = ("report", "smollm2", tmp_path / "tok", "--text", f"en={texts[0]}", "--lines")
    result = json.loads(run(*words, "--json"))
    assert [row["tokenizer"] for row in result["texts"]] == ["smollm2", str(tmp_path / "tok")]
    assert [row["num_texts"] for row in result["texts"]] == [15, 15]
    assert result["texts"][1]["num_failures"] == 5
    table = run(*words)
    assert f"{result['texts'][0]['fertility']:.3f}" in table
    assert "is decoded as" in table


def test_extend_prints_figures_in_a_dry_run_and_then_writes_a_model(texts, tmp_path, tiny_folder):
    words = ("extend", tiny_folder, texts[1], "--text-key", "body", "--new", 40, "--json")
    plan = json.loads(run(*words, "--dry-run"))
    assert (plan["new_pieces"], plan["tokenizer_ids"], plan["model_vocab_size"]) == (40, 360, 384)
    assert plan["parameters_added"] == 64 * 32
    assert plan["fertility_after"] < plan["fertility_before"]
    assert not (tmp_path / "out").exists()
    done = json.loads(run(*words, "--output", tmp_path / "out"))
    assert done.items() >= plan.items()
    assert abs(done["loss_over_old_ids_nats"] - done["loss_before_nats"]) <= 1e-6
    assert done["loss_over_all_ids_nats"] > done["loss_before_nats"]
    assert done["nats_per_byte_before"] < done["loss_before_nats"]
    assert done["nats_per_byte_after"] > 0
    model, tokenizer = load_model(tmp_path / "out"), load_tokenizer(tmp_path / "out")
    assert model.config.vocab_size == 384
    assert max(tokenizer.encode("词元")) >= 320
    assert tokenizer.encode("lower") == load_tokenizer(tiny_folder).encode("lower")
    manifest = json.loads((tmp_path / "out" / "manifest.json").read_text())
    assert manifest["kind"] == "extend"
    assert set(manifest["inputs"]) == {"model", "zh.jsonl"}


def test_import_gives_the_ids_of_sentencepiece(tmp_path):
    import sentencepiece

    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter((ENGLISH + CHINESE).splitlines()),
        model_writer=out,
        model_type="bpe",
        vocab_size=120,
        minloglevel=2,
    )
    (tmp_path / "t.model").write_bytes(out.getvalue())
    result = json.loads(
        run("import", tmp_path / "t.model", tmp_path / "tok", "--add-bos", "--json")
    )
    assert result["vocab_size"] == 120
    theirs = sentencepiece.SentencePieceProcessor(model_proto=out.getvalue())
    shown = json.loads(run("encode", tmp_path / "tok", "lower 词元", "--json"))
    assert shown["ids"] == [theirs.bos_id(), *theirs.encode("lower 词元")]


def test_every_command_shows_examples():
    app = typer.Typer()
    register(app)
    group = typer.main.get_command(app)
    group = getattr(group, "commands", {}).get("tokenizer", group)
    for name, command in group.commands.items():
        assert f"easyllm tokenizer {name}" in command.help
    assert "easyllm tokenizer" in group.help


def test_errors_are_one_sentence_each_and_leave_nothing_behind(texts, tmp_path, tiny_folder):
    english, chinese = texts
    out = tmp_path / "out"
    mistakes = [
        (
            ("train", english, "-o", out, "--vocab-size", 100),
            ConfigError,
            "is too small for 256 bytes",
        ),
        (("train", english, "-o", out, "--kind", "bpee"), ConfigError, "bpee"),
        (
            ("train", english, "-o", out, "--set", "model.digit=x"),
            ConfigError,
            "did you mean 'digits'",
        ),
        (("train", tmp_path / "no.txt", "-o", out), SourceError, r"no\.txt"),
        (("train", english, "-o", tmp_path), OutputError, "already exists and is not empty"),
        (("report", "smollm2", "--text", english), ConfigError, "is not name=PATH"),
        (("extend", tiny_folder, english), ConfigError, "add --output out/NAME or --dry-run"),
        (("extend", tiny_folder, chinese, "--script", "hun", "--dry-run"), ConfigError, "hun"),
        (("extend", tiny_folder, chinese, "--dtype", "fp8", "--dry-run"), ConfigError, "fp8"),
        (("import", english, out), CheckpointError, r"en\.txt: "),
        (("encode", "smollm3", "x"), SourceError, "did you mean 'smollm2'"),
    ]
    for words, kind, message in mistakes:
        with pytest.raises(kind, match=message) as caught:
            run(*words)
        assert "\n" not in str(caught.value)
    assert not out.exists()
