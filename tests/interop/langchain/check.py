"""LangChain's clients of OpenAI and Anthropic against `easyllm serve`."""

import asyncio
import base64
import struct
import sys
from collections.abc import Iterable
from typing import Any, Literal, TypedDict

import langchain_anthropic
import langchain_openai
from figures import Figures
from langchain_core.exceptions import ContextOverflowError
from langchain_core.messages import AIMessage, AIMessageChunk, HumanMessage, ToolMessage
from local_server import KEY, SMOLLM2, post, serving
from pydantic import BaseModel, ConfigDict, Field

MODEL = "smollm2"
ASK = "Name the capital of France in one sentence."
FACT = "Ada Lovelace, aged 36, is a mathematician from London."


class Person(BaseModel):
    """A person."""

    model_config = ConfigDict(extra="forbid")  # otherwise a small model adds fields without end

    name: str = Field(description="full name", max_length=40)
    age: int = Field(ge=0, le=150)
    job: str | None = Field(None, max_length=40)


class City(TypedDict):
    """A city."""

    city: Literal["Paris", "Rome"]
    large: bool


def main() -> int:
    figures = Figures("langchain-core", "langchain-openai", "langchain-anthropic", "openai")
    with serving(*SMOLLM2) as address:
        for group in (
            chat,
            streams,
            tools,
            structured,
            batches,
            completions,
            responses,
            messages,
            embeddings,
            errors,
        ):
            print(group.__name__)
            figures.run(group.__name__, lambda g=group: g(figures, address))
    return figures.end()


def client(address: str, **options: Any) -> langchain_openai.ChatOpenAI:
    settings = {"model": MODEL, "temperature": 0, "max_tokens": 32, "max_retries": 0} | options
    return langchain_openai.ChatOpenAI(base_url=f"{address}/v1", api_key=KEY, **settings)


def reference(address: str, **fields: Any) -> dict[str, Any]:
    """Returns the greedy answer to `ASK` of a plain HTTP request."""
    body = {"model": MODEL, "messages": [{"role": "user", "content": ASK}], "temperature": 0}
    status, answer = post(f"{address}/v1/chat/completions", body | {"max_tokens": 32} | fields)
    assert status == 200, answer
    return answer


def counts(message: AIMessage) -> tuple[int, int]:
    usage = message.usage_metadata
    assert usage is not None
    return usage["input_tokens"], usage["output_tokens"]


def expected_counts(answer: dict[str, Any]) -> tuple[int, int]:
    return answer["usage"]["prompt_tokens"], answer["usage"]["completion_tokens"]


def joined(chunks: Iterable[AIMessageChunk]) -> AIMessageChunk:
    found: AIMessageChunk | None = None
    for chunk in chunks:
        found = chunk if found is None else found + chunk
    assert found is not None
    return found


def chat(figures: Figures, address: str) -> None:
    plain = reference(address)
    answer = client(address).invoke(ASK)
    figures.equal("invoke", answer.content, plain["choices"][0]["message"]["content"])
    figures.equal("usage", counts(answer), expected_counts(plain))
    reason = answer.response_metadata["finish_reason"]
    figures.equal("finish reason", reason, plain["choices"][0]["finish_reason"])
    stopped = client(address, stop_sequences=["Paris"]).invoke(ASK)
    figures.true("stop", "Paris" not in stopped.content, repr(stopped.content))
    found = client(address, logprobs=True, top_logprobs=2).invoke(ASK)
    entries = found.response_metadata["logprobs"]["content"]
    figures.equal("log-probabilities", "".join(e["token"] for e in entries), answer.content)
    history = [HumanMessage(ASK), answer, HumanMessage("And of Italy?")]
    figures.true("a second turn", bool(client(address).invoke(history).content))
    options = {"seed": 4, "temperature": 1.0, "n": 2}
    two = client(address, **options).generate([[HumanMessage(ASK)]]).generations[0]
    figures.true("n = 2", len({g.text for g in two}) == 2)


def streams(figures: Figures, address: str) -> None:
    plain = reference(address)
    for usage in (True, None):
        chunks = list(client(address, stream_usage=usage).stream(ASK))
        whole = joined(chunks)
        name = "with usage" if usage else "plain"
        figures.equal(f"{name}: text", whole.content, plain["choices"][0]["message"]["content"])
        if usage:
            figures.equal("usage is not doubled", counts(whole), expected_counts(plain))
        figures.equal(f"{name}: finish reason", whole.response_metadata["finish_reason"], "stop")
    running = {"stream_options": {"continuous_usage_stats": True}}
    try:  # LangChain adds the usage of chunks, so a server must send it in one of them only
        whole = joined(client(address, model_kwargs=running).stream(ASK))
        doubled = whole.usage_metadata is not None and counts(whole) != expected_counts(plain)
        figures.true("running usage is added up by LangChain", doubled, str(counts(whole)))
    except Exception as error:
        figures.true("running usage", False, str(error)[:200])


def tools(figures: Figures, address: str) -> None:
    forced = client(address, max_tokens=120).bind_tools([Person], tool_choice="any")
    answer = forced.invoke(FACT)
    (call,) = answer.tool_calls[:1]
    figures.equal("any: name", call["name"], "Person")
    figures.true("any: arguments", bool(Person(**call["args"])), str(call["args"]))
    figures.equal("any: none is invalid", answer.invalid_tool_calls, [])
    whole = joined(forced.stream(FACT))
    same = [(c["name"], c["args"]) for c in whole.tool_calls]
    figures.equal("streamed", same, [(c["name"], c["args"]) for c in answer.tool_calls])
    named = client(address, max_tokens=120).bind_tools([Person, City], tool_choice="City")
    answer = named.invoke("Paris has two million inhabitants.")
    figures.equal("named", {c["name"] for c in answer.tool_calls}, {"City"})
    free = client(address, max_tokens=120).bind_tools([Person])
    figures.true("auto", isinstance(free.invoke(ASK), AIMessage))
    strict = client(address, max_tokens=120).bind_tools(
        [Person], tool_choice="any", strict=True, parallel_tool_calls=False
    )
    answer = strict.invoke(FACT)
    figures.equal("strict, not parallel", len(answer.tool_calls), 1)
    figures.equal("finish reason", answer.response_metadata["finish_reason"], "tool_calls")
    result = ToolMessage("stored", tool_call_id=call["id"])
    replied = free.invoke([HumanMessage(FACT), forced.invoke(FACT), result])
    figures.true("a result", isinstance(replied, AIMessage), repr(replied.content)[:60])


def structured(figures: Figures, address: str) -> None:
    model = client(address, max_tokens=120)
    for method in ("json_schema", "function_calling"):
        found = model.with_structured_output(Person, method=method).invoke(FACT)
        figures.true(method, isinstance(found, Person), repr(found))
        found = model.with_structured_output(City, method=method).invoke("Paris: two million.")
        figures.true(f"{method}, TypedDict", set(found) == {"city", "large"}, repr(found))
        found = model.with_structured_output(
            Person.model_json_schema(), method=method, include_raw=True
        ).invoke(FACT)
        figures.true(f"{method}, schema", bool(Person(**found["parsed"])), repr(found["parsed"]))
    if_strict = model.with_structured_output(Person, method="json_schema", strict=True)
    figures.true("strict", isinstance(if_strict.invoke(FACT), Person))
    last = list(model.with_structured_output(Person).stream(FACT))[-1]
    figures.true("streamed", isinstance(last, Person), repr(last))
    found = model.with_structured_output(None, method="json_mode").invoke(f"{FACT} As JSON.")
    figures.true("json_mode", isinstance(found, dict), repr(found)[:80])


def batches(figures: Figures, address: str) -> None:
    model = client(address)
    alone = model.invoke(ASK).content
    figures.equal("batch of 4", {a.content for a in model.batch([ASK] * 4)}, {alone})

    async def together() -> None:
        answers = await asyncio.gather(*(model.ainvoke(ASK) for _ in range(4)))
        figures.equal("ainvoke", {a.content for a in answers}, {alone})
        text = "".join([chunk.content async for chunk in model.astream(ASK)])
        figures.equal("astream", text, alone)

    asyncio.run(together())


def completions(figures: Figures, address: str) -> None:
    """`OpenAI`, LangChain's older client, which uses /v1/completions."""
    model = langchain_openai.OpenAI(
        model=MODEL, base_url=f"{address}/v1", api_key=KEY, temperature=0, max_tokens=12
    )
    body = {"model": MODEL, "prompt": "The capital of France is", "temperature": 0}
    _, plain = post(f"{address}/v1/completions", body | {"max_tokens": 12})
    text = plain["choices"][0]["text"]
    figures.equal("invoke", model.invoke("The capital of France is"), text)
    figures.equal("stream", "".join(model.stream("The capital of France is")), text)
    figures.equal("batch", model.batch(["The capital of France is"] * 3), [text] * 3)


def responses(figures: Figures, address: str) -> None:
    expected = reference(address)["choices"][0]["message"]["content"]
    model = client(address, use_responses_api=True)
    answer = model.invoke(ASK)
    figures.equal("invoke", answer.text, expected)
    whole = joined(model.stream(ASK))
    figures.equal("stream", whole.text, expected)
    figures.equal("usage", counts(whole), counts(answer))
    forced = client(address, use_responses_api=True, max_tokens=120).bind_tools(
        [Person], tool_choice="any"
    )
    (call,) = joined(forced.stream(FACT)).tool_calls[:1]
    figures.true("a call, streamed", bool(Person(**call["args"])), str(call["args"]))
    found = client(address, use_responses_api=True, max_tokens=120).with_structured_output(Person)
    figures.true("with_structured_output", isinstance(found.invoke(FACT), Person))
    followed = client(address, use_responses_api=True, use_previous_response_id=True)
    history = [HumanMessage(ASK), followed.invoke(ASK), HumanMessage("And of Italy?")]
    figures.equal("previous_response_id", followed.invoke(history).text, model.invoke(history).text)


def messages(figures: Figures, address: str) -> None:
    """`ChatAnthropic`."""
    expected = reference(address)["choices"][0]["message"]["content"]
    settings: dict[str, Any] = {"model": MODEL, "base_url": address, "api_key": KEY}
    settings |= {"temperature": 0, "max_retries": 0}
    model = langchain_anthropic.ChatAnthropic(**settings, max_tokens=32)
    answer = model.invoke(ASK)
    figures.equal("invoke", answer.text, expected)
    whole = joined(model.stream(ASK))
    figures.equal("stream", whole.text, expected)
    figures.equal("usage", counts(whole), expected_counts(reference(address)))
    longer = langchain_anthropic.ChatAnthropic(**settings, max_tokens=120)
    forced = longer.bind_tools([Person], tool_choice="any")
    called = forced.invoke(FACT)
    figures.true("a call", bool(Person(**called.tool_calls[0]["args"])), str(called.tool_calls[0]))
    streamed = joined(forced.stream(FACT))
    figures.equal("streamed", streamed.tool_calls[0]["args"], called.tool_calls[0]["args"])
    result = ToolMessage("stored", tool_call_id=called.tool_calls[0]["id"])
    replied = forced.invoke([HumanMessage(FACT), called, result])
    figures.true("a result", isinstance(replied, AIMessage))
    for method in ("function_calling", "json_schema"):
        found = longer.with_structured_output(Person, method=method).invoke(FACT)
        figures.true(method, isinstance(found, Person), repr(found))


def embeddings(figures: Figures, address: str) -> None:
    model = langchain_openai.OpenAIEmbeddings(
        model=MODEL,
        base_url=f"{address}/v1",
        api_key=KEY,
        check_embedding_ctx_length=False,  # otherwise it sends token ids of OpenAI's vocabulary
    )
    body = {"model": MODEL, "input": ["cat", "今天下雨"], "encoding_format": "base64"}
    _, plain = post(f"{address}/v1/embeddings", body)
    expected = [
        list(struct.unpack(f"<{len(raw) // 4}f", raw))
        for raw in (base64.b64decode(each["embedding"]) for each in plain["data"])
    ]
    figures.equal("embed_documents", model.embed_documents(["cat", "今天下雨"]), expected)
    figures.equal("embed_query", model.embed_query("cat"), expected[0])


def errors(figures: Figures, address: str) -> None:
    try:
        client(address).invoke("word " * 20_000)
    except ContextOverflowError as error:
        figures.true("too long", True, type(error).__name__)
    else:
        figures.true("too long", False, "was accepted")
    for name, options, kind in (
        ("an unknown model", {"model": "gpt-x"}, "OpenAIModelNotFoundError"),
        ("temperature 9", {"temperature": 9}, "OpenAIInvalidRequestError"),
    ):
        try:
            client(address, **options).invoke(ASK)
        except Exception as error:
            figures.equal(name, type(error).__name__, kind)
        else:
            figures.true(name, False, "was accepted")


if __name__ == "__main__":
    sys.exit(main())
