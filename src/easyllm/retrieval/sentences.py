"""Sentences of a text with their positions, in scripts with and without spaces."""

import re

Span = tuple[int, int]
_END = re.compile(r"(?:[.!?]+[\"')\]”’]*(?=\s|$)|[。！？]+[”’」』）]*|\n+)\s*")
_ABBREVIATION = re.compile(
    r"(?:\b(?:e\.g|i\.e|etc|vs|cf|Mr|Mrs|Ms|Dr|Prof|St|No|Fig|approx)|\b[A-Z])\.$"
)


def sentence_spans(text: str) -> list[Span]:
    """Returns the spans of the sentences of `text`, without the space around them.

    >>> sentence_spans("One, e.g. two. 三。四")
    [(0, 14), (15, 17), (17, 18)]
    """
    found, start = list[Span](), 0
    for end in [*(m.end() for m in _END.finditer(text)), len(text)]:
        part = text[start:end]
        if end < len(text) and _ABBREVIATION.search(part.rstrip()):
            continue
        if part.strip():
            begin = start + len(part) - len(part.lstrip())
            found.append((begin, start + len(part.rstrip())))
        start = end
    return found


__all__ = ["sentence_spans"]
