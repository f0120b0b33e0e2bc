"""Models of our own make: any parts in any order, named on disk as they are here.

For decoders that no published family describes (linear attention, ALiBi in a Llama ...). Other toolkits do not read them.
"""

from typing import Any

from easyllm.checkpoint.keymap import SameNames
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
    """The configuration as it was written."""
    return ModelConfig.model_validate({**require(hf, "parts"), **read_token_ids(hf)})


def write_config(config: ModelConfig) -> dict[str, Any]:
    """Its `config.json`: the whole of `ModelConfig` under `parts`."""
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
