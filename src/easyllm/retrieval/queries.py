"""Queries that a model makes of a question: a rewritten one, sub-questions, a made-up passage.

The model sees the question and the conversation, never a document. A reply that is empty, or far
longer than the question, is not used.
"""

import re
from collections.abc import Sequence

from easyllm.core.json_types import JsonObject
from easyllm.retrieval.generator import Generator

REWRITE = (
    "Rewrite the last question as one short search query that can be understood without the "
    "conversation. Keep its language, names and numbers. Reply with the query only."
)
HYDE = (
    "Write one short paragraph of an encyclopedia that answers the question, in the language of "
    "the question. Reply with the paragraph only."
)
SPLIT = (
    "Split the question into at most {n} simpler questions that can be answered separately, in its "
    "language. Write one question per line, without numbers. If it is simple, repeat it."
)
MAX_QUERY = 400
"""Characters above which a rewritten query is not used."""
_BULLET = re.compile(r"^\s*(?:[-*•]|\(?\d{1,2}[.):、])\s*")


def rewritten(
    question: str, history: Sequence[JsonObject], generator: Generator, max_tokens: int = 64
) -> str:
    """Returns the question as a search query; the question itself if the reply is not usable."""
    turns = [f"{m.get('role', 'user')}: {m.get('content', '')}" for m in history]
    asked = "\n".join([*turns[-6:], f"user: {question}"])
    reply = _reply(generator, REWRITE, asked, max_tokens)
    first = reply.splitlines()[0].strip().strip('"“”') if reply else ""
    return first if 0 < len(first) <= MAX_QUERY else question


def sub_questions(question: str, count: int, generator: Generator) -> list[str]:
    """Returns up to `count` simpler questions, without the question itself."""
    reply = _reply(generator, SPLIT.format(n=count), question, 48 * count)
    lines = (_BULLET.sub("", line).strip() for line in reply.splitlines())
    kept = [line for line in lines if 0 < len(line) <= MAX_QUERY and line != question]
    return list(dict.fromkeys(kept))[:count]


def made_up_passage(question: str, generator: Generator, max_tokens: int = 96) -> str:
    """Returns a hypothetical answer, or the question if the reply is empty.

    HyDE (Gao et al. 2022, arXiv 2212.10496): a wrong answer is still near to right ones.
    """
    return _reply(generator, HYDE, question, max_tokens) or question


def _reply(generator: Generator, instruction: str, text: str, max_tokens: int) -> str:
    messages: list[JsonObject] = [
        {"role": "system", "content": instruction},
        {"role": "user", "content": text},
    ]
    return generator.reply(messages, max_tokens).strip()


__all__ = ["made_up_passage", "rewritten", "sub_questions"]
