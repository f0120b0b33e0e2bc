"""Question and answer files: the loss on the given answers, and whether the model's own hold the key."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from easyllm.batches.packing import pack, split_by_tokens
from easyllm.engine.llm import LLM
from easyllm.engine.request import SamplingParams
from easyllm.examples.conversations import conversations
from easyllm.examples.data_file import Row, read_rows
from easyllm.examples.prepare import prepare_conversations
from easyllm.train.loop import mean_loss
from easyllm.train.objectives import LanguageModel

BATCH_TOKENS = 2048


@dataclass(frozen=True, slots=True)
class Answer:
    """One question, the answer expected, the model's own, and whether that holds the key."""

    question: str
    expected: str
    answer: str
    key: str
    correct: bool


@dataclass(frozen=True, slots=True)
class AnswerReport:
    """Mean loss a trained token in nats; with keys also the share of answers that hold theirs."""

    loss_nats: float
    num_rows: int
    num_tokens: int
    recall: float | None
    answers: tuple[Answer, ...]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def evaluate_answers(
    llm: LLM, path: Path, *, max_tokens: int = 32, generate: bool = True
) -> AnswerReport:
    """Evaluates a model on a file of conversations.

    Args:
        path: rows in any known format; a row with `key` is also answered by the model (greedily, at most
            `max_tokens` tokens) and counts as recalled when the key stands in the answer.

    Raises:
        DataError: the file or a row is wrong.
    """
    rows = list(read_rows(path))
    chats = list(conversations(rows))
    samples, account = prepare_conversations(
        chats, llm.tokenizer, max_seq_len=llm.model.config.max_seq_len
    )
    groups = split_by_tokens(samples, BATCH_TOKENS)
    loss = mean_loss(llm.model, LanguageModel(), (pack(group) for group in groups))
    keyed = [
        (row, chat.messages) for row, chat in zip(rows, chats, strict=True) if "key" in row.values
    ]
    answers = _ask(llm, keyed, max_tokens) if generate and keyed else ()
    recall = sum(a.correct for a in answers) / len(answers) if answers else None
    return AnswerReport(loss, account.samples, account.trained_tokens, recall, answers)


def key_in_text(key: str, text: str) -> bool:
    """Whether `key` stands in `text` as whole tokens, after NFKC and lower-casing.

    Letters, digits, `_` and `-` on either side make it part of another token.

    >>> key_in_text("2048", "It packs 2048 tokens."), key_in_text("2048", "20480")
    (True, False)
    """
    key, text = _fold(key), _fold(text)
    return re.search(rf"(?<![\w-]){re.escape(key)}(?![\w-])", text) is not None


def _fold(text: str) -> str:
    return unicodedata.normalize("NFKC", text).lower()


def _ask(
    llm: LLM, keyed: Sequence[tuple[Row, list[dict[str, Any]]]], max_tokens: int
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
