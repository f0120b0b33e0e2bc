"""Easyllm: the full life cycle of a language model in one readable package.

Exports are imported lazily: `import easyllm` alone does not load torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from easyllm.engine import LLM, SamplingParams
    from easyllm.models import load_model, load_tokenizer, save_model

__version__ = "0.1.0"

__all__ = ["LLM", "SamplingParams", "load_model", "load_tokenizer", "save_model"]

_EXPORTS = {
    "LLM": "easyllm.engine",
    "SamplingParams": "easyllm.engine",
    "load_model": "easyllm.models",
    "load_tokenizer": "easyllm.models",
    "save_model": "easyllm.models",
}


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'easyllm' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
