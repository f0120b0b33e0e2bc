"""Reading JSON in parts: the values that Python reads, and their text unchanged."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from easyllm.tokenizer.tool_calls.json_reader import MAX_DEPTH, read_value
from easyllm.tokenizer.tool_calls.source import Malformed, Source

SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text()
)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner), max_leaves=8
)


def read(text, step=1):
    """Returns the text of the value that was read, and how much of the text it is not."""
    source, parts = Source(), []
    reading = read_value(source, parts.append)
    for place in range(0, len(text), step):
        source.push(text[place : place + step])
        if next(reading, "done") == "done":
            break
    else:
        source.ended = True
        for _ in reading:
            raise AssertionError("it waits at the end")
    return "".join(parts), len(text) - len("".join(parts))


@given(value=VALUES, indent=st.sampled_from([None, 1]), ascii=st.booleans())
def test_values_are_read_to_their_end(value, indent, ascii):
    text = json.dumps(value, indent=indent, ensure_ascii=ascii)
    if isinstance(value, dict | list | str):
        assert read(text + "}") == (text, 1)
    assert read(text, step=5) == (text, 0)


@pytest.mark.parametrize(
    "text",
    [
        *("", "{", "[1", '"a', '"\\x"', '"\\u12g4"', '"\n"', "{a: 1}", "{'a': 1}", "[1,]", "[,1]"),
        *('{"a" 1}', '{"a": 1,}', '{"a": 1 "b": 2}', "01", "1.", ".5", "+1", "1e", "--1", "tru"),
        *("nul", "True", "NaN", "Infinity", "-", "{1: 2}", "[1 2]", "{]", "[}", "undefined"),
    ],
)
def test_what_is_not_json_is_refused(text):
    with pytest.raises(Malformed):
        read(text)


@given(text=st.text(st.sampled_from('{}[]",: \n\\u01e.-tfn"a'), max_size=12))
def test_exactly_the_texts_that_python_reads_are_accepted(text):
    try:
        value = json.loads(text.lstrip(" \n"))
    except ValueError:
        value = Malformed
    stripped = text.strip(" \n")
    try:
        found, rest = read(stripped)
    except Malformed:
        assert value is Malformed
    else:
        is_whole = rest == 0
        assert is_whole == (value is not Malformed)
        assert not is_whole or found == stripped


def test_nesting_is_bounded():
    assert read("[" * MAX_DEPTH + "]" * MAX_DEPTH)[1] == 0
    with pytest.raises(Malformed):
        read("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
