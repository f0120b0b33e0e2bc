"""`easyllm eval --task perplexity`: the figures of a plain sliding-window loop in transformers."""

import json
import math

import pytest
import torch

from easyllm_command import easyllm

TEXT = "The quick brown fox jumps over the lazy dog, 你好 世界, and then it rests a while. " * 9


def plain_loop(folder, ids, length, stride):
    """The loop of transformers' documentation: windows of `length` tokens, labels masked."""
    transformers = pytest.importorskip("transformers")
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    whole, total, count, before = torch.tensor([ids]), 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + length, len(ids))
        labels = whole[:, begin:end].clone()
        labels[:, : -(end - before)] = -100
        with torch.no_grad():
            loss = float(model(whole[:, begin:end], labels=labels).loss)
        scored = int((labels[:, 1:] != -100).sum())
        total, count, before = total + loss * scored, count + scored, end
        if end == len(ids):
            break
    return total / count, count


@pytest.mark.parametrize(("context", "stride"), [(24, 12), (24, 24), (16, 5)])
def test_figures_are_those_of_a_plain_loop(context, stride, tiny_folder, tiny_tokenizer, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    flags = ["--context", str(context), "--stride", str(stride), "--json"]
    done = easyllm("eval", tiny_folder, "--task", "perplexity", "--data", path, *flags)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    ids = tiny_tokenizer.encode(TEXT)
    # a window of `context` tokens and the token that the last of them predicts
    expected, count = plain_loop(tiny_folder, ids, context + 1, stride)
    assert found["tokens"] == count == len(ids) - 1
    assert found["perplexity"] == pytest.approx(math.exp(expected), rel=1e-4)
    words = len(TEXT.split())
    assert found["words"] == words
    assert found["word_perplexity"] == pytest.approx(math.exp(expected * count / words), rel=1e-4)
    assert found["texts"] == 1


def test_rows_are_texts_of_their_own(tiny_folder, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps({"body": t}) + "\n" for t in (TEXT[:60], TEXT[:90])))
    flags = ["--task", "perplexity", "--text-key", "body"]
    done = easyllm("eval", tiny_folder, path, *flags)
    assert done.returncode == 0, done.stderr
    assert "of 2 texts" in " ".join(done.stdout.split())
    assert "bits per byte" in done.stdout


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--stride", "4"], "--stride concerns perplexity"),
        (["--task", "perplexity", "--max-tokens", "4"], "--max-tokens concerns answers"),
        (["--task", "perplexity", "--data", "x.txt"], "give DATA, or --data FILE"),
        (["--task", "perplexity", "--context", "99999"], "context=99999 must be from 1"),
        (["--task", "perplexity", "--context", "8", "--stride", "9"], "stride=9"),
        (["--task", "perplexity", "--quantize", "int5"], "'int5' is not known"),
    ],
)
def test_what_does_not_fit_is_one_sentence(flags, words, tiny_folder, tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    done = easyllm("eval", tiny_folder, path, *flags)
    assert done.returncode == 2
    assert words in " ".join(done.stderr.split())


def test_a_file_without_texts_is_refused(tiny_folder, tmp_path):
    done = easyllm("eval", tiny_folder, tmp_path / "none.txt", "--task", "perplexity")
    assert done.returncode == 2
    assert "does not exist" in " ".join(done.stderr.split())
    (tmp_path / "empty.jsonl").write_text("")
    done = easyllm("eval", tiny_folder, tmp_path / "empty.jsonl", "--task", "perplexity")
    assert done.returncode == 2
    assert "empty.jsonl' has no text" in " ".join(done.stderr.split())
