"""Further content of rows: turn weights, mixed formats, double-encoded JSON, unknown keys."""

import json

import pytest

from chat_templates import QWEN3
from conversation_rows import assistant, read, user
from easyllm.core.errors import DataError
from easyllm.corpus.files.row import Row
from easyllm.examples.conversations import detect_format
from easyllm.examples.preferences import labelled, preferences, prepare_preferences
from easyllm.examples.prepare import prepare_conversations
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.tokenizer import Tokenizer


def learned(tokenizer, values, **options):
    """Returns the trained text of each sample of a row."""
    samples, account = prepare_conversations([read(values)], tokenizer, max_seq_len=256, **options)
    texts = []
    for sample in samples:
        kept = [label for label in sample.labels if label != IGNORE_INDEX]
        texts.append(tokenizer.decode(kept, skip_special=False))
    return texts, account


BAD_AND_GOOD = [user("q1"), assistant("BAD"), user("q2"), assistant("GOOD")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", 0),
        ("weight", 0.0),
        ("train", False),
        ("training", False),
        ("loss", False),
        ("mask", 0),
    ],
)
def test_a_turn_can_be_masked_under_every_usual_name(tiny_tokenizer, key, value):
    messages = [BAD_AND_GOOD[0], BAD_AND_GOOD[1] | {key: value}, *BAD_AND_GOOD[2:]]
    turns = [
        {"from": "human" if m["role"] == "user" else "gpt", "value": m["content"]}
        for m in BAD_AND_GOOD
    ]
    turns[1][key] = value
    prompt = {"prompt": messages[:3], "completion": messages[3:]}
    for row in (
        {"messages": messages},
        {"conversations": turns},
        {"conversations": messages},
        prompt,
    ):
        assert learned(tiny_tokenizer, row)[0] == ["GOOD<|im_end|>"]
        assert learned(tiny_tokenizer, row, split_turns=True)[0] == ["GOOD<|im_end|>"]
        with pytest.raises(
            DataError, match=rf"^data\.jsonl:7: message 1 has {key} .* train_on: all"
        ):
            learned(tiny_tokenizer, row, train_on="all")


def test_a_row_whose_responses_are_all_masked_is_dropped_with_a_reason(tiny_tokenizer):
    with pytest.raises(DataError, match=r"no trainable rows remain .* for messages of weight 0"):
        learned(tiny_tokenizer, {"messages": [user("q"), assistant("a", weight=0)]})


@pytest.mark.parametrize("split_turns", [False, True])
def test_a_weight_between_0_and_1_is_refused_with_the_row(tiny_tokenizer, split_turns):
    row = {"messages": [user("q"), assistant("a", weight=0.5)]}
    with pytest.raises(DataError, match=r"^data\.jsonl:7: message 1 has weight 0\.5"):
        learned(tiny_tokenizer, row, split_turns=split_turns)


def test_a_masked_response_of_a_pair_is_not_trained(tiny_tokenizer):
    row = {"prompt": "q", "chosen": [assistant("a", weight=0)], "rejected": [assistant("b")]}
    pairs = preferences([Row(row, "data.jsonl:7")])
    with pytest.raises(DataError, match="no trainable rows remain"):
        prepare_preferences(pairs, tiny_tokenizer, max_seq_len=99)


# formats


CALL = {"name": "f", "arguments": {"a": 1}}


@pytest.mark.parametrize(
    "arguments", [{"a": 1}, '{"a": 1}', json.dumps('{"a": 1}')], ids=["object", "text", "twice"]
)
def test_call_arguments_are_decoded_once_by_every_reader(tiny_tokenizer, arguments):
    call = {"name": "f", "arguments": arguments}
    asked = {"from": "human", "value": "q"}
    rows = [
        {"conversations": [asked, {"from": "function_call", "value": json.dumps(call)}]},
        {
            "conversations": [
                asked,
                {"from": "gpt", "value": "", "tool_calls": [{"function": call}]},
            ]
        },
        {
            "messages": [
                user("q"),
                assistant(None, tool_calls=[{"type": "function", "function": call}]),
            ]
        },
        {"messages": [user("q"), assistant(None, tool_calls=[call])]},
        {"messages": [user("q"), assistant(None, function_call=call)]},
        {"prompt": [user("q")], "completion": [assistant("", tool_calls=[{"function": call}])]},
    ]
    tokenizer = Tokenizer(tiny_tokenizer.backend, tiny_tokenizer.special, chat_template=QWEN3)
    for row in rows:
        assert read(row).messages[-1]["tool_calls"][0]["function"] == CALL
        (text,), _ = learned(tokenizer, row)
        assert '<tool_call>\n{"name": "f", "arguments": {"a": 1}}\n</tool_call><|im_end|>' in text
    pair = {"prompt": "q", "chosen": rows[0]["conversations"][1:], "rejected": "no"}
    (found,) = preferences([Row(pair, "data.jsonl:7")])
    assert found.chosen[0]["tool_calls"][0]["function"] == CALL


@pytest.mark.parametrize("key", ["tools", "functions"])
def test_tools_become_objects_from_any_encoding(key):
    parameters = {"type": "object", "properties": {"a": {"type": "integer"}}}
    plain = [{"type": "function", "function": {"name": "f", "parameters": parameters}}]
    text = {"type": "function", "function": {"name": "f", "parameters": json.dumps(parameters)}}
    for tools in (plain, json.dumps(plain), [json.dumps(plain[0])], [text], json.dumps([text])):
        assert read({"messages": [user("q"), assistant("a")], key: tools}).tools == plain
    bare = [{"name": "f", "parameters": json.dumps(parameters)}]
    assert read({"messages": [user("q"), assistant("a")], key: bare}).tools == [
        plain[0]["function"]
    ]


def test_turns_of_either_format_are_read_under_either_key():
    messages = [{"role": "system", "content": "s"}, user("q"), assistant("a")]
    turns = [
        {"from": "system", "value": "s"},
        {"from": "human", "value": "q"},
        {"from": "gpt", "value": "a"},
    ]
    names = [{"role": "human", "content": "q"}, {"role": "gpt", "content": "a"}]
    for key in ("messages", "conversations"):
        assert detect_format({key: messages}) == "messages"
        assert detect_format({key: turns}) == "sharegpt"
        for given in (messages, turns, [turns[0], *messages[1:]]):
            assert read({key: given}).messages == messages
        assert read({key: names, "system": "s"}).messages == messages
    pair = {"messages": messages[:2], "chosen": messages[2], "rejected": turns[2] | {"value": "b"}}
    (found,) = preferences([Row(pair, "data.jsonl:7")])
    assert (found.prompt, found.format) == (messages[:2], "messages-preference")
    assert [found.chosen, found.rejected] == [[assistant("a")], [assistant("b")]]


def test_text_parts_null_and_other_roles_are_read():
    row = {
        "messages": [
            {"role": "developer", "content": "s"},
            user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]),
            {"role": "assistant", "content": None, "refusal": "No."},
        ]
    }
    assert read(row).messages == [
        {"role": "system", "content": "s"},
        user("a\nb"),
        assistant("No."),
    ]


def test_text_parts_of_a_sharegpt_turn_are_joined():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    turns = [{"from": "human", "value": parts}, {"from": "gpt", "value": "c"}]
    assert read({"conversations": turns}).messages == [user("a\nb"), assistant("c")]
    image = {"from": "human", "value": [{"type": "image", "image": "x"}]}
    with pytest.raises(DataError, match="image"):
        read({"conversations": [image, turns[1]]})


@pytest.mark.parametrize("key", ["system", "system_prompt"])
def test_a_system_prompt_in_a_row_is_read_in_every_format(key):
    system, asked, answer = {"role": "system", "content": "s"}, user("q"), assistant("a")
    for row in (
        {"messages": [asked, answer]},
        {"messages": [system, asked, answer]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": [asked], "completion": [answer]},
        {"prompt": "q", "completion": "a"},
        {"instruction": "q", "output": "a"},
    ):
        assert read(row | {key: "s"}).messages == [system, asked, answer]
    for row in (
        {"prompt": [asked], "chosen": [answer], "rejected": [assistant("b")]},
        {"chosen": [asked, answer], "rejected": [asked, assistant("b")]},
    ):
        (pair,) = preferences([Row(row | {key: "s"}, "data.jsonl:7")])
        assert pair.prompt == [system, asked]
    with pytest.raises(DataError, match="two system prompts"):
        read({"messages": [system, asked, answer], key: "t"})


# unknown keys


METADATA = {
    "id": 7,
    "source": "web",
    "category": "chat",
    "language": "zh",
    "score": 0.5,
    "topic": None,
    "prompt_id": "p",
    "num_turns": 1,
    "text": "q a",
    "model": "m",
    "weight": 1,
    "images": [],
    "loss_mask": None,
    "mask": "User",
}
FORMS = {
    "messages": {"messages": [user("q"), assistant("a")]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
    "alpaca": {"instruction": "q", "output": "a"},
    "prompt-completion": {"prompt": "q", "completion": "a"},
    "question-answer": {"question": "q", "answer": "a"},
}


@pytest.mark.parametrize("form", FORMS)
def test_metadata_is_ignored(form):
    assert read(FORMS[form] | METADATA).messages == [user("q"), assistant("a")]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("weight", 0),
        ("weight", 0.5),
        ("sample_weight", 2),
        ("train", False),
        ("labels", [1, 2]),
        ("loss_mask", [0, 1]),
        ("mask", "Assistant"),
        ("input_ids", [1]),
        ("images", ["a.png"]),
        ("image", "a.png"),
        ("audio", {"path": "a.wav"}),
        ("rejected", "b"),
        ("rejected_response", "b"),
        ("chat_template_kwargs", {"enable_thinking": False}),
    ],
)
@pytest.mark.parametrize("form", FORMS)
def test_a_key_that_would_affect_training_is_refused_by_name(form, key, value):
    with pytest.raises(
        DataError, match=rf"^data\.jsonl:7 has the key '{key}', which is not read; "
    ):
        read(FORMS[form] | {key: value})


@pytest.mark.parametrize("key", ["context", "passage"])
@pytest.mark.parametrize("form", ["alpaca", "prompt-completion"])
def test_a_context_separate_from_its_question_is_refused(form, key):
    with pytest.raises(DataError, match=f"has the key '{key}'.*put it into the question"):
        read(FORMS[form] | {key: "p"})
    assert read(FORMS[form] | {key: ""}).messages == [user("q"), assistant("a")]


def test_pairs_and_labelled_rows_refuse_the_same_keys():
    pair = {"prompt": "q", "chosen": "a", "rejected": "b"}
    for key, value in (("images", ["x"]), ("weight", 0.5)):
        with pytest.raises(DataError, match=f"has the key '{key}'"):
            list(preferences([Row(pair | {key: value}, "data.jsonl:7")]))
        good = FORMS["prompt-completion"] | {"label": True, key: value}
        with pytest.raises(DataError, match=f"has the key '{key}'"):
            list(labelled([Row(good, "data.jsonl:7")]))
    (found,) = preferences([Row(pair | METADATA | {"score_chosen": 9}, "data.jsonl:7")])
    assert found.chosen == [assistant("a")]


@pytest.mark.parametrize("key", ["label", "kto_tag"])
@pytest.mark.parametrize("value", [0, 1])
def test_a_numeric_label_is_not_ignored(key, value):
    with pytest.raises(
        DataError, match=rf"^data\.jsonl:7 has {key} {value}, .* give true or false"
    ):
        read(FORMS["messages"] | {key: value})
    assert read(FORMS["messages"] | {key: "maths"}).messages == [user("q"), assistant("a")]


@pytest.mark.parametrize("key", ["images", "audio", "files"])
def test_a_message_with_unsupported_content_is_refused(key):
    with pytest.raises(DataError, match=f"message 0 has {key}; only text is supported"):
        read({"messages": [user("q") | {key: ["x"]}, assistant("a")]})


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_reasoning_omitted_by_the_template_is_counted(tiny_tokenizer, key):
    row = {"messages": [user("q"), assistant("a", **{key: "because of this"})]}
    _, account = learned(tiny_tokenizer, row)
    assert account.unwritten_reasoning == 1
    assert "1 with reasoning the chat template does not write" in account.summary()
    pair = {"prompt": "q", "chosen": row["messages"][1:], "rejected": "b"}
    _, account = prepare_preferences(preferences([Row(pair, "x")]), tiny_tokenizer, max_seq_len=99)
    assert account.unwritten_reasoning == 1


def test_reasoning_that_is_rendered_or_omitted_on_purpose_is_not_counted(tiny_tokenizer):
    tokenizer = Tokenizer(tiny_tokenizer.backend, tiny_tokenizer.special, chat_template=QWEN3)
    said = [
        user("q"),
        assistant("a", reasoning_content="hm"),
        user("r"),
        assistant("b", reasoning_content="so"),
    ]
    (text,), account = learned(tokenizer, {"messages": said})
    assert text == "a<|im_end|><think>\nso\n</think>\n\nb<|im_end|>"
    assert account.unwritten_reasoning == 0
