"""What a run trains on, as a recipe names it."""

from typing import Annotated, Literal

from pydantic import Field, PositiveInt

from easyllm.core.config import Config
from easyllm.core.kinds import Kinds

Paths = Annotated[tuple[str, ...], Field(min_length=1)]
DATA = Kinds("data", default="conversations")
"""What `data:` of a recipe may be; objectives register the kinds they take."""


class DataBase(Config):
    """What every kind of data has."""

    kind: str
    max_seq_len: int = Field(default=1024, ge=2)


class RowsConfig(DataBase):
    """Files of rows, of which an objective makes samples."""

    train: Paths
    eval: tuple[str, ...] = ()


class DataConfig(RowsConfig):
    """Files of conversations, and how they become samples."""

    kind: Literal["conversations"] = "conversations"
    train: Paths
    eval: tuple[str, ...] = ()
    max_seq_len: int = Field(default=1024, ge=2)
    overlong: Literal["cut", "drop"] = "cut"
    train_on: Literal["assistant", "all"] = "assistant"
    split_turns: bool = False
    """Whether every turn of the assistant becomes a sample of its own, with the turns before it as its prompt."""


class CorpusDataConfig(DataBase):
    """Token shards that `easyllm data build` made, cut into rows.

    Attributes:
        shards: their folder.
        validation: a folder of shards to evaluate on; by default the `validation` folder inside, where there is one.
        max_seq_len: tokens of a row; documents in a row are isolated from each other.
        eval_tokens: most tokens of an evaluation.
    """

    kind: Literal["corpus"] = "corpus"
    shards: str
    validation: str | None = None
    max_seq_len: int = Field(default=1024, ge=2)
    eval_tokens: PositiveInt = 2**16


class LabelledDataConfig(RowsConfig):
    """Rows of a text and a label (a class by its number, or a number to regress on), for a head of labels."""

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
