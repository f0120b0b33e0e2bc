"""Keys of a row that would change what is trained if they were read, and are not: each is refused by name.

Metadata (`id`, `source`, `category`, `language`, `score`, ...) says nothing about the loss, and any key may be such; the ones
here are those that other trainers read. A key that holds nothing (null, "", [], {}) asks for nothing and is passed over.
"""

from typing import Any

from easyllm.core.errors import DataError
from easyllm.data.row import Row

_WEIGHT = (
    "all rows weigh the same: remove a row of weight 0, repeat one that should count more, or put weight 0 into the "
    "messages that are not to be trained"
)
_TOKENS = "rows are given as text and the loss follows from who speaks: remove it, or mask messages with weight 0"
_MEDIA = "only text is supported: remove it, or the row"
_PAIR = "the row compares answers: give chosen and rejected, or remove it to train on the conversation alone"
_TEMPLATE = "every row is rendered by the model's own chat template: remove it"
_CONTEXT = "the answer would be learned without it: put it into the question"

REFUSED: dict[str, str] = (
    dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight", "example_weight"), _WEIGHT)
    | dict.fromkeys(("loss", "loss_scale", "loss_weights", "token_weights"), _WEIGHT)
    | dict.fromkeys(("train", "training", "trainable"), _WEIGHT)
    | dict.fromkeys(("labels", "loss_mask", "mask", "train_mask", "assistant_masks"), _TOKENS)
    | dict.fromkeys(("train_detail", "training_detail"), _TOKENS)
    | dict.fromkeys(("input_ids", "token_ids", "attention_mask", "completion_mask"), _TOKENS)
    | dict.fromkeys(("images", "image", "videos", "video", "audios", "audio", "speech"), _MEDIA)
    | dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PAIR)
    | dict.fromkeys(("margin",), "answers are compared without a margin: remove it")
    | dict.fromkeys(("chat_template", "chat_template_kwargs", "documents"), _TEMPLATE)
)
"""Key -> why it is not read, and what to do."""
FLAT_FORMATS = ("alpaca", "prompt-completion")
"""Formats of one question and one answer, where `context` belongs to the question."""
CONTEXT_KEYS = ("context", "passage")
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "mask": ("User", "user"),  # NeMo's name of the turns without a loss, which is what is done here
}


def check_keys(row: Row, format: str, *, read: tuple[str, ...] = ()) -> None:
    """Refuses a row with a key that asks for what is not done.

    Args:
        format: of the row, as it was detected.
        read: keys of `REFUSED` that this kind of row does read.

    Raises:
        DataError: there is such a key; it and the row's place are named.
    """
    for key, remedy in REFUSED.items():
        if key in row.values and key not in read and _asks(key, row.values[key]):
            raise DataError(f"{row.place} has the key {key!r}, which is not read; {remedy}")
    if format in FLAT_FORMATS:
        for key in CONTEXT_KEYS:
            if row.values.get(key):
                raise DataError(f"{row.place} has the key {key!r}, which is not read; {_CONTEXT}")


def _asks(key: str, value: Any) -> bool:
    """Whether the value is other than nothing, and other than what is done anyway."""
    if REFUSED[key] is _WEIGHT:
        return value is not None and value != 1
    return not (value is None or value in ("", [], {}) or value in _HARMLESS.get(key, ()))
