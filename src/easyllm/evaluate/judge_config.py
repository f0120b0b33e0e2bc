"""Configuration of an LLM judge; this module does not load torch."""

from typing import Literal

from pydantic import Field, NonNegativeInt, PositiveFloat, PositiveInt

from easyllm.core.config import Config


class JudgeConfig(Config):
    """An LLM judge at an address with OpenAI's chat completions API.

    The API key is not part of the configuration, so that it is never written to a file.
    """

    url: str = Field(
        description="Address of the judge, such as http://127.0.0.1:8420 or "
        "https://api.openai.com/v1."
    )
    model: str | None = Field(
        default=None,
        description="Name of the judge's model at its address; by default the first that the "
        "address lists.",
    )
    language: Literal["en", "zh"] = Field(
        default="en", description="Language of the judge's instructions: en or zh."
    )
    reason: bool = Field(
        default=True,
        description="Whether the judge gives its reason before the verdict, which is more accurate "
        "and slower than a verdict alone.",
    )
    max_tokens: PositiveInt = Field(
        default=512, description="Maximum number of tokens of a reason and verdict."
    )
    seed: int = Field(default=0, description="Seed that is sent to the judge.")
    timeout_s: PositiveFloat = Field(
        default=120.0, description="Maximum time in seconds to connect, and to wait for data."
    )
    retries: NonNegativeInt = Field(
        default=4,
        description="Number of times a request is sent again after a timeout, a lost connection, "
        "or status 408, 409, 429 or 5xx.",
    )
    concurrency: PositiveInt = Field(
        default=4, description="Number of requests to the judge at the same time."
    )


__all__ = ["JudgeConfig"]
