"""Trained text of a turn: everything a template writes for it up to its end token."""

import pytest

from chat_conversations import trained, with_template
from chat_templates import DEEPSEEK, GEMMA, GLM, INDEXED, LLAMA3, MISTRAL, QWEN3
from conversation_rows import assistant, user
from easyllm.core.errors import DataError
from easyllm.tokenizer import normalise_messages
from tiny_models import CHATML

SPECIAL = (
    *("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<start_of_turn>", "<end_of_turn>"),
    *(
        "<|user|>",
        "<|assistant|>",
        "<|system|>",
        "<|observation|>",
        "[gMASK]",
        "<sop>",
        "[INST]",
        "[/INST]",
    ),
    *(
        "<|User|>",
        "<|Assistant|>",
        "<|end|>",
        "<|calls|>",
        "<|call end|>",
        "<|outputs|>",
        "<|outputs end|>",
    ),
    *("[TOOL_CALLS]", "[TOOL_RESULTS]", "[/TOOL_RESULTS]", "</s>"),
)


def tool(content):
    return {"role": "tool", "content": content}


def calling(content, **arguments):
    call = {"type": "function", "function": {"name": "f", "arguments": arguments}}
    return assistant(content, tool_calls=[call])


@pytest.fixture
def make(tiny_tokenizer):
    return lambda source, **eos: with_template(tiny_tokenizer, source, *SPECIAL, **eos)


LOOKED_UP = [user("q1"), calling("Let me see", a=1), tool("42"), assistant("It is 42")]
SILENT = [user("q1"), calling("", a=1), tool("42"), assistant("It is 42")]
EMPTY = [user("q1"), assistant(""), user("q2"), assistant("two")]
EQUAL = [user("yes"), assistant("yes"), user("yes"), assistant("yes")]
REASONED = [
    *(user("q1"), assistant("one", reasoning_content="why one")),
    *(user("q2"), assistant("two", reasoning_content="why two")),
]
BLANKS = [user("q1"), assistant("  one \n"), user("q2"), assistant("\n two ")]
CALL = '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call>'
END = "<|im_end|>"

SHAPES = {
    "qwen3, a call after words": (
        QWEN3,
        LOOKED_UP,
        [f"Let me see\n{CALL}{END}", f"<think>\n\n</think>\n\nIt is 42{END}"],
    ),
    "qwen3, a call without words": (
        QWEN3,
        SILENT,
        [f"{CALL}{END}", f"<think>\n\n</think>\n\nIt is 42{END}"],
    ),
    "qwen3, an empty earlier answer": (QWEN3, EMPTY, [END, f"<think>\n\n</think>\n\ntwo{END}"]),
    "qwen3, equal answers": (QWEN3, EQUAL, [f"yes{END}", f"<think>\n\n</think>\n\nyes{END}"]),
    "qwen3, reasoning kept after the last question alone": (
        QWEN3,
        REASONED,
        [f"one{END}", f"<think>\nwhy two\n</think>\n\ntwo{END}"],
    ),
    "qwen3, reasoning of all turns after the last question": (
        QWEN3,
        [
            user("q"),
            calling("", a=1) | {"reasoning_content": "hm"},
            tool("42"),
            assistant("It is 42"),
        ],
        [f"<think>\nhm\n</think>\n\n{CALL}{END}", f"<think>\n\n</think>\n\nIt is 42{END}"],
    ),
    "llama 3, a call hides the words": (
        LLAMA3,
        LOOKED_UP,
        ['{"name": "f", "parameters": {"a": 1}}<|eot_id|>', "It is 42<|eot_id|>"],
    ),
    "llama 3, an empty earlier answer": (LLAMA3, EMPTY, ["<|eot_id|>", "two<|eot_id|>"]),
    "llama 3, trimmed": (LLAMA3, BLANKS, ["one<|eot_id|>", "two<|eot_id|>"]),
    "chatml, equal answers": (CHATML, EQUAL, [f"yes{END}", f"yes{END}"]),
    "chatml, an empty earlier answer": (CHATML, EMPTY, [END, f"two{END}"]),
    "gemma, trimmed": (GEMMA, BLANKS, ["one<end_of_turn>", "two<end_of_turn>"]),
    "gemma, an empty earlier answer": (GEMMA, EMPTY, ["<end_of_turn>", "two<end_of_turn>"]),
    "gemma, a system prompt in the first question": (
        GEMMA,
        [{"role": "system", "content": "s"}, *EQUAL],
        ["yes<end_of_turn>", "yes<end_of_turn>"],
    ),
    "glm, stripped": (
        GLM,
        BLANKS,
        ["\n<think></think>\none<|user|>", f"\n<think></think>\ntwo{END}"],
    ),
    "glm, a call": (
        GLM,
        SILENT,
        [
            "\n<think></think>\n<tool_call>f\n<arg_key>a</arg_key>\n<arg_value>1</arg_value>\n"
            "</tool_call><|observation|>",
            f"\n<think></think>\nIt is 42{END}",
        ],
    ),
    "glm, an empty earlier answer": (
        GLM,
        EMPTY,
        ["\n<think></think><|user|>", f"\n<think></think>\ntwo{END}"],
    ),
    "glm, reasoning kept after the last question alone": (
        GLM,
        REASONED,
        ["\n<think></think>\none<|user|>", f"\n<think>why two</think>\ntwo{END}"],
    ),
    "mistral": (MISTRAL, EQUAL, [f" yes{END}", f" yes{END}"]),
    "mistral, an empty earlier answer": (MISTRAL, EMPTY, [f" {END}", f" two{END}"]),
    "mistral, a call": (
        MISTRAL,
        SILENT,
        [
            '[TOOL_CALLS] [{"name": "f", "arguments": {"a": 1}, "id": "none"}]' + END,
            f" It is 42{END}",
        ],
    ),
    "mistral, a system prompt that moves to the last question": (
        MISTRAL,
        [{"role": "system", "content": "s"}, *EQUAL],
        [f" yes{END}", f" yes{END}"],
    ),
    "deepseek, a prompt that opens reasoning": (DEEPSEEK, EQUAL, ["yes<|end|>", "yes<|end|>"]),
    "deepseek, no header after a tool's answer": (
        DEEPSEEK,
        LOOKED_UP,
        ['Let me see<|calls|>f\n{"a": 1}<|call end|><|end|>', "It is 42<|end|>"],
    ),
    "indices in place of messages": (INDEXED, EMPTY, [END, f"two{END}"]),
    "indices in place of messages, a call": (
        INDEXED,
        LOOKED_UP,
        ['Let me see<tool_call>{"name": "f", "arguments": {"a": 1}}' + END, f"It is 42{END}"],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_the_complete_text_of_a_turn_is_trained(make, name):
    source, messages, expected = SHAPES[name]
    assert trained(make(source), messages) == expected


@pytest.mark.parametrize("name", SHAPES)
def test_ids_equal_transformers_up_to_a_final_end_token(make, tmp_path, name):
    from transformers import AutoTokenizer

    source, messages, _ = SHAPES[name]
    ours = make(source)
    ours.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    plain = ours.encode_chat(messages)
    assert plain.token_ids == theirs.apply_chat_template(messages, return_dict=True)["input_ids"]
    with_mask = ours.encode_chat(messages, with_mask=True).token_ids
    assert with_mask in (plain.token_ids, [*plain.token_ids, ours.eos_id])


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("key", ["weight", "train", "loss"])
def test_a_turn_of_weight_0_is_masked_in_every_format(make, name, key):
    source, messages, expected = SHAPES[name]
    turns = [turn for turn, message in enumerate(messages) if message["role"] == "assistant"]
    for number, turn in enumerate(turns):
        masked = [m | {key: 0} if i == turn else m for i, m in enumerate(messages)]
        assert trained(make(source), masked) == [*expected[:number], *expected[number + 1 :]]
        assert make(source).encode_chat(masked).text == make(source).encode_chat(messages).text


@pytest.mark.parametrize("name", SHAPES)
def test_prompt_messages_are_not_trained(make, name):
    source, messages, expected = SHAPES[name]
    first = next(turn for turn, m in enumerate(messages) if m["role"] == "assistant")
    assert trained(make(source), messages, num_prompt=first + 1) == expected[1:]
    assert trained(make(source), messages, num_prompt=len(messages)) == []


MARKED = CHATML.replace(
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}",
    "{{ '<|im_start|>' + message['role'] + '\\n' }}{% if message['role'] == 'assistant' "
    "%}{% generation %}"
    "{{ message['content'] + '<|im_end|>' }}{% endgeneration %}{{ '\\n' }}{% else %}"
    "{{ message['content'] + '<|im_end|>\\n' }}{% endif %}",
)
MARKED_IN_A_MACRO = (
    "{% macro say(m) %}{% if m.role == 'assistant' %}{% generation %}{{ m.content "
    "}}<|im_end|>{% endgeneration %}"
    "{% else %}{{ m.content }}{% endif %}{% endmacro %}{% for i in range(messages | "
    "length) %}<|user|>{{ say(messages[i]) }}"
    "{% endfor %}"
)


@pytest.mark.parametrize("source", [MARKED, MARKED_IN_A_MACRO], ids=["in the loop", "in a macro"])
def test_markers_are_honoured_and_an_untrained_turn_is_masked(make, source):
    tokenizer = make(source)
    messages = [*EQUAL, user("q"), assistant("three")]
    assert trained(tokenizer, messages) == [f"yes{END}", f"yes{END}", f"three{END}"]
    messages[3] = messages[3] | {"weight": 0}
    assert trained(tokenizer, messages) == [f"yes{END}", f"three{END}"]
    assert trained(tokenizer, messages, num_prompt=2) == [f"three{END}"]


def test_ambiguous_markers_are_refused_if_a_turn_is_masked(make):
    source = (
        "{% for i in range(messages | length) %}{% if messages[i].role == 'assistant' %}{% "
        "for w in ['a', 'b'] %}"
        "{% generation %}{{ messages[i].content }}{% endgeneration %}{% endfor %}{% endif "
        "%}{% endfor %}"
    )
    messages = [user("q"), assistant("one"), user("r"), assistant("two")]
    assert trained(make(source), messages) == ["oneonetwotwo"]
    messages[1]["weight"] = 0
    with pytest.raises(DataError, match=r"the template's .* marks cannot be assigned to turns"):
        trained(make(source), messages)


def test_a_masked_turn_need_not_be_found(make):
    source = "{{ messages[-1].content }}<|im_end|>"
    messages = [user("q"), assistant("old", weight=0), user("r"), assistant("new")]
    assert trained(make("{{ '' }}" + source), messages) == ["new<|im_end|>"]


# the canonical form of messages


def test_messages_of_every_client_are_normalised():
    call = {"id": "c1", "type": "function", "function": {"name": "f", "arguments": '{"a": 1}'}}
    given = [
        {"role": "developer", "content": "Be terse.", "name": None},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "one"},
                {"type": "input_text", "text": "two"},
                "three",
            ],
        },
        {"role": "assistant", "content": None, "tool_calls": [call], "weight": 1, "refusal": None},
        {
            "role": "tool",
            "content": [{"type": "text", "text": "4"}, {"type": "text", "text": "2"}],
            "tool_call_id": "c1",
        },
        {
            "role": "assistant",
            "content": [{"type": "refusal", "refusal": "No."}],
            "tool_calls": None,
        },
        {"role": "assistant", "content": None, "refusal": "I cannot."},
        {"role": "assistant", "content": None, "function_call": {"name": "g", "arguments": ""}},
        {"role": "function", "name": "g", "content": "ok"},
        {"role": "user", "content": {"type": "text", "text": "alone"}, "name": "Ann"},
        {"role": "assistant", "tool_calls": [{"name": "h", "arguments": '"{\\"b\\": 2}"'}]},
    ]
    before = repr(given)
    read = normalise_messages(given)
    assert read == [
        {"role": "system", "content": "Be terse."},
        {"role": "user", "content": "one\ntwo\nthree"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [call | {"function": {"name": "f", "arguments": {"a": 1}}}],
        },
        {"role": "tool", "content": "4\n2", "tool_call_id": "c1"},
        {"role": "assistant", "content": "No."},
        {"role": "assistant", "content": "I cannot."},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "g", "arguments": {}}}],
        },
        {"role": "tool", "name": "g", "content": "ok"},
        {"role": "user", "content": "alone", "name": "Ann"},
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": "h", "arguments": {"b": 2}}}],
        },
    ]
    assert normalise_messages(read) == read
    assert repr(given) == before


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ("hi", "message 1 has no role: it is a str"),
        ({"content": "x"}, "message 1 has no role"),
        (
            {"role": "user", "content": 3},
            "content of type int, expected text or a list of text parts",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            "part of type 'image_url'.*not images",
        ),
        ({"role": "user", "content": [{"type": "input_audio"}]}, "part of type 'input_audio'"),
        ({"role": "user", "content": [{"type": "text"}]}, "part of type 'text' without text"),
        ({"role": "user", "content": [3]}, "part of type 'int'"),
        ({"role": "assistant", "content": None, "refusal": 3}, "refusal is a int"),
        (
            {"role": "assistant", "tool_calls": [{"function": {"arguments": "{}"}}]},
            "tool_calls without name",
        ),
        (
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]},
            "JSON arguments",
        ),
        ({"role": "assistant", "tool_calls": 3}, "tool_calls without name"),
    ],
)
def test_a_message_without_text_is_refused_by_name(tiny_tokenizer, message, reason):
    for read in (normalise_messages, tiny_tokenizer.encode_chat):
        with pytest.raises(DataError, match=reason):
            read([user("q"), message])


@pytest.mark.parametrize("source", [CHATML, QWEN3, LLAMA3, GLM])
def test_parts_roles_and_null_are_rendered_like_plain_messages(make, source):
    tokenizer = make(source)
    given = [
        {"role": "developer", "content": "s"},
        user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
        assistant(None),
        user("c"),
    ]
    plain = [{"role": "system", "content": "s"}, user("a\nb"), assistant(""), user("c")]
    ours = tokenizer.encode_chat(given, add_generation_prompt=True).text
    assert ours == tokenizer.encode_chat(plain, add_generation_prompt=True).text
    assert "a\nb" in ours
    assert "None" not in ours


@pytest.mark.parametrize(
    ("messages", "reason"),
    [
        (
            [user("q"), assistant("a", weight=0.5)],
            "message 1 has weight 0.5; a message is either trained or masked",
        ),
        ([user("q"), assistant("a", weight="0")], "message 1 has weight '0'"),
        (
            [user("q"), assistant("a", train=True, weight=0)],
            "weight 0 and train True, which contradict",
        ),
        (
            [user("q") | {"train": True}, assistant("a")],
            "message 0 is from 'user' and has train True; only assistant",
        ),
    ],
)
def test_a_weight_that_is_not_0_or_1_is_refused(tiny_tokenizer, messages, reason):
    with pytest.raises(DataError, match=reason):
        tiny_tokenizer.encode_chat(messages, with_mask=True)


def test_a_user_message_may_be_explicitly_untrained(tiny_tokenizer):
    assert trained(tiny_tokenizer, [user("q") | {"train": False}, assistant("a", loss=True)]) == [
        f"a{END}"
    ]
