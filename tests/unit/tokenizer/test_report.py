"""The tokenizer report: figures compared with manual counts on small tokenizers."""

import json

import pytest

from easyllm.tokenizer.report import HAN, count_words, gb2312, report
from easyllm.tokenizer.train import train_tokenizer
from easyllm.tokenizer.train_config import (
    BPEConfig,
    CharactersConfig,
    TokenizerConfig,
    UnigramConfig,
    WordLevelConfig,
)

ENGLISH = ["low lower lowest", "it isn't - new!"]
CHINESE = ["你好，世界", "世界你好 ok"]


@pytest.fixture(scope="module")
def letters():
    """A tokenizer with one token per character of the texts."""
    return train_tokenizer(ENGLISH + CHINESE, TokenizerConfig(model=CharactersConfig(), eos=None))


@pytest.fixture(scope="module")
def bytes_alone():
    """A tokenizer with one token per byte."""
    config = TokenizerConfig(model=BPEConfig(min_frequency=1000), vocab_size=300)
    return train_tokenizer(["x"], config)


def figures(tokenizer, texts):
    return report({"t": tokenizer}, {"d": texts}).texts[0]


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("", 0),
        ("low lower  lowest\n", 3),
        ("it isn't - new!", 3),
        ("你好，世界", 4),
        ("我用Python3写代码 ok", 7),
        ("3.14 π", 2),
        ("👩\u200d💻 — ", 0),
        ("𠀀㐀豈", 3),
        ("한국어 단어", 2),
    ],
)
def test_a_word_is_a_run_with_a_letter_or_a_han_character(text, count):
    assert count_words(text) == count


def test_lengths_are_totals_over_all_texts(letters, bytes_alone):
    english = figures(letters, ENGLISH)
    assert (english.num_texts, english.num_words) == (2, 6)
    assert english.num_bytes == english.num_characters == english.num_tokens == 31
    assert english.fertility == 31 / 6
    chinese = figures(bytes_alone, CHINESE)
    assert (chinese.num_bytes, chinese.num_characters, chinese.num_words) == (15 + 15, 5 + 7, 9)
    assert chinese.bytes_per_token == 1
    assert chinese.characters_per_token == 12 / 30
    assert chinese.fertility == 30 / 9


def test_fertility_of_chinese_is_tokens_per_character(letters):
    assert figures(letters, ["你好世界"]).fertility == 1


def test_han_coverage_is_the_share_of_different_characters_that_are_one_token(letters, bytes_alone):
    assert figures(letters, ["你你好鼎"]).han_coverage == 2 / 3
    assert figures(bytes_alone, ["你你好鼎"]).han_coverage == 0
    assert figures(letters, ["low"]).han_coverage is None


def test_a_prefix_space_does_not_count_as_a_second_token():
    model = UnigramConfig(add_prefix_space=True)
    tokenizer = train_tokenizer(CHINESE, TokenizerConfig(model=model, vocab_size=400))
    assert len(tokenizer.encode("世")) == 2
    assert figures(tokenizer, CHINESE).han_coverage == 1


def test_unknown_text_and_round_trip_failures_are_counted_and_the_first_is_shown(letters):
    result = figures(letters, ["low", "lox Ωlow", "łow"])
    assert (result.num_unknown, result.num_failures) == (3, 2)
    assert (result.failure.at, result.failure.text) == (2, "x Ωlow")
    assert result.failure.decoded.startswith("<unk>")


def test_text_missing_after_decoding_is_a_failure_at_the_end():
    tokenizer = train_tokenizer(["a b"], TokenizerConfig(model=WordLevelConfig()))
    result = figures(tokenizer, ["a  b "])
    assert (result.num_failures, result.failure.at) == (1, 2)


def test_names_of_special_tokens_in_a_text_are_not_failures(bytes_alone):
    assert figures(bytes_alone, ["a<|endoftext|>b"]).num_failures == 0


def test_unused_ids_occur_in_none_of_the_texts(letters):
    everything = report({"t": letters}, {"en": ENGLISH, "zh": CHINESE})
    unknown = 1
    assert everything.vocabularies[0].num_unused == unknown
    assert everything.vocabularies[0].vocab_size == letters.vocab_size
    only_chinese = set("".join(CHINESE)) - set("".join(ENGLISH))
    english = report({"t": letters}, {"en": ENGLISH}).vocabularies[0]
    assert english.num_unused == unknown + len(only_chinese)


def test_gb2312_contains_its_6763_characters_in_order_of_level():
    characters = gb2312()
    assert len(characters) == len(set(characters)) == 6763
    assert all(HAN.fullmatch(character) for character in characters)
    assert characters[0] == "啊"
    assert characters[3754] == "座"
    assert "的" in characters[:3755]
    assert "鼎" in characters[:3755]
    assert "亍" in characters[3755:]


def test_coverage_of_gb2312_counts_single_tokens(letters, bytes_alone):
    vocabularies = report({"letters": letters, "bytes": bytes_alone}, {}).vocabularies
    assert [v.gb2312_coverage for v in vocabularies] == [4 / 6763, 0]


def test_several_tokenizers_are_compared_while_texts_are_read_once(letters, bytes_alone):
    streams = {"en": iter(ENGLISH * 300), "zh": (text for text in CHINESE)}
    result = report({"letters": letters, "bytes": bytes_alone}, streams)
    names = [(row.domain, row.tokenizer, row.num_texts) for row in result.texts]
    assert names == [
        ("en", "letters", 600),
        ("en", "bytes", 600),
        ("zh", "letters", 2),
        ("zh", "bytes", 2),
    ]


def test_a_report_can_be_encoded_as_json(letters):
    result = report({"t": letters}, {"zh": [*CHINESE, "Ω"]}).as_dict()
    row = json.loads(json.dumps(result))["texts"][0]
    assert row["failure"] == {"at": 0, "text": "Ω", "decoded": "<unk>"}
    assert row["han_coverage"] == 1
    assert row["bytes_per_token"] == row["num_bytes"] / row["num_tokens"]


def test_a_report_on_no_text_does_not_divide_by_zero(letters):
    empty = figures(letters, [])
    assert (empty.fertility, empty.bytes_per_token, empty.num_texts) == (0, 0, 0)
