"""Reading logs of JSON lines: damaged lines are skipped, the others are read."""

import pytest

from easyllm.core.jsonl import json_objects, read_json_objects


@pytest.mark.parametrize(
    "damage", [b'{"step": 2, "lo', b"\xff\xfe", b"[1, 2]", b"7", b"", b"\x00\x00"]
)
def test_damaged_lines_are_skipped(damage):
    data = b'{"step": 1}\n' + damage + b'\n{"step": 3}\n'
    assert list(json_objects(data)) == [{"step": 1}, {"step": 3}]


def test_a_partial_last_line_is_skipped_and_a_complete_one_is_read():
    assert list(json_objects(b'{"a": 1}\n{"b": 2')) == [{"a": 1}]
    assert list(json_objects(b'{"a": 1}\n{"b": 2}')) == [{"a": 1}, {"b": 2}]


def test_only_line_feeds_separate_lines():
    """Unicode's line separators may be inside of a JSON string."""
    data = '{"text": "a\u2028b\u0085c"}\n'.encode()
    assert list(json_objects(data)) == [{"text": "a\u2028b\u0085c"}]


def test_a_missing_file_has_no_objects(tmp_path):
    assert read_json_objects(tmp_path / "none.jsonl") == []
