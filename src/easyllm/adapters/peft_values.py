"""The types that the values of `adapter_config.json` must have, by key.

A key means the same for all of peft's methods (0.21.2). Files are untrusted input: a value of
another type must not change the result in silence, as any text would that is taken for `true`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import Json, JsonMapping


@dataclass(frozen=True, slots=True)
class Type:
    """A type of JSON values.

    Attributes:
        words: what it is, for the error.
        holds: whether a value is of this type.
    """

    words: str
    holds: Callable[[Json], bool]


def _is_whole(value: Json) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Json) -> bool:
    return _is_whole(value) or (isinstance(value, float) and math.isfinite(value))


def _is_names(value: Json) -> bool:
    return isinstance(value, list) and all(isinstance(name, str) for name in value)


def _is_layers(value: Json) -> bool:
    return _is_whole(value) or (isinstance(value, list) and all(map(_is_whole, value)))


def _is_token_rows(value: Json) -> bool:
    lists = list(value.values()) if isinstance(value, dict) else [value]
    return all(isinstance(ids, list) and all(map(_is_whole, ids)) for ids in lists)


WHOLE = Type("a whole number", _is_whole)
NUMBER = Type("a finite number", _is_number)
SWITCH = Type("true or false", lambda value: isinstance(value, bool))
TEXT = Type("text", lambda value: isinstance(value, str))
NAMES = Type("a list of names", _is_names)
TARGETS = Type("text or a list of names", lambda value: isinstance(value, str) or _is_names(value))
LAYERS = Type("a layer's number or a list of them", _is_layers)
NUMBERS = Type(
    "an object of numbers or lists",
    lambda value: (
        isinstance(value, dict)
        and all(_is_number(v) or isinstance(v, list) for v in value.values())
    ),
)
TOKEN_ROWS = Type("a list of token ids, or an object of such lists", _is_token_rows)

TYPES: dict[str, Type] = {
    **dict.fromkeys(("r", "init_r", "target_r", "oft_block_size"), WHOLE),
    **dict.fromkeys(("num_cayley_neumann_terms", "decompose_factor"), WHOLE),
    **dict.fromkeys(("projection_prng_key", "num_virtual_tokens", "token_dim"), WHOLE),
    **dict.fromkeys(("num_layers", "num_attention_heads", "encoder_hidden_size"), WHOLE),
    **dict.fromkeys(("encoder_num_layers", "num_transformer_submodules"), WHOLE),
    **dict.fromkeys(("lora_alpha", "alpha", "d_initial"), NUMBER),
    **dict.fromkeys(("lora_dropout", "vera_dropout", "miss_dropout", "encoder_dropout"), NUMBER),
    **dict.fromkeys(("use_rslora", "use_dora", "decompose_both", "save_projection"), SWITCH),
    **dict.fromkeys(("use_cayley_neumann", "prefix_projection", "fan_in_fan_out"), SWITCH),
    **dict.fromkeys(("peft_type", "bias", "encoder_reparameterization_type"), TEXT),
    **dict.fromkeys(("modules_to_save", "parameters"), NAMES),
    **dict.fromkeys(("target_modules", "exclude_modules"), TARGETS),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), NUMBERS),
    "layers_to_transform": LAYERS,
    "trainable_token_indices": TOKEN_ROWS,
}
"""The type of every key whose value is read."""


def check_values(description: JsonMapping, path: Path) -> None:
    """Checks the types of the values in an `adapter_config.json`; null stands for no value.

    Args:
        description: the parsed file.
        path: the file, for the error.

    Raises:
        CheckpointError: a value has another type than its key's.
    """
    for key, value in description.items():
        expected = TYPES.get(key)
        if expected is not None and value is not None and not expected.holds(value):
            raise CheckpointError(
                f"{path} sets {key}={value!r:.100}, expected {expected.words}; "
                "copy the adapter again"
            )


__all__ = ["check_values"]
