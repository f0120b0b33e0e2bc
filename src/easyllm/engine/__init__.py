"""Inference engine: turns requests into tokens, using the same decoder as training.

Exports are imported lazily: the parameters and options, from which the command line makes its
flags, do not load torch.
"""

from typing import TYPE_CHECKING

from easyllm.core.lazy import lazy_exports

if TYPE_CHECKING:
    from easyllm.engine.completion import Completion
    from easyllm.engine.engine import Engine
    from easyllm.engine.guide_spec import GuideError, GuideSpec
    from easyllm.engine.llm import LLM
    from easyllm.engine.options import EngineConfig
    from easyllm.engine.params import BeamParams, SamplingParams
    from easyllm.engine.request import Logprobs, Request, TokenEvent

__all__ = [
    "LLM",
    "BeamParams",
    "Completion",
    "Engine",
    "EngineConfig",
    "GuideError",
    "GuideSpec",
    "Logprobs",
    "Request",
    "SamplingParams",
    "TokenEvent",
]

__getattr__ = lazy_exports(
    __name__,
    {
        "LLM": "easyllm.engine.llm",
        "BeamParams": "easyllm.engine.params",
        "Completion": "easyllm.engine.completion",
        "Engine": "easyllm.engine.engine",
        "EngineConfig": "easyllm.engine.options",
        "GuideError": "easyllm.engine.guide_spec",
        "GuideSpec": "easyllm.engine.guide_spec",
        "Logprobs": "easyllm.engine.request",
        "Request": "easyllm.engine.request",
        "SamplingParams": "easyllm.engine.params",
        "TokenEvent": "easyllm.engine.request",
    },
)
