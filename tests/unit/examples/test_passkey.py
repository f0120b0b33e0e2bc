"""Passkey rows: lengths in tokens, depths, and the evaluation task that reads them."""

import json

import pytest

from easyllm.core.errors import ConfigError
from easyllm.evaluate.task_config import load_task
from easyllm.evaluate.task_items import read_items
from easyllm.examples.passkey import passkey_rows
from easyllm_command import easyllm


def test_contexts_have_their_length_and_hide_the_number_at_its_depth(tiny_tokenizer):
    rows = list(passkey_rows(tiny_tokenizer, [400, 1200], count=3, seed=1))
    assert [(row["length"], row["depth"]) for row in rows] == [
        (n, depth) for n in (400, 1200) for depth in (0.0, 0.5, 1.0)
    ]
    for row in rows:
        context, key = row["context"], row["answer"]
        count = len(tiny_tokenizer.encode(context))
        assert row["length"] - 120 < count <= row["length"]
        assert context.count(key) == 2
        share = context.index(f"The pass key is {key}") / len(context)
        assert share == pytest.approx(row["depth"], abs=0.35)
    assert len({row["answer"] for row in rows}) == 6
    with pytest.raises(ConfigError, match="a context of 64 tokens is too short"):
        list(passkey_rows(tiny_tokenizer, [64], count=1))


def test_the_task_reads_what_the_command_writes(tmp_path, tiny_folder):
    file = tmp_path / "p.jsonl"
    done = easyllm("data", "passkey", tiny_folder, file, "--length", "400", "--count", "2")
    assert done.returncode == 0, done.stderr
    assert len(file.read_text().splitlines()) == 2
    items = read_items(load_task("passkey"), file)
    assert [item.fields["answer"] for item in items] == [
        json.loads(line)["answer"] for line in file.read_text().splitlines()
    ]
