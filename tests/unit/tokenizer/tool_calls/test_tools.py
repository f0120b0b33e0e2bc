"""Definitions of tools: what is read, and what is refused."""

import pytest

from easyllm.core.errors import DataError
from easyllm.tokenizer.tool_calls import OneTool
from easyllm.tokenizer.tool_calls.tools import chosen, declared

ADD = {"type": "function", "function": {"name": "add", "parameters": {"properties": {}}}}


def test_tools_are_read_with_their_schemas():
    assert declared([ADD])["add"].schema == {"type": "object", "properties": {}}
    assert declared([{"name": "now"}])["now"].schema == {"type": "object"}
    assert [tool.name for tool in chosen([ADD, {"name": "now"}], "required")] == ["add", "now"]
    assert [tool.name for tool in chosen([ADD, {"name": "now"}], OneTool("now"))] == ["now"]


@pytest.mark.parametrize(
    ("tools", "reason"),
    [
        ([ADD, ADD], "two tools are named 'add'"),
        ([{"type": "function", "function": {}}], "tool 0 has no name"),
        ([{"type": "function", "function": None}], "tool 0 has no name"),
        (["add"], "tool 0 has no name"),
        ([None], "tool 0 has no name"),
        ([{"name": " "}], "tool 0 has no name"),
        ([{"name": "add", "parameters": [1]}], "the parameters of the tool 'add' are a list"),
    ],
)
def test_malformed_tools_are_refused(tools, reason):
    with pytest.raises(DataError, match=reason):
        declared(tools)


def test_a_choice_without_its_tool_is_refused():
    with pytest.raises(DataError, match="names the tool 'sub', which is not among the tools"):
        chosen([ADD], OneTool("sub"))
    with pytest.raises(DataError, match="no tool is declared"):
        chosen([], "required")
