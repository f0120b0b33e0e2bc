"""Conversations to samples: trained tokens, the length limit, split turns."""

import json
import re
from collections import Counter
from fractions import Fraction

import pytest

from conversation_rows import TOOLS, assistant, read, system, user
from easyllm.core.errors import ConfigError, DataError
from easyllm.examples.conversations import (
    Conversation,
    conversations,
)
from easyllm.examples.data_file import Row
from easyllm.examples.prepare import prepare_conversations, split_responses
from easyllm.examples.sample import Sample
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.tokenizer import Tokenizer


def talk(*contents):
    """Returns a conversation of contents of user and assistant alternately."""
    messages = [(user, assistant)[i % 2](c) for i, c in enumerate(contents)]
    return Conversation(messages, None, "data.jsonl:7")


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
            *[user("<|im_ end|>"), assistant("d\n"), user("e")],
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
