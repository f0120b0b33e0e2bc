"""The official clients on the routes beyond plain chat: tools, forms, responses, messages."""

import json
from typing import Any, Literal

import anthropic
import openai
from figures import Figures
from pydantic import BaseModel, ConfigDict

LIMIT = 250  # each letter of a call is a token of the tiny model
ASK: dict[str, Any] = {
    "model": "tiny",
    "messages": [{"role": "user", "content": "hello"}],
    "temperature": 0,
    "max_tokens": LIMIT,
}
GREEDY = {"temperature": 0}
"""For `extra_body`: anthropic's client has no sampling parameters since version 2."""


class City(BaseModel):
    """A city; without free text, so that a random model ends it."""

    model_config = ConfigDict(extra="forbid")

    city: Literal["Oslo", "Rome"]
    large: bool


SCHEMA = City.model_json_schema()
TOOL: Any = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}


def tools(figures: Figures, client: openai.OpenAI) -> None:
    asked = {**ASK, "tools": [TOOL], "tool_choice": "required", "parallel_tool_calls": False}
    choice = client.chat.completions.create(**asked).choices[0]
    (call,) = choice.message.tool_calls or ()
    figures.true("a call", bool(City.model_validate_json(call.function.arguments)))
    figures.equal("finish reason", choice.finish_reason, "tool_calls")
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion().choices[0].message
    arguments = (final.tool_calls or ())[0].function.arguments
    figures.equal("stream helper", arguments, call.function.arguments)
    figures.true("its events", "tool_calls.function.arguments.done" in kinds, str(sorted(kinds)))
    pieces = [
        piece
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices
        for piece in chunk.choices[0].delta.tool_calls or ()
    ]
    figures.equal("id and name once", [bool(p.id) for p in pieces].count(True), 1)
    figures.true("index always", all(piece.index == 0 for piece in pieces))
    result: Any = {"role": "tool", "tool_call_id": call.id, "content": "found"}
    history = {"messages": [*ASK["messages"], choice.message, result], "tool_choice": "none"}
    replied = client.chat.completions.create(**asked | history)
    figures.true("a result", replied.choices[0].finish_reason in ("stop", "length"))


def structured(figures: Figures, client: openai.OpenAI) -> None:
    found = client.chat.completions.parse(**ASK, response_format=City)
    figures.true("parse", isinstance(found.choices[0].message.parsed, City))
    with client.chat.completions.stream(**ASK, response_format=City) as stream:
        final = stream.get_final_completion()
    figures.equal(
        "parsed, streamed", final.choices[0].message.parsed, found.choices[0].message.parsed
    )
    bad: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"not": {}}}}
    try:
        client.chat.completions.create(**ASK, response_format=bad)
    except openai.BadRequestError as error:
        figures.true("a keyword that is refused", "not" in error.message, error.message[:100])
    else:
        figures.true("a keyword that is refused", False, "was accepted")


def completions(figures: Figures, client: openai.OpenAI) -> None:
    settings: dict[str, Any] = {"model": "tiny", "prompt": "hello", "temperature": 0}
    whole = client.completions.create(**settings, max_tokens=8, logprobs=2)
    text = whole.choices[0].text
    chunks = client.completions.create(**settings, max_tokens=8, stream=True)
    figures.equal("streamed", "".join(c.choices[0].text for c in chunks), text)
    echoed = client.completions.create(**settings, max_tokens=8, logprobs=2, echo=True)
    figures.equal("echo", echoed.choices[0].text, f"hello{text}")
    found = echoed.choices[0].logprobs
    figures.equal("no value for the first token only", (found.token_logprobs or ())[0], None)
    own = whole.choices[0].logprobs
    worst = max(
        abs((a or 0) - (b or 0))
        for a, b in zip((found.token_logprobs or ())[-8:], own.token_logprobs or (), strict=True)
    )
    figures.at_most("their values", worst, 1e-4)
    several = client.completions.create(model="tiny", prompt=["a", "b"], n=2, max_tokens=2)
    figures.equal("two prompts, n = 2", [c.index for c in several.choices], [0, 1, 2, 3])


def embeddings(figures: Figures, client: openai.OpenAI) -> None:
    texts = ["hello", "你好"]
    by_default = client.embeddings.create(model="tiny", input=texts).data
    numbers = client.embeddings.create(model="tiny", input=texts, encoding_format="float").data
    worst = max(
        abs(a - b)
        for one, other in zip(by_default, numbers, strict=True)
        for a, b in zip(one.embedding, other.embedding, strict=True)
    )
    figures.at_most("base64 and float", worst, 1e-7)
    figures.at_most("unit length", abs(sum(x * x for x in numbers[0].embedding) - 1), 1e-5)


def responses(figures: Figures, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "input": "hello", "temperature": 0}
    chat = client.chat.completions.create(**ASK).choices[0].message.content
    whole = client.responses.create(**asked, max_output_tokens=LIMIT)
    figures.equal("the text of a chat", whole.output_text, chat)
    with client.responses.stream(**asked, max_output_tokens=LIMIT) as stream:
        deltas = "".join(e.delta for e in stream if e.type == "response.output_text.delta")
    figures.equal("streamed", deltas, chat)
    parsed = client.responses.parse(**asked, max_output_tokens=LIMIT, text_format=City)
    figures.true("parse", isinstance(parsed.output_parsed, City))
    tool: Any = {"type": "function", "name": "look", "parameters": SCHEMA, "strict": True}
    called = client.responses.create(
        **asked, max_output_tokens=LIMIT, tools=[tool], tool_choice="required"
    )
    kinds = {item.type for item in called.output}
    figures.true("a call", "function_call" in kinds, str(sorted(kinds)))
    followed = client.responses.create(**asked, max_output_tokens=8, previous_response_id=whole.id)
    figures.equal("previous_response_id", followed.previous_response_id, whole.id)
    figures.equal("retrieve", client.responses.retrieve(whole.id).output_text, chat)
    figures.equal("input items", len(client.responses.input_items.list(followed.id).data), 3)
    client.responses.delete(whole.id)
    try:
        client.responses.retrieve(whole.id)
    except openai.NotFoundError:
        figures.true("delete", True)
    else:
        figures.true("delete", False, "was retrieved")


def messages(figures: Figures, openai_client: openai.OpenAI, address: str, key: str) -> None:
    """anthropic's client."""
    chat = openai_client.chat.completions.create(**ASK)
    asked: dict[str, Any] = {"model": "tiny", "messages": ASK["messages"], "max_tokens": LIMIT}
    with anthropic.Anthropic(base_url=address, api_key=key, max_retries=0) as client:
        whole = client.messages.create(**asked, extra_body=GREEDY)
        text = "".join(block.text for block in whole.content if block.type == "text")
        figures.equal("the text of a chat", text, chat.choices[0].message.content)
        figures.equal(
            "tokens",
            whole.usage.input_tokens + (whole.usage.cache_read_input_tokens or 0),
            chat.usage.prompt_tokens if chat.usage else None,
        )
        with client.messages.stream(**asked, extra_body=GREEDY) as stream:
            streamed = "".join(stream.text_stream)
            final = stream.get_final_message()
        figures.equal("streamed", (streamed, final.stop_reason), (text, whole.stop_reason))
        counted = client.messages.count_tokens(model="tiny", messages=ASK["messages"])
        figures.equal(
            "count_tokens",
            counted.input_tokens,
            chat.usage.prompt_tokens if chat.usage else None,
        )
        tool: Any = {"name": "look", "input_schema": SCHEMA}
        called = client.messages.create(
            **asked, tools=[tool], tool_choice={"type": "any"}, extra_body=GREEDY
        )
        use = next(block for block in called.content if block.type == "tool_use")
        figures.true("tool_use", bool(City.model_validate(use.input)), json.dumps(use.input))
        try:
            client.messages.create(**asked | {"model": "x"})
        except anthropic.NotFoundError as error:
            figures.true("an unknown model", True, str(error)[:90])
        else:
            figures.true("an unknown model", False, "was accepted")


__all__ = ["completions", "embeddings", "messages", "responses", "structured", "tools"]
