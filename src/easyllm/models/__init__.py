"""Model sources and model families: locating, loading, converting and saving models.

Exports are imported lazily: a model without an adapter loads without the methods of adapters.
"""

from typing import TYPE_CHECKING

from easyllm.core.lazy import lazy_exports

if TYPE_CHECKING:
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

__getattr__ = lazy_exports(
    __name__,
    {
        "KNOWN_MODELS": "easyllm.models.sources",
        "ContextConfig": "easyllm.models.context",
        "add_adapter": "easyllm.models.adapter_files",
        "hf_module_name": "easyllm.models.hf_names",
        "load_adapted": "easyllm.models.adapted",
        "load_model": "easyllm.models.load",
        "load_tokenizer": "easyllm.models.load",
        "locate": "easyllm.models.sources",
        "open_source": "easyllm.models.load",
        "pool_kv_heads": "easyllm.models.grouped_heads",
        "pull": "easyllm.models.sources",
        "save_model": "easyllm.models.save",
        "split_adapter": "easyllm.models.adapted",
        "to_classifier": "easyllm.models.heads",
    },
)
