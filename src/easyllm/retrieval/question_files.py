"""Reads questions for an evaluation: SQuAD's format, or rows of a user's own questions.

    SQuAD   {"data": [{"paragraphs": [{"context", "qas": [{"question", "answers": [{"text"}]}]}]}]}
    rows    {"question": "...", "answer": "...", "document": "guide.md"}     JSON lines

Rajpurkar et al. 2016 (arXiv 1606.05250). A row needs an answer or a document, or both.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from easyllm.core.errors import DataError, read_failure
from easyllm.examples.data_file import read_rows


@dataclass(frozen=True, slots=True, kw_only=True)
class Question:
    """A question with what is known of its answer.

    Attributes:
        text: the question.
        answers: texts of correct answers; may be empty.
        document: name of the document that contains the answer, or None.
    """

    text: str
    answers: tuple[str, ...] = ()
    document: str | None = None


@dataclass(frozen=True, slots=True)
class QuestionSet:
    """Questions, and for SQuAD's format the paragraphs that they are about, by name."""

    questions: tuple[Question, ...]
    paragraphs: dict[str, str]


def read_questions(path: Path, limit: int | None = None) -> QuestionSet:
    """Reads a file of questions.

    Args:
        path: `.json` in SQuAD's format, or `.jsonl` with one question per line.
        limit: how many questions to read, from the beginning; all paragraphs are read.

    Raises:
        DataError: the file does not have the format; the message names the first problem.
    """
    if path.suffix.lower() == ".json":
        found = _squad(path)
    else:
        found = QuestionSet(tuple(_row(row.values, row.location) for row in read_rows(path)), {})
    if not found.questions:
        raise DataError(f"{path} contains no question; add some")
    return QuestionSet(found.questions[:limit], found.paragraphs)


def _squad(path: Path) -> QuestionSet:
    try:
        content = json.loads(path.read_bytes())
    except OSError as error:
        raise DataError(
            f"the questions {str(path)!r} cannot be read ({read_failure(error)}); give a file in "
            "SQuAD's format"
        ) from None
    except ValueError as error:
        raise DataError(f"{path} is not JSON ({error}); give a file in SQuAD's format") from None
    questions, paragraphs, names = list[Question](), dict[str, str](), dict[str, str]()
    try:
        for article in content["data"]:
            for paragraph in article["paragraphs"]:
                text = _text(paragraph["context"], "context")
                name = names.setdefault(text, f"paragraph-{len(names) + 1}")
                paragraphs[name] = text
                questions += (_squad_question(each, name) for each in paragraph["qas"])
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is not in SQuAD's format ({type(error).__name__}: {error}); expected "
            '{"data": [{"paragraphs": [{"context", "qas": [{"question", "answers"}]}]}]}'
        ) from None
    return QuestionSet(tuple(questions), paragraphs)


def _squad_question(values: dict[str, Any], paragraph: str) -> Question:
    answers = tuple(_text(answer["text"], "text") for answer in values.get("answers", ()))
    question = _text(values["question"], "question")
    return Question(text=question, answers=answers, document=paragraph)


def _text(value: object, key: str) -> str:
    """Returns a value that must be a text, and not an empty one.

    Raises:
        TypeError: it is not.
    """
    if not isinstance(value, str) or not value.strip():
        raise TypeError(f"{key} is {value!r}, not a text")
    return value


def _row(values: dict[str, Any], location: str) -> Question:
    question, answer, document = (values.get(k) for k in ("question", "answer", "document"))
    if not isinstance(question, str) or not question.strip():
        raise DataError(f"{location} has no text under 'question'; add it")
    answers = (answer,) if isinstance(answer, str) else answer or ()
    if not isinstance(answers, list | tuple) or not all(isinstance(a, str) for a in answers):
        raise DataError(f"{location} has answer {answer!r}, expected a text or a list of texts")
    if not all(each.strip() for each in answers):  # found in no passage: recall would be 0
        raise DataError(f"{location} has an empty answer; add its text, or leave it out")
    if document is not None and not isinstance(document, str):
        raise DataError(f"{location} has document {document!r}, expected the name of a document")
    if not answers and document is None:
        raise DataError(
            f"{location} has neither 'answer' nor 'document', so no passage can be judged; add one"
        )
    return Question(text=question, answers=tuple(answers), document=document)


__all__ = ["Question", "QuestionSet", "read_questions"]
