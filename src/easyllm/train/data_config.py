"""Configuration of training data."""

from typing import Annotated, ClassVar, Literal

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from easyllm.core.config import Config
from easyllm.core.kinds import Kinds
from easyllm.core.paths import PathText

ONE_OR_MORE = BeforeValidator(
    lambda value: (value,) if isinstance(value, str) else value,
    json_schema_input_type=str | tuple[str, ...],
)
"""Lets a list of strings be written as a single string."""
Paths = Annotated[tuple[PathText, ...], Field(min_length=1), ONE_OR_MORE]
DATA = Kinds("data", default="conversations")
"""The kinds that a recipe may set under `data:`; objectives register the kinds they accept."""


class DataBase(Config):
    """Settings shared by all kinds of data."""

    has_chats: ClassVar[bool] = False
    """Whether rows are rendered with the chat template, so that responses end with its tokens."""

    kind: str = Field(description="Name of the kind of data; each subclass sets its own.")
    max_seq_len: int = Field(
        default=1024, ge=2, description="Maximum length of a sequence, in tokens."
    )

    @property
    def files(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The files to train and to evaluate on; none for generated data."""
        return (), ()

    @property
    def has_eval(self) -> bool:
        """Whether there are rows to evaluate on."""
        return bool(self.files[1])


class GeneratedConfig(DataBase):
    """Rows that an objective generates from a seed, without files."""

    count: PositiveInt = Field(default=1024, description="Number of rows to train on.")
    held_out: NonNegativeInt = Field(
        default=200, description="Number of other rows to evaluate on; 0 evaluates on none."
    )
    seed: NonNegativeInt = Field(default=0, description="Seed of the rows.")

    @property
    def has_eval(self) -> bool:
        """Whether there are rows to evaluate on."""
        return self.held_out > 0


class RowsConfig(DataBase):
    """Files of rows, which an objective converts to samples."""

    max_seq_len: int = Field(
        default=1024, ge=2, description="Maximum length of a sample, in tokens."
    )
    train: Paths = Field(description="Files to train on.")
    eval: Annotated[tuple[PathText, ...], ONE_OR_MORE] = Field(
        default=(), description="Files to evaluate on."
    )

    @property
    def files(self) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The files to train and to evaluate on."""
        return self.train, self.eval


class ChatRowsConfig(RowsConfig):
    """Files of rows that the chat template renders."""

    has_chats: ClassVar[bool] = True

    overlong: Literal["cut", "drop"] = Field(
        default="cut",
        description="Whether samples that are too long are truncated (`cut`) or dropped (`drop`).",
    )


class DataConfig(ChatRowsConfig):
    """Files of conversations, and how they are converted to samples."""

    kind: Literal["conversations"] = "conversations"
    train_on: Literal["assistant", "all"] = Field(
        default="assistant",
        description="Which tokens carry a loss: those of the assistant's turns, or all.",
    )
    split_turns: bool = Field(
        default=False,
        description="Whether each assistant turn becomes a separate sample, with the turns before "
        "it as prompt.",
    )


class PreferenceDataConfig(ChatRowsConfig):
    """Files of preference pairs (chosen and rejected) or rankings of several responses."""

    kind: Literal["preferences"] = "preferences"


class UnpairedPreferenceDataConfig(ChatRowsConfig):
    """Files of single responses with a binary label: true for a good one, false for a bad one."""

    kind: Literal["unpaired_preferences"] = "unpaired_preferences"


class RatingsDataConfig(ChatRowsConfig):
    """Files of single responses with a numeric score."""

    kind: Literal["ratings"] = "ratings"
    score_key: str = Field(default="score", description="Key of the score in a row.")


class CorpusDataConfig(DataBase):
    """Token shards built by `easyllm data build`, split into rows."""

    kind: Literal["corpus"] = "corpus"
    shards: PathText = Field(description="Folder of the shards.")
    validation: PathText | None = Field(
        default=None,
        description="Folder of shards to evaluate on; by default the `validation` folder inside "
        "shards, if it exists.",
    )
    max_seq_len: int = Field(
        default=1024,
        ge=2,
        description="Tokens per row; documents packed into the same row do not attend to each "
        "other.",
    )
    eval_tokens: PositiveInt = Field(
        default=2**16, description="Maximum number of tokens per evaluation."
    )


class TextDataConfig(RowsConfig):
    """Rows of a text, without a chat template."""

    kind: Literal["texts"] = "texts"
    text_key: str = Field(default="text", description="Key of the text in a row.")


class LabelledDataConfig(RowsConfig):
    """Rows of a text and a label: a class index, or a number for regression."""

    kind: Literal["labels"] = "labels"
    text_key: str = Field(default="text", description="Key of the text in a row.")
    label_key: str = Field(default="label", description="Key of the label in a row.")


class TextPairsConfig(RowsConfig):
    """Rows of a query and a matching text, optionally with texts that do not match."""

    kind: Literal["text_pairs"] = "text_pairs"
    query_key: str = Field(default="query", description="Key of the query in a row.")
    positive_key: str = Field(default="positive", description="Key of the matching text in a row.")
    negatives_key: str = Field(
        default="negatives",
        description="Key of a list of texts that do not match, which a row may lack.",
    )


__all__ = [
    "DATA",
    "ChatRowsConfig",
    "CorpusDataConfig",
    "DataBase",
    "DataConfig",
    "GeneratedConfig",
    "LabelledDataConfig",
    "Paths",
    "PreferenceDataConfig",
    "RatingsDataConfig",
    "RowsConfig",
    "TextDataConfig",
    "TextPairsConfig",
    "UnpairedPreferenceDataConfig",
]
