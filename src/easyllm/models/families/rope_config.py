"""RoPE as `config.json` writes it: `rope_theta` and `rope_scaling` (transformers 4), `rope_parameters` (5)."""

import math
from collections.abc import Mapping
from typing import Any

from easyllm.core.errors import CheckpointError
from easyllm.nn.config import (
    DynamicNTKScaling,
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    NTKScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)

_LENGTH = "original_max_position_embeddings"
KNOWN = ("default", "linear", "ntk", "dynamic", "yarn", "llama3")


def read_rope(
    config: Mapping[str, Any],
    head_dim: int,
    *,
    interleaved: bool = False,
    theta: float = 10000.0,
    share: float | None = None,
) -> Rope:
    """The rotary positions of a `config.json`.

    Args:
        share: of a head that turns where the file does not say; None for families all of whose head always turns.

    Raises:
        CheckpointError: the positions are scaled in a way that is not implemented, or only a part of a head turns in a
            family that has no such thing.
    """
    parameters = config.get("rope_parameters") or {}
    base = parameters.get("rope_theta") or config.get("rope_theta") or theta
    given = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor")
    if share is None and given not in (None, 1):
        raise CheckpointError(
            f"config.json sets partial_rotary_factor={given!r}, which is not implemented for this family (expected 1.0)"
        )
    width = int(head_dim * (given or share or 1.0))
    return Rope(
        theta=float(base),
        interleaved=interleaved,
        rotary_dim=None if width == head_dim else width,
        scaling=_read_scaling(config.get("rope_scaling") or parameters, config),
    )


def _read_scaling(values: Mapping[str, Any], config: Mapping[str, Any]) -> RopeScaling | None:
    kind = values.get("rope_type", values.get("type", "default"))
    length = values.get(_LENGTH) or config.get(_LENGTH) or config.get("max_position_embeddings")
    match kind:
        case "default":
            return None
        case "linear":
            return LinearScaling(factor=_need(values, "factor"))
        case "ntk":
            return NTKScaling(factor=_need(values, "factor"))
        case "dynamic":
            # transformers counts from the model's own length, whatever else the file names
            trained = config.get("max_position_embeddings") or length
            return DynamicNTKScaling(factor=_need(values, "factor"), original_max_seq_len=trained)
        case "yarn":
            return _read_yarn(values, length, config)
        case "llama3":
            return Llama3Scaling(
                factor=_need(values, "factor"),
                low_freq_factor=_need(values, "low_freq_factor"),
                high_freq_factor=_need(values, "high_freq_factor"),
                original_max_seq_len=length,
            )
        case "factors":
            return FactorScaling(factors=tuple(_need(values, "factors")))
    raise CheckpointError(
        f"config.json asks for RoPE scaling {kind!r}, which is not implemented; known are {', '.join(KNOWN)}"
    )


def _read_yarn(values: Mapping[str, Any], length: Any, config: Mapping[str, Any]) -> YarnScaling:
    """YaRN; without a factor it is how far the model reaches, and `mscale` counts where `mscale_all_dim` is given too
    (as transformers reads them)."""
    names = ("beta_fast", "beta_slow", "attention_factor", "truncate")
    given = {name: values[name] for name in names if values.get(name) is not None}
    reach = config.get("max_position_embeddings")
    if values.get("factor") is None and values.get(_LENGTH) and reach:
        factor = reach / length
    else:
        factor = _need(values, "factor")
    over, under = values.get("mscale"), values.get("mscale_all_dim")
    if over and under and "attention_factor" not in given:
        given["attention_factor"] = _attention_scale(factor, over) / _attention_scale(factor, under)
    return YarnScaling(factor=factor, original_max_seq_len=length, **given)


def _attention_scale(factor: float, weight: float) -> float:
    """0.1 m ln(factor) + 1 (YaRN's scale of attention, weighed as DeepSeek does)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def _need(values: Mapping[str, Any], key: str) -> Any:
    if values.get(key) is None:
        raise CheckpointError(
            f"config.json has no {key!r} in its rope_scaling; copy the checkpoint's own config.json"
        )
    return values[key]


def read_max_seq_len(config: Mapping[str, Any], rope: Rope | None, default: int = 2048) -> int:
    """The longest sequence: dynamic scaling reaches `factor` times as far as the length that it counts from."""
    length: int = config.get("max_position_embeddings", default)
    scaling = None if rope is None else rope.scaling
    return int(length * scaling.factor) if isinstance(scaling, DynamicNTKScaling) else length


def write_max_seq_len(max_seq_len: int, rope: Rope) -> int:
    """`max_position_embeddings`: of dynamic scaling the length that it counts from."""
    scaling = rope.scaling
    return scaling.original_max_seq_len if isinstance(scaling, DynamicNTKScaling) else max_seq_len


def write_rope(rope: Rope, head_dim: int) -> dict[str, Any]:
    """The keys of `config.json`, in the spelling of transformers 4.

    Raises:
        CheckpointError: no `config.json` says it (factors, which GGUF files may hold).
    """
    if isinstance(rope.scaling, FactorScaling):
        raise CheckpointError(
            "its RoPE frequencies are divided by factors of no rule that HF knows"
        )
    written: dict[str, Any] = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.rotary_dim is not None:
        written["partial_rotary_factor"] = rope.rotary_dim / head_dim
    if rope.scaling is not None:
        values = rope.scaling.model_dump(exclude_none=True)
        values["rope_type"] = values.pop("kind")
        if isinstance(rope.scaling, DynamicNTKScaling):
            del values["original_max_seq_len"]  # it is the model's `max_position_embeddings`
        elif "original_max_seq_len" in values:
            values[_LENGTH] = values.pop("original_max_seq_len")
        written["rope_scaling"] = values
    return written
