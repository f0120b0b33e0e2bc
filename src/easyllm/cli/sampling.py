"""Options shared by the commands that generate: sampling, weights, and cache memory."""

from typing import Annotated, Any

import typer

Temperature = Annotated[float, typer.Option(min=0, help="0 is greedy decoding.")]
TopK = Annotated[int, typer.Option(min=0, help="Sample from the k most likely tokens; 0: all.")]
TopP = Annotated[
    float, typer.Option(help="Sample from the most likely tokens of total probability p.")
]
MinP = Annotated[
    float,
    typer.Option(help="Drop tokens less than p times as likely as the most likely; 0: none."),
]
TypicalP = Annotated[
    float, typer.Option(help="Locally typical sampling with total probability p; 1 disables it.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1: makes tokens of prompt and output less likely.")
]
PresencePenalty = Annotated[
    float, typer.Option(help="Subtracted from the logits of tokens that occur in the output.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(help="Subtracted once per occurrence of a token in the output.")
]
NoRepeatNgram = Annotated[
    int, typer.Option("--no-repeat-ngram", min=0, help="Forbid repeated n-grams; 0 allows all.")
]
Seed = Annotated[int | None, typer.Option(help="Sampling seed, for reproducible output.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Maximum number of tokens to generate.")]
MinTokens = Annotated[int, typer.Option(min=0, help="Minimum number of tokens before EOS or stop.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="Stop string that ends the generation; repeatable.")
]
Dtype = Annotated[
    str | None, typer.Option(help="Weight dtype: float32, bfloat16 ...; by default a fast one.")
]
CacheGb = Annotated[
    float | None,
    typer.Option(help="KV cache memory in GB; by default at most a quarter of free memory."),
]
Quantize = Annotated[
    str | None,
    typer.Option(help="Quantize the weights on loading.", metavar="int8|int4"),
]
CacheDtype = Annotated[
    str | None,
    typer.Option(
        help="KV cache dtype: float32, bfloat16, int8, int4; by default that of the weights, "
        "or bfloat16 if they are quantized."
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option("--deterministic", help="Batch-invariant: bitwise the same result for any batch."),
]
Draft = Annotated[
    str | None,
    typer.Option(
        help="Speculative decoding (same output): ngram, or a small model with the same tokenizer.",
        metavar="ngram|MODEL",
    ),
]


def sampling_params(**values: Any) -> Any:
    """Returns the `SamplingParams` of a command's options."""
    from easyllm.core.config import validate
    from easyllm.engine import SamplingParams

    values["stop"] = tuple(values.get("stop") or ())
    return validate(SamplingParams, values, source="sampling options")


def load_llm(model: str, *, quiet: bool = False, **options: Any) -> Any:
    """Loads a model for generation; prints one line about its memory use on standard error."""
    import sys

    from easyllm.engine import LLM

    llm = LLM(model, **{name: value for name, value in options.items() if value is not None})
    if not quiet:
        sys.stderr.write(f"{llm.engine.memory.line()}\n")
    return llm
