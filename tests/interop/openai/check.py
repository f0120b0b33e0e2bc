"""The official clients against `easyllm serve`, with a tiny random model in a separate process."""

import asyncio
import json
import math
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import openai
import routes
from figures import Figures
from local_server import KEY, save_tiny, serving

QUESTION: Any = [{"role": "user", "content": "hello, 世界 12345"}]
PLAIN: dict[str, Any] = {"model": "tiny", "messages": QUESTION, "max_tokens": 24, "temperature": 0}


def main() -> int:
    figures = Figures("openai", "anthropic", "starlette", "uvicorn", "pydantic", "httpx2")
    with tempfile.TemporaryDirectory() as folder:
        model = save_tiny(Path(folder) / "tiny")
        with serving(f"tiny={model}") as address, connect(address) as client:
            for group in (answers, streams, logprobs, choices, replay, errors, listing):
                print(group.__name__)
                figures.run(group.__name__, lambda g=group: g(figures, client))
            print("keys")
            figures.run("keys", lambda: keys(figures, address))
            print("asynchronous")
            figures.run("asynchronous", lambda: asyncio.run(together(figures, address)))
        wide = save_tiny(Path(folder) / "wide", context=2048)  # tools take many tokens
        with serving(f"tiny={wide}") as address, connect(address) as client:
            for group in (
                routes.tools,
                routes.structured,
                routes.completions,
                routes.embeddings,
                routes.responses,
            ):
                print(group.__name__)
                figures.run(group.__name__, lambda g=group: g(figures, client))
            print("messages")
            figures.run("messages", lambda: routes.messages(figures, client, address, KEY))
    return figures.end()


# ---- requests


def answers(figures: Figures, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**PLAIN)
    (choice,) = answer.choices
    figures.equal("role", choice.message.role, "assistant")
    figures.true("content", bool(choice.message.content), repr(choice.message.content)[:60])
    figures.true("finish reason", choice.finish_reason in ("stop", "length"), choice.finish_reason)
    figures.true("id", answer.id.startswith("chatcmpl-"))
    figures.equal("object", answer.object, "chat.completion")
    assert answer.usage is not None
    parts = answer.usage.prompt_tokens + answer.usage.completion_tokens
    figures.equal("usage adds up", answer.usage.total_tokens, parts)
    again = client.chat.completions.create(**PLAIN)
    figures.equal("greedy twice", content(again), content(answer))
    seeded = PLAIN | {"temperature": 1.0, "seed": 7}
    first, second = (content(client.chat.completions.create(**seeded)) for _ in range(2))
    figures.equal("seed 7 twice", second, first)
    other = content(client.chat.completions.create(**seeded | {"seed": 8}))
    figures.true("seed 8 differs", other != first)
    new = client.chat.completions.create(**without(PLAIN, "max_tokens"), max_completion_tokens=5)
    figures.true(
        "max_completion_tokens", new.usage is not None and new.usage.completion_tokens <= 5
    )
    parts_of_text: Any = [{"type": "text", "text": QUESTION[0]["content"]}]
    listed = client.chat.completions.create(
        **PLAIN | {"messages": [{"role": "user", "content": parts_of_text}]}
    )
    figures.equal("content as parts", content(listed), content(answer))
    system, developer = (
        content(
            client.chat.completions.create(
                **PLAIN | {"messages": [{"role": role, "content": "Be brief."}, *QUESTION]}
            )
        )
        for role in ("system", "developer")
    )
    figures.equal("developer is system", developer, system)
    raw = client.chat.completions.with_raw_response.create(**PLAIN)
    figures.equal("raw response", content(raw.parse()), content(answer))
    omitted = client.chat.completions.create(
        **PLAIN,
        stop=openai.omit,
        top_p=None,
        n=None,  # type: ignore[arg-type]
    )
    figures.equal("null and omitted fields", content(omitted), content(answer))


def streams(figures: Figures, client: openai.OpenAI) -> None:
    whole = client.chat.completions.create(**PLAIN)
    options: Any = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(client.chat.completions.create(**PLAIN, **options))
    text = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    figures.equal("joined deltas", text, content(whole))
    roles = [c.choices[0].delta.role for c in chunks if c.choices and c.choices[0].delta.role]
    figures.equal("role once", roles, ["assistant"])
    reasons = [c.choices[0].finish_reason for c in chunks if c.choices]
    figures.equal("finish reason at the end", reasons[-1], whole.choices[0].finish_reason)
    figures.true("no finish reason before", not any(reasons[:-1]))
    with_usage = [c for c in chunks if c.usage is not None]
    figures.equal("usage once, without choices", [len(c.choices) for c in with_usage], [0])
    figures.equal("usage of the whole", with_usage[0].usage, whole.usage)
    figures.equal("one id", len({c.id for c in chunks}), 1)
    stopped = PLAIN | {"stop": content(whole)[6:8]}
    with client.chat.completions.stream(**stopped) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    expected = content(client.chat.completions.create(**stopped))
    figures.equal("stream helper", content(final), expected)
    figures.true("its events", {"content.delta", "content.done"} <= kinds, str(sorted(kinds)))
    try:  # it rejects completions truncated by max_tokens: findings/openai_stream_length.sh
        with client.chat.completions.stream(**PLAIN) as stream:
            stream.get_final_completion()
    except openai.LengthFinishReasonError as error:
        figures.equal("stream helper, cut", content(error.completion), content(whole))
    early = client.chat.completions.create(**PLAIN, stream=True)
    next(iter(early))
    early.close()
    figures.equal(
        "after a stream was left", content(client.chat.completions.create(**PLAIN)), content(whole)
    )


def logprobs(figures: Figures, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**PLAIN, logprobs=True, top_logprobs=4)
    entries = answer.choices[0].logprobs
    assert entries is not None
    assert entries.content is not None
    joined = b"".join(bytes(entry.bytes or []) for entry in entries.content)
    figures.equal("joined bytes", joined.decode("utf-8", "replace"), content(answer))
    figures.true(
        "four alternatives", all(len(entry.top_logprobs) == 4 for entry in entries.content)
    )
    best = all(
        entry.logprob == max(t.logprob for t in entry.top_logprobs) for entry in entries.content
    )
    figures.true("greedy is the likeliest", best)
    mass = max(sum(math.exp(t.logprob) for t in entry.top_logprobs) for entry in entries.content)
    figures.true("at most all of the mass", mass <= 1 + 1e-6, f"{mass:.6f}")
    chunks = client.chat.completions.create(**PLAIN, logprobs=True, top_logprobs=4, stream=True)
    streamed = [
        entry
        for chunk in chunks
        if chunk.choices and chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or []
    ]
    same = [(e.token, e.bytes) for e in streamed] == [(e.token, e.bytes) for e in entries.content]
    figures.true("streamed: the same tokens", same)
    worst = max(abs(a.logprob - b.logprob) for a, b in zip(streamed, entries.content, strict=True))
    figures.at_most("streamed: the same values", worst, 1e-5)
    without_them = client.chat.completions.create(**PLAIN)
    figures.equal("not asked for", without_them.choices[0].logprobs, None)


def choices(figures: Figures, client: openai.OpenAI) -> None:
    sampled = PLAIN | {"temperature": 1.0, "seed": 3}
    three = client.chat.completions.create(**sampled, n=3)
    figures.equal("n = 3", [c.index for c in three.choices], [0, 1, 2])
    figures.true("they differ", len({c.message.content for c in three.choices}) > 1)
    found = dict.fromkeys(range(3), "")
    for chunk in client.chat.completions.create(**sampled, n=3, stream=True):
        for choice in chunk.choices:
            found[choice.index] += choice.delta.content or ""
    figures.equal(
        "n = 3, streamed", list(found.values()), [c.message.content for c in three.choices]
    )
    text = content(client.chat.completions.create(**PLAIN))
    stop = next(
        (text[i : i + 2] for i in range(3, len(text) - 2) if text[i : i + 2].isprintable()),
        text[2:4],
    )
    stopped = client.chat.completions.create(**PLAIN, stop=[stop, "never, ever"])
    figures.equal(f"stop {stop!r}", content(stopped), text[: text.index(stop)])
    figures.equal("its finish reason", stopped.choices[0].finish_reason, "stop")
    pieces = client.chat.completions.create(**PLAIN, stop=stop, stream=True)
    joined = "".join(c.choices[0].delta.content or "" for c in pieces if c.choices)
    figures.equal("stop, streamed", joined, text[: text.index(stop)])


def replay(figures: Figures, client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(**PLAIN)
    message = answer.choices[0].message
    follow_up: Any = {"role": "user", "content": "and then?"}
    plain = {"role": "assistant", "content": message.content}
    expected = content(
        client.chat.completions.create(**PLAIN | {"messages": [*QUESTION, plain, follow_up]})
    )
    for name, dumped in (
        ("the message itself", message),
        ("model_dump()", message.model_dump()),
        ("model_dump(exclude_none=True)", message.model_dump(exclude_none=True)),
        ("to_dict()", message.to_dict()),
        ("model_dump_json()", json.loads(message.model_dump_json())),
    ):
        history: Any = [*QUESTION, dumped, follow_up]
        got = client.chat.completions.create(**PLAIN | {"messages": history})
        figures.equal(name, content(got), expected)


def errors(figures: Figures, client: openai.OpenAI) -> None:
    create = client.chat.completions.create
    image: Any = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA=="}}]
    pictures: Any = [{"role": "user", "content": image}]
    long: Any = [{"role": "user", "content": "hello " * 400}]
    for name, action, kind, code, param in (
        (
            "temperature 9",
            lambda: create(**PLAIN | {"temperature": 9}),
            400,
            "invalid_value",
            "temperature",
        ),
        (
            "no messages",
            lambda: create(**PLAIN | {"messages": []}),
            400,
            "invalid_value",
            "messages",
        ),
        ("n = 0", lambda: create(**PLAIN, n=0), 400, "invalid_value", "n"),
        ("top_logprobs alone", lambda: create(**PLAIN, top_logprobs=2), 400, None, "top_logprobs"),
        (
            "an unknown field",
            lambda: create(**PLAIN, extra_body={"temp": 1}),
            400,
            "unknown_parameter",
            "temp",
        ),
        (
            "an image",
            lambda: create(**PLAIN | {"messages": pictures}),
            400,
            None,
            "messages.0.content",
        ),
        (
            "a prompt that is too long",
            lambda: create(**PLAIN | {"messages": long}),
            400,
            "context_length_exceeded",
            "messages",
        ),
        (
            "an unknown model",
            lambda: create(**PLAIN | {"model": "gpt-x"}),
            404,
            "model_not_found",
            "model",
        ),
        (
            "a model to retrieve",
            lambda: client.models.retrieve("gpt-x"),
            404,
            "model_not_found",
            "model",
        ),
    ):
        refused(figures, name, action, kind, code, param)
    refused(figures, "no such route", lambda: client.batches.list(), 404, None, None)


def refused(
    figures: Figures,
    name: str,
    action: Callable[[], Any],
    status: int,
    code: str | None,
    param: str | None,
) -> None:
    kinds = {
        400: openai.BadRequestError,
        401: openai.AuthenticationError,
        404: openai.NotFoundError,
    }
    try:
        action()
    except openai.APIStatusError as error:
        right = type(error) is kinds[status] and error.type == "invalid_request_error"
        right &= code is None or error.code == code
        right &= param is None or error.param == param
        text = f"{type(error).__name__} code={error.code} param={error.param} type={error.type}"
        figures.true(name, right and bool(error.message), text)
    else:
        figures.true(name, False, "was accepted, expected an error")


def listing(figures: Figures, client: openai.OpenAI) -> None:
    (entry,) = client.models.list()
    figures.equal("models.list", entry.id, "tiny")
    figures.equal("models.retrieve", client.models.retrieve("tiny"), entry)
    figures.equal("object", entry.object, "model")
    figures.equal("max_model_len", (entry.model_extra or {}).get("max_model_len"), 256)


def keys(figures: Figures, address: str) -> None:
    for name, key in (("a wrong key", "sk-wrong"), ("the key's beginning", KEY[:-1])):
        with openai.OpenAI(base_url=f"{address}/v1", api_key=key, max_retries=0) as stranger:
            refused(
                figures,
                f"{name}, models",
                lambda s=stranger: s.models.list(),
                401,
                "invalid_api_key",
                None,
            )
            ask = lambda s=stranger: s.chat.completions.create(**PLAIN)  # noqa: E731
            refused(figures, f"{name}, chat", ask, 401, "invalid_api_key", None)


async def together(figures: Figures, address: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0) as client:
        alone = await client.chat.completions.create(**PLAIN)
        many = await asyncio.gather(*(client.chat.completions.create(**PLAIN) for _ in range(6)))
        figures.equal("six at a time", {content(answer) for answer in many}, {content(alone)})
        stream = await client.chat.completions.create(**PLAIN, stream=True)
        text = "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])
        figures.equal("streamed", text, content(alone))


def connect(address: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{address}/v1", api_key=KEY, max_retries=0, timeout=60)


def content(answer: Any) -> str:
    found: str = answer.choices[0].message.content
    return found


def without(values: dict[str, Any], name: str) -> dict[str, Any]:
    return {key: value for key, value in values.items() if key != name}


if __name__ == "__main__":
    sys.exit(main())
