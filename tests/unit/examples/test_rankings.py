"""Rankings of responses: layouts, ties, identical responses, and what is refused."""

import pytest

from easyllm.core.errors import DataError
from easyllm.corpus.files.row import Row
from easyllm.examples.rankings import prepare_rankings, rankings

SPOKEN = {"role": "user", "content": "q"}


def assistant(text):
    return {"role": "assistant", "content": text}


def read(values):
    (found,) = rankings([Row(values, "data.jsonl:7")])
    return found


def prepare(tokenizer, *rows, **options):
    given = rankings(Row(values, f"data.jsonl:{i}") for i, values in enumerate(rows))
    return prepare_rankings(given, tokenizer, **{"max_seq_len": 64} | options)


def test_the_order_of_responses_is_their_rank():
    found = read({"prompt": "q", "responses": ["a", assistant("b"), [assistant("c")]]})
    assert found.prompt == [SPOKEN]
    assert found.responses == [[assistant(x)] for x in "abc"]
    assert (found.ranks, found.format, found.margin) == ((0, 1, 2), "ranking", None)


def test_scores_give_ranks_with_ties():
    found = read({"prompt": "q", "responses": ["a", "b", "c"], "scores": [2, 4.5, 2]})
    assert found.ranks == (1, 0, 1)


def test_a_pair_is_a_ranking_of_two_with_its_margin():
    found = read({"prompt": "q", "chosen": "a", "rejected": "b", "margin": 0.5})
    assert (found.ranks, found.margin, found.format) == ((0, 1), 0.5, "preference")


def test_prompts_are_messages_or_text_with_a_system_message():
    messages = [{"role": "system", "content": "s"}, SPOKEN]
    as_list = read({"prompt": messages, "responses": ["a", "b"]})
    as_text = read({"system": "s", "prompt": "q", "responses": ["a", "b"]})
    assert as_list.prompt == as_text.prompt == messages


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"prompt": "q", "responses": ["a"]}, "responses has 1 entries, expected at least 2"),
        ({"responses": ["a", "b"]}, "has responses but no prompt"),
        ({"prompt": "", "responses": ["a", "b"]}, "has responses but no prompt"),
        ({"prompt": "q", "responses": ["a", 3]}, r"responses\[1\] is not a response"),
        ({"prompt": "q", "responses": ["a", SPOKEN]}, r"responses\[1\] is not a response"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1]}, "a list of 2 finite numbers"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, "x"]}, "2 finite numbers"),
        ({"prompt": "q", "responses": ["a", "b"], "scores": [1, True]}, "2 finite numbers"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": -1}, "margin is -1"),
        ({"prompt": "q", "chosen": "a", "rejected": "b", "margin": "big"}, "margin is 'big'"),
        ({"prompt": "q", "completion": "a"}, "unknown format"),
    ],
)
def test_a_malformed_row_is_refused_with_its_location(values, message):
    with pytest.raises(DataError, match=rf"^data\.jsonl:7.*{message}"):
        read(values)


def test_the_prompt_is_tokenized_once_and_shared(tiny_tokenizer):
    row = {"prompt": "How many?", "responses": ["One.", "One dog.", "Two."], "scores": [1, 3, 2]}
    (found,), account = prepare(tiny_tokenizer, row)
    assert found.ranks == (0, 1, 2)  # best first
    texts = [tiny_tokenizer.decode(list(e.token_ids)[found.num_prompt :]) for e in found.sequences]
    assert [text.splitlines()[0] for text in texts] == ["One dog.", "Two.", "One."]
    starts = {tuple(e.token_ids[: found.num_prompt]) for e in found.sequences}
    rendered = tiny_tokenizer.encode_chat(
        [{"role": "user", "content": "How many?"}], add_generation_prompt=True
    )
    assert starts == {tuple(rendered.token_ids)}
    assert (account.rows, account.samples) == (1, 1)
    assert account.tokens == sum(len(e.token_ids) - 1 for e in found.sequences)


def test_identical_responses_are_dropped_and_counted(tiny_tokenizer):
    rows = [
        {"prompt": "q", "responses": ["same", "same"]},
        {"prompt": "q", "responses": ["a", "b", "a"]},
        {"prompt": "q", "responses": ["a", "b"], "scores": [1, 1]},
    ]
    (found,), account = prepare(tiny_tokenizer, *rows)
    assert found.ranks == (0, 1)
    assert len(found.sequences) == 2
    assert (account.rows, account.samples, account.dropped_equal) == (3, 1, 2)
    assert account.tokens == sum(len(e.token_ids) - 1 for e in found.sequences)
    assert account.trained_tokens == sum(sum(e.mask) for e in found.sequences)
    with pytest.raises(DataError, match="identical, or have equal scores, in every row"):
        prepare(tiny_tokenizer, rows[0])
