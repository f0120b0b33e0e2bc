"""Content a chat template may omit: mapped, refused or counted, but never dropped silently."""

import json

import pytest

from chat_templates import GEMMA, INDEXED, LLAMA3, MISTRAL, QWEN3
from conversation_rows import assistant, read, user
from easyllm.core.errors import DataError
from easyllm.corpus.files.row import Row
from easyllm.examples.preferences import labelled, preferences, prepare_preferences
from easyllm.examples.prepare import prepare_conversations
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.tokenizer import Tokenizer
from tiny_models import CHATML

NO_CALLS = """{%- for m in messages %}{%- if m.role in ['system', 'user', 'assistant'] %}
{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
"""Renders neither tool calls nor tool responses."""
NO_CALLS_MARKED = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role \
== 'assistant' %}
{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}{%- else %}{{- m.content + \
'<|im_end|>' }}{%- endif %}
{%- endfor %}"""
WANTED = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'


def calls(*names):
    return [{"type": "function", "function": {"name": n, "arguments": {"a": 1}}} for n in names]


@pytest.fixture
def learned(tiny_tokenizer):
    """Returns a function that returns a row's trained texts under a template, and the account."""

    def prepare(template, values, **options):
        tokenizer = Tokenizer(
            tiny_tokenizer.backend, tiny_tokenizer.special, chat_template=template
        )
        samples, account = prepare_conversations(
            [read(values)], tokenizer, max_seq_len=512, **options
        )
        kept = [[label for label in s.labels if label != IGNORE_INDEX] for s in samples]
        return [tokenizer.decode(ids, skip_special=False) for ids in kept], account

    return prepare


# roles of other formats


@pytest.mark.parametrize("encode", [json.dumps, lambda call: call], ids=["text", "object"])
@pytest.mark.parametrize("speaker", ["tool_call", "function_call"])
@pytest.mark.parametrize("answer", ["tool_response", "ipython", "observation", "tool"])
def test_calls_and_tool_responses_are_read_under_alternative_role_names(
    learned, encode, speaker, answer
):
    call = encode({"name": "f", "arguments": {"a": 1}})
    turns = [("user", "q"), (speaker, call), (answer, "42"), ("bot", "It is 42")]
    for who, says, key in (("role", "content", "messages"), ("from", "value", "conversations")):
        row = {key: [{who: a, says: b} for a, b in turns]}
        assert read(row).messages == [
            user("q"),
            assistant("", tool_calls=calls("f")),
            {"role": "tool", "content": "42"},
            assistant("It is 42"),
        ]
        (text,), account = learned(QWEN3, row)
        assert text == f"{WANTED}<|im_end|><think>\n\n</think>\n\nIt is 42<|im_end|>"
        assert account.unrendered_messages == account.unwritten_tools == 0


def test_consecutive_calls_are_one_turn():
    def call(name):
        return {"role": "tool_call", "content": json.dumps({"name": name, "arguments": {"a": 1}})}

    answers = [{"role": "tool_response", "content": text} for text in "12"]
    messages = read(
        {"messages": [user("q"), call("f"), call("g"), *answers, assistant("a")]}
    ).messages
    assert [m["role"] for m in messages] == ["user", "assistant", "tool", "tool", "assistant"]
    assert messages[1]["tool_calls"] == calls("f", "g")
    masked = [user("q"), call("f") | {"loss": False}, call("g")]
    assert [m.get("loss") for m in read({"messages": masked}).messages] == [None, False, None]
    row = {"prompt": [user("q"), call("f"), call("g"), *answers], "completion": [assistant("a")]}
    for system in ({}, {"system": "s"}):
        (found,) = labelled([Row(row | system | {"label": True}, "data.jsonl:7")])
        assert found.completion == [assistant("a")]


@pytest.mark.parametrize("value", ["f(1)", {"arguments": {}}, [], {"name": 3}, None, "[1]"])
def test_an_invalid_call_is_refused_with_its_location(value):
    for turn in (
        {"role": "tool_call", "content": value},
        {"from": "function_call", "value": value},
    ):
        key = "messages" if "role" in turn else "conversations"
        with pytest.raises(DataError, match=r"^data\.jsonl:7: turn 0 (is a|has no text value)"):
            read({key: [turn]})


# roles and text omitted by the template


@pytest.mark.parametrize("role", ["critic", "narrator", "Assistant", "tools"])
@pytest.mark.parametrize("options", [{}, {"split_turns": True}, {"train_on": "all"}])
def test_a_role_omitted_by_the_template_is_refused(learned, role, options):
    row = {"messages": [user("q"), {"role": role, "content": "Too long."}, assistant("a")]}
    with pytest.raises(
        DataError,
        match=rf"^data\.jsonl:7: message 1 has the role '{role}', which the chat template",
    ):
        learned(QWEN3, row, **options)
    for template in (CHATML, INDEXED):  # these templates render every role
        (text,), account = learned(template, row)
        assert text.startswith("a<|im_end|>")
        assert account.unrendered_messages == 0


def test_an_omitted_role_is_refused_in_pairs_and_if_its_text_occurs_elsewhere(tiny_tokenizer):
    tokenizer = Tokenizer(tiny_tokenizer.backend, tiny_tokenizer.special, chat_template=QWEN3)
    prompt = [user("Be short."), {"role": "critic", "content": "Be short."}]
    row = {"prompt": prompt, "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match="message 1 has the role 'critic'"):
        prepare_preferences(preferences([Row(row, "x")]), tokenizer, max_seq_len=99)


SYSTEM = {"role": "system", "content": "Be terse."}
TOOL = {"role": "tool", "content": "42"}


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (MISTRAL, [SYSTEM, user("q"), assistant("a")], 1),  # only before a final question
        (
            LLAMA3,
            [user("q"), assistant("Let me see", tool_calls=calls("f")), TOOL, assistant("a")],
            1,
        ),
        (
            NO_CALLS,
            [user("q"), assistant("Let me see", tool_calls=calls("f")), TOOL, assistant("a")],
            1,
        ),
        (GEMMA, [SYSTEM, user("q"), assistant("a")], 0),  # inside the first question
        (QWEN3, [SYSTEM, user("q"), assistant("<think>hm</think>a"), user("r"), assistant("b")], 0),
        (INDEXED, [SYSTEM, user("q"), assistant("a"), user(""), assistant("b")], 0),
    ],
    ids=["mistral", "llama 3", "no calls", "gemma", "qwen 3", "indexed"],
)
def test_text_omitted_by_the_template_is_counted(learned, template, messages, expected):
    _, account = learned(template, {"messages": messages})
    assert account.unrendered_messages == expected
    assert ("1 with messages the chat template does not write" in account.summary()) == bool(
        expected
    )


# calls omitted by the template


@pytest.mark.parametrize("template", [NO_CALLS, NO_CALLS_MARKED], ids=["plain", "marked"])
def test_an_omitted_call_is_not_trained_as_an_empty_response(learned, template):
    silent = assistant("", tool_calls=calls("f"))
    (text,), account = learned(template, {"messages": [user("f?"), silent, TOOL, assistant("a")]})
    assert text == "a<|im_end|>"
    assert account.untrained_calls == 1
    assert (
        "1 tool-call turns not trained, as the chat template does not write them"
        in account.summary()
    )
    for row in (
        {"messages": [user("f?"), silent]},
        {"messages": [user("f?"), silent | {"content": " \n"}]},
        {
            "conversations": [
                {"from": "human", "value": "f?"},
                {"from": "function_call", "value": {"name": "f"}},
            ]
        },
    ):
        with pytest.raises(DataError, match="tool calls, which the chat template does not write"):
            learned(template, row)
    texts, account = learned(
        template, {"messages": [user("f?"), silent, TOOL, assistant("a")]}, split_turns=True
    )
    assert (texts, account.untrained_calls) == (["a<|im_end|>"], 1)


def test_empty_responses_and_rendered_calls_are_trained(learned):
    (text,), account = learned(NO_CALLS, {"messages": [user("q"), assistant("")]})
    assert (text.strip(), account.untrained_calls) == ("<|im_end|>", 0)
    silent = assistant("", tool_calls=calls("f"))
    (text,), account = learned(QWEN3, {"messages": [user("q"), silent]})
    assert WANTED in text
    assert account.untrained_calls == 0


# keys for the loss


@pytest.mark.parametrize("key", ["train_detail", "training_detail"])
def test_partial_masks_are_refused_by_name(key):
    parts = [{"begin_offset": 0, "end_offset": 1, "train": False}]
    rows = [
        {"messages": [user("q"), assistant("ab", **{key: parts})]},
        {
            "conversations": [
                {"from": "human", "value": "q"},
                {"from": "gpt", "value": "ab", key: parts},
            ]
        },
        {"prompt": [user("q")], "completion": [assistant("ab", **{key: parts})]},
    ]
    for row in rows:
        with pytest.raises(
            DataError, match=rf"^data\.jsonl:7: message 1 has {key}, but parts of a message"
        ):
            read(row)
    assert read({"messages": [user("q"), assistant("ab", **{key: []})]}).messages[1] == assistant(
        "ab"
    )


@pytest.mark.parametrize("key", ["loss_weight", "loss_scale", "loss", "weight"])
def test_a_turns_loss_can_be_disabled_but_other_weights_are_refused(learned, key):
    said = [user("q"), assistant("BAD", **{key: 0}), user("r"), assistant("GOOD", **{key: 1})]
    (text,), _ = learned(NO_CALLS, {"messages": said})
    assert text == "GOOD<|im_end|>"
    with pytest.raises(DataError, match=rf"message 1 has {key} 0\.5"):
        learned(NO_CALLS, {"messages": [user("q"), assistant("a", **{key: 0.5})]})


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("loss", False),
        ("loss", 0.3),
        ("loss_scale", "last_round"),
        ("loss_scale", 0.5),
        ("token_weights", [1, 0]),
    ],
)
def test_a_rows_loss_is_refused_by_name(key, value):
    for row in ({"messages": [user("q"), assistant("a")]}, {"instruction": "q", "output": "a"}):
        with pytest.raises(DataError, match=rf"^data\.jsonl:7 has the key '{key}', which is not"):
            read(row | {key: value})
        assert read(row | {key: 1}).messages[-1] == assistant("a")


def test_a_prompt_with_a_message_omitted_by_the_template_is_refused(tiny_tokenizer):
    tokenizer = Tokenizer(tiny_tokenizer.backend, tiny_tokenizer.special, chat_template=NO_CALLS)
    asked = [user("What is it?"), assistant("", tool_calls=calls("f"))]
    options = {"add_generation_prompt": True, "reject_unrendered": True}
    tokenizer.encode_chat([*asked, user("Well?")], **options)
    with pytest.raises(DataError, match="message 2 has the role 'tool', whose content"):
        tokenizer.encode_chat([*asked, {"role": "tool", "content": "42"}], **options)


@pytest.mark.parametrize("template", [CHATML, LLAMA3, QWEN3, GEMMA, INDEXED])
def test_a_prompt_with_all_messages_rendered_is_accepted(tiny_tokenizer, template):
    tokenizer = Tokenizer(tiny_tokenizer.backend, tiny_tokenizer.special, chat_template=template)
    messages = [user(" One? "), assistant("<think>\nwell\n</think>\n\n1"), user("Two & two?")]
    plain = tokenizer.encode_chat(messages, add_generation_prompt=True)
    strict = tokenizer.encode_chat(messages, add_generation_prompt=True, reject_unrendered=True)
    assert strict.token_ids == plain.token_ids


def test_checking_a_prompt_takes_only_a_few_renderings(tiny_tokenizer, monkeypatch):
    shouting = NO_CALLS.replace("m.content", "m.content | upper")
    tokenizer = Tokenizer(tiny_tokenizer.backend, tiny_tokenizer.special, chat_template=shouting)
    render, count = tokenizer.chat_template._render, 0

    def counted(**values):
        nonlocal count
        count += 1
        return render(**values)

    monkeypatch.setattr(tokenizer.chat_template, "_render", counted)
    messages = [user(f"question {i}") for i in range(200)]
    tokenizer.encode_chat(messages, add_generation_prompt=True, reject_unrendered=True)
    assert count < 10
