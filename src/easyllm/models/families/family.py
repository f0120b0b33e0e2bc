"""What a family is: data that connects a Hugging Face `config.json` and its tensor names with our decoder."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from easyllm.checkpoint.keymap import KeyMap
from easyllm.core.errors import CheckpointError
from easyllm.nn.config import ModelConfig

HFConfig = Mapping[str, Any]
MAX_LAYERS = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A family of models.

    Attributes:
        name: ours, kept in `ModelConfig.family`.
        model_types: the `model_type`s of `config.json` it reads; the first is the one it writes.
        read_config, write_config: `config.json` to `ModelConfig` and back.
        keymap: names of our parameters on disk.
    """

    name: str
    model_types: tuple[str, ...]
    read_config: Callable[[HFConfig], ModelConfig]
    write_config: Callable[[ModelConfig], dict[str, Any]]
    keymap: Callable[[ModelConfig], KeyMap]
    sizes: Mapping[str, dict[str, Any]] = field(default_factory=dict)


def require(config: HFConfig, key: str) -> Any:
    """The value of `key`.

    Raises:
        CheckpointError: `config.json` has none.
    """
    if config.get(key) is None:
        raise CheckpointError(f"config.json has no {key!r}; copy the checkpoint's own config.json")
    return config[key]


def num_layers(config: HFConfig, key: str = "num_hidden_layers") -> int:
    """The number of layers.

    Raises:
        CheckpointError: there is none, or one no model has (a damaged file must not make us build millions).
    """
    count = require(config, key)
    if not isinstance(count, int) or not 1 <= count <= MAX_LAYERS:
        raise CheckpointError(f"config.json sets {key}={count!r}, expected 1 to {MAX_LAYERS}")
    return count


def rope_theta(config: HFConfig, default: float = 10000.0) -> float:
    """RoPE's base: `rope_theta` (transformers 4) or `rope_parameters.rope_theta` (5).

    Raises:
        CheckpointError: the positions are scaled in a way that is not implemented.
    """
    parameters = config.get("rope_parameters") or {}
    scaling = config.get("rope_scaling") or parameters
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    if kind != "default":
        raise CheckpointError(
            f"config.json asks for RoPE scaling {kind!r}, which is not implemented; known: default"
        )
    return float(parameters.get("rope_theta") or config.get("rope_theta") or default)


def token_ids(config: HFConfig) -> dict[str, Any]:
    """bos, eos (one or several) and pad ids as `ModelConfig` keeps them."""
    eos = config.get("eos_token_id")
    ids = tuple(eos) if isinstance(eos, list) else () if eos is None else (eos,)
    return {
        "bos_token_id": config.get("bos_token_id"),
        "eos_token_ids": ids,
        "pad_token_id": config.get("pad_token_id"),
    }


def write_token_ids(config: ModelConfig) -> dict[str, Any]:
    """The same, as `config.json` writes them."""
    eos: int | list[int] | None = list(config.eos_token_ids) or None
    if isinstance(eos, list) and len(eos) == 1:
        eos = eos[0]
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": eos,
        "pad_token_id": config.pad_token_id,
    }


def refuse(config: HFConfig, expected: Mapping[str, Any]) -> None:
    """Refuses options of `config.json` that would change the mathematics and are not implemented."""
    for key, value in expected.items():
        if config.get(key, value) not in (value, None):
            raise CheckpointError(
                f"config.json sets {key}={config[key]!r}, which is not implemented (expected {value!r})"
            )
