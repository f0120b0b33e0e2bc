"""Generation: requests in, tokens out, with the training decoder itself."""

from easyllm.engine.engine import Engine
from easyllm.engine.llm import LLM, Completion
from easyllm.engine.request import Request, SamplingParams, TokenEvent

__all__ = ["LLM", "Completion", "Engine", "Request", "SamplingParams", "TokenEvent"]
