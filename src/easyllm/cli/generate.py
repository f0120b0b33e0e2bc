"""The `easyllm generate` and `easyllm chat` commands."""

import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from easyllm.cli.adapter import AdapterFolder
from easyllm.cli.guide import GUIDE, guide_of, warn_if_cut
from easyllm.cli.models import LogN, Model, Rope, RopeFactor, Sinks, Window, context_config
from easyllm.cli.options import Values, with_flags
from easyllm.cli.output import JsonFlag, print_json
from easyllm.cli.sampling import (
    LOADING,
    SAMPLING,
    Beams,
    LengthPenalty,
    load_llm,
    sampling_params,
)
from easyllm.core.json_types import JsonObject
from easyllm.engine.guide_spec import GuideSpec
from easyllm.engine.params import BeamParams, SamplingParams

if TYPE_CHECKING:
    from easyllm.engine import LLM, Completion


def register(app: typer.Typer) -> None:
    """Adds the commands to `app`."""
    app.command("generate")(generate)
    app.command("chat")(chat)


@with_flags
def generate(
    model: Model,
    prompt: Annotated[str, typer.Argument(help="The text to continue.")],
    sampling: Annotated[Values, SAMPLING.starting(temperature=0.0, max_tokens=64)],
    loading: Annotated[Values, LOADING],
    guided: Annotated[Values, GUIDE],
    beams: Beams = 0,
    length_penalty: LengthPenalty = 1.0,
    rope: Rope = None,
    rope_factor: RopeFactor = None,
    logn: LogN = False,
    window: Window = None,
    sinks: Sinks = None,
    adapter: AdapterFolder = None,
    as_chat: Annotated[
        bool, typer.Option("--chat", help="Send the prompt as a user message.")
    ] = False,
    json_output: JsonFlag = False,
) -> None:
    """Continue a prompt, printing the text as it is generated.

    [bold]Examples[/bold]

        easyllm generate smollm2 "The capital of France is" --max-tokens 16

        easyllm generate smollm2 "Name three colours." --chat --temperature 0.7 --seed 1

        easyllm generate smollm2 "Once upon a time" --temperature 1 --min-p 0.1 --n 3

        easyllm generate smollm2 "The capital of France is" --beams 4 --json

        easyllm generate smollm2 "Once upon a time" --quantize int4

        easyllm generate smollm2 "Is Paris in France?" --chat --choice yes --choice no

        easyllm generate smollm2 "A person:" --json-schema person.json --max-tokens 200

        easyllm generate smollm2 "$(cat long.txt)" --rope yarn --rope-factor 2

        easyllm generate smollm2 "Hello" --rope streaming --window 1020 --max-tokens 20000
    """
    from easyllm.core.errors import ConfigError

    params = sampling_params(sampling)
    if params.logprobs is not None and not json_output:
        raise ConfigError("--logprobs is part of the JSON output; add --json")
    beam_params = _beam_params(beams, length_penalty, params)
    if beam_params is None:
        _check_sampling(params)
    elif loading.get("draft") is not None:
        raise ConfigError("beam search does not use speculative decoding; leave out --draft")
    guide = guide_of(guided, beams=beam_params is not None)
    if not prompt:
        raise ConfigError("the prompt is empty; give a text that the model continues")
    copies = max(params.num_sequences, beams)
    llm = load_llm(
        model,
        quiet=json_output,
        max_running=copies if copies == 1 else copies + 1,  # one more for copy-on-write
        context=context_config(rope, rope_factor, logn, window, sinks),
        adapter=adapter,
        **loading,
    )
    ids = llm.encode_chat([{"role": "user", "content": prompt}]) if as_chat else llm.encode(prompt)
    start = time.perf_counter()
    if beam_params is not None:
        (done,) = llm.beam_search([ids], beam_params)
    else:
        done = _stream(llm, ids, params, guide, shown=not json_output and params.n == 1)
    seconds = time.perf_counter() - start
    every = [done, *done.others]
    _note_ends(every, guide, as_chat=as_chat)
    if json_output:
        tokens = sum(len(each.token_ids) for each in every)
        figures = {"prompt_tokens": len(ids), "tokens_per_s": round(tokens / seconds, 1)}
        others = {"others": [_as_dict(each) for each in done.others]} if done.others else {}
        print_json(_as_dict(done) | figures | others)
    elif beam_params is not None or params.n > 1:
        sys.stdout.write("\n---\n".join(each.text for each in every) + "\n")
    else:
        sys.stdout.write("\n")


@with_flags
def chat(
    model: Model = "smollm2",
    *,
    system: Annotated[str | None, typer.Option(help="System message of the conversation.")] = None,
    sampling: Annotated[
        Values,
        SAMPLING.only(
            *("temperature", "top_k", "top_p", "min_p", "typical_p"),
            *("repetition_penalty", "presence_penalty", "frequency_penalty"),
            *("seed", "max_tokens", "stop"),
        ).starting(temperature=0.7, top_p=0.95, max_tokens=512),
    ],
    loading: Annotated[Values, LOADING],
    guided: Annotated[Values, GUIDE],
    adapter: AdapterFolder = None,
) -> None:
    r"""Chat with a model in the terminal; an empty line or Ctrl-D quits.

    Without a terminal, each line of standard input is a message of the conversation.

    [bold]Examples[/bold]

        easyllm chat

        easyllm chat runs/quickstart/merged --temperature 0

        easyllm chat runs/mine/adapter

        printf 'What is Easyllm?\\n' | easyllm chat runs/mine/adapter

        easyllm chat --regex '\[A-Z]\[a-z ]{1,60}\[.]'
    """
    params, guide = sampling_params(sampling), guide_of(guided)
    # the cache of a single conversation
    llm = load_llm(model, max_running=1, adapter=adapter, **loading)
    messages: list[JsonObject] = [{"role": "system", "content": system}] if system else []
    while True:
        try:
            line = input("you> " if sys.stdin.isatty() else "")
        except EOFError:
            break
        if not line.strip():
            break
        messages.append({"role": "user", "content": line})
        answer = ""
        for event in llm.stream(llm.encode_chat(messages), params, guide=guide):
            answer += event.text
            sys.stdout.write(event.text)
            sys.stdout.flush()
        sys.stdout.write("\n")
        messages.append({"role": "assistant", "content": answer})


def _stream(
    llm: "LLM", ids: list[int], params: SamplingParams, guide: GuideSpec | None, *, shown: bool
) -> "Completion":
    """Returns the completion; prints its text as it is generated if `shown`."""
    from easyllm.engine import Completion

    done = Completion()
    for event in llm.stream(ids, params, guide=guide):
        done.take(event)
        if shown:
            sys.stdout.write(event.text)
            sys.stdout.flush()
    return done


def _check_sampling(params: SamplingParams) -> None:
    """Checks that no option is given that greedy decoding would ignore.

    Raises:
        ConfigError: there is one.
    """
    from easyllm.core.errors import ConfigError

    if params.temperature != 0:
        return
    for name in ("top_k", "top_p", "min_p", "typical_p"):
        value = getattr(params, name)
        if value != SamplingParams.model_fields[name].default:
            option = name.replace("_", "-")
            raise ConfigError(
                f"--{option} {value:g} restricts sampling, but at temperature 0 the most likely "
                f"token is chosen; add --temperature 1, or leave out --{option}"
            )


def _note_ends(
    completions: Sequence["Completion"], guide: GuideSpec | None, *, as_chat: bool
) -> None:
    """Says so if a completion was cut off inside its form, or if none has text."""
    for each in completions:
        warn_if_cut(each, guide)
    if not any(each.text for each in completions):
        hint = "" if as_chat else "; to ask it as in a conversation, add --chat"
        sys.stderr.write(f"note: the model generated no text{hint}\n")


def _beam_params(beams: int, length_penalty: float, params: SamplingParams) -> BeamParams | None:
    """Returns the `BeamParams` of the options; None without `--beams`.

    Raises:
        ConfigError: an option was given that beam search does not honour.
    """
    from easyllm.core.config import validate
    from easyllm.core.errors import ConfigError

    if not beams:
        if length_penalty != 1:
            raise ConfigError("--length-penalty ranks hypotheses of beam search; add --beams")
        return None
    honoured = {"max_tokens": params.max_tokens, "n": params.n}
    plain = SamplingParams(temperature=0, **honoured)
    if params != plain:
        other = [f for f in SamplingParams.model_fields if getattr(params, f) != getattr(plain, f)]
        raise ConfigError(
            f"beam search selects the most likely hypotheses and does not honour "
            f"{', '.join(other)}; leave them out"
        )
    values = honoured | {"num_beams": beams, "length_penalty": length_penalty}
    return validate(BeamParams, values, source="--beams")


def _as_dict(done: "Completion") -> JsonObject:
    """Returns a completion as a JSON object."""
    from dataclasses import asdict

    values: JsonObject = {
        "text": done.text,
        "token_ids": done.token_ids,
        "logprobs": done.logprobs,
        "finish_reason": done.finish_reason,
    }
    if done.details:
        values["details"] = [
            asdict(each) | {"removed": sorted(each.removed)} for each in done.details
        ]
    if done.score is not None:
        values["score"] = done.score
    return values
