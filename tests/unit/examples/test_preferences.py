"""Preference data, pairs (DPO) and binary labels (KTO): formats, invalid rows, samples."""

import json

import pytest

from conversation_rows import TOOLS, assistant, system, user
from easyllm.core.errors import DataError
from easyllm.examples.data_file import Row
from easyllm.examples.preferences import (
    LabelledCompletion,
    PreferencePair,
    detect_pair_format,
    labelled,
    preferences,
    prepare_labelled,
    prepare_preferences,
    read_labelled,
    read_preferences,
)
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.tokenizer import Tokenizer


def said(speaker, value):
    return {"from": speaker, "value": value}


def read_pair(values):
    (pair,) = preferences([Row(values, "data.jsonl:7")])
    return pair


def read_label(values):
    (row,) = labelled([Row(values, "data.jsonl:7")])
    return row


def pair_of(prompt, chosen, rejected):
    return PreferencePair(
        [user(prompt)], [assistant(chosen)], [assistant(rejected)], None, "data.jsonl:7"
    )


def label_of(prompt, completion, label):
    return LabelledCompletion([user(prompt)], [assistant(completion)], label, None, "data.jsonl:7")


HISTORY = [user("p"), assistant("o")]
PAIRS = {
    "texts": (
        "preference",
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        ([user("q")], [assistant("a")], [assistant("b")]),
    ),
    "texts with a system prompt": (
        "preference",
        {"system": "s", "question": "q", "chosen": "a", "rejected": "b"},
        ([system("s"), user("q")], [assistant("a")], [assistant("b")]),
    ),
    "messages": (
        "preference",
        {
            "prompt": [system("s"), *HISTORY, user("q")],
            "chosen": [assistant("a")],
            "rejected": [assistant("b")],
        },
        ([system("s"), *HISTORY, user("q")], [assistant("a")], [assistant("b")]),
    ),
    "answers of several messages": (
        "preference",
        {"prompt": "q", "chosen": [assistant("a"), user("r"), assistant("c")], "rejected": "b"},
        ([user("q")], [assistant("a"), user("r"), assistant("c")], [assistant("b")]),
    ),
    "a single message as answer": (
        "preference",
        {"prompt": "q", "chosen": assistant("a"), "rejected": assistant("b")},
        ([user("q")], [assistant("a")], [assistant("b")]),
    ),
    "an implicit prompt": (
        "implicit-preference",
        {
            "chosen": [*HISTORY, user("q"), assistant("a")],
            "rejected": [*HISTORY, user("q"), assistant("b")],
        },
        ([*HISTORY, user("q")], [assistant("a")], [assistant("b")]),
    ),
    "an implicit prompt and equal answers": (
        "implicit-preference",
        {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("a")]},
        ([user("q")], [assistant("a")], [assistant("a")]),
    ),
    "an implicit prompt, one answer longer": (
        "implicit-preference",
        {
            "chosen": [user("q"), assistant("a"), user("r"), assistant("c")],
            "rejected": [user("q"), assistant("a")],
        },
        ([user("q")], [assistant("a"), user("r"), assistant("c")], [assistant("a")]),
    ),
    "a prompt given twice": (
        "preference",
        {
            "prompt": "q",
            "chosen": [user("q"), assistant("a")],
            "rejected": [user("q"), assistant("b")],
        },
        ([user("q")], [assistant("a")], [assistant("b")]),
    ),
    "sharegpt": (
        "sharegpt-preference",
        {
            "system": "s",
            "conversations": [said("human", "p"), said("gpt", "o"), said("human", "q")],
            "chosen": said("gpt", "a"),
            "rejected": said("gpt", "b"),
        },
        ([system("s"), *HISTORY, user("q")], [assistant("a")], [assistant("b")]),
    ),
    "alpaca": (
        "alpaca-preference",
        {
            "instruction": "q",
            "input": "more",
            "history": [["p", "o"]],
            "chosen": "a",
            "rejected": "b",
        },
        ([*HISTORY, user("q\nmore")], [assistant("a")], [assistant("b")]),
    ),
}


@pytest.mark.parametrize("name", PAIRS)
def test_a_pair_is_detected_and_read_as_messages(name):
    kind, values, expected = PAIRS[name]
    assert detect_pair_format(values) == kind
    pair = read_pair(values)
    assert (pair.prompt, pair.chosen, pair.rejected) == expected
    assert (pair.location, pair.format, pair.tools) == ("data.jsonl:7", kind, None)


def test_a_pair_keeps_its_tools_and_function_calls():
    call = {"name": "add", "arguments": {"a": 1}}
    pair = read_pair(
        {
            "tools": json.dumps(TOOLS),
            "conversations": [said("human", "1+1?")],
            "chosen": said("function_call", json.dumps(call)),
            "rejected": said("gpt", "3"),
        }
    )
    assert pair.tools == TOOLS
    assert pair.chosen[0]["tool_calls"] == [{"type": "function", "function": call}]


WRONG_PAIRS = {
    "no pair": (
        {"prompt": "q", "completion": "a"},
        r"unknown format \(keys: completion, prompt\)",
    ),
    "half a pair": ({"prompt": "q", "chosen": "a"}, "unknown format"),
    "texts without a prompt": ({"chosen": "q a", "rejected": "q b"}, "unknown format"),
    "a prompt that is a number": (
        {"prompt": 3, "chosen": "a", "rejected": "b"},
        "prompt is of type int",
    ),
    "an answer that is a number": (
        {"prompt": "q", "chosen": 3, "rejected": "b"},
        "chosen is not a response",
    ),
    "no messages as answer": (
        {"prompt": "q", "chosen": "a", "rejected": []},
        "rejected is not a response",
    ),
    "an answer of the user": (
        {"prompt": "q", "chosen": [assistant("a")], "rejected": [user("b")]},
        "not two responses to one prompt",
    ),
    "two prompts": (
        {"chosen": [user("p"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        "not two responses to one prompt",
    ),
    "prompts that part late": (
        {
            "chosen": [*HISTORY, user("p"), assistant("a")],
            "rejected": [*HISTORY, user("q"), assistant("b")],
        },
        "not two responses to one prompt",
    ),
    "no prompt": (
        {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        "not two responses to one prompt",
    ),
    "another prompt in the answers": (
        {
            "prompt": "p",
            "chosen": [user("q"), assistant("a")],
            "rejected": [user("q"), assistant("b")],
        },
        "start with a different prompt than the row's",
    ),
    "an unknown speaker": (
        {
            "conversations": [said("human", "q")],
            "chosen": said("narrator", "a"),
            "rejected": said("gpt", "b"),
        },
        "chosen is from 'narrator'",
    ),
}


@pytest.mark.parametrize("name", WRONG_PAIRS)
def test_an_invalid_pair_is_refused_with_its_location(name):
    values, message = WRONG_PAIRS[name]
    with pytest.raises(DataError, match=rf"^data\.jsonl:7.*{message}"):
        read_pair(values)


LABELLED = {
    "texts": (
        "prompt-completion-label",
        {"prompt": "q", "completion": "a", "label": True},
        ([user("q")], [assistant("a")], True),
    ),
    "messages apart": (
        "prompt-completion-label",
        {
            "prompt": [user("q")],
            "completion": [assistant("a"), user("r"), assistant("b")],
            "label": False,
        },
        ([user("q")], [assistant("a"), user("r"), assistant("b")], False),
    ),
    "messages": (
        "messages-label",
        {"messages": [*HISTORY, user("q"), assistant("a")], "kto_tag": False},
        ([*HISTORY, user("q")], [assistant("a")], False),
    ),
    "sharegpt": (
        "sharegpt-label",
        {"conversations": [said("human", "q"), said("gpt", "a")], "label": True},
        ([user("q")], [assistant("a")], True),
    ),
    "alpaca": (
        "alpaca-label",
        {"instruction": "q", "output": "a", "kto_tag": True},
        ([user("q")], [assistant("a")], True),
    ),
}


@pytest.mark.parametrize("name", LABELLED)
def test_a_labelled_completion_is_read_as_messages(name):
    kind, values, expected = LABELLED[name]
    row = read_label(values)
    assert (row.prompt, row.completion, row.label) == expected
    assert (row.location, row.format) == ("data.jsonl:7", kind)


WRONG_LABELS = {
    "no label": ({"prompt": "q", "completion": "a"}, "unknown format"),
    "a pair": ({"prompt": "q", "chosen": "a", "rejected": "b", "label": True}, "unknown format"),
    "a number": ({"prompt": "q", "completion": "a", "label": 1}, "label is 1; expected true"),
    "a word": ({"prompt": "q", "completion": "a", "label": "good"}, "label is 'good'; expected"),
    "two labels": (
        {"prompt": "q", "completion": "a", "label": True, "kto_tag": False},
        "label and kto_tag is True",
    ),
    "no conversation": ({"text": "q", "label": True}, "unknown format"),
    "a question at the end": (
        {"messages": [*HISTORY, user("q")], "label": True},
        "the last message, which is from user",
    ),
    "no prompt": ({"messages": [assistant("a")], "label": True}, "give a prompt"),
    "no completion": (
        {"prompt": [user("q"), assistant("a")], "completion": [], "label": True},
        "which is from nobody",
    ),
}


@pytest.mark.parametrize("name", WRONG_LABELS)
def test_an_invalid_labelled_row_is_refused_with_its_location(name):
    values, message = WRONG_LABELS[name]
    with pytest.raises(DataError, match=rf"^data\.jsonl:7.*{message}"):
        read_label(values)


def test_files_are_read_row_by_row(tmp_path):
    path = tmp_path / "pairs.json"
    path.write_text(json.dumps([values for _, values, _ in PAIRS.values()]), encoding="utf-8")
    pairs = list(read_preferences(path))
    assert [pair.format for pair in pairs] == [kind for kind, _, _ in PAIRS.values()]
    assert pairs[1].location == f"{path}[1]"
    path = tmp_path / "labelled.jsonl"
    lines = [json.dumps(values) for _, values, _ in LABELLED.values()]
    path.write_text("\n".join(lines), encoding="utf-8")
    rows = list(read_labelled(path))
    assert [row.label for row in rows] == [True, False, False, True, True]
    assert rows[1].location == f"{path}:2"


def trained(tokenizer, sample):
    ids = [label for label in sample.labels if label != IGNORE_INDEX]
    return tokenizer.decode(ids, skip_special=False)


def test_both_responses_of_a_pair_are_trained_after_one_prompt(tiny_tokenizer):
    prompt = [system("s"), *HISTORY, user("q")]
    pair = PreferencePair(prompt, [assistant("good")], [assistant("bad world")], None, "x")
    (sample,), account = prepare_preferences([pair], tiny_tokenizer, max_seq_len=1000)
    assert trained(tiny_tokenizer, sample.chosen) == "good<|im_end|>"
    assert trained(tiny_tokenizer, sample.rejected) == "bad world<|im_end|>"
    rendered = tiny_tokenizer.encode_chat(prompt, add_generation_prompt=True).token_ids
    for side, answer in ((sample.chosen, "good"), (sample.rejected, "bad world")):
        assert list(side.token_ids[: sample.num_prompt]) == rendered
        assert all(label == IGNORE_INDEX for label in side.labels[: sample.num_prompt - 1])
        whole = tiny_tokenizer.encode_chat([*prompt, assistant(answer)]).token_ids
        assert list(side.token_ids) == whole[:-1]
    assert account.trained_tokens == sample.chosen.num_trained + sample.rejected.num_trained
    assert account.tokens == len(sample.chosen.token_ids) + len(sample.rejected.token_ids)
    assert (account.rows, account.samples) == (1, 1)


def test_a_common_prefix_of_the_responses_is_trained_in_both(tiny_tokenizer):
    pair = pair_of("q", "world world a", "world world b")
    (sample,), _ = prepare_preferences([pair], tiny_tokenizer, max_seq_len=1000)
    prompt = tiny_tokenizer.encode_chat([user("q")], add_generation_prompt=True).token_ids
    assert sample.num_prompt == len(prompt)
    assert trained(tiny_tokenizer, sample.chosen) == "world world a<|im_end|>"


def test_assistant_turns_within_a_response_are_trained_but_user_turns_are_not(tiny_tokenizer):
    chosen = [assistant("a"), user("r"), assistant("c")]
    pair = PreferencePair([*HISTORY, user("q")], chosen, [assistant("b")], None, "x")
    (sample,), _ = prepare_preferences([pair], tiny_tokenizer, max_seq_len=1000)
    assert trained(tiny_tokenizer, sample.chosen) == "a<|im_end|>c<|im_end|>"


def test_pairs_of_identical_responses_are_dropped_and_counted(tiny_tokenizer):
    pairs = [pair_of("q", "a", "a"), pair_of("q", "a", "b")]
    samples, account = prepare_preferences(pairs, tiny_tokenizer, max_seq_len=100)
    assert len(samples) == 1
    assert (account.rows, account.samples, account.dropped_equal) == (2, 1, 1)
    assert account.summary().endswith("format preference")
    assert "1 dropped with identical responses" in account.summary()


def test_pairs_with_identically_rendered_responses_are_dropped(tiny_tokenizer):
    source = tiny_tokenizer.chat_template.source.replace(
        "message['content']", "message['content'] | trim"
    )
    tokenizer = Tokenizer(tiny_tokenizer.backend, tiny_tokenizer.special, chat_template=source)
    pairs = [pair_of("q", "a", " a\n"), pair_of("q", "a", "b")]
    _, account = prepare_preferences(pairs, tokenizer, max_seq_len=100)
    assert account.dropped_equal == 1


def test_too_long_pairs_are_truncated_or_dropped_and_counted(tiny_tokenizer):
    pairs = [pair_of("q", "a", "b"), pair_of("q", "a", "world " * 60)]
    samples, account = prepare_preferences(pairs, tiny_tokenizer, max_seq_len=50)
    assert (account.samples, account.cut) == (2, 1)
    assert len(samples[1].rejected.token_ids) == 49
    samples, account = prepare_preferences(pairs, tiny_tokenizer, max_seq_len=50, overlong="drop")
    assert (account.samples, account.dropped_overlong) == (1, 1)


def test_a_pair_is_dropped_if_truncation_leaves_a_response_empty(tiny_tokenizer):
    pairs = [pair_of("q", "a", "b"), pair_of("world " * 60, "a", "b")]
    _, account = prepare_preferences(pairs, tiny_tokenizer, max_seq_len=50)
    assert (account.samples, account.cut, account.dropped_untrained) == (1, 1, 1)
    assert account.dropped_equal == 0


def test_a_pair_is_dropped_if_truncation_makes_the_responses_identical(tiny_tokenizer):
    pairs = [pair_of("q", "a", "b"), pair_of("q", "world " * 60, "world " * 60 + "!")]
    _, account = prepare_preferences(pairs, tiny_tokenizer, max_seq_len=50)
    assert (account.samples, account.dropped_equal) == (1, 1)


def test_only_the_labelled_response_is_trained(tiny_tokenizer):
    rows = [
        LabelledCompletion([*HISTORY, user("q")], [assistant("good")], True, None, "x"),
        label_of("q", "bad", False),
    ]
    samples, account = prepare_labelled(rows, tiny_tokenizer, max_seq_len=100)
    assert [sample.label for sample in samples] == [True, False]
    texts = [trained(tiny_tokenizer, sample.sample) for sample in samples]
    assert texts == ["good<|im_end|>", "bad<|im_end|>"]
    whole = tiny_tokenizer.encode_chat([*rows[0].prompt, *rows[0].completion]).token_ids
    assert list(samples[0].sample.token_ids) == whole[:-1]
    assert account.formats == {"prompt-completion-label": 2}


def test_no_remaining_samples_are_refused_with_a_summary(tiny_tokenizer):
    with pytest.raises(
        DataError, match=r"no trainable rows remain .*0 of 1 rows.*1 dropped with identical"
    ):
        prepare_preferences([pair_of("q", "a", "a")], tiny_tokenizer, max_seq_len=100)
    with pytest.raises(DataError, match=r"no trainable rows remain .*1 dropped as too long"):
        prepare_labelled(
            [label_of("q", "a " * 99, True)], tiny_tokenizer, max_seq_len=50, overlong="drop"
        )


def test_a_row_rejected_by_the_template_is_named(tiny_tokenizer):
    refusing = Tokenizer(
        tiny_tokenizer.backend,
        tiny_tokenizer.special,
        chat_template="{% if messages | length %}{{ raise_exception('no such roles') }}{% endif %}",
    )
    message = r"^data\.jsonl:7: the chat template rejects .*no such roles"
    with pytest.raises(DataError, match=message):
        prepare_preferences([pair_of("q", "a", "b")], refusing, max_seq_len=100)
    with pytest.raises(DataError, match=message):
        prepare_labelled([label_of("q", "a", True)], refusing, max_seq_len=100)


def test_pairs_whose_tools_the_template_omits_are_counted(tiny_tokenizer):
    pair = PreferencePair([user("q")], [assistant("a")], [assistant("b")], TOOLS, "x")
    _, account = prepare_preferences([pair], tiny_tokenizer, max_seq_len=100)
    assert account.unwritten_tools == 1
