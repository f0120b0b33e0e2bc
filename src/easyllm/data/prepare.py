"""Conversations to samples: template, loss mask, length limit, and an account of what happened."""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Literal

from easyllm.core.errors import DataError
from easyllm.data.conversations import Conversation
from easyllm.data.packing import Sample
from easyllm.tokenizer.tokenizer import Tokenizer

Overlong = Literal["cut", "drop"]


@dataclass(slots=True)
class Account:
    """What became of the rows, reported before the first step."""

    rows: int = 0
    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    cut: int = 0
    dropped_overlong: int = 0
    dropped_untrained: int = 0

    @property
    def prompt_tokens(self) -> int:
        return self.tokens - self.trained_tokens

    def summary(self) -> str:
        """One line for people."""
        parts = [
            f"{self.samples} of {self.rows} rows",
            f"{self.trained_tokens} trained + {self.prompt_tokens} prompt tokens",
        ]
        if self.cut:
            parts.append(f"{self.cut} cut at the length limit")
        if self.dropped_overlong:
            parts.append(f"{self.dropped_overlong} over the length limit dropped")
        if self.dropped_untrained:
            parts.append(f"{self.dropped_untrained} without a trained token dropped")
        return ", ".join(parts)

    def as_dict(self) -> dict[str, int]:
        return asdict(self) | {"prompt_tokens": self.prompt_tokens}


def prepare_conversations(
    conversations: Iterable[Conversation],
    tokenizer: Tokenizer,
    *,
    max_seq_len: int,
    overlong: Overlong = "cut",
    train_on: Literal["assistant", "all"] = "assistant",
) -> tuple[list[Sample], Account]:
    """Samples of conversations under the tokenizer's chat template.

    Args:
        max_seq_len: most ids a sample may have, the last one (never an input) included.
        overlong: what happens to a longer one: `cut` at the end, or `drop`.
        train_on: the assistant's words with the end of their turns, or every token.

    Raises:
        DataError: the template refuses a row (its place is named), or nothing is left to train.
    """
    samples, account = [], Account()
    for conversation in conversations:
        account.rows += 1
        try:
            encoded = tokenizer.encode_chat(
                conversation.messages, tools=conversation.tools, with_mask=train_on == "assistant"
            )
        except DataError as error:
            raise DataError(f"{conversation.place}: {error}") from None
        ids, mask = encoded.token_ids, encoded.mask
        if len(ids) > max_seq_len:
            if overlong == "drop":
                account.dropped_overlong += 1
                continue
            account.cut += 1
            ids, mask = ids[:max_seq_len], None if mask is None else mask[:max_seq_len]
        sample = Sample.from_mask(ids, mask)
        if sample.num_trained == 0:
            account.dropped_untrained += 1
            continue
        samples.append(sample)
        account.samples += 1
        account.tokens += len(sample.token_ids)
        account.trained_tokens += sample.num_trained
    if not samples:
        raise DataError(
            f"no row is left to train on ({account.summary()}); raise max_seq_len={max_seq_len} or check the data"
        )
    return samples, account
