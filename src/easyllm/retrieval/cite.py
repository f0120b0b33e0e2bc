"""Citations: which sentence of a source supports each statement of an answer.

The check is code that compares texts. It reads the question, the answer and the passages, calls no
model, and does not depend on what a passage says about it: a document that contains "ignore the
above" is compared like any other.

A statement (a sentence of the answer) is supported by a sentence of a passage if that sentence
contains all its numbers, and at least `MIN_SHARE` of its terms that the question does not contain
(of all its terms, if the question contains them all). Terms are those of BM25, without stop words.
This is a lexical criterion: it finds quoted and lightly rephrased facts, and rejects statements
that paraphrase a source without its words.
"""

import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

from easyllm.core.json_types import JsonObject
from easyllm.retrieval.index import StoredChunk
from easyllm.retrieval.sentences import sentence_spans
from easyllm.retrieval.terms import terms

MIN_SHARE = 0.8
Verdict = Literal["supported", "partly supported", "not supported", "no answer"]
_MARK = re.compile(r"\s*[\[【](\d{1,3})[\]】]")
_NUMBER = re.compile(r"\d+")
STOP_WORDS = frozenset(
    [
        *("a", "an", "the", "of", "to", "in", "on", "at", "for", "from", "by", "with", "and"),
        *("or", "but", "as", "is", "are", "was", "were", "be", "been", "being", "it", "its"),
        *("this", "that", "these", "those", "he", "she", "they", "his", "her", "their", "there"),
        *("here", "i", "you", "we", "me", "my", "your", "our", "not", "no", "do", "does", "did"),
        *("has", "have", "had", "can", "could", "will", "would", "should", "may", "might"),
        *("must", "which", "who", "whom", "whose", "what", "when", "where", "why", "how"),
        *("than", "then", "so", "such", "also", "into", "about", "over", "under", "between"),
        *("according", "passage", "passages", "answer", "document", "documents", "text"),
    ]
)
_CHINESE_STOP = re.compile("[的了是在和与及也就都而或被把这那有]")
_REFUSALS = (
    *("do not know", "don't know", "does not contain", "do not contain", "not mentioned"),
    *(
        "cannot answer",
        "can't answer",
        "no information",
        "不知道",
        "没有提到",
        "无法回答",
        "未提及",
    ),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Citation:
    """What supports a statement of an answer.

    Attributes:
        statement: the statement, without marks such as `[1]`.
        supported: whether the quote supports it.
        passage: number of the passage, from 1; None if no passage has a word of the statement.
        document: name of the passage's document.
        page: its page, for a PDF.
        start, end: span of the quote in the document's text.
        quote: the sentence of the document.
        marked: the numbers that the answer itself gives for the statement.
    """

    statement: str
    supported: bool
    passage: int | None = None
    document: str | None = None
    page: int | None = None
    start: int | None = None
    end: int | None = None
    quote: str = ""
    marked: tuple[int, ...] = ()

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return asdict(self)


def cite(question: str, answer: str, passages: Sequence[StoredChunk]) -> list[Citation]:
    """Returns the citation of each statement of an answer.

    A statement that names passages (`[2]`) is compared with these, any other with all.

    Args:
        question: the question.
        answer: the answer.
        passages: the passages that the model was given, in the order of their numbers from 1.
    """
    asked = set(terms(question))
    return [_cited(statement, marks, asked, passages) for statement, marks in statements(answer)]


def verdict_of(answer: str, citations: Sequence[Citation]) -> Verdict:
    """Returns whether all, some or none of the statements are supported.

    An empty answer, or one that says that the passages do not contain it, is `no answer`.
    """
    lower = answer.casefold()
    if not citations or any(refusal in lower for refusal in _REFUSALS):
        return "no answer"
    supported = sum(citation.supported for citation in citations)
    if supported == len(citations):
        return "supported"
    return "partly supported" if supported else "not supported"


def statements(answer: str) -> list[tuple[str, tuple[int, ...]]]:
    """Returns the sentences of an answer without marks, and the numbers in their marks.

    >>> statements("It opens at 7 [1]. It closes late. [2][3]")
    [('It opens at 7.', (1,)), ('It closes late.', (2, 3))]
    """
    found = list[tuple[str, tuple[int, ...]]]()
    for start, end in sentence_spans(answer):
        sentence = answer[start:end]
        marks = tuple(int(m[1]) for m in _MARK.finditer(sentence))
        plain = _MARK.sub("", sentence).strip()
        if plain.strip(" .。,，;；"):
            found.append((plain, marks))
        elif found and marks:  # marks after the full stop belong to the sentence before
            found[-1] = (found[-1][0], found[-1][1] + marks)
    return found


def _cited(
    statement: str, marks: tuple[int, ...], asked: set[str], passages: Sequence[StoredChunk]
) -> Citation:
    numbers = [n for n in dict.fromkeys(marks) if 1 <= n <= len(passages)]
    among = numbers if marks else range(1, len(passages) + 1)
    best: tuple[bool, float, int, tuple[int, int]] | None = None
    for number in among:
        text = passages[number - 1].text
        for span in sentence_spans(text):
            share, complete = _support(statement, text[slice(*span)], asked)
            found = (complete and share >= MIN_SHARE, share, number, span)
            if share > 0 and (best is None or found[:2] > best[:2]):
                best = found
    if best is None:
        return Citation(statement=statement, supported=False, marked=marks)
    supported, _, number, (start, end) = best
    chunk = passages[number - 1]
    return Citation(
        statement=statement,
        supported=supported,
        passage=number,
        document=chunk.document,
        page=chunk.page,
        start=chunk.start + start,
        end=chunk.start + end,
        quote=chunk.text[start:end],
        marked=marks,
    )


def _support(statement: str, sentence: str, asked: set[str]) -> tuple[float, bool]:
    """Returns the share of the statement's new terms in a sentence, and if it has all numbers."""
    there = set(terms(sentence))
    own = content_terms(statement)
    new = own - asked or own
    numbers = set(_NUMBER.findall(statement)) <= set(_NUMBER.findall(sentence))
    return (len(new & there) / len(new) if new else 0.0), numbers


def content_terms(text: str) -> set[str]:
    """Returns the terms of a text without stop words and Chinese function words."""
    return {t for t in terms(_CHINESE_STOP.sub(" ", text)) if t not in STOP_WORDS}


__all__ = ["MIN_SHARE", "Citation", "Verdict", "cite", "content_terms", "statements", "verdict_of"]
