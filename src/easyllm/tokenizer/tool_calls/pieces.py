"""What an output is split into: text, reasoning, and tool calls whose arguments arrive in parts."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True, slots=True)
class TextPiece:
    """Text of the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class ReasoningPiece:
    """Text of the reasoning that precedes the answer."""

    text: str


@dataclass(frozen=True, slots=True)
class CallStart:
    """The beginning of a tool call.

    Attributes:
        index: number of the call in the output, from 0.
        name: name of the tool.
    """

    index: int
    name: str


@dataclass(frozen=True, slots=True)
class CallArguments:
    """The next part of the arguments of a call, as JSON text."""

    index: int
    text: str


@dataclass(frozen=True, slots=True)
class CallEnd:
    """The end of a tool call; every `CallStart` is followed by one.

    Attributes:
        index: number of the call.
        complete: whether the arguments are a whole JSON object. Otherwise the output was cut, or
            the model wrote something else; what follows the arguments so far is in text pieces.
    """

    index: int
    complete: bool = True


Piece: TypeAlias = TextPiece | ReasoningPiece | CallStart | CallArguments | CallEnd


@dataclass(frozen=True, slots=True)
class Call:
    """A complete tool call.

    Attributes:
        name: name of the tool.
        arguments: the arguments, a JSON object as text.
    """

    name: str
    arguments: str


@dataclass(frozen=True, slots=True)
class Output:
    """A whole output: the joined pieces of each kind."""

    text: str
    reasoning: str
    calls: tuple[Call, ...]


def merged(pieces: Iterable[Piece]) -> list[Piece]:
    """Returns the pieces with neighbours of the same kind joined, and without empty ones."""
    found = list[Piece]()
    for piece in pieces:
        last = found[-1] if found else None
        if isinstance(piece, TextPiece | ReasoningPiece | CallArguments) and not piece.text:
            continue
        if isinstance(piece, TextPiece) and isinstance(last, TextPiece):
            found[-1] = TextPiece(last.text + piece.text)
        elif isinstance(piece, ReasoningPiece) and isinstance(last, ReasoningPiece):
            found[-1] = ReasoningPiece(last.text + piece.text)
        elif isinstance(piece, CallArguments) and isinstance(last, CallArguments):
            found[-1] = CallArguments(piece.index, last.text + piece.text)
        else:
            found.append(piece)
    return found


def joined(pieces: Iterable[Piece]) -> Output:
    """Returns a whole output; of an incomplete call, the arguments that were written."""
    text, reasoning = list[str](), list[str]()
    names, arguments = list[str](), list[list[str]]()
    for piece in pieces:
        if isinstance(piece, TextPiece):
            text.append(piece.text)
        elif isinstance(piece, ReasoningPiece):
            reasoning.append(piece.text)
        elif isinstance(piece, CallStart):
            names.append(piece.name)
            arguments.append([])
        elif isinstance(piece, CallArguments):
            arguments[piece.index].append(piece.text)
    calls = tuple(Call(n, "".join(parts)) for n, parts in zip(names, arguments, strict=True))
    return Output("".join(text), "".join(reasoning), calls)
