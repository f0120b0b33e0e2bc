"""User options of the engine: KV cache and batch sizes."""

from typing import Annotated

from pydantic import Field, PositiveInt, model_validator

from easyllm.core.config import Config


class EngineConfig(Config):
    """Options of the engine.

    Attributes:
        page_size: tokens per page of the KV cache.
        num_pages: number of pages of the KV cache; mutually exclusive with `cache_gb`.
        cache_gb: memory for the pages in GB. If neither is set, the cache fits `max_running`
            sequences of the model's context, but takes at most a quarter of the free memory.
        cache_dtype: dtype of keys and values; by default that of the model, or bfloat16 with
            quantized weights (in deterministic mode always that of the model). `int8` and `int4`
            store a scale for each token and head.
        compiled_step: whether decode-only steps may run as a single call (compiled C on a CPU, a
            CUDA graph on a GPU).
        deterministic: batch-invariant mode: a request gives bitwise identical results whatever the
            batch composition, at the cost of speed.
        max_running: maximum number of sequences that run at once.
        max_step_tokens: maximum number of tokens computed in a step; longer prompts are split into
            chunks (chunked prefill).
        prefix_caching: whether the keys and values of a prompt prefix seen before are reused.
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
            raise ValueError("num_pages and cache_gb both set the cache size; set only one of them")
        if self.max_running > self.max_step_tokens:
            raise ValueError(
                f"max_running={self.max_running} is more than "
                f"max_step_tokens={self.max_step_tokens}: every running sequence needs one token "
                "per step; lower max_running or raise max_step_tokens"
            )
        return self
