"""Rows to conversations to samples: formats, invalid rows, and the length limit."""

import bz2
import gzip
import json
import lzma
import re
from collections import Counter
from fractions import Fraction

import pytest
import zstandard

from easyllm.core.errors import ConfigError, DataError
from easyllm.examples.conversations import (
    Conversation,
    conversations,
    detect_format,
    read_conversations,
)
from easyllm.examples.data_file import Row, read_rows
from easyllm.examples.prepare import prepare_conversations, split_responses
from easyllm.examples.sample import Sample
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.tokenizer import Tokenizer

TOOLS = [{"name": "add", "parameters": {"type": "object"}}]


def user(content):
    return {"role": "user", "content": content}


def assistant(content):
    return {"role": "assistant", "content": content}


def system(content):
    return {"role": "system", "content": content}


def read(values):
    (conversation,) = conversations([Row(values, "data.jsonl:7")])
    return conversation


def talk(*contents):
    """Returns a conversation of contents of user and assistant alternately."""
    messages = [(user, assistant)[i % 2](c) for i, c in enumerate(contents)]
    return Conversation(messages, None, "data.jsonl:7")


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


FORMATS = {
    "messages": (
        "messages",
        {"messages": [system("s"), user("q"), assistant("a")]},
        [system("s"), user("q"), assistant("a")],
    ),
    "alpaca": (
        "alpaca",
        {"instruction": "q", "output": "a"},
        [user("q"), assistant("a")],
    ),
    "alpaca with everything": (
        "alpaca",
        {
            "system": "s",
            "history": [["q1", "a1"], ["q2", "a2"]],
            "instruction": "q",
            "input": "more",
            "output": "a",
        },
        [
            *[system("s"), user("q1"), assistant("a1"), user("q2"), assistant("a2")],
            *[user("q\nmore"), assistant("a")],
        ],
    ),
    "alpaca with empty fields": (
        "alpaca",
        {"system": "", "history": [], "instruction": "q", "input": "", "output": "a"},
        [user("q"), assistant("a")],
    ),
    "alpaca with null fields": (
        "alpaca",
        {"system": None, "history": None, "instruction": "q", "input": None, "output": "a"},
        [user("q"), assistant("a")],
    ),
    "sharegpt": (
        "sharegpt",
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        [user("q"), assistant("a")],
    ),
    "sharegpt with a system field": (
        "sharegpt",
        {"system": "s", "conversations": [{"from": "gpt", "value": "a"}]},
        [system("s"), assistant("a")],
    ),
    "sharegpt by other names": (
        "sharegpt",
        {
            "conversations": [
                {"from": "system", "value": "s"},
                {"from": "user", "value": "q"},
                {"from": "model", "value": "a"},
                {"from": "tool", "value": "t"},
                {"from": "function_response", "value": "f"},
                {"from": "assistant", "value": "b"},
            ]
        },
        [
            *[system("s"), user("q"), assistant("a")],
            *[{"role": "tool", "content": "t"}, {"role": "tool", "content": "f"}, assistant("b")],
        ],
    ),
    "prompt and completion": (
        "prompt-completion",
        {"prompt": "q", "completion": "a"},
        [user("q"), assistant("a")],
    ),
    "prompt and completion as messages": (
        "prompt-completion",
        {"prompt": [system("s"), user("q")], "completion": [assistant("a")]},
        [system("s"), user("q"), assistant("a")],
    ),
    "question and answer": (
        "question-answer",
        {"question": "q", "answer": "a", "id": 3},
        [user("q"), assistant("a")],
    ),
    "question and answer with a system prompt": (
        "question-answer",
        {"system": "s", "question": "q", "answer": "a"},
        [system("s"), user("q"), assistant("a")],
    ),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_format_is_detected_and_read_as_messages(name):
    kind, values, messages = FORMATS[name]
    assert detect_format(values) == kind
    conversation = read(values)
    assert conversation.messages == messages
    assert conversation.tools is None
    assert conversation.location == "data.jsonl:7"
    assert conversation.format == kind


def test_sharegpt_function_calls_become_tool_calls():
    calls = {"name": "add", "arguments": {"a": 1}}
    conversation = read(
        {
            "tools": json.dumps(TOOLS),
            "conversations": [
                {"from": "human", "value": "1+1?"},
                {"from": "function_call", "value": json.dumps(calls)},
                {"from": "observation", "value": "2"},
                {"from": "function_call", "value": json.dumps([calls, {"name": "stop"}])},
                {"from": "gpt", "value": "Two."},
            ],
        }
    )
    assert conversation.tools == TOOLS
    assert [m["role"] for m in conversation.messages] == [
        *["user", "assistant", "tool", "assistant", "assistant"]
    ]
    first, second = (conversation.messages[i]["tool_calls"] for i in (1, 3))
    assert first == [{"type": "function", "function": calls}]
    assert [call["function"] for call in second] == [calls, {"name": "stop", "arguments": {}}]
    assert conversation.messages[2] == {"role": "tool", "content": "2"}


def test_messages_keep_their_tools_and_tool_calls():
    called = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add"}}]}
    conversation = read({"messages": [user("q"), called], "tools": TOOLS})
    function = {"name": "add", "arguments": {}}
    assert conversation.messages[1] == assistant("") | {"tool_calls": [{"function": function}]}
    assert conversation.tools == TOOLS


def test_json_encoded_call_arguments_become_objects_without_modifying_the_row():
    def called(arguments):
        function = {"name": "add", "arguments": arguments}
        return {"role": "assistant", "content": "", "tool_calls": [{"function": function}]}

    values = {"messages": [user("q"), called('{"a": [1, "b"]}'), called(""), called({"a": 1})]}
    before = json.dumps(values)
    assert read(values).messages == [
        *[user("q"), called({"a": [1, "b"]}), called({}), called({"a": 1})]
    ]
    assert json.dumps(values) == before


@pytest.mark.parametrize("tools", [None, [], "", "  ", "[]"])
def test_empty_tools_are_none(tools):
    assert read({"messages": [assistant("a")], "tools": tools}).tools is None


WRONG = {
    "no known format": ({"text": "x", "label": 1}, r"unknown format \(keys: label, text\)"),
    "no keys": ({}, r"keys: none"),
    "messages that are no list": (
        {"messages": "hello"},
        r"unknown format \(keys: messages\): messages is text, expected a list like",
    ),
    "messages that are an object": (
        {"messages": {"0": user("q")}},
        "messages is of type dict, expected a list",
    ),
    "conversations that are null": (
        {"conversations": None},
        "conversations is null, expected a list",
    ),
    "a question alone": ({"instruction": "q", "input": ""}, "it has 'instruction' but no 'output'"),
    "an answer alone": ({"completion": "a"}, "it has 'completion' but no 'prompt'"),
    "a plain text": ({"text": "x"}, "it is plain text, which `easyllm data build` packs"),
    "no assistant": ({"messages": [user("q")]}, "no assistant turn"),
    "no messages": ({"messages": []}, "no assistant turn"),
    "no turns": ({"conversations": []}, "no assistant turn"),
    "only questions": ({"conversations": [{"from": "human", "value": "q"}]}, "no assistant turn"),
    "a prompt alone": ({"prompt": [user("q")], "completion": [user("r")]}, "no assistant turn"),
    "a message without a role": ({"messages": [{"content": "q"}]}, "message 0 has no role"),
    "a message that is text": ({"messages": [user("q"), "a"]}, "message 1 has no role"),
    "a message without content": ({"messages": [{"role": "user"}]}, "message 0 has no text"),
    "an image": (
        {"messages": [user([{"type": "image_url", "image_url": {"url": "x"}}]), assistant("a")]},
        "message 0 has a part of type 'image_url'; only text is supported",
    ),
    "a prompt of texts": ({"prompt": ["q"], "completion": ["a"]}, "message 0 has no role"),
    "a completion without content": (
        {"prompt": [user("q")], "completion": [{"role": "assistant"}]},
        "message 1 has no text",
    ),
    "a prompt of messages to a text": (
        {"prompt": [user("q")], "completion": "a"},
        "prompt is of type list, expected text",
    ),
    "a number as output": (
        {"instruction": "q", "output": 4},
        "output is of type int, expected text",
    ),
    "a list as input": ({"instruction": "q", "input": [1], "output": "a"}, "input is of type list"),
    "history of texts": ({"instruction": "q", "output": "a", "history": ["x"]}, "history"),
    "history of triples": (
        {"instruction": "q", "output": "a", "history": [["x", "y", "z"]]},
        "history is not a list of pairs",
    ),
    "history of numbers": ({"instruction": "q", "output": "a", "history": [[1, 2]]}, "history"),
    "history that is a number": ({"instruction": "q", "output": "a", "history": 3}, "history"),
    "an unknown speaker": (
        {"conversations": [{"from": "narrator", "value": "x"}]},
        "turn 0 is from 'narrator'; expected one of human, .*function_call",
    ),
    "a turn without a value": (
        {"conversations": [{"from": "human"}]},
        "turn 0 has no text value",
    ),
    "a turn that is text": ({"conversations": ["x"]}, "turn 0 has no text value"),
    "a call that is not JSON": (
        {"conversations": [{"from": "function_call", "value": "add(1)"}]},
        "turn 0 is a function_call without name and arguments",
    ),
    "a call without a name": (
        {"conversations": [{"from": "function_call", "value": "{}"}]},
        "turn 0 is a function_call without name and arguments",
    ),
    "a call that is a number": (
        {"conversations": [{"from": "function_call", "value": "4"}]},
        "turn 0 is a function_call without name and arguments",
    ),
    "tools that are no JSON": (
        {"messages": [assistant("a")], "tools": "[add"},
        "tools is not JSON",
    ),
    "tools that are no list": (
        {"messages": [assistant("a")], "tools": {"name": "add"}},
        "tools is not a list of functions",
    ),
    "tools that are names": (
        {"messages": [assistant("a")], "tools": ["add"]},
        "tools is not a list of functions",
    ),
    "tool calls without a name": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {}}]}]},
        "message 0 has tool_calls without name",
    ),
    "tool calls that are text": (
        {"messages": [{"role": "assistant", "tool_calls": "add(1)"}]},
        "message 0 has tool_calls without name",
    ),
    "arguments that are no JSON": (
        {
            "messages": [
                {"role": "assistant", "tool_calls": [{"name": "add", "arguments": "a=1"}]},
            ]
        },
        "message 0 has tool_calls without name and JSON arguments",
    ),
    "a preference pair": (
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        "is a preference pair .*expected a conversation",
    ),
    "a preference pair after a conversation": (
        {
            "conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}],
            "chosen": {"from": "gpt", "value": "b"},
            "rejected": {"from": "gpt", "value": "c"},
        },
        "is a preference pair .*expected a conversation",
    ),
    "a bad answer": (
        {"prompt": "q", "completion": "a", "label": False},
        "has a binary label",
    ),
    "a judged conversation": (
        {"messages": [user("q"), assistant("a")], "kto_tag": True},
        "has a binary label",
    ),
    "a question whose choices are apart": (
        {"question": "q", "choices": ["a", "b"], "answer": "a"},
        r"unknown format \(keys: answer, choices, question\)",
    ),
    "an answer by number": ({"question": "q", "answer": 2}, "answer is of type int, expected text"),
}


@pytest.mark.parametrize("name", WRONG)
def test_an_invalid_row_is_refused_with_its_location(name):
    values, message = WRONG[name]
    with pytest.raises(DataError, match=rf"^data\.jsonl:7.*{message}"):
        read(values)


def test_an_unknown_format_lists_the_known_ones():
    with pytest.raises(DataError) as caught:
        read({"text": "x"})
    for name in ("messages", "alpaca", "sharegpt", "prompt-completion", "question-answer"):
        assert name in str(caught.value)


def test_a_jsonl_file_and_a_json_array_give_the_same_rows(tmp_path):
    rows = [FORMATS[name][1] for name in FORMATS]
    lines = write_lines(tmp_path / "data.jsonl", rows)
    array = tmp_path / "data.json"
    array.write_text(json.dumps(rows, indent=1), encoding="utf-8")
    expected = [FORMATS[name][2] for name in FORMATS]
    assert [c.messages for c in read_conversations(lines)] == expected
    assert [c.messages for c in read_conversations(array)] == expected
    assert [row.location for row in read_rows(lines)][:2] == [f"{lines}:1", f"{lines}:2"]
    assert [row.location for row in read_rows(array)][:2] == [f"{array}[0]", f"{array}[1]"]


def test_blank_lines_are_skipped_but_counted(tmp_path):
    path = tmp_path / "data.jsonl"
    path.write_text('\n{"a": 1}\n  \n\n{"a": 2}', encoding="utf-8")
    assert [row.location for row in read_rows(path)] == [f"{path}:2", f"{path}:5"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("data.jsonl", b'{"a": 1}\n{"a": \n', r"data\.jsonl:2 is not JSON"),
        ("data.jsonl", b'{"a": 1}\n{"a": "\xff\xfe"}\n', r"data\.jsonl:2 is not UTF-8"),
        (
            "data.jsonl",
            b'{"a": 1}\n\n[1]\n',
            r"data\.jsonl:3 contains a JSON list, expected an object",
        ),
        ("data.jsonl", b"[\n", r"data\.jsonl:1 is not JSON"),
        ("data.json", b'[{"a": 1}, 2]', r"data\.json\[1\] contains a JSON int, expected an object"),
        ("data.json", b'[{"a": 1}', r"data\.json' cannot be read to its end: not JSON"),
        ("data.jsonl", b"", r"data\.jsonl' is empty; give"),
        ("data.jsonl", b"\n \n", r"data\.jsonl' contains no rows; give"),
        ("data.json", b"[]", r"data\.json' contains no rows; give"),
        ("data.jsonl.gz", gzip.compress(b""), r"data\.jsonl\.gz' contains no rows"),
        (
            "data.jsonl.xz",
            lzma.compress(b'{"a": 1}')[:-9],
            r"data\.jsonl\.xz' cannot be read to its end: damaged",
        ),
        ("data.jsonl", gzip.compress(b"{}"), r"contains gzip, not JSON; rename it to end in \.gz"),
        ("data.jsonl", bz2.compress(b"{}"), r"contains bzip2, not JSON; rename it to end in \.bz2"),
        ("data.json", b"PK\x03\x04....", "contains a zip archive, not JSON; convert it"),
    ],
)
def test_a_malformed_file_is_refused_with_the_location(tmp_path, name, content, message):
    path = tmp_path / name
    path.write_bytes(content)
    with pytest.raises(DataError, match=message):
        list(read_rows(path))


COMPRESSED = {
    ".gz": gzip.compress,
    ".zst": zstandard.compress,
    ".xz": lzma.compress,
    ".bz2": bz2.compress,
    ".XZ": lzma.compress,
}


@pytest.mark.parametrize("suffix", COMPRESSED)
@pytest.mark.parametrize("name", ["data.jsonl", "data.json"])
def test_a_compressed_file_gives_the_same_rows(tmp_path, name, suffix):
    rows = [{"prompt": "问", "completion": "答" * n} for n in range(50)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    content = json.dumps(rows) if name == "data.json" else lines
    path = tmp_path / f"{name}{suffix}"
    path.write_bytes(COMPRESSED[suffix](content.encode()))
    found = list(read_rows(path))
    assert [row.values for row in found] == rows
    assert found[1].location == f"{path}[1]" if name == "data.json" else f"{path}:2"


def test_jsonl_content_in_a_json_file_is_read(tmp_path):
    path = write_lines(tmp_path / "data.json", [{"a": 1}, {"a": 2}])
    assert [row.values for row in read_rows(path)] == [{"a": 1}, {"a": 2}]


def test_a_folder_is_refused_with_a_list_of_its_files(tmp_path):
    with pytest.raises(DataError, match=r"is a folder; name the files in it, which must be .*none"):
        list(read_rows(tmp_path))
    for name in ("b.jsonl", "a.json.gz", "notes.md"):
        (tmp_path / name).write_bytes(b"")
    with pytest.raises(DataError, match=r"is a folder; .* \(it contains a\.json\.gz, b\.jsonl\)"):
        list(read_rows(tmp_path))


@pytest.mark.parametrize("name", ["data.parquet", "data.csv", "data.csv.gz"])
def test_a_file_with_another_suffix_is_refused(tmp_path, name):
    (tmp_path / name).write_bytes(b"PAR1")
    with pytest.raises(DataError, match=rf"{name}' is a \.\w+ file, expected \.json .*convert it"):
        list(read_rows(tmp_path / name))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(DataError, match="does not exist"):
        list(read_rows(tmp_path / "data.jsonl"))


def test_a_sample_trains_the_assistants_text_and_the_end_of_its_turns(tiny_tokenizer):
    (sample,), account = prepare_conversations(
        [talk("hello", "good morning", "what", "how")], tiny_tokenizer, max_seq_len=256
    )
    learnt = [label for label in sample.labels if label != IGNORE_INDEX]
    text = tiny_tokenizer.decode(learnt, skip_special=False)
    assert text == "good morning<|im_end|>how<|im_end|>"
    assert (account.rows, account.samples) == (1, 1)
    assert account.trained_tokens == sample.num_trained == len(learnt)
    assert account.tokens == len(sample.token_ids)
    assert account.prompt_tokens == account.tokens - len(learnt)


def test_all_tokens_can_be_trained(tiny_tokenizer):
    (sample,), account = prepare_conversations(
        [talk("hello", "world")], tiny_tokenizer, max_seq_len=256, train_on="all"
    )
    ids = tiny_tokenizer.encode_chat(talk("hello", "world").messages).token_ids
    assert [*sample.token_ids, sample.labels[-1]] == ids
    assert list(sample.labels) == ids[1:]
    assert account.prompt_tokens == 0


def test_too_long_samples_are_truncated_and_counted(tiny_tokenizer):
    talks = [talk("hello", "world " * 50), talk("hello", "world")]
    samples, account = prepare_conversations(talks, tiny_tokenizer, max_seq_len=40)
    assert (account.rows, account.samples, account.cut) == (2, 2, 1)
    assert len(samples[0].token_ids) == 39
    whole, _ = prepare_conversations(talks, tiny_tokenizer, max_seq_len=10_000)
    assert samples[0].token_ids == whole[0].token_ids[:39]
    assert samples[0].labels == whole[0].labels[:39]
    assert samples[1] == whole[1]
    assert "1 truncated to the length limit" in account.summary()


def test_a_sample_as_long_as_the_limit_is_complete(tiny_tokenizer):
    length = len(tiny_tokenizer.encode_chat(talk("hello", "world").messages).token_ids)
    for overlong in ("cut", "drop"):
        samples, account = prepare_conversations(
            [talk("hello", "world")], tiny_tokenizer, max_seq_len=length, overlong=overlong
        )
        assert len(samples[0].token_ids) == length - 1
        assert (account.cut, account.dropped_overlong) == (0, 0)


def test_too_long_samples_are_dropped_and_counted(tiny_tokenizer):
    talks = [talk("hello", "world " * 50), talk("hello", "world")]
    samples, account = prepare_conversations(talks, tiny_tokenizer, max_seq_len=40, overlong="drop")
    assert (account.rows, account.samples) == (2, 1)
    assert (account.cut, account.dropped_overlong) == (0, 1)
    assert account.tokens == len(samples[0].token_ids)
    assert "1 dropped as too long" in account.summary()


def test_a_sample_without_trained_tokens_is_dropped_and_counted(tiny_tokenizer):
    talks = [talk("hello " * 50, "world"), talk("hello", "world")]
    samples, account = prepare_conversations(talks, tiny_tokenizer, max_seq_len=40)
    assert (account.samples, account.cut, account.dropped_untrained) == (1, 1, 1)
    assert len(samples) == 1
    assert "1 dropped without a trained token" in account.summary()


@pytest.mark.parametrize("overlong", ["cut", "drop"])
def test_no_remaining_samples_are_refused_with_a_summary(tiny_tokenizer, overlong):
    with pytest.raises(DataError, match=r"no trainable rows remain .*0 of 1 rows.*max_seq_len=10"):
        prepare_conversations(
            [talk("hello " * 50, "world")], tiny_tokenizer, max_seq_len=10, overlong=overlong
        )


def test_an_empty_list_of_rows_is_refused(tiny_tokenizer):
    with pytest.raises(DataError, match="no trainable rows remain"):
        prepare_conversations([], tiny_tokenizer, max_seq_len=10)


def test_a_row_rejected_by_the_template_is_named(tiny_tokenizer):
    tiny_tokenizer = Tokenizer(
        tiny_tokenizer.backend,
        tiny_tokenizer.special,
        chat_template="{{ raise_exception('no') }}",
    )
    broken = Conversation([user("q"), assistant("a")], None, "data.jsonl:9")
    with pytest.raises(DataError, match=r"^data\.jsonl:9: the chat template rejects"):
        prepare_conversations([broken], tiny_tokenizer, max_seq_len=10)


def test_an_account_consists_of_plain_numbers(tiny_tokenizer):
    _, account = prepare_conversations([talk("q", "a")], tiny_tokenizer, max_seq_len=40)
    values = account.as_dict()
    assert values.pop("formats") == {"messages": 1}
    assert all(type(value) is int for value in values.values())
    assert values["tokens"] == values["trained_tokens"] + values["prompt_tokens"]
    assert json.loads(json.dumps(account.as_dict())) == account.as_dict()


def test_an_account_names_the_formats(tiny_tokenizer):
    rows = [{"prompt": "q", "completion": "a"}] * 2 + [{"question": "q", "answer": "a"}]
    chats = list(conversations(Row(row, "x") for row in rows))
    _, mixed = prepare_conversations(chats, tiny_tokenizer, max_seq_len=40)
    assert mixed.formats == {"prompt-completion": 2, "question-answer": 1}
    assert mixed.summary().endswith(" · format prompt-completion 2, question-answer 1")
    _, plain = prepare_conversations(chats[:2], tiny_tokenizer, max_seq_len=40)
    assert plain.summary().endswith(" · format prompt-completion")


def test_rows_prepared_in_batches_equal_those_prepared_at_once(tiny_tokenizer):
    talks = [talk(*["hello", "good morning " * (n % 5)] * (1 + n % 3)) for n in range(13)]
    options = {"max_seq_len": 60, "overlong": "drop"}
    whole, account = prepare_conversations(talks, tiny_tokenizer, **options)
    parts = [prepare_conversations(talks[i : i + 5], tiny_tokenizer, **options) for i in (0, 5, 10)]
    assert [sample for samples, _ in parts for sample in samples] == whole
    for name in ("rows", "samples", "tokens", "trained_tokens", "dropped_overlong"):
        assert sum(getattr(part, name) for _, part in parts) == getattr(account, name)
    assert 0 < account.dropped_overlong < len(talks)


HERMES = """{%- if tools %}
    {{- '<|im_start|>system\\nTools:' }}
    {%- for tool in tools %}{{- '\\n' + (tool | tojson) }}{%- endfor %}
    {{- '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' }}
    {%- if message.role == 'assistant' %}
        {%- generation %}
        {{- message.content }}
        {%- for call in message.tool_calls or [] %}
            {{- '<tool_call>' + (call.function | tojson) + '</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>' }}
        {%- endgeneration %}
    {%- else %}
        {{- message.content + '<|im_end|>' }}
    {%- endif %}
    {{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""
ROWS = {
    "alpaca": {"instruction": "What is 2 + 2?", "input": "你好", "output": "4\n世界"},
    "sharegpt with tools": {
        "tools": json.dumps(TOOLS),
        "conversations": [
            {"from": "human", "value": "1 + 1?"},
            {
                "from": "function_call",
                "value": json.dumps({"name": "add", "arguments": {"a": 1, "b": "世"}}),
            },
            {"from": "observation", "value": '{"sum": 2}'},
            {"from": "gpt", "value": "Two."},
        ],
    },
    "chat of many turns": {
        "messages": [
            *[system("Be terse."), user("a"), assistant("b"), user(" c "), assistant("")],
            *[user("<|im_end|>"), assistant("d\n"), user("e")],
        ]
    },
}


def templated(tokenizer, source):
    return Tokenizer(tokenizer.backend, tokenizer.special, chat_template=source)


@pytest.mark.parametrize("marked", [True, False], ids=["with marks", "without"])
@pytest.mark.parametrize("name", ROWS)
def test_labels_of_a_row_equal_the_mask_of_transformers(tiny_tokenizer, tmp_path, name, marked):
    from transformers import AutoTokenizer

    source = HERMES if marked else re.sub(r"\{%- (end)?generation %\}", "", HERMES)
    tokenizer = templated(tiny_tokenizer, source)
    tokenizer.save(tmp_path)
    conversation = read(ROWS[name])
    (sample,), account = prepare_conversations([conversation], tokenizer, max_seq_len=1000)
    theirs = AutoTokenizer.from_pretrained(tmp_path).apply_chat_template(
        conversation.messages,
        tools=conversation.tools,
        chat_template=HERMES,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, mask = theirs["input_ids"], theirs["assistant_masks"]
    assert list(sample.token_ids) == ids[:-1]
    assert list(sample.labels) == [
        i if m else IGNORE_INDEX for i, m in zip(ids[1:], mask[1:], strict=True)
    ]
    assert sample.num_trained == sum(mask) > 1
    assert account.unwritten_tools == 0


def test_rows_whose_tools_the_template_omits_are_counted(tiny_tokenizer):
    rows = [read(ROWS["sharegpt with tools"]), read(ROWS["alpaca"])]
    for split in (False, True):
        _, account = prepare_conversations(
            rows, tiny_tokenizer, max_seq_len=1000, split_turns=split
        )
        assert account.unwritten_tools == 1
        assert "1 with tools the chat template does not write" in account.summary()


def session_weights(samples, answers):
    """Returns each response's weight in the loss as the mean over samples of their token means."""
    weights = dict.fromkeys(answers, Fraction(0))
    for sample in samples:
        trained = [label for label in sample.labels if label != IGNORE_INDEX]
        ends = trained[1]  # each response is one token plus the end of its turn
        for token in trained:
            if token != ends:
                weights[token] += Fraction(2, len(trained)) / len(samples)
    return list(weights.values())


def test_loss_weights_of_responses_in_complete_and_split_sessions(tiny_tokenizer):
    """Sessions of one and three turns; A, B and C respond to the first, second and third question.

    A mean of means gives A, B, C the weights 2/3, 1/6, 1/6 in complete sessions. If sessions are
    split after each turn with every response trained, early responses are repeated with each later
    turn: 17/24, 5/24, 1/12. If only the last response is trained, each counts once.
    """
    answers = [tiny_tokenizer.encode(letter)[0] for letter in "ABC"]
    sessions = [talk("x", "A"), talk("x", "A", "y", "B", "z", "C")]
    cut = [part for session in sessions for part in split_responses(session)]

    def prepare(talks, **options):
        return prepare_conversations(talks, tiny_tokenizer, max_seq_len=1000, **options)[0]

    assert session_weights(prepare(sessions), answers) == [
        *[Fraction(2, 3), Fraction(1, 6), Fraction(1, 6)]
    ]
    assert session_weights(prepare(cut), answers) == [
        *[Fraction(17, 24), Fraction(5, 24), Fraction(1, 12)]
    ]
    split = prepare(sessions, split_turns=True)
    assert session_weights(split, answers) == [Fraction(1, 2), Fraction(1, 4), Fraction(1, 4)]
    # the training loop's mean over tokens is the same for complete and split sessions
    assert session_weights([merged(prepare(sessions))], answers) == session_weights(split, answers)


def merged(samples):
    """Returns one sample with all labels, whose mean is the mean over all tokens."""
    return Sample(
        tuple(t for s in samples for t in s.token_ids), tuple(t for s in samples for t in s.labels)
    )


def predictions(samples):
    """Counts the trained predictions: each label with all preceding ids."""
    return Counter(
        (sample.token_ids[: at + 1], label)
        for sample in samples
        for at, label in enumerate(sample.labels)
        if label != IGNORE_INDEX
    )


def test_split_turns_train_the_same_tokens_with_the_same_context(tiny_tokenizer):
    talks = [
        talk("hello", "world"),
        talk("a", "b", "c", "d", "e", "f"),
        Conversation([system("s"), assistant("x"), user("u"), assistant("v")], None, "x"),
        Conversation([user("u"), assistant("one"), assistant("two"), user("v")], None, "x"),
    ]
    whole, _ = prepare_conversations(talks, tiny_tokenizer, max_seq_len=1000)
    split, account = prepare_conversations(
        talks, tiny_tokenizer, max_seq_len=1000, split_turns=True
    )
    assert predictions(split) == predictions(whole)
    assert (account.rows, account.turns, account.samples) == (4, 8, 8)
    assert "8 of 8 turns of 4 rows" in account.summary()


QWEN3 = """{%- set ns = namespace(last=0) %}
{%- for message in messages %}
    {%- if message.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content %}
    {%- if message.role == 'assistant' and loop.index0 < ns.last %}
        {%- set content = content.split('</think>')[-1] %}
    {%- endif %}
    {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""


def test_split_turns_keep_reasoning_that_later_turns_would_drop(tiny_tokenizer):
    tokenizer = templated(tiny_tokenizer, QWEN3)
    session = talk("u", "<think>hm</think>one", "v", "<think>so</think>two")

    def texts(split):
        samples, _ = prepare_conversations(
            [session], tokenizer, max_seq_len=1000, split_turns=split
        )
        trained = [[label for label in s.labels if label != IGNORE_INDEX] for s in samples]
        return [tokenizer.decode(ids, skip_special=False) for ids in trained]

    assert texts(False) == ["one<|im_end|><think>so</think>two<|im_end|>"]
    assert texts(True) == ["<think>hm</think>one<|im_end|>", "<think>so</think>two<|im_end|>"]


def test_split_turns_of_a_template_without_headers_are_separate(tiny_tokenizer):
    """Consecutive responses are adjacent, with nothing untrained between them."""
    source = (
        "{% for m in messages %}{{ '<|im_start|>' + m.content if m.role == 'user' "
        "else m.content + '<|im_end|>' }}{% endfor %}"
    )
    tokenizer = templated(tiny_tokenizer, source)
    session = Conversation([user("u"), assistant("one"), assistant("two")], None, "x")
    samples, _ = prepare_conversations([session], tokenizer, max_seq_len=99, split_turns=True)
    trained = [[label for label in s.labels if label != IGNORE_INDEX] for s in samples]
    assert [tokenizer.decode(ids, skip_special=False) for ids in trained] == [
        *["one<|im_end|>", "two<|im_end|>"]
    ]


def test_too_long_split_turns_are_counted_individually(tiny_tokenizer):
    talks = [talk("hello", "world", "again", "world " * 50)]
    samples, account = prepare_conversations(
        talks, tiny_tokenizer, max_seq_len=60, overlong="drop", split_turns=True
    )
    assert len(samples) == 1
    assert (account.rows, account.turns, account.dropped_overlong) == (1, 2, 1)


def test_splitting_is_refused_if_all_tokens_are_trained(tiny_tokenizer):
    with pytest.raises(ConfigError, match=r"split_turns .*train_on"):
        prepare_conversations(
            [talk("q", "a")], tiny_tokenizer, max_seq_len=40, train_on="all", split_turns=True
        )
