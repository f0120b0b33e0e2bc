"""Reading and writing the RoPE keys of `config.json`.

transformers 4 writes `rope_theta` and `rope_scaling`, transformers 5 writes `rope_parameters`.
"""

from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.nn.position_config import (
    DynamicNTKScaling,
    FactorScaling,
    LinearScaling,
    Llama3Scaling,
    LongRopeScaling,
    NTKScaling,
    Rope,
    RopeScaling,
    YarnScaling,
)
from easyllm.nn.rope_scaling import yarn_mscale

_LENGTH = "original_max_position_embeddings"
KNOWN = ("default", "linear", "ntk", "dynamic", "yarn", "llama3", "longrope")


def read_rope(
    config: JsonMapping,
    head_dim: int,
    *,
    interleaved: bool = False,
    theta: float = 10000.0,
    share: float | None = None,
) -> Rope:
    """Reads the RoPE configuration of a `config.json`.

    Args:
        config: the values of the `config.json`.
        head_dim: the head dimension.
        interleaved: whether RoPE rotates pairs of adjacent dimensions instead of the two halves.
        theta: the base, if the file does not give one.
        share: fraction of the head dimension that is rotated, if the file does not give one; None
            for families that always rotate the full head dimension.

    Raises:
        CheckpointError: the RoPE scaling is not implemented, or the file sets a partial rotation in
            a family that does not support it.
    """
    parameters = config.get("rope_parameters") or {}
    base = parameters.get("rope_theta") or config.get("rope_theta") or theta
    given = parameters.get("partial_rotary_factor") or config.get("partial_rotary_factor")
    if share is None and given not in (None, 1):
        raise CheckpointError(
            f"config.json sets partial_rotary_factor={given!r}, which is not implemented for this "
            "family (expected 1.0)"
        )
    width = int(head_dim * (given or share or 1.0))
    return Rope(
        theta=float(base),
        interleaved=interleaved,
        rotary_dim=None if width == head_dim else width,
        scaling=_read_scaling(config.get("rope_scaling") or parameters, config),
    )


def _read_scaling(values: JsonMapping, config: JsonMapping) -> RopeScaling | None:
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
            # transformers uses max_position_embeddings here, whatever other length the file gives
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
        case "longrope" | "su":
            return _read_longrope(values, length, config)
        case "factors":
            return FactorScaling(factors=tuple(_need(values, "factors")))
    raise CheckpointError(
        f"config.json sets RoPE scaling {kind!r}, which is not implemented; "
        f"known types are {', '.join(KNOWN)}"
    )


def _read_yarn(values: JsonMapping, length: object, config: JsonMapping) -> YarnScaling:
    """Reads YaRN scaling as transformers does.

    A missing factor is the ratio of the maximum to the original length, and `mscale` is used only
    together with `mscale_all_dim`.
    """
    names = ("beta_fast", "beta_slow", "attention_factor", "truncate")
    given = {name: values[name] for name in names if values.get(name) is not None}
    reach = config.get("max_position_embeddings")
    if values.get("factor") is None and values.get(_LENGTH) and reach:
        factor = reach / length
    else:
        factor = _need(values, "factor")
    over, under = values.get("mscale"), values.get("mscale_all_dim")
    if over and under and "attention_factor" not in given:
        given["attention_factor"] = yarn_mscale(factor, over) / yarn_mscale(factor, under)
    return YarnScaling(factor=factor, original_max_seq_len=length, **given)


def _read_longrope(values: JsonMapping, length: object, config: JsonMapping) -> LongRopeScaling:
    """Reads LongRoPE; a missing factor is the ratio of the maximum to the original length."""
    given = _need({**config, _LENGTH: length}, _LENGTH)
    factor = values.get("factor") or config.get("max_position_embeddings", given) / given
    return LongRopeScaling(
        short_factors=tuple(_need(values, "short_factor")),
        long_factors=tuple(_need(values, "long_factor")),
        factor=factor,
        original_max_seq_len=given,
        attention_factor=values.get("attention_factor"),
    )


def _need(values: JsonMapping, key: str) -> Json:
    if values.get(key) is None:
        raise CheckpointError(
            f"config.json has no {key!r} in its rope_scaling; copy the checkpoint's own config.json"
        )
    return values[key]


def read_max_seq_len(config: JsonMapping, rope: Rope | None, default: int = 2048) -> int:
    """Returns the maximum sequence length in tokens.

    For dynamic NTK scaling it is `factor` times `max_position_embeddings`, the original length.
    """
    length: int = config.get("max_position_embeddings", default)
    scaling = None if rope is None else rope.scaling
    return int(length * scaling.factor) if isinstance(scaling, DynamicNTKScaling) else length


def write_max_seq_len(max_seq_len: int, rope: Rope) -> int:
    """Returns `max_position_embeddings`; for dynamic NTK scaling this is the original length."""
    scaling = rope.scaling
    return scaling.original_max_seq_len if isinstance(scaling, DynamicNTKScaling) else max_seq_len


def write_rope(rope: Rope, head_dim: int) -> JsonObject:
    """Returns the RoPE keys of `config.json` as transformers 4 writes them.

    Raises:
        CheckpointError: `config.json` cannot represent the scaling (explicit factors, which GGUF
            files may contain).
    """
    if isinstance(rope.scaling, FactorScaling):
        raise CheckpointError(
            "its RoPE frequencies are divided by explicit factors, which config.json cannot store"
        )
    written: JsonObject = {"rope_theta": rope.theta, "rope_scaling": None}
    if rope.rotary_dim is not None:
        written["partial_rotary_factor"] = rope.rotary_dim / head_dim
    if rope.scaling is not None:
        values = rope.scaling.model_dump(exclude_none=True)
        values["rope_type"] = values.pop("kind")
        if isinstance(rope.scaling, DynamicNTKScaling):
            del values["original_max_seq_len"]  # written as `max_position_embeddings`
        elif "original_max_seq_len" in values:
            values[_LENGTH] = values.pop("original_max_seq_len")
        for name in ("short_factor", "long_factor"):
            if f"{name}s" in values:
                values[name] = list(values.pop(f"{name}s"))
        written["rope_scaling"] = values
    return written
