"""LlamaIndex's `OpenAILike` and `OpenAILikeEmbedding` against `easyllm serve`."""

import asyncio
import sys
from typing import Any

from figures import Figures
from llama_index.core.llms import ChatMessage
from llama_index.core.program import FunctionCallingProgram
from llama_index.core.tools import FunctionTool
from llama_index.embeddings.openai_like import OpenAILikeEmbedding
from llama_index.llms.openai_like import OpenAILike
from local_server import KEY, SMOLLM2, post, serving
from pydantic import BaseModel, Field

MODEL = "smollm2"
PROMPT = "The capital of France is"
FACT = "Ada Lovelace, aged 36, is a mathematician from London."


class Person(BaseModel):
    """A person."""

    name: str = Field(description="full name")
    age: int = Field(ge=0, le=150)


def main() -> int:
    figures = Figures(
        "llama-index-core",
        "llama-index-llms-openai-like",
        "llama-index-embeddings-openai-like",
        "openai",
    )
    with serving(*SMOLLM2) as address:
        for group in (completions, chat, tools, structured, embeddings, errors):
            print(group.__name__)
            figures.run(group.__name__, lambda g=group: g(figures, address))
    return figures.end()


def client(address: str, **options: Any) -> OpenAILike:
    settings = {"model": MODEL, "temperature": 0, "max_tokens": 24, "max_retries": 0} | options
    return OpenAILike(api_base=f"{address}/v1", api_key=KEY, context_window=8192, **settings)


def completions(figures: Figures, address: str) -> None:
    """The default: /v1/completions."""
    model = client(address)
    body = {"model": MODEL, "prompt": PROMPT, "temperature": 0, "max_tokens": 24}
    _, plain = post(f"{address}/v1/completions", body)
    text = plain["choices"][0]["text"]
    figures.equal("complete", model.complete(PROMPT).text, text)
    pieces = list(model.stream_complete(PROMPT))
    figures.equal("stream_complete", "".join(p.delta or "" for p in pieces), text)
    figures.equal("its last text", pieces[-1].text, text)
    figures.equal("acomplete", asyncio.run(model.acomplete(PROMPT)).text, text)
    unset = OpenAILike(model=MODEL, api_base=f"{address}/v1", api_key=KEY)
    figures.true("all defaults", bool(unset.complete(PROMPT).text))
    answer = model.chat([ChatMessage(role="user", content="Hello.")])
    figures.true("chat by a completion", bool(answer.message.content), repr(answer.message.content))
    scored = client(address, additional_kwargs={"logprobs": 2}).complete(PROMPT)
    entries = scored.logprobs or []
    shown = [e.token if hasattr(e, "token") else [t.token for t in e] for e in entries[:2]]
    figures.true("log-probabilities", len(entries) > 0, str(shown))


def chat(figures: Figures, address: str) -> None:
    model = client(address, is_chat_model=True)
    question = [
        ChatMessage(role="system", content="Be brief."),
        ChatMessage(content="Who are you?"),
    ]
    body = {
        "model": MODEL,
        "messages": [{"role": m.role.value, "content": m.content} for m in question],
        "temperature": 0,
        "max_tokens": 24,
    }
    _, plain = post(f"{address}/v1/chat/completions", body)
    text = plain["choices"][0]["message"]["content"]
    figures.equal("chat", model.chat(question).message.content, text)
    pieces = list(model.stream_chat(question))
    figures.equal("stream_chat", "".join(p.delta or "" for p in pieces), text)
    figures.equal("its last message", pieces[-1].message.content, text)
    figures.equal("achat", asyncio.run(model.achat(question)).message.content, text)
    figures.true("complete by a chat", bool(model.complete("Who are you?").text))
    history = [*question, model.chat(question).message, ChatMessage(content="Why?")]
    figures.true("a second turn", bool(model.chat(history).message.content))


def tools(figures: Figures, address: str) -> None:
    settings = {"is_chat_model": True, "is_function_calling_model": True, "max_tokens": 120}
    model = client(address, **settings)

    def store(name: str, age: int) -> str:
        """Stores a person."""
        return f"{name}: {age}"

    tool = FunctionTool.from_defaults(store)
    answer = model.chat_with_tools([tool], user_msg=FACT, tool_required=True)
    calls = model.get_tool_calls_from_response(answer)
    kwargs = calls[0].tool_kwargs
    figures.true("chat_with_tools", set(kwargs) == {"name", "age"}, str(kwargs))
    last = list(model.stream_chat_with_tools([tool], user_msg=FACT, tool_required=True))[-1]
    streamed = model.get_tool_calls_from_response(last)
    figures.equal("streamed", [c.tool_kwargs for c in streamed], [c.tool_kwargs for c in calls])
    ran = model.predict_and_call([tool], user_msg=FACT, tool_choice="store")
    figures.true("predict_and_call", bool(ran.sources), str(ran)[:80])


def structured(figures: Figures, address: str) -> None:
    settings = {"is_chat_model": True, "max_tokens": 120}
    by_form = client(address, **settings, should_use_structured_outputs=True)
    by_call = client(address, **settings, is_function_calling_model=True)
    for name, model in (("response_format", by_form), ("function calling", by_call)):
        found = model.as_structured_llm(Person).complete(FACT).raw
        figures.true(f"as_structured_llm, {name}", isinstance(found, Person), repr(found))
    program = FunctionCallingProgram.from_defaults(
        output_cls=Person, llm=by_call, prompt_template_str="{text}"
    )
    found = program(text=FACT)
    figures.true("FunctionCallingProgram", isinstance(found, Person), repr(found))


def embeddings(figures: Figures, address: str) -> None:
    model = OpenAILikeEmbedding(
        model_name=MODEL, api_base=f"{address}/v1", api_key=KEY, embed_batch_size=2
    )
    texts = ["cat", "今天下雨", "the quick brown fox"]
    found = model.get_text_embedding_batch(texts)
    _, plain = post(f"{address}/v1/embeddings", {"model": MODEL, "input": texts})
    worst = max(
        abs(a - b)
        for one, other in zip(found, plain["data"], strict=True)
        for a, b in zip(one, other["embedding"], strict=True)
    )
    figures.at_most("get_text_embedding_batch", worst, 1e-6)
    figures.at_most("unit length", abs(sum(x * x for x in found[1]) - 1), 1e-5)


def errors(figures: Figures, address: str) -> None:
    for name, options, prompt, kind in (
        ("an unknown model", {"model": "gpt-x"}, PROMPT, "NotFoundError"),
        ("too long", {}, "word " * 20_000, "BadRequestError"),
    ):
        try:
            client(address, **options).complete(prompt)
        except Exception as error:
            figures.equal(name, type(error).__name__, kind)
        else:
            figures.true(name, False, "was accepted")


if __name__ == "__main__":
    sys.exit(main())
