"""User options of the engine and of `LLM`: KV cache, batch sizes, weights and draft tokens.

This module does not load torch, so that the command line can make its flags from the fields.
"""

from typing import Annotated, Any

from pydantic import Field, PositiveInt, model_validator

from easyllm.core.config import Config
from easyllm.core.errors import ConfigError

MAX_DRAFT_TOKENS = 16
NGRAM = "ngram"
"""The source of draft tokens that needs no model."""


class EngineConfig(Config):
    """Options of the engine."""

    page_size: Annotated[int, Field(ge=1, le=1024)] = Field(
        16, description="Tokens per page of the KV cache."
    )
    num_pages: PositiveInt | None = Field(
        None, description="Number of pages of the KV cache; mutually exclusive with `cache_gb`."
    )
    cache_gb: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="Memory of the KV cache in GB; by default enough for the sequences that may "
        "run at once, each as long as the model's context, but at most a quarter of the free "
        "memory.",
    )
    cache_dtype: str | None = Field(
        None,
        description="KV cache dtype: float32, bfloat16, float16, int8 or int4; by default that "
        "of the weights, or bfloat16 if they are quantized (in deterministic mode "
        "always that of the weights).",
    )
    compiled_step: bool = Field(
        True,
        description="Run decode-only steps as a single call (compiled C on a CPU, a CUDA graph "
        "on a GPU) where possible.",
    )
    deterministic: bool = Field(
        False,
        description="Batch-invariant mode: results are bitwise independent of the batch "
        "composition, at the cost of speed.",
    )
    max_running: PositiveInt = Field(
        64, description="Maximum number of sequences that run at once."
    )
    max_step_tokens: PositiveInt = Field(
        2048,
        description="Maximum number of tokens computed in a step; longer prompts are split into "
        "chunks (chunked prefill).",
    )
    prefix_caching: bool = Field(
        True, description="Reuse the keys and values of prompt prefixes that were computed before."
    )
    system: str = Field(
        "", description="System message of conversations that begin with none of their own."
    )

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


class LLMOptions(EngineConfig):
    """Options of `LLM`: how the model is loaded, and the options of its engine."""

    dtype: str | None = Field(
        None,
        description="Weight dtype: float32, bfloat16 or float16; by default float32 on a CPU, "
        "bfloat16 on an accelerator.",
    )
    device: str | None = Field(
        None, description="Device: cpu, cuda or auto (the default: an accelerator if there is one)."
    )
    quantize: str | None = Field(
        None,
        description="Quantize the weights while they are loaded: int8, int4, llm.int8, nf4 or fp4 "
        "(nf4-single and fp4-single without double quantization). gguf keeps the blocks of a GGUF "
        "file as they are; without it, they are dequantized.",
    )
    weight_cache: bool = Field(
        True,
        description="Store quantized weights in the cache folder, and map them from there at the "
        "next start.",
    )
    draft: str | None = Field(
        None,
        description="Source of draft tokens for speculative decoding, which does not change greedy "
        "output or the distribution of sampled output: ngram looks them up in the text itself; "
        "anything else is a smaller model with the same tokenizer.",
    )
    draft_tokens: Annotated[int, Field(ge=1, le=MAX_DRAFT_TOKENS)] = Field(
        4, description="Maximum number of draft tokens per step."
    )


def refuse_loading_options(**options: Any) -> None:
    """Refuses loading options that would have to change a model owned by the caller.

    Raises:
        ConfigError: such an option is set.
    """
    given = [name for name, value in options.items() if value is not None]
    if given:
        remedy = "pass the option when loading it: load_model(source, ...)"
        if given == ["quantize"]:
            remedy += (
                f', or call quantize_weights(model, "{options["quantize"]}"), which changes it in '
                "place"
            )
        raise ConfigError(
            f"{', '.join(given)} would change the model that was passed in, which is already "
            f"loaded; {remedy}"
        )
