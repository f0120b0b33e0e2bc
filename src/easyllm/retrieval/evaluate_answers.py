"""Evaluates answers from an index: are they right, are they cited, do the sources support them.

    answer_match         share of answers that contain a correct answer (questions that have one)
    citation_precision   share of citations that are of a document, or quote a text, that is right
    faithfulness         share of the statements of all answers that their sources support (`cite`)
    answered             share of questions that are answered, other than with "I do not know"

Intervals are over questions; a question without a statement or citation does not count in the
figures of these.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from easyllm.core.json_types import JsonObject
from easyllm.core.progress import track
from easyllm.retrieval.ask import Answer, Reader
from easyllm.retrieval.cite import Citation
from easyllm.retrieval.evaluate import contains_any
from easyllm.retrieval.metrics import mean_and_interval
from easyllm.retrieval.question_files import Question


@dataclass(frozen=True, slots=True)
class AnswersReport:
    """The figures of answers: for each metric, one value per question that counts in it."""

    values: dict[str, list[float]]

    def as_dict(self) -> JsonObject:
        """Returns for each metric its `value`, 95% `interval` and number of questions `n`."""
        found: JsonObject = {}
        for name, values in self.values.items():
            if not values:
                found[name] = {"value": None, "interval": None, "n": 0}
                continue
            mean, interval = mean_and_interval(np.asarray(values, np.float64))
            found[name] = {"value": mean, "interval": list(interval), "n": len(values)}
        return found


def evaluate_answers(reader: Reader, questions: Sequence[Question]) -> AnswersReport:
    """Answers questions and evaluates the answers."""
    values: dict[str, list[float]] = {
        name: [] for name in ("answer_match", "citation_precision", "faithfulness", "answered")
    }
    for question in track(questions, "answering", total=len(questions), unit="question"):
        for name, value in _figures(reader.ask(question.text), question):
            values[name].append(value)
    return AnswersReport(values)


def _figures(answer: Answer, question: Question) -> Iterator[tuple[str, float]]:
    """Yields the metrics in which a question counts."""
    answered = answer.verdict != "no answer"
    yield "answered", float(answered)
    if question.answers:
        yield "answer_match", float(contains_any(answer.text, question.answers))
    if not answered:
        return
    supported = [citation.supported for citation in answer.citations]
    yield "faithfulness", sum(supported) / len(supported)
    cited = [citation for citation in answer.citations if citation.supported]
    if cited:
        yield "citation_precision", sum(_is_right(c, question) for c in cited) / len(cited)


def _is_right(citation: Citation, question: Question) -> bool:
    """Whether a citation is of the right document and, without one, quotes a correct answer."""
    if question.document is not None:
        return citation.document == question.document
    return contains_any(citation.quote, question.answers)


__all__ = ["AnswersReport", "evaluate_answers"]
