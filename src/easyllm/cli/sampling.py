"""Options of the verbs that generate: how tokens are chosen, and what memory the engine may take."""

from typing import Annotated, Any

import typer

Temperature = Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")]
TopK = Annotated[int, typer.Option(min=0, help="Only the k most likely tokens; 0 takes all.")]
TopP = Annotated[float, typer.Option(help="Only the most likely tokens that reach p together.")]
MinP = Annotated[
    float,
    typer.Option(help="Only tokens at least p times as likely as the likeliest; 0 takes all."),
]
TypicalP = Annotated[
    float, typer.Option(help="Only the tokens of typical information that reach p; 1 takes all.")
]
RepetitionPenalty = Annotated[
    float, typer.Option(help="Above 1, tokens of prompt and output become less likely.")
]
PresencePenalty = Annotated[
    float, typer.Option(help="Subtracted from the logits of tokens that are in the output.")
]
FrequencyPenalty = Annotated[
    float, typer.Option(help="The same for each time a token is in the output.")
]
NoRepeatNgram = Annotated[
    int, typer.Option("--no-repeat-ngram", min=0, help="No n tokens occur twice; 0: any may.")
]
Seed = Annotated[int | None, typer.Option(help="Same seed, same tokens.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
MinTokens = Annotated[int, typer.Option(min=0, help="No end before so many tokens.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text that ends the generation; may be given again.")
]
Dtype = Annotated[
    str | None, typer.Option(help="Of the weights: float32, bfloat16 ...; by default what is fast.")
]
CacheGb = Annotated[
    float | None,
    typer.Option(help="Memory for the cache; by default at most a quarter of what is free."),
]
Quantize = Annotated[
    str | None,
    typer.Option(help="Round the weights on loading: int8 or int4.", metavar="int8|int4"),
]
CacheDtype = Annotated[
    str | None,
    typer.Option(
        help="Of the cache: float32, bfloat16, int8, int4; by default the weights', bfloat16 beside rounded ones."
    ),
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic", help="The same request gives the same bits whatever shares its batch."
    ),
]
Draft = Annotated[
    str | None,
    typer.Option(
        help="Guess tokens ahead, with the same output: ngram, or a smaller model of the same tokenizer.",
        metavar="ngram|MODEL",
    ),
]


def sampling_params(**values: Any) -> Any:
    """`SamplingParams` of a verb's options."""
    from easyllm.core.config import validate
    from easyllm.engine import SamplingParams

    values["stop"] = tuple(values.get("stop") or ())
    return validate(SamplingParams, values, source="sampling options")


def load_llm(model: str, *, quiet: bool = False, **options: Any) -> Any:
    """The model ready to generate; one line on standard error says where memory goes."""
    import sys

    from easyllm.engine import LLM

    llm = LLM(model, **{name: value for name, value in options.items() if value is not None})
    if not quiet:
        sys.stderr.write(f"{llm.engine.memory.line()}\n")
    return llm
