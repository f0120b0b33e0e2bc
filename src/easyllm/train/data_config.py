"""Configuration of training data."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from easyllm.core.config import Config
from easyllm.core.kinds import Kinds

Paths = Annotated[tuple[str, ...], Field(min_length=1)]
DATA = Kinds("data", default="conversations")
"""The kinds that a recipe may set under `data:`; objectives register the kinds they accept."""


class DataBase(Config):
    """Settings shared by all kinds of data.

    Attributes:
        max_seq_len: maximum length of a sequence, in tokens.
    """

    kind: str
    max_seq_len: int = Field(default=1024, ge=2)


class RowsConfig(DataBase):
    """Files of rows, which an objective converts to samples.

    Attributes:
        train: files to train on.
        eval: files to evaluate on.
    """

    train: Paths
    eval: tuple[str, ...] = ()


class DataConfig(RowsConfig):
    """Files of conversations, and how they are converted to samples.

    Attributes:
        train: files to train on.
        eval: files to evaluate on.
        max_seq_len: maximum length of a sample, in tokens.
        overlong: whether samples that are too long are truncated (`cut`) or dropped.
        train_on: which tokens carry a loss: the assistant's turns, or all.
    """

    kind: Literal["conversations"] = "conversations"
    train: Paths
    eval: tuple[str, ...] = ()
    max_seq_len: int = Field(default=1024, ge=2)
    overlong: Literal["cut", "drop"] = "cut"
    train_on: Literal["assistant", "all"] = "assistant"
    split_turns: bool = False
    """Whether each assistant turn becomes a separate sample, with the turns before it as prompt."""


class CorpusDataConfig(DataBase):
    """Token shards built by `easyllm data build`, split into rows.

    Attributes:
        shards: folder of the shards.
        validation: folder of shards to evaluate on; by default the `validation` folder inside
            `shards`, if it exists.
        max_seq_len: tokens per row; documents packed into the same row do not attend to each other.
        eval_tokens: maximum number of tokens per evaluation.
    """

    kind: Literal["corpus"] = "corpus"
    shards: str
    validation: str | None = None
    max_seq_len: int = Field(default=1024, ge=2)
    eval_tokens: PositiveInt = 2**16


class LabelledDataConfig(RowsConfig):
    """Rows of a text and a label: a class index, or a number for regression.

    Attributes:
        train: files to train on.
        eval: files to evaluate on.
        text_key, label_key: keys of the text and of the label in a row.
        max_seq_len: maximum length of a sample, in tokens.
    """

    kind: Literal["labels"] = "labels"
    train: Paths
    eval: tuple[str, ...] = ()
    text_key: str = "text"
    label_key: str = "label"
    max_seq_len: int = Field(default=1024, ge=2)


__all__ = [
    "DATA",
    "CorpusDataConfig",
    "DataBase",
    "DataConfig",
    "LabelledDataConfig",
    "Paths",
    "RowsConfig",
]
