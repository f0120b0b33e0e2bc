"""Rejects rows with keys that would change what is trained, but that are not supported.

The keys listed here are those that other trainers read. Any other key may be metadata (`id`,
`source`, `category`, `language`, `score`, ...), which does not affect the loss. A key with an empty
value (null, "", [], {}) has no effect and is ignored.
"""

from typing import Any

from easyllm.core.errors import DataError
from easyllm.corpus.files.row import Row

_WEIGHT = (
    "all rows have the same weight: remove a row of weight 0, repeat one that should count more, "
    "or set weight 0 on the messages that should not be trained"
)
_TOKENS = (
    "rows are given as text and the loss mask follows from the roles: remove the key, or mask "
    "messages with weight 0"
)
_MEDIA = "only text is supported: remove the key or the row"
_PAIR = (
    "the row compares responses: give both chosen and rejected, or remove the key to train on the "
    "conversation alone"
)
_TEMPLATE = "every row is rendered with the model's own chat template: remove the key"
_CONTEXT = "the response would be trained without it: put it into the question"

REFUSED: dict[str, str] = (
    dict.fromkeys(("weight", "weights", "sample_weight", "loss_weight", "example_weight"), _WEIGHT)
    | dict.fromkeys(("loss", "loss_scale", "loss_weights", "token_weights"), _WEIGHT)
    | dict.fromkeys(("train", "training", "trainable"), _WEIGHT)
    | dict.fromkeys(("labels", "loss_mask", "mask", "train_mask", "assistant_masks"), _TOKENS)
    | dict.fromkeys(("train_detail", "training_detail"), _TOKENS)
    | dict.fromkeys(("input_ids", "token_ids", "attention_mask", "completion_mask"), _TOKENS)
    | dict.fromkeys(("images", "image", "videos", "video", "audios", "audio", "speech"), _MEDIA)
    | dict.fromkeys(("chosen", "rejected", "rejected_response", "rejected_messages"), _PAIR)
    | dict.fromkeys(("margin",), "responses are compared without a margin: remove the key")
    | dict.fromkeys(("chat_template", "chat_template_kwargs", "documents"), _TEMPLATE)
)
"""Maps each unsupported key to the reason and the remedy."""
FLAT_FORMATS = ("alpaca", "prompt-completion")
"""Formats of one question and one response, in which `context` belongs to the question."""
CONTEXT_KEYS = ("context", "passage")
_HARMLESS: dict[str, tuple[Any, ...]] = {
    "mask": ("User", "user"),  # NeMo: role whose turns have no loss, as is the case here anyway
}


def check_keys(row: Row, format: str, *, read: tuple[str, ...] = ()) -> None:
    """Checks that a row has no key that requests unsupported behaviour.

    Args:
        format: detected format of the row.
        read: keys of `REFUSED` that are supported for this kind of row.

    Raises:
        DataError: the row has such a key; the message names it and the location of the row.
    """
    for key, remedy in REFUSED.items():
        if key in row.values and key not in read and _asks(key, row.values[key]):
            raise DataError(f"{row.location} has the key {key!r}, which is not read; {remedy}")
    if format in FLAT_FORMATS:
        for key in CONTEXT_KEYS:
            if row.values.get(key):
                raise DataError(
                    f"{row.location} has the key {key!r}, which is not read; {_CONTEXT}"
                )


def _asks(key: str, value: object) -> bool:
    """Returns whether the value is neither empty nor the default behaviour."""
    if REFUSED[key] is _WEIGHT:
        return value is not None and value != 1
    return not (value is None or value in ("", [], {}) or value in _HARMLESS.get(key, ()))
