"""Easyllm's own family: any combination of parts, with our parameter names on disk.

It represents decoders that no published family describes (linear attention, a Llama with ALiBi,
...). Other tools cannot read these checkpoints.
"""

from easyllm.checkpoint.keymap import SameNames
from easyllm.core.json_types import JsonObject
from easyllm.models.families.family import (
    Family,
    HFConfig,
    read_token_ids,
    require,
    write_token_ids,
)
from easyllm.nn.config import ModelConfig

_TOKEN_IDS = {"bos_token_id", "eos_token_ids", "pad_token_id"}


def read_config(hf: HFConfig) -> ModelConfig:
    """Returns the `ModelConfig` stored under `parts`."""
    return ModelConfig.model_validate({**require(hf, "parts"), **read_token_ids(hf)})


def write_config(config: ModelConfig) -> JsonObject:
    """Returns the `config.json` values: the complete `ModelConfig` under `parts`."""
    return {
        "architectures": ["EasyllmForCausalLM"],
        "model_type": "easyllm",
        "vocab_size": config.vocab_size,
        "parts": config.model_dump(mode="json", exclude=_TOKEN_IDS),
        **write_token_ids(config),
    }


FAMILY = Family(
    name="easyllm",
    model_types=("easyllm",),
    read_config=read_config,
    write_config=write_config,
    keymap=lambda _: SameNames([]),
)
