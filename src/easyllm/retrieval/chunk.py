"""Splits a document into chunks by its structure and a number of tokens.

    section   a Markdown heading and what follows it, up to the next heading
    block     a paragraph, list or fenced code block: text between blank lines
    sentence  ends with . ! ? or 。！？ (and closing quotes)

Blocks of a section are joined while they fit; a block that does not fit is split at sentences, a
sentence at its longest prefix that fits. Chunks never overlap, and together contain every character
of the document but the space between them, so that each can be extended by its neighbours
(small-to-big) and cited by its position.
"""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from pydantic import Field

from easyllm.core.config import Config

Span = tuple[int, int]
MAX_CHARACTERS = 16
"""Characters per token above which a text is taken as too long without being tokenized."""
_HEADING = re.compile(r"[ ]{0,3}(#{1,6})[ \t]+(.+?)[ \t]*#*[ \t]*$")
_SPACE = re.compile(r"\s+")
_FENCE = re.compile(r"[ ]{0,3}(`{3,}|~{3,})")
_SENTENCE_END = re.compile(r"(?:[.!?]+[\"')\]”’]*(?=\s)|[。！？]+[”’」』）]*|\n)\s*")


class ChunkConfig(Config):
    """How documents are split."""

    max_tokens: int = Field(
        default=256,
        ge=16,
        description="Maximum number of tokens of a chunk, counted by the embedding model.",
    )


@dataclass(frozen=True, slots=True)
class Chunk:
    """A part of a document.

    Attributes:
        start, end: its span of characters in the document.
        headings: the headings above it, outermost first.
    """

    start: int
    end: int
    headings: tuple[str, ...]


def split_document(
    text: str,
    offsets: Callable[[str], list[Span]],
    config: ChunkConfig,
    *,
    is_markdown: bool,
) -> list[Chunk]:
    """Returns the chunks of a document, in order.

    Args:
        text: the document.
        offsets: returns the span of each token of a text.
        config: the size of chunks.
        is_markdown: whether `#` begins a heading.
    """
    found = list[Chunk]()
    for headings, blocks in _sections(text, is_markdown=is_markdown):
        start: int | None = None
        end = 0
        for first, last in (p for block in blocks for p in _parts(text, block, offsets, config)):
            fits = start is not None and _fits(text[start:last], offsets, config.max_tokens)
            if not fits and start is not None:
                found.append(Chunk(start, end, headings))
                start = None
            start, end = (first if start is None else start), last
        if start is not None:
            found.append(Chunk(start, end, headings))
    return found


def _fits(text: str, offsets: Callable[[str], list[Span]], max_tokens: int) -> bool:
    """Whether a text has at most so many tokens; very long texts are not tokenized to find out."""
    return len(text) <= max_tokens * MAX_CHARACTERS and len(offsets(text)) <= max_tokens


def _sections(text: str, *, is_markdown: bool) -> Iterator[tuple[tuple[str, ...], list[Span]]]:
    """Yields the blocks of each section, with the headings above it.

    A heading is part of its section's first block.
    """
    path: list[tuple[int, str]] = []
    blocks, fence, at = list[Span](), "", 0
    start: int | None = None
    for line in text.splitlines(keepends=True):
        begin, at = at, at + len(line)
        mark = _FENCE.match(line) if is_markdown else None
        heading = _HEADING.match(line) if is_markdown and not fence else None
        if heading is not None:
            if start is not None:
                blocks.append((start, begin))
            if blocks:
                yield _names(path), [_trimmed(text, b) for b in blocks]
            level = len(heading[1])
            path = [p for p in path if p[0] < level] + [(level, heading[2])]
            blocks, start = [], begin
        elif mark is not None and not fence:
            fence = mark[1]
            start = begin if start is None else start
        elif fence:
            if mark is not None and mark[1].startswith(fence):
                fence = ""
        elif not line.strip():
            if start is not None and not _only_heading(text[start:begin], is_markdown=is_markdown):
                blocks.append((start, begin))
                start = None
        elif start is None:
            start = begin
    if start is not None:
        blocks.append((start, at))
    if blocks:
        yield _names(path), [_trimmed(text, b) for b in blocks]


def _only_heading(text: str, *, is_markdown: bool) -> bool:
    """Whether a block is a heading without text after it yet, which stays with the next block."""
    lines = text.strip().splitlines()
    return is_markdown and len(lines) == 1 and _HEADING.match(lines[0]) is not None


def _names(path: list[tuple[int, str]]) -> tuple[str, ...]:
    return tuple(name for _, name in path)


def _trimmed(text: str, span: Span) -> Span:
    """Returns a span without the space at its ends."""
    part = text[span[0] : span[1]]
    return span[0] + len(part) - len(part.lstrip()), span[0] + len(part.rstrip())


def _parts(
    text: str, block: Span, offsets: Callable[[str], list[Span]], config: ChunkConfig
) -> Iterator[Span]:
    """Yields a block, or its parts if it has too many tokens."""
    start, stop = block
    if _fits(text[start:stop], offsets, config.max_tokens):
        if start < stop:
            yield block
        return
    ends = [start + m.end() for m in _SENTENCE_END.finditer(text[start:stop])]
    begin = start
    for end in [*ends, stop]:
        if end <= begin:
            continue
        if text[begin:end].strip():
            whole = _trimmed(text, (begin, end))
            if _fits(text[slice(*whole)], offsets, config.max_tokens):
                yield whole
            else:
                yield from _cut(text, whole, offsets, config.max_tokens)
        begin = end


def _cut(
    text: str, span: Span, offsets: Callable[[str], list[Span]], max_tokens: int
) -> Iterator[Span]:
    """Yields the parts of a sentence that is too long, split between tokens."""
    begin, stop = span
    while begin < stop:
        end = min(stop, begin + max_tokens * MAX_CHARACTERS)
        tokens = offsets(text[begin:end])
        if len(tokens) > max_tokens:
            end = begin + max(1, min(tokens[max_tokens - 1][1], end - begin))
        if end < stop and not (text[end - 1].isspace() or text[end].isspace()):
            # in a word: better after the last space, if there is one in the second half
            middle = begin + (end - begin + 1) // 2
            breaks = [m.end() for m in _SPACE.finditer(text, middle, end)]
            end = breaks[-1] if breaks else end
        if text[begin:end].strip():
            yield _trimmed(text, (begin, end))
        begin = end


__all__ = ["Chunk", "ChunkConfig", "split_document"]
