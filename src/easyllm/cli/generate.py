"""`easyllm generate` and `easyllm chat`."""

import sys
import time
from typing import Annotated, Any

import typer

from easyllm.cli.models import LogN, Rope, RopeFactor, context_of
from easyllm.cli.output import JsonFlag, print_json

Model = Annotated[
    str, typer.Argument(help="smollm2, a checkpoint folder, a .gguf file, or hf:org/name.")
]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the most likely token.")]
TopK = Annotated[int, typer.Option(min=0, help="Only the k most likely tokens; 0 takes all.")]
TopP = Annotated[float, typer.Option(help="Only the most likely tokens that reach p together.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same tokens.")]
MaxTokens = Annotated[int, typer.Option(min=1, help="Most tokens to generate.")]
Stop = Annotated[
    list[str] | None, typer.Option(help="Text that ends the generation; may be given again.")
]


def register(app: typer.Typer) -> None:
    """Adds the verbs."""
    app.command("generate")(generate)
    app.command("chat")(chat)


def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to go on with.")],
    temperature: Temperature = 0.0,
    top_k: TopK = 0,
    top_p: TopP = 1.0,
    seed: Seed = None,
    max_tokens: MaxTokens = 64,
    stop: Stop = None,
    rope: Rope = None,
    rope_factor: RopeFactor = 4.0,
    logn: LogN = False,
    as_chat: Annotated[
        bool, typer.Option("--chat", help="Take the prompt as a user's message.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Go on with a prompt, printing text as it comes.

    [bold]Examples[/bold]

        easyllm generate smollm2 "The capital of France is" --max-tokens 16

        easyllm generate smollm2 "Name three colours." --chat --temperature 0.7 --seed 1

        easyllm generate smollm2 "$(cat long.txt)" --rope yarn --rope-factor 2
    """
    from easyllm.engine import Completion

    params = _params(temperature, top_k, top_p, seed, max_tokens, stop)
    llm = _load(model, context_of(rope, rope_factor, logn))
    ids = llm.encode_chat([{"role": "user", "content": prompt}]) if as_chat else llm.encode(prompt)
    done, start = Completion(), time.perf_counter()
    for event in llm.stream(ids, params):
        done.take(event)
        if not json_output:
            sys.stdout.write(event.text)
            sys.stdout.flush()
    seconds = time.perf_counter() - start
    if not json_output:
        sys.stdout.write("\n")
        return
    print_json(
        {
            "text": done.text,
            "token_ids": done.token_ids,
            "logprobs": done.logprobs,
            "finish_reason": done.finish_reason,
            "prompt_tokens": len(ids),
            "tokens_per_s": round(len(done.token_ids) / seconds, 1),
        }
    )


def chat(
    model: Model = "smollm2",
    system: Annotated[str | None, typer.Option(help="What the assistant is told first.")] = None,
    temperature: Temperature = 0.7,
    top_k: TopK = 0,
    top_p: TopP = 0.95,
    seed: Seed = None,
    max_tokens: MaxTokens = 512,
) -> None:
    """Talk with a model in the terminal; an empty line or Ctrl-D ends.

    [bold]Examples[/bold]

        easyllm chat

        easyllm chat runs/quickstart/merged --temperature 0
    """
    params = _params(temperature, top_k, top_p, seed, max_tokens, None)
    llm = _load(model)
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "")
        except EOFError:
            break
        if not line.strip():
            break
        messages.append({"role": "user", "content": line})
        answer = ""
        for event in llm.stream(llm.encode_chat(messages), params):
            answer += event.text
            sys.stdout.write(event.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        messages.append({"role": "assistant", "content": answer})


def _params(
    temperature: float,
    top_k: int,
    top_p: float,
    seed: int | None,
    max_tokens: int,
    stop: list[str] | None,
) -> Any:
    from easyllm.core.config import validate
    from easyllm.engine import SamplingParams

    values = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "seed": seed,
        "max_tokens": max_tokens,
        "stop": tuple(stop or ()),
    }
    return validate(SamplingParams, values, source="sampling options")


def _load(model: str, context: Any = None) -> Any:
    from easyllm.engine import LLM

    return LLM(model, context=context)
