"""Model sources and model families: locating, loading, converting and saving models."""

from easyllm.models.adapted import load_adapted, split_adapter
from easyllm.models.adapter_files import add_adapter
from easyllm.models.context import ContextConfig
from easyllm.models.grouped_heads import pool_kv_heads
from easyllm.models.heads import to_classifier
from easyllm.models.hf_names import hf_module_name
from easyllm.models.load import load_model, load_tokenizer, open_source
from easyllm.models.save import save_model
from easyllm.models.sources import KNOWN_MODELS, locate, pull

__all__ = [
    "KNOWN_MODELS",
    "ContextConfig",
    "add_adapter",
    "hf_module_name",
    "load_adapted",
    "load_model",
    "load_tokenizer",
    "locate",
    "open_source",
    "pool_kv_heads",
    "pull",
    "save_model",
    "split_adapter",
    "to_classifier",
]
