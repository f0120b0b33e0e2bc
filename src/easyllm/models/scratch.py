"""Building a model from scratch: from a depth preset, a named size or a full configuration.

The weights are random and determined by a seed.
"""

from collections.abc import Iterator, Mapping

import torch
from pydantic import Field, PositiveInt, ValidationError, model_validator

from easyllm.core.config import Config, first_problem, validate
from easyllm.core.errors import ConfigError, suggest
from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.models.families import FAMILIES
from easyllm.models.families.family import read_token_ids
from easyllm.models.hf_config import read_config
from easyllm.nn.config import LatentAttentionConfig, ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.encoder_decoder import build_model
from easyllm.tokenizer.tokenizer import Tokenizer

HEAD_DIM = 64
WIDTH_PER_LAYER = 64
INITIAL_STD = 0.02
"""Standard deviation of the initial weights, as in GPT-2 (Radford et al. 2019): logits start near
0, so that the first loss is near ln V."""
END_OF_TEXT = "<|endoftext|>"
"""Token that ends documents. If a tokenizer has it in addition to an end-of-turn token, a fresh
model stops at either."""
PARTS = "easyllm"
"""The `model_type` whose `config.json` stores a `ModelConfig` under `parts`."""
WITHOUT_EFFECT = frozenset(
    {
        *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path"),
        *("use_cache", "pretraining_tp"),
    }
)
"""Keys of a published `config.json` that do not affect the model's computation."""
_SHARED = ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")
"""Keys that must agree with the tokenizer."""


class ScratchConfig(Config):
    """A model to pretrain from scratch.

    Exactly one of `depth`, `size` and `config` sets its size.
    """

    tokenizer: str = Field(
        description="A model source, or a folder with a tokenizer; the model uses its vocabulary "
        "and special tokens.",
    )
    depth: PositiveInt | None = Field(
        default=None,
        description="Depth preset: a Llama with this number of layers, a width of 64 times the "
        "number of layers (Karpathy 2025, nanochat) and a head dimension of 64.",
    )
    size: str | None = Field(default=None, description="Named size of a family (`smollm2-135m`).")
    config: JsonObject | None = Field(
        default=None,
        description="Values of a `config.json`; or `model_type: easyllm` with any parts under "
        "`parts` (nn/config). A larger vocab_size than the tokenizer's leaves rows without a "
        "token; ids of special tokens must match the tokenizer.",
    )
    max_seq_len: PositiveInt | None = Field(
        default=None,
        description="Maximum sequence length, in tokens; null keeps that of depth, size or config.",
    )
    changes: JsonObject = Field(
        default_factory=dict,
        description="Values of `config.json` (or parts) that override those given by depth, size "
        "or config.",
    )

    @model_validator(mode="after")
    def _one_size(self) -> "ScratchConfig":
        given = [name for name in ("depth", "size", "config") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "the size of a fresh model must be given exactly once, got "
                f"{' and '.join(given) or 'none'}; give depth, size or config"
            )
        return self


def scratch_model_config(scratch: ScratchConfig, tokenizer: Tokenizer) -> ModelConfig:
    """Returns the configuration of the model, with the tokenizer's vocabulary and special ids.

    Raises:
        ConfigError: the size is unknown, a value is unknown or contradicts the tokenizer, or the
            values do not describe a valid model.
    """
    stated = _stated(scratch)
    vocab_size = _vocab_size(stated, tokenizer)
    values = _ReadTracker(_values(scratch, vocab_size=vocab_size) | _special_ids(stated, tokenizer))
    if values["model_type"] == PARTS:
        parts = {**values["parts"], **read_token_ids(values)}
        validate(ModelConfig, parts, source="the parts of the fresh model")
    try:
        config = read_config(values)
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise ConfigError(f"the fresh model cannot be built: {_reason(error)}") from None
    given = {**(scratch.config or {}), **scratch.changes}
    added = {"num_key_value_heads"} - given.keys()  # a family without it has none to set
    unread = [key for key in values if key not in values.read and key not in WITHOUT_EFFECT | added]
    if unread:
        raise ConfigError(
            f"{unread[0]!r} is not a value of a model of type {values['model_type']!r}"
            f"{suggest(unread[0], values.read)}; remove it"
        )
    _check_width(values, config)
    return config


def build_scratch(config: ModelConfig, *, seed: int, dtype: torch.dtype = torch.float32) -> Decoder:
    """Builds a model with random weights that depend only on the seed, not on device or dtype.

    Args:
        config: the model configuration.
        seed: seed of the random weights.
        dtype: dtype of the result; weights are drawn in fp32 and then rounded to it.

    Example:
        >>> scratch = ScratchConfig(tokenizer="out/tok", depth=4)     # doctest: +SKIP
        >>> config = scratch_model_config(scratch, tokenizer)         # doctest: +SKIP
        >>> model = build_scratch(config, seed=0)                     # doctest: +SKIP
    """
    model = build_model(config)
    generator = torch.Generator().manual_seed(seed)
    model.reset_parameters(std=INITIAL_STD, generator=generator)
    return model.to(dtype).requires_grad_(False).eval()


def _stated(scratch: ScratchConfig) -> JsonObject:
    """Returns the user's values for vocabulary and special tokens; a named size provides none.

    Raises:
        ConfigError: `parts` is not a mapping, or names a family.
    """
    stated = dict(scratch.config or {})
    if stated.get("model_type") == PARTS:
        parts = stated.get("parts", {})
        if not isinstance(parts, Mapping):
            raise ConfigError(
                f"parts={parts!r} of the fresh model is not a mapping; see docs/models.md"
            )
        stated |= parts
    stated |= scratch.changes
    if stated.get("model_type") == PARTS:
        if stated.get("family", PARTS) != PARTS:
            raise ConfigError(
                f"family={stated['family']!r} does not fit a model from parts, whose family is "
                f"{PARTS!r}; leave it out, or set model_type to {stated['family']!r} and give its "
                "values instead of parts"
            )
        stated.setdefault("eos_token_id", stated.get("eos_token_ids"))
    return stated


def _vocab_size(stated: JsonMapping, tokenizer: Tokenizer) -> int:
    """Returns the tokenizer's vocabulary size, or the larger one that the user requested."""
    least, asked = tokenizer.vocab_size, stated.get("vocab_size")
    if asked is None:
        return least
    if not isinstance(asked, int) or asked < least:
        raise ConfigError(
            f"vocab_size={asked!r} is too small for the {least} ids of the fresh model's "
            f"tokenizer; leave it out, or set it to {least} or more"
        )
    return asked


def _special_ids(stated: JsonMapping, tokenizer: Tokenizer) -> JsonObject:
    """Returns the tokenizer's special ids as `config.json` stores them.

    The user may select a subset of the tokenizer's EOS ids.
    """
    ends = [i for i in (tokenizer.eos_id, tokenizer.id_of(END_OF_TEXT)) if i is not None]
    known: dict[str, list[int]] = {
        "bos_token_id": [] if tokenizer.bos_id is None else [tokenizer.bos_id],
        "eos_token_id": list(dict.fromkeys(ends)),
        "pad_token_id": [] if tokenizer.pad_id is None else [tokenizer.pad_id],
    }
    ids: JsonObject = {}
    for key, ours in known.items():
        asked = stated.get(key)
        several = list(asked) if isinstance(asked, list | tuple) else [asked]
        if asked is not None and not set(several) <= set(ours):
            have = " and ".join(map(str, ours)) if ours else "none"
            raise ConfigError(
                f"{key}={asked!r} contradicts the fresh model's tokenizer, which has {have}; "
                "leave it out"
            )
        chosen = ours if asked is None else several
        ids[key] = chosen or None if key == "eos_token_id" else next(iter(ours), None)
    return ids


def _values(scratch: ScratchConfig, *, vocab_size: int) -> JsonObject:
    """Returns the `config.json` values of the model, except for the special tokens."""
    values = _sized(scratch)
    length = {} if scratch.max_seq_len is None else {"max_seq_len": scratch.max_seq_len}
    if values["model_type"] == PARTS:
        own = {"family": PARTS, "vocab_size": vocab_size, **length}
        values = {key: value for key, value in values.items() if key not in _SHARED}
        parts = {**values.get("parts", {}), **scratch.changes, **own}
        return values | {"parts": {k: v for k, v in parts.items() if k != "eos_token_id"}}
    values |= scratch.changes | {"vocab_size": vocab_size}
    if "padded_vocab_size" in values:
        values["padded_vocab_size"] = vocab_size
    if "num_attention_heads" in values:  # MHA by default, not the KV heads of the family's default
        values.setdefault("num_key_value_heads", values["num_attention_heads"])
    if length:
        key = "n_positions" if "n_embd" in values else "max_position_embeddings"
        values[key] = scratch.max_seq_len
    return values


def _sized(scratch: ScratchConfig) -> JsonObject:
    if scratch.config is not None:
        return {"model_type": "llama", **scratch.config}
    if scratch.size is not None:
        sizes = {name: v for family in FAMILIES.values() for name, v in family.sizes.items()}
        if scratch.size not in sizes:
            raise ConfigError(
                f"model size {scratch.size!r} is unknown{suggest(scratch.size, sizes)}; "
                f"known sizes are {', '.join(sizes)}"
            )
        return dict(sizes[scratch.size])
    assert scratch.depth is not None, "the configuration was validated"
    width = WIDTH_PER_LAYER * scratch.depth
    return {
        "model_type": "llama",
        "hidden_size": width,
        "intermediate_size": _swiglu_width(width),
        "num_hidden_layers": scratch.depth,
        "num_attention_heads": width // HEAD_DIM,
        "num_key_value_heads": width // HEAD_DIM,
        "head_dim": HEAD_DIM,
        "max_position_embeddings": 1024,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": True,
    }


def _swiglu_width(width: int) -> int:
    """Returns 8/3 of the width, rounded up to a multiple of 64.

    A SwiGLU of this size has as many parameters as an MLP with 4 times the width.
    """
    return -(-8 * width // 3 // 64) * 64


class _ReadTracker(JsonMapping):
    """A mapping that records which keys were read; keys that are never read have no effect."""

    def __init__(self, values: JsonObject) -> None:
        self._values = values
        self.read: set[str] = set()

    def __getitem__(self, key: str) -> Json:
        self.read.add(key)
        return self._values[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _reason(error: Exception) -> str:
    """Returns the error text reworded for user-supplied values.

    The `config.json` readers word their errors for the file of a checkpoint.
    """
    if isinstance(error, ValidationError):
        return first_problem(error).replace("Value error, ", "", 1)
    text = str(error).replace("config.json has no", "the model's values have no")
    text = text.replace("config.json sets", "the model's values set")
    return text.removesuffix("; copy the checkpoint's own config.json")


def _check_width(values: JsonMapping, config: ModelConfig) -> None:
    """Checks that the heads divide the width evenly, unless a head dimension was given."""
    for layer in config.layers:
        mixer = layer.mixer
        if isinstance(mixer, LatentAttentionConfig):  # its widths are given
            continue
        width, heads = config.hidden_size, mixer.num_heads
        given = config.family == PARTS or values.get("head_dim") is not None
        if not given and width % heads and mixer.head_dim == width // heads:
            below = width // heads * heads
            fits = " or ".join(str(w) for w in (below, below + heads) if w)
            raise ConfigError(
                f"the fresh model cannot be built: a width of {width} is not divisible by {heads} "
                f"heads; set it to {fits}, or give head_dim"
            )
