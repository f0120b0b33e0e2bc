"""Request fields: honoured within limits, accepted if without effect, or refused by name."""

import typing
from pathlib import Path

import httpx
import openai
import pytest

from easyllm.engine import LLM, SamplingParams
from easyllm.serve.openai.chat_request import ChatRequest, StreamOptions
from easyllm.serve.openai.messages import ChatMessage
from easyllm.serve.treatment import Neutral, Refused, treatment_of
from running_server import QUESTION, running
from tiny_models import build_tiny

FIELDS = {name: treatment_of(ChatRequest, name) for name in ChatRequest.model_fields}
REQUIRED = {"model", "messages"}
EXTENSIONS = {
    *("top_k", "min_p", "typical_p", "repetition_penalty", "min_tokens", "stop_token_ids"),
    *("ignore_eos", "skip_special_tokens", "include_stop_str_in_output", "cache_salt"),
    *("structured_outputs", "thinking_token_budget", "chat_template_kwargs"),
    *("add_generation_prompt", "continue_final_message", "token_details"),
}
FUNCTION = {"name": "f", "parameters": {"type": "object", "properties": {}}}
TOOL = {"type": "function", "function": FUNCTION}
USER = {"role": "user", "content": "x"}

# values without effect, and values that would have one or are invalid
NEUTRAL = {
    "user": (["ada", ""], [5]),
    "safety_identifier": (["a1"], [True]),
    "prompt_cache_key": (["k"], [["k"]]),
    "metadata": ([{}, {"topic": "x"}], [{"topic": 5}, {"k" * 65: "x"}, [1]]),
    "functions": ([[]], [[FUNCTION]]),
    "function_call": (["none", "auto"], [{"name": "f"}]),
    "modalities": ([["text"]], [["text", "audio"], ["audio"], []]),
    "store": ([False], [True, "false", 0]),
    "verbosity": (["medium"], ["low", "high"]),
    "prompt_cache_retention": (["in_memory"], ["24h"]),
    "prompt_cache_options": ([{}, {"mode": "implicit"}], [{"mode": "explicit"}, {"ttl": "30m"}]),
}
REFUSED = {
    "audio": {"format": "wav", "voice": "alloy"},
    "moderation": {"model": "m"},
    "prediction": {"type": "content", "content": "x"},
    "web_search_options": {},
}
ANSWER = {"model": "m", "messages": QUESTION, "max_tokens": 6, "temperature": 0}


def text_of(answer):
    return answer["choices"][0]["message"]["content"]


def tokens_of(answer):
    return answer["usage"]["completion_tokens"]


# changes to `ANSWER`, and their required effect on the response
HONOURED = {
    "model": ({"model": "n"}, lambda new, old: new["model"] == "n"),
    "messages": ({"messages": [USER]}, lambda new, old: new["usage"] != old["usage"]),
    "temperature": ({"temperature": 1.9, "seed": 1}, lambda new, old: text_of(new) != text_of(old)),
    "top_p": (
        {"temperature": 2, "top_p": 1e-9},
        lambda new, old: text_of(new) == text_of(old),  # a single token: greedy
    ),
    "top_k": (
        {"temperature": 2, "top_k": 1},
        lambda new, old: text_of(new) == text_of(old),
    ),
    "seed": ({"temperature": 2, "seed": 3}, lambda new, old: text_of(new) != text_of(old)),
    "max_tokens": ({"max_tokens": 2}, lambda new, old: tokens_of(new) == 2),
    "max_completion_tokens": (
        {"max_tokens": None, "max_completion_tokens": 3},
        lambda new, old: tokens_of(new) == 3,
    ),
    "n": ({"n": 2}, lambda new, old: [c["index"] for c in new["choices"]] == [0, 1]),
    "logit_bias": (
        {"logit_bias": {"40": 100}},
        lambda new, old: text_of(new) != text_of(old),
    ),
    "logprobs": (
        {"logprobs": True},
        lambda new, old: (
            old["choices"][0]["logprobs"] is None
            and new["choices"][0]["logprobs"]["content"][0]["top_logprobs"] == []
        ),
    ),
    "token_details": (
        {"logprobs": True, "top_logprobs": 2, "token_details": True},
        lambda new, old: new["choices"][0]["logprobs"]["content"][0]["entropy"] > 0,
    ),
    "top_logprobs": (
        {"logprobs": True, "top_logprobs": 3},
        lambda new, old: len(new["choices"][0]["logprobs"]["content"][0]["top_logprobs"]) == 3,
    ),
    "min_p": ({"temperature": 2, "min_p": 1}, lambda new, old: text_of(new) == text_of(old)),
    "typical_p": (
        {"temperature": 2, "seed": 3, "typical_p": 0.01},
        lambda new, old: text_of(new) != text_of(old),
    ),
    "repetition_penalty": (
        {"repetition_penalty": 50, "max_tokens": 30},
        lambda new, old: not text_of(new).startswith(text_of(old)),
    ),
    "min_tokens": (
        {"logit_bias": {"2": 100}, "min_tokens": 3},
        lambda new, old: tokens_of(new) == 4,
    ),
    "ignore_eos": (
        {"logit_bias": {"2": 100}, "ignore_eos": True},
        lambda new, old: tokens_of(new) == 6,
    ),
    "stop_token_ids": (
        {"logit_bias": {"40": 100}, "stop_token_ids": [40]},
        lambda new, old: tokens_of(new) == 1 and new["choices"][0]["finish_reason"] == "stop",
    ),
    "skip_special_tokens": (
        {"logit_bias": {"1": 100}, "skip_special_tokens": False},
        lambda new, old: text_of(new) == "<|im_start|>" * 6,
    ),
    "cache_salt": (
        {"cache_salt": "a"},
        lambda new, old: new["usage"]["prompt_tokens_details"]["cached_tokens"] == 0,
    ),
    "add_generation_prompt": (
        {"add_generation_prompt": False},
        lambda new, old: new["usage"]["prompt_tokens"] < old["usage"]["prompt_tokens"],
    ),
    "continue_final_message": (
        {
            "messages": [*QUESTION, {"role": "assistant", "content": "a"}],
            "continue_final_message": True,
            "add_generation_prompt": False,
        },
        lambda new, old: new["usage"]["prompt_tokens"] == old["usage"]["prompt_tokens"] + 1,
    ),
    "service_tier": (
        {"service_tier": "auto"},
        lambda new, old: new["service_tier"] == "default" and "service_tier" not in old,
    ),
}
ELSEWHERE = {
    *("stream", "stream_options", "stop", "frequency_penalty", "presence_penalty"),
    *("include_stop_str_in_output", "response_format", "structured_outputs"),
    *("tools", "tool_choice", "parallel_tool_calls"),
    *("reasoning_effort", "thinking_token_budget", "chat_template_kwargs"),
}
"""Fields with tests of their own, below, in `test_guided.py`, `test_tool_calls.py` and
`test_reasoning.py`."""


@pytest.fixture(scope="module")
def models(tiny_model, tiny_tokenizer):
    return {name: LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="") for name in ("m", "n")}


@pytest.fixture(scope="module")
def address(models):
    with running(models) as address:
        yield address


@pytest.fixture(scope="module")
def ask(address):
    def ask(**changes):
        return httpx.post(f"{address}/v1/chat/completions", json=ANSWER | changes)

    return ask


@pytest.fixture(scope="module")
def plain(ask):
    """The completion, which neutral fields must not change."""
    answer = ask()
    assert answer.status_code == 200
    return text_of(answer.json())


def error_of(answer):
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    return error


def published(owner):
    """Returns the fields of one of the client's types."""
    return set(typing.get_type_hints(owner))


@pytest.mark.parametrize("name", FIELDS)
def test_null_is_equivalent_to_omitting_a_field(ask, plain, name):
    changes = {name: None} | ({"max_completion_tokens": 6} if name == "max_tokens" else {})
    if name == "temperature":  # the default is 1
        changes["top_k"] = 1
    answer = ask(**changes)
    if name in REQUIRED:
        assert error_of(answer)["param"] == name
    else:
        assert answer.status_code == 200, answer.text
        assert text_of(answer.json()) == plain


@pytest.mark.parametrize("name", [n for n, mark in FIELDS.items() if isinstance(mark, Neutral)])
def test_a_neutral_value_has_no_effect_and_any_other_is_refused_by_name(ask, plain, name):
    accepted, others = NEUTRAL[name]
    for value in accepted:
        answer = ask(**{name: value})
        assert answer.status_code == 200, answer.text
        assert text_of(answer.json()) == plain
    for value in others:
        error = error_of(ask(**{name: value}))
        assert error["param"].split(".")[0] == name
        assert error["code"] == "unsupported_value"
        assert FIELDS[name].accepts in error["message"]


@pytest.mark.parametrize("name", [n for n, mark in FIELDS.items() if isinstance(mark, Refused)])
def test_an_unsupported_field_is_refused_by_name(ask, name):
    error = error_of(ask(**{name: REFUSED[name]}))
    assert (error["param"], error["code"]) == (name, "unsupported_parameter")


@pytest.mark.parametrize("name", [n for n, mark in FIELDS.items() if mark is None])
def test_an_honoured_field_has_its_effect(ask, name):
    if name in ELSEWHERE:
        return
    changes, has_effect = HONOURED[name]
    new, old = ask(**changes), ask()
    assert new.status_code == 200, new.text
    assert has_effect(new.json(), old.json())


@pytest.mark.parametrize("name", ["frequency_penalty", "presence_penalty"])
def test_a_penalty_has_the_engines_effect(ask, tiny_model, tiny_tokenizer, name):
    alone = LLM(model=tiny_model, tokenizer=tiny_tokenizer, source="")
    texts = {
        value: alone.chat(
            QUESTION, SamplingParams(temperature=0, max_tokens=60, **{name: value})
        ).text
        for value in (-2.0, 0.0, 2.0)
    }
    assert len(set(texts.values())) == 3
    for value, text in texts.items():
        assert text_of(ask(max_tokens=60, **{name: value}).json()) == text


def test_streams_and_their_usage_are_honoured(address, ask):
    def events(**changes):
        lines = ask(stream=True, **changes).text.split("\n\n")
        return [line.removeprefix("data: ") for line in lines if line]

    plain_events = events()
    assert plain_events[-1] == "[DONE]"
    assert not [e for e in plain_events if '"usage"' in e]
    counted = [
        httpx.Response(200, content=e).json()
        for e in events(stream_options={"include_usage": True, "include_obfuscation": False})[:-1]
    ]
    assert [c["usage"] for c in counted[:-1]] == [None] * (len(counted) - 1)
    assert counted[-1]["choices"] == []
    assert counted[-1]["usage"]["completion_tokens"] == 6
    assert ask(stream=False).headers["content-type"] == "application/json"
    assert error_of(ask(stream_options={}))["param"] == "stream_options"
    for wrong in (True, 0):
        error = error_of(ask(stream=True, stream_options={"include_obfuscation": wrong}))
        assert error["param"] == "stream_options.include_obfuscation"


def test_stop_is_honoured(ask, plain):
    stop = plain[2:4]
    assert text_of(ask(stop=stop).json()) == plain[: plain.index(stop)]
    assert text_of(ask(stop=["zzz", stop]).json()) == plain[: plain.index(stop)]
    assert text_of(ask(stop=[]).json()) == plain
    included = text_of(ask(stop=stop, include_stop_str_in_output=True).json())
    assert included == plain[: plain.index(stop) + len(stop)]


def test_every_field_of_the_published_schema_is_handled():
    base = openai.types.chat.completion_create_params.CompletionCreateParamsBase
    stream = openai.types.chat.completion_create_params.CompletionCreateParamsStreaming
    assert set(FIELDS) - EXTENSIONS >= published(base) | published(stream)
    options = openai.types.chat.ChatCompletionStreamOptionsParam
    assert set(StreamOptions.model_fields) >= published(options)
    for role in ("System", "Developer", "User", "Assistant", "Tool"):
        message = getattr(openai.types.chat, f"ChatCompletion{role}MessageParam")
        assert set(ChatMessage.model_fields) >= published(message)


def test_every_field_is_documented():
    page = (Path(__file__).parents[2] / "docs" / "serve.md").read_text(encoding="utf-8")
    rows = [line.split("|")[1] for line in page.splitlines() if line.startswith("| `")]
    listed = {word.strip(" `") for row in rows for word in row.split(",")}
    assert set(FIELDS) <= listed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("stream", "true"),
        ("stream", 1),
        ("n", "2"),
        ("n", True),
        ("n", 1.5),
        ("temperature", "0.5"),
        ("temperature", True),
        ("logprobs", 1),
        ("logprobs", "yes"),
        ("seed", "7"),
        ("max_tokens", "8"),
        ("model", 5),
        ("stop", 5),
        ("messages", "hello"),
        ("messages", ["hello"]),
        ("logit_bias", [1]),
        ("stream_options", True),
    ],
    ids=str,
)
def test_a_value_of_another_type_is_not_converted(ask, field, value):
    error = error_of(ask(**{field: value}))
    assert error["param"].split(".")[0] == field
    assert error["code"] in ("invalid_type", "invalid_value")


def test_an_integral_float_is_accepted_as_an_integer(ask):
    """JSON does not distinguish integers from other numbers."""
    answer = httpx.post(
        str(ask(n=2.0).request.url), json=ANSWER | {"n": 2.0, "max_tokens": 3.0, "seed": 1.0}
    )
    assert len(answer.json()["choices"]) == 2


@pytest.mark.parametrize("key", ["05", "+5", " 5", "1_0", "５", "-1", "x", "", "99999999999"])
def test_a_key_of_logit_bias_is_a_token_id(ask, key):
    assert error_of(ask(logit_bias={key: 1}))["param"] == "logit_bias"


@pytest.mark.parametrize("name", ["mirostat", "length_penalty", "whatever"])
def test_an_unknown_field_that_is_null_is_ignored(ask, plain, name):
    assert text_of(ask(**{name: None}).json()) == plain
    assert error_of(ask(**{name: 0}))["code"] == "unknown_parameter"
    replayed = [
        *QUESTION,
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "b"},
    ]
    nulls = ("reasoning_content", "reasoning", "provider_specific_fields", "thinking_blocks", name)
    with_nulls = [message | dict.fromkeys(nulls) for message in replayed]
    answers = [ask(messages=messages) for messages in (replayed, with_nulls)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert text_of(answers[0].json()) == text_of(answers[1].json())
    unknown = [message | {"annotations": [1], "provider": {"a": 1}} for message in replayed]
    assert text_of(ask(messages=unknown).json()) == text_of(answers[0].json())
    options = {"include_usage": False, name: None}
    assert ask(stream=True, stream_options=options).status_code == 200


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"logit_bias": {"99999": 1}}, "logit_bias"),
        ({"messages": [USER | {"content": "a" * 5000}]}, "messages"),
    ],
)
def test_errors_of_the_engine_name_the_field(ask, changes, param):
    error = error_of(ask(**changes))
    assert error["param"] == param
    assert "--" not in error["message"]
    assert "cache_gb" not in error["message"]


def test_an_unknown_field_is_refused_with_a_suggestion(ask):
    error = error_of(ask(top_pp=1))
    assert error["message"].endswith("(did you mean 'top_p'?)")
    assert error["code"] == "unknown_parameter"


@pytest.mark.parametrize("field", ["adapter", "lora", "min_p", "echo"])
def test_fields_of_other_servers_are_refused(ask, field):
    assert error_of(ask(**{field: "x"}))["param"] == field
    for name in ("m:x", "m/x", "../m", "M", ""):
        answer = ask(model=name)
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "model_not_found"


def test_zero_top_logprobs_do_not_require_logprobs(ask, plain):
    assert text_of(ask(top_logprobs=0).json()) == plain
    assert error_of(ask(top_logprobs=1))["param"] == "top_logprobs"


# ---- messages


def test_a_response_can_be_sent_back_as_the_client_dumps_it(address, ask):
    with openai.OpenAI(base_url=f"{address}/v1", api_key="x", max_retries=0) as client:
        first = client.chat.completions.create(**ANSWER).choices[0].message
        for replayed in (
            first.model_dump(),
            first.model_dump() | {"annotations": [], "tool_calls": []},
            first,
        ):
            history = [*QUESTION, replayed, USER]
            again = client.chat.completions.create(**ANSWER | {"messages": history})
            plain = [*QUESTION, {"role": "assistant", "content": first.content}, USER]
            alone = client.chat.completions.create(**ANSWER | {"messages": plain})
            assert again.choices[0].message.content == alone.choices[0].message.content
            assert again.usage.prompt_tokens == alone.usage.prompt_tokens


def test_audio_in_a_message_is_refused_by_name(ask):
    message = {"role": "assistant", "content": "x", "audio": {"id": "a"}}
    assert error_of(ask(messages=[USER, message, USER]))["param"] == "messages.1.audio"


def test_unknown_fields_of_a_message_and_its_parts_are_ignored(ask):
    parts = [{"type": "text", "text": "x", "cache_control": {"type": "ephemeral"}}]
    message = {"role": "user", "content": parts, "weight": 0, "annotations": [{"type": "x"}]}
    assert text_of(ask(messages=[message]).json()) == text_of(ask(messages=[USER]).json())


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "images are not supported"),
        (
            [{"type": "text", "text": "x"}, {"type": "input_audio", "input_audio": {}}],
            "part 1 of the content is of type 'input_audio': audio is not supported",
        ),
        ([{"type": "file", "file": {}}], "files are not supported"),
        ([{"type": "text"}], "part 0 of the content is not text"),
        ([{"type": "text", "text": None}], "part 0 of the content is not text"),
        (["x"], "part 0 of the content is not text"),
        ([{"type": ["text"], "text": "x"}], "part 0 of the content is not text"),
        (None, "the content is null or missing"),
        (5, "the content is of another type"),
        ({"type": "text", "text": "x"}, "the content is of another type"),
    ],
    ids=str,
)
def test_content_that_is_not_text_is_refused_by_its_type(ask, content, message):
    error = error_of(ask(messages=[USER, {"role": "user", "content": content}]))
    assert error["param"] == "messages.1.content"
    assert message in error["message"]


def test_content_may_be_a_string_or_text_parts(ask):
    def prompt(*messages):
        answer = ask(messages=[*messages, USER], max_tokens=1)
        assert answer.status_code == 200, answer.text
        return answer.json()["usage"]["prompt_tokens"]

    parts = [
        {"type": "text", "text": "hel"},
        {"type": "text", "text": "lo", "prompt_cache_breakpoint": None},
    ]
    hello = prompt({"role": "user", "content": "hel\nlo"})
    assert prompt({"role": "user", "content": parts}) == hello
    empty = prompt({"role": "assistant", "content": ""})
    assert prompt({"role": "assistant", "content": None}) == empty
    assert prompt({"role": "assistant"}) == empty
    system = prompt({"role": "system", "content": "hel\nlo"})
    assert prompt({"role": "developer", "content": parts}) == system


# ---- limits


@pytest.fixture(scope="module")
def large(tiny_tokenizer):
    """A vocabulary large enough that top-p tries the most likely tokens first."""
    return LLM(model=build_tiny(vocab_size=5000), tokenizer=tiny_tokenizer, source="")


@pytest.fixture(scope="module")
def large_address(large):
    with running({"m": large}) as address:
        yield address


@pytest.mark.parametrize(
    ("changes", "status", "message"),
    [
        ({"top_k": 2**63}, 400, "top_k: Input should be less than or equal to 2147483647"),
        ({"top_k": 2**31 - 1}, 200, ""),
        ({"top_k": -1}, 200, ""),
        ({"top_k": -2}, 400, "top_k"),
        ({"logit_bias": {str(2**63): 1}}, 400, "logit_bias"),
        ({"top_p": 1e-50}, 200, ""),
        ({"stop": "0123456789abcdefg"}, 200, ""),
        ({"stop": ["0123456789abcdefg"] * 16}, 200, ""),
        ({"stop": None}, 200, ""),
        ({"stop": ["a"] * 17}, 400, "stop: List should have at most 16 items"),
        ({"stop": "x" * 1001}, 400, "stop.0: String should have at most 1000 characters"),
        ({"stop": ["a", ""]}, 400, "stop.1: String should have at least 1 character"),
        ({"stop": 5}, 400, "stop: Input should be a valid list"),
        ({"seed": 2**63}, 400, "seed"),
        ({"seed": -(2**63)}, 200, ""),
    ],
    ids=str,
)
def test_values_at_their_limits_are_honoured_and_beyond_them_refused(
    large_address, changes, status, message
):
    body = {"model": "m", "messages": QUESTION, "max_tokens": 2} | changes
    answer = httpx.post(f"{large_address}/v1/chat/completions", json=body)
    assert answer.status_code == status
    assert message in answer.text


def test_the_name_of_a_message_is_passed_to_the_template(tiny_model, tiny_tokenizer):
    template = tiny_tokenizer.chat_template.source.replace(
        "message['role']", "message['role'] + (' ' + message['name'] if message.name else '')"
    )
    prefix_errors_with_path = type(tiny_tokenizer)(
        tiny_tokenizer.backend, tiny_tokenizer.special, chat_template=template
    )
    llm = LLM(model=tiny_model, tokenizer=prefix_errors_with_path, source="")
    named = [{"role": "user", "content": "hello", "name": "Ada"}]
    counts = []
    with running({"m": llm}) as address:
        for messages in (QUESTION, named):
            body = {"model": "m", "messages": messages, "max_tokens": 1}
            answer = httpx.post(f"{address}/v1/chat/completions", json=body)
            counts.append(answer.json()["usage"]["prompt_tokens"])
    assert counts == [len(llm.encode_chat(messages)) for messages in (QUESTION, named)]
    assert counts[0] < counts[1]
