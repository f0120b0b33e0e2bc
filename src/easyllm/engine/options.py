"""What a user may say of the engine's memory and batches."""

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from easyllm.core.config import Config


class EngineConfig(Config):
    """How the cache and the batches are cut.

    Attributes:
        page_size: tokens a page of the cache holds.
        num_pages: all pages; or
        cache_gb: memory for them; by default what `max_running` sequences of the model's context need, at most a
            quarter of the memory that is free.
        cache_dtype: of keys and values; by default the model's, and bfloat16 beside quantized weights (the model's in
            deterministic mode). `int8` and `int4` keep a scale for each token and head.
        compiled_step: whether steps that only decode may go through one call into C.
        deterministic: the same request gives the same bits whatever shares its batch, at the cost of speed.
        max_running: sequences that run at once.
        max_step_tokens: most tokens computed in a step; longer prompts are cut into chunks.
        prefix_caching: whether the keys of a beginning that was seen before are used again.
    """

    page_size: Annotated[int, Field(ge=1, le=1024)] = 16
    num_pages: PositiveInt | None = None
    cache_gb: Annotated[float, Field(gt=0)] | None = None
    cache_dtype: str | None = None
    compiled_step: bool = True
    deterministic: bool = False
    max_running: PositiveInt = 64
    max_step_tokens: PositiveInt = 2048
    prefix_caching: bool = True

    @model_validator(mode="after")
    def _fits_together(self) -> "EngineConfig":
        if self.num_pages is not None and self.cache_gb is not None:
            raise ValueError("num_pages and cache_gb both say how large the cache is; give one")
        if self.max_running > self.max_step_tokens:
            raise ValueError(
                f"max_running={self.max_running} is more than max_step_tokens={self.max_step_tokens}: every "
                "running sequence takes a token of a step; lower max_running or raise max_step_tokens"
            )
        return self
