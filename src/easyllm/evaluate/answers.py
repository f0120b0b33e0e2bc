"""Evaluates question-answer files: the loss on the reference answers, and key recall.

Recall is the fraction of the model's generated answers that contain the expected key.
"""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from easyllm.batches.packing import pack, split_by_tokens
from easyllm.core.json_types import JsonObject
from easyllm.engine.llm import LLM
from easyllm.engine.params import SamplingParams
from easyllm.examples.conversations import conversations
from easyllm.examples.data_file import Row, read_rows
from easyllm.examples.prepare import prepare_conversations
from easyllm.train.objectives import LanguageModel

BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Answer:
    """The model's answer to one question.

    Attributes:
        question: the question.
        expected: the reference answer.
        answer: the model's answer.
        key: the text that a correct answer contains.
        correct: whether the model's answer contains the key.
    """

    question: str
    expected: str
    answer: str
    key: str
    correct: bool


@dataclass(frozen=True, slots=True)
class AnswerReport:
    """Result of an evaluation.

    Attributes:
        loss_nats: mean loss per trained token in nats.
        num_rows: number of samples.
        num_tokens: number of trained tokens, those that contribute to the loss.
        recall: fraction of the answers that contain their key; None without generated answers.
        answers: the generated answers.
    """

    loss_nats: float
    num_rows: int
    num_tokens: int
    recall: float | None
    answers: tuple[Answer, ...]

    def as_dict(self) -> JsonObject:
        """Returns the fields as a dict."""
        return asdict(self)


def evaluate_answers(
    llm: LLM, path: Path, *, max_tokens: int = 32, generate: bool = True
) -> AnswerReport:
    """Evaluates a model on a file of conversations.

    Args:
        llm: the model.
        path: rows in any supported format. The model also generates an answer for each row with a
            `key` (greedily), which counts as recalled if it contains the key.
        max_tokens: maximum number of tokens per generated answer.
        generate: whether to generate answers.

    Raises:
        DataError: the file or a row is invalid.
    """
    rows = list(read_rows(path))
    chats = list(conversations(rows))
    samples, account = prepare_conversations(
        chats, llm.tokenizer, max_seq_len=llm.model.config.max_seq_len
    )
    groups = split_by_tokens(samples, BATCH_TOKENS)
    figures = LanguageModel().evaluate(llm.model, (pack(group) for group in groups))
    keyed = [
        (row, chat.messages) for row, chat in zip(rows, chats, strict=True) if "key" in row.values
    ]
    answers = _generate_answers(llm, keyed, max_tokens) if generate and keyed else ()
    recall = sum(a.correct for a in answers) / len(answers) if answers else None
    return AnswerReport(
        loss_nats=figures["loss_nats"],
        num_rows=account.samples,
        num_tokens=account.trained_tokens,
        recall=recall,
        answers=answers,
    )


def key_in_text(key: str, text: str) -> bool:
    """Whether `text` contains `key` as a complete word, after NFKC normalization and lowercasing.

    The key is not complete if a letter, digit, `_` or `-` is adjacent to it. Han characters may be
    adjacent, because Chinese is written without spaces.

    >>> key_in_text("2048", "It packs 2048 tokens."), key_in_text("2048", "20480")
    (True, False)
    >>> key_in_text("巴黎", "法国的首都是巴黎。"), key_in_text("Ag", "符号是Ag。")
    (True, True)
    """
    key, text = _fold(key), _fold(text)
    adjacent = "(?:-|[^\\W\u4e00-\u9fff])"  # `-`, or a word character other than Han
    return re.search(f"(?<!{adjacent}){re.escape(key)}(?!{adjacent})", text) is not None


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def _generate_answers(
    llm: LLM, keyed: Sequence[tuple[Row, list[JsonObject]]], max_tokens: int
) -> tuple[Answer, ...]:
    prompts = [messages[:-1] for _, messages in keyed]
    done = llm.chat(prompts, SamplingParams(temperature=0, max_tokens=max_tokens))
    return tuple(
        Answer(
            question=str(messages[-2]["content"]),
            expected=str(messages[-1]["content"]),
            answer=completion.text.strip(),
            key=str(row.values["key"]),
            correct=key_in_text(str(row.values["key"]), completion.text),
        )
        for (row, messages), completion in zip(keyed, done, strict=True)
    )
