"""Tool calls: the format in which a model writes them, their grammar, and reading them."""

from easyllm.tokenizer.tool_calls.base import ToolFormat
from easyllm.tokenizer.tool_calls.detect import detect_tool_format
from easyllm.tokenizer.tool_calls.known import known_formats
from easyllm.tokenizer.tool_calls.output import OutputParser
from easyllm.tokenizer.tool_calls.pieces import (
    Call,
    CallArguments,
    CallEnd,
    CallStart,
    Output,
    Piece,
    ReasoningPiece,
    TextPiece,
    joined,
)
from easyllm.tokenizer.tool_calls.plain import PlainCalls
from easyllm.tokenizer.tool_calls.reasoning_grammar import after_reasoning
from easyllm.tokenizer.tool_calls.tools import OneTool, ToolChoice, ToolDefinitions

__all__ = [
    "Call",
    "CallArguments",
    "CallEnd",
    "CallStart",
    "OneTool",
    "Output",
    "OutputParser",
    "Piece",
    "PlainCalls",
    "ReasoningPiece",
    "TextPiece",
    "ToolChoice",
    "ToolDefinitions",
    "ToolFormat",
    "after_reasoning",
    "detect_tool_format",
    "joined",
    "known_formats",
]
