"""litellm's routes to OpenAI's and Anthropic's dialects against `easyllm serve`."""

import asyncio
import json
import logging
import os
import sys
from collections.abc import Callable
from typing import Any

os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"  # otherwise it downloads the prices

import litellm
from figures import Figures
from local_server import KEY, SMOLLM2, post, serving
from pydantic import BaseModel, ConfigDict, Field

MODEL = "smollm2"
PROMPT = "The capital of France is"
ASK: list[dict[str, Any]] = [{"role": "user", "content": "Name the capital of France."}]
FACT = [{"role": "user", "content": "Ada Lovelace, aged 36, is a mathematician from London."}]
PLAIN: dict[str, Any] = {"messages": ASK, "temperature": 0, "max_tokens": 24}
TOOL = {
    "type": "function",
    "function": {
        "name": "store",
        "description": "Stores a person.",
        "parameters": {
            "type": "object",
            "properties": {"age": {"type": "integer", "maximum": 150}, "job": {"enum": ["a", "b"]}},
            "required": ["age", "job"],
            "additionalProperties": False,
        },
    },
}


class Person(BaseModel):
    """A person."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(max_length=40)
    age: int = Field(ge=0, le=150)


def main() -> int:
    litellm.suppress_debug_info = True
    litellm.telemetry = False
    logging.getLogger("LiteLLM").setLevel(logging.ERROR)
    figures = Figures("litellm", "openai")
    with serving(*SMOLLM2) as address:
        routes = {
            "openai": {"api_base": f"{address}/v1", "api_key": KEY},
            "hosted_vllm": {"api_base": f"{address}/v1", "api_key": KEY},
            "anthropic": {"api_base": address, "api_key": KEY},
        }
        _, answer = post(f"{address}/v1/chat/completions", {**PLAIN, "model": MODEL})
        for name, route in routes.items():
            print(name)
            settings = {**route, "model": f"{name}/{MODEL}"}
            for group in (chat, tools, structured, errors):
                figures.run(
                    f"{name}, {group.__name__}", lambda g=group, s=settings: g(figures, s, answer)
                )
        for group in (completions, responses, messages, embeddings):
            print(group.__name__)
            figures.run(group.__name__, lambda g=group: g(figures, address))
    return figures.end()


def chat(figures: Figures, settings: dict[str, Any], answer: dict[str, Any]) -> None:
    expected = answer["choices"][0]["message"]["content"]
    counts = answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]
    whole = litellm.completion(**settings, **PLAIN)
    figures.equal("completion", whole.choices[0].message.content, expected)
    used = whole.usage.prompt_tokens, whole.usage.completion_tokens
    figures.equal("usage", used, counts)
    figures.equal("finish reason", whole.choices[0].finish_reason, "stop")
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(litellm.completion(**settings, **PLAIN, **options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    figures.equal("streamed", text, expected)
    built = litellm.stream_chunk_builder(chunks, messages=ASK)
    figures.equal("usage, streamed", built.usage.completion_tokens, counts[1])
    again = asyncio.run(litellm.acompletion(**settings, **PLAIN))
    figures.equal("acompletion", again.choices[0].message.content, expected)


def tools(figures: Figures, settings: dict[str, Any], _: dict[str, Any]) -> None:
    options = {"messages": FACT, "tools": [TOOL], "temperature": 0, "max_tokens": 120}
    options |= {"tool_choice": "required", "parallel_tool_calls": False}
    message = litellm.completion(**settings, **options).choices[0].message
    (call,) = message.tool_calls
    arguments = json.loads(call.function.arguments)
    figures.equal("a call", (call.function.name, set(arguments)), ("store", {"age", "job"}))
    chunks = list(litellm.completion(**settings, **options, stream=True))
    (built,) = litellm.stream_chunk_builder(chunks).choices[0].message.tool_calls
    figures.equal("streamed", json.loads(built.function.arguments), arguments)
    result = {"role": "tool", "tool_call_id": call.id, "content": "stored"}
    options["messages"] = [*FACT, message.model_dump(), result]
    options["tool_choice"] = "none"
    replied = litellm.completion(**settings, **options)
    figures.true("a result", replied.choices[0].finish_reason in ("stop", "length"))


def structured(figures: Figures, settings: dict[str, Any], _: dict[str, Any]) -> None:
    found = litellm.completion(
        **settings, messages=FACT, temperature=0, max_tokens=120, response_format=Person
    )
    text = found.choices[0].message.content
    figures.true("response_format", bool(Person.model_validate_json(text)), text)


def errors(figures: Figures, settings: dict[str, Any], _: dict[str, Any]) -> None:
    long = [{"role": "user", "content": "word " * 20_000}]
    for name, action, kind in (
        (
            "too long",
            lambda: litellm.completion(**settings, messages=long),
            litellm.ContextWindowExceededError,
        ),
        (
            "an unknown model",
            lambda: litellm.completion(
                **settings | {"model": settings["model"].replace(MODEL, "gpt-x")}, messages=ASK
            ),
            litellm.NotFoundError,
        ),
        (
            "a wrong key",
            lambda: litellm.completion(**settings | {"api_key": "sk-wrong"}, messages=ASK),
            litellm.AuthenticationError,
        ),
        (
            "max_tokens 0",
            lambda: litellm.completion(**settings, messages=ASK, max_tokens=0),
            litellm.BadRequestError,
        ),
    ):
        raised(figures, name, action, kind)


def raised(
    figures: Figures, name: str, action: Callable[[], object], kind: type[Exception]
) -> None:
    try:
        action()
    except Exception as error:
        figures.true(name, type(error) is kind, f"{type(error).__name__}: {error}"[:100])
    else:
        figures.true(name, False, "was accepted")


def completions(figures: Figures, address: str) -> None:
    settings = {"model": f"text-completion-openai/{MODEL}", "api_base": f"{address}/v1"}
    options = {"prompt": PROMPT, "temperature": 0, "max_tokens": 8}
    _, plain = post(f"{address}/v1/completions", {**options, "model": MODEL})
    text = plain["choices"][0]["text"]
    found = litellm.text_completion(**settings, **options, api_key=KEY)
    figures.equal("text_completion", found.choices[0].text, text)
    chunks = litellm.text_completion(**settings, **options, api_key=KEY, stream=True)
    figures.equal("streamed", "".join(c.choices[0].text or "" for c in chunks), text)
    options |= {"logprobs": 1, "echo": True}
    _, plain = post(f"{address}/v1/completions", {**options, "model": MODEL})
    entries = litellm.text_completion(**settings, **options, api_key=KEY).choices[0].logprobs
    expected = plain["choices"][0]["logprobs"]
    figures.equal("log-probabilities", entries.token_logprobs, expected["token_logprobs"])
    figures.equal("their tokens", "".join(entries.tokens), plain["choices"][0]["text"])


def responses(figures: Figures, address: str) -> None:
    settings = {"model": f"openai/{MODEL}", "api_base": f"{address}/v1", "api_key": KEY}
    options = {"input": ASK[0]["content"], "temperature": 0, "max_output_tokens": 24}
    whole = litellm.responses(**settings, **options)
    text = whole.output[0].content[0].text
    _, plain = post(f"{address}/v1/chat/completions", {**PLAIN, "model": MODEL})
    figures.equal("responses", text, plain["choices"][0]["message"]["content"])
    events = list(litellm.responses(**settings, **options, stream=True))
    deltas = "".join(e.delta for e in events if e.type == "response.output_text.delta")
    figures.equal("streamed", deltas, text)


def messages(figures: Figures, address: str) -> None:
    """litellm's own form of the Messages API, over both dialects."""
    _, plain = post(f"{address}/v1/chat/completions", {**PLAIN, "model": MODEL})
    expected = plain["choices"][0]["message"]["content"]
    for route, base in (("anthropic", address), ("openai", f"{address}/v1")):
        settings = {"model": f"{route}/{MODEL}", "api_base": base, "api_key": KEY}
        found = asyncio.run(litellm.anthropic.messages.acreate(**settings, **PLAIN))
        figures.equal(f"{route}", found["content"][0]["text"], expected)


def embeddings(figures: Figures, address: str) -> None:
    texts = ["cat", "今天下雨"]
    found = litellm.embedding(
        model=f"openai/{MODEL}", input=texts, api_base=f"{address}/v1", api_key=KEY
    )
    _, plain = post(f"{address}/v1/embeddings", {"model": MODEL, "input": texts})
    worst = max(
        abs(a - b)
        for one, other in zip(found.data, plain["data"], strict=True)
        for a, b in zip(one["embedding"], other["embedding"], strict=True)
    )
    figures.at_most("embedding", worst, 1e-6)


if __name__ == "__main__":
    sys.exit(main())
