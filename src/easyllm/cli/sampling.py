"""Flags shared by the commands that generate: sampling, loading, cache memory."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

from easyllm.cli.options import FlagGroup, Values, checked_flags, option
from easyllm.core.garbage import collector_paused, importing
from easyllm.engine.options import LLMOptions
from easyllm.engine.params import BeamParams, SamplingParams

if TYPE_CHECKING:
    from easyllm.engine import LLM

SAMPLING = FlagGroup(
    SamplingParams,
    *("temperature", "top_k", "top_p", "min_p", "typical_p"),
    *("repetition_penalty", "presence_penalty", "frequency_penalty", "no_repeat_ngram_size"),
    *("seed", "max_tokens", "min_tokens", "stop", "n", "best_of", "logprobs"),
    flags={"no_repeat_ngram_size": "--no-repeat-ngram"},
    needs={"logprobs": "--json"},
)
LOADING = FlagGroup(
    LLMOptions,
    *("draft", "dtype", "quantize", "weight_cache", "cache_gb", "cache_dtype", "deterministic"),
    flags={"weight_cache": "--weight-cache/--no-weight-cache"},
    metavars={"draft": "ngram|MODEL", "quantize": "int8|int4|nf4|fp4|llm.int8|gguf"},
)
BATCH = FlagGroup(LLMOptions, "max_running")
MaxTokens = Annotated[int, option(SamplingParams, "max_tokens")]
RepetitionPenalty = Annotated[float, option(SamplingParams, "repetition_penalty")]
Beams = Annotated[
    int,
    option(BeamParams, "num_beams", "--beams", low=0, note="0 (the default): no beam search."),
]
LengthPenalty = Annotated[float, option(BeamParams, "length_penalty", needs="--beams")]


def sampling_params(values: Values) -> SamplingParams:
    """Returns the `SamplingParams` of a command's flags."""

    return checked_flags(SamplingParams, values, SAMPLING, source="sampling options")


def load_llm(model: str, *, quiet: bool = False, **options: Any) -> "LLM":
    """Loads a model for generation; prints one line about its memory use on standard error.

    Raises:
        ConfigError: an option is wrong; it is named by its flag.
    """
    given = {name: value for name, value in options.items() if value is not None}
    of_engine = {name: value for name, value in given.items() if name in LLMOptions.model_fields}
    checked_flags(LLMOptions, of_engine, LOADING, BATCH, source="engine options")
    with importing():
        from easyllm.engine import LLM
    with collector_paused():
        llm = LLM(model, **given)
    if not quiet:
        sys.stderr.write(f"{llm.engine.memory.line()}\n")
    return llm
