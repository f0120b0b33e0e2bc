"""Named models and families: where weights come from, how they are read and saved."""

from easyllm.models.load import (
    hf_module_name,
    load_model,
    load_tokenizer,
    open_source,
    save_model,
)
from easyllm.models.sources import KNOWN_MODELS, locate, pull

__all__ = [
    "KNOWN_MODELS",
    "hf_module_name",
    "load_model",
    "load_tokenizer",
    "locate",
    "open_source",
    "pull",
    "save_model",
]
