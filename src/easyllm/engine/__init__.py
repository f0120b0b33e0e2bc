"""Inference engine: turns requests into tokens, using the same decoder as training."""

from easyllm.engine.engine import Engine
from easyllm.engine.llm import LLM, Completion
from easyllm.engine.options import EngineConfig
from easyllm.engine.request import BeamParams, Logprobs, Request, SamplingParams, TokenEvent

__all__ = [
    "LLM",
    "BeamParams",
    "Completion",
    "Engine",
    "EngineConfig",
    "Logprobs",
    "Request",
    "SamplingParams",
    "TokenEvent",
]
