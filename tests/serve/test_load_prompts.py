"""Prompts of a load test that are read from a file."""

from itertools import islice

import pytest

from easyllm.core.errors import DataError, SourceError
from easyllm.serve.load_prompts import read_prompts


def read(tmp_path, name, text, dialect="chat", count=3):
    path = tmp_path / name
    path.write_text(text, encoding="utf-8")
    return list(islice(read_prompts(path, dialect), count))


def user(text):
    return {"messages": [{"role": "user", "content": text}]}


def test_each_line_of_a_text_is_a_prompt_and_the_file_repeats(tmp_path):
    assert read(tmp_path, "a.txt", "one\n\n你好\n") == [user("one"), user("你好"), user("one")]


def test_rows_have_prompts_or_messages(tmp_path):
    messages = [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}]
    rows = '{"prompt": "one"}\n{"messages": [{"role": "system", "content": "x"}, '
    rows += '{"role": "user", "content": "y"}]}\n'
    assert read(tmp_path, "a.jsonl", rows, count=2) == [user("one"), {"messages": messages}]


def test_completions_take_prompts(tmp_path):
    assert read(tmp_path, "a.jsonl", '{"prompt": "one"}', "completions", 1) == [{"prompt": "one"}]


@pytest.mark.parametrize(
    ("text", "dialect", "message"),
    [
        ('{"prompt": "a"}\nnot json\n', "chat", r"a\.jsonl:2 is not a JSON object"),
        ("[1]\n", "chat", r"a\.jsonl:1 is not a JSON object"),
        ('\n{"text": "a"}\n', "chat", r"a\.jsonl:2 has neither prompt nor messages"),
        ('{"prompt": 5}\n', "chat", "has neither prompt nor messages"),
        ('{"messages": []}\n', "completions", "has messages, which need --dialect chat"),
        ("\n\n", "chat", "contains no prompt"),
    ],
)
def test_a_row_without_a_prompt_is_refused_with_its_line(tmp_path, text, dialect, message):
    with pytest.raises(DataError, match=message):
        read(tmp_path, "a.jsonl", text, dialect)


def test_files_that_cannot_be_read_are_refused(tmp_path):
    with pytest.raises(SourceError, match="No such file"):
        read_prompts(tmp_path / "missing.txt", "chat")
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(DataError, match="not UTF-8"):
        read_prompts(tmp_path / "binary.txt", "chat")
