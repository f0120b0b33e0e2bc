"""Easyllm: the full life cycle of a language model in one readable package.

Exports are imported lazily: `import easyllm` alone does not load torch.
"""

from typing import TYPE_CHECKING

from easyllm.core.lazy import lazy_exports

if TYPE_CHECKING:
    from easyllm.engine import LLM, GuideSpec, SamplingParams
    from easyllm.models import load_model, load_tokenizer, save_model
    from easyllm.train.initialize import initialize

__version__ = "0.1.0"

__all__ = [
    "LLM",
    "GuideSpec",
    "SamplingParams",
    "initialize",
    "load_model",
    "load_tokenizer",
    "save_model",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "LLM": "easyllm.engine",
        "GuideSpec": "easyllm.engine",
        "SamplingParams": "easyllm.engine",
        "initialize": "easyllm.train.initialize",
        "load_model": "easyllm.models",
        "load_tokenizer": "easyllm.models",
        "save_model": "easyllm.models",
    },
)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
