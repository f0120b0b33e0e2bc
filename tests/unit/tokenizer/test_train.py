"""Tokenizer training: the library's merges, reproducibility, round trips, special tokens."""

import json
import os
import re
import subprocess
import sys
import unicodedata

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError
from tokenizers import Tokenizer as Backend
from tokenizers import models, normalizers, pre_tokenizers, trainers

import tokenizer_training
from easyllm.core.config import validate
from easyllm.core.errors import ConfigError, DataError
from easyllm.tokenizer import Tokenizer
from easyllm.tokenizer.token_bytes import byte_values
from easyllm.tokenizer.train import train_tokenizer, vocab_size_warning
from easyllm.tokenizer.train_config import (
    PATTERNS,
    BPEConfig,
    CharactersConfig,
    NormalizerConfig,
    TokenizerConfig,
    UnigramConfig,
    WordLevelConfig,
    WordPieceConfig,
)
from tokenizer_training import CORPUS, KINDS

HELD_OUT = [
    "Slower trains were the newest in 2031, weren't they?  Two spaces.",
    "明天我们训练分词器，后天去公园。编号是12345。",
    "naïve café 😀 def f(x):\n\treturn x\n",
    "",
]


SPECIAL = ("<s>", "</s>", "<pad>", "<mask>", "<sep>", "<cls>", "<unk>", "<extra>")


@pytest.fixture(scope="module")
def trained():
    """A tokenizer of each kind, with ChatML."""
    return {
        name: train_tokenizer(
            CORPUS, TokenizerConfig(model=kind, vocab_size=700, chat_template="chatml")
        )
        for name, kind in KINDS.items()
    }


# ---- equality with the library's own trainer


def merges_of(backend):
    return json.loads(backend.to_str())["model"]["merges"]


def library_bpe(
    steps, *, normalizer=None, vocab_size=600, special=("<|endoftext|>",), min_frequency=2
):
    """Trains BPE directly with the library."""
    backend = Backend(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    if normalizer is not None:
        backend.normalizer = normalizer
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(special),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(CORPUS, trainer)
    return backend


def split(pattern):
    from tokenizers import Regex

    return [
        pre_tokenizers.Split(Regex(pattern), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ]


@pytest.mark.parametrize(
    ("model", "steps"),
    [
        (BPEConfig(), [pre_tokenizers.ByteLevel(add_prefix_space=False)]),
        (BPEConfig(add_prefix_space=True), [pre_tokenizers.ByteLevel()]),
        (BPEConfig(pattern="cl100k"), split(PATTERNS["cl100k"])),
        (BPEConfig(pattern="qwen2"), split(PATTERNS["qwen2"])),
        (BPEConfig(own_pattern=r"\p{L}+|\P{L}+"), split(r"\p{L}+|\P{L}+")),
        (
            BPEConfig(pattern=None),
            [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)],
        ),
        (
            BPEConfig(digits="individual"),
            [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)],
        ),
    ],
    ids=lambda value: str(value) if isinstance(value, BPEConfig) else "",
)
def test_bpe_merges_and_ids_equal_the_library(model, steps):
    ours = train_tokenizer(CORPUS, TokenizerConfig(model=model, vocab_size=600))
    theirs = library_bpe(steps)
    assert merges_of(ours.backend) == merges_of(theirs)
    assert ours.backend.get_vocab() == theirs.get_vocab()
    assert [ours.encode(t) for t in HELD_OUT] == [theirs.encode(t).ids for t in HELD_OUT]


@pytest.mark.parametrize("prefix_space", [True, False])
def test_bpe_with_every_preprocessing_step_has_the_merges_of_the_library(prefix_space):
    """NFD without accents; splits at whitespace, punctuation, digits; bytes; 8 special tokens.

    A vocabulary of 54,000 is requested.
    """
    config = TokenizerConfig(
        model=BPEConfig(
            whitespace=True,
            punctuation=True,
            digits="individual",
            add_prefix_space=prefix_space,
            min_frequency=0,
        ),
        normalizer=NormalizerConfig(form="nfd", strip_accents=True),
        vocab_size=54_000,
        special_tokens=SPECIAL,
        eos=None,
    )
    ours = train_tokenizer(iter(CORPUS), config)
    theirs = library_bpe(
        [
            pre_tokenizers.Whitespace(),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=prefix_space),
        ],
        normalizer=normalizers.Sequence([normalizers.NFD(), normalizers.StripAccents()]),
        vocab_size=54_000,
        special=SPECIAL,
        min_frequency=0,
    )
    assert merges_of(ours.backend) == merges_of(theirs)
    assert ours.backend.get_vocab() == theirs.get_vocab()
    assert [ours.encode(t) for t in HELD_OUT] == [theirs.encode(t).ids for t in HELD_OUT]
    assert [ours.id_of(token) for token in SPECIAL] == list(range(8))


@pytest.mark.parametrize("pattern", [*PATTERNS, "gpt2"])
def test_patterns_split_like_published_tokenizers(pattern):
    """Words include a leading space, symbols and digits are separate, newlines end a run."""
    words = {
        "gpt2": ["I", "'ll", " pay", " 12345", "€", " now", "!", "\n\n ", " ok"],
        "cl100k": ["I", "'ll", " pay", " ", "123", "45", "€", " now", "!\n\n", " ", " ok"],
        "qwen2": [
            "I",
            "'ll",
            " pay",
            " ",
            "1",
            "2",
            "3",
            "4",
            "5",
            "€",
            " now",
            "!\n\n",
            " ",
            " ok",
        ],
    }
    tokenizer = train_tokenizer(
        ["x"], TokenizerConfig(model=BPEConfig(pattern=pattern), vocab_size=300)
    )
    cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str("I'll pay 12345€ now!\n\n  ok")
    values = byte_values()
    assert [bytes(values[c] for c in word).decode() for word, _ in cut] == words[pattern]


# ---- reproducibility

AGAIN = """
import hashlib, json, sys
sys.path.insert(0, {support!r})
from tokenizer_training import CORPUS, KINDS
from easyllm.tokenizer.train import train_tokenizer
from easyllm.tokenizer.train_config import TokenizerConfig
tokenizers = {{n: train_tokenizer(CORPUS, TokenizerConfig(model=k, vocab_size=700)) for n, k in \
KINDS.items()}}
print(json.dumps({{n: hashlib.sha256(t.backend.to_str().encode()).hexdigest() for n, t in \
tokenizers.items()}}))
"""


def test_the_same_corpus_gives_the_same_bytes_in_another_process_and_thread_count():
    support = os.path.dirname(tokenizer_training.__file__)
    seen = []
    for seed, threads in (("1", "1"), ("2", "2"), ("3", "4")):
        environment = os.environ | {"PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads}
        done = subprocess.run(
            [sys.executable, "-c", AGAIN.format(support=support)],
            capture_output=True,
            text=True,
            env=environment,
        )
        assert done.returncode == 0, done.stderr
        seen.append(json.loads(done.stdout))
    assert seen[0] == seen[1] == seen[2]
    assert len(set(seen[0].values())) == len(KINDS)


# ---- round trips


@settings(deadline=None, max_examples=150)
@given(text=st.text(st.characters(exclude_categories=["Cs"]), max_size=40))
def test_byte_level_bpe_round_trips_any_text(trained, text):
    tokenizer = trained["bpe"]
    assert tokenizer.decode(tokenizer.encode(text), skip_special=False) == text


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
def test_every_unicode_plane_round_trips_without_unknown_tokens(trained, kind):
    planes = {
        plane: [
            chr(code)
            for code in range(plane << 16, (plane << 16) + 0x10000, 97)
            if unicodedata.category(chr(code)) not in ("Cn", "Cs")
        ]
        for plane in range(17)
    }
    assert {plane for plane, found in planes.items() if found} == {0, 1, 2, 3, 14, 15, 16}
    tokenizer = trained[kind]
    for characters in planes.values():
        text = "".join(characters)
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text
        assert tokenizer.id_of(tokenizer.special.unk) not in ids


@settings(deadline=None, max_examples=100)
@given(text=st.text("ab <0x41>FZ▂世界😀\n", max_size=30))
def test_unigram_with_byte_fallback_round_trips_names_of_byte_tokens(trained, text):
    tokenizer = trained["unigram"]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode("<0x41>")) == "<0x41>"


def test_unigram_with_a_prefix_space_removes_it_on_decoding():
    config = TokenizerConfig(model=UnigramConfig(add_prefix_space=True), vocab_size=500)
    tokenizer = train_tokenizer(CORPUS, config)
    assert tokenizer.backend.encode("lower").tokens[0].startswith("▁")
    assert tokenizer.decode(tokenizer.encode("lower the")) == "lower the"


def test_character_tokens_are_single_characters_and_unseen_ones_are_unknown(trained):
    tokenizer = trained["characters"]
    text = "The lowest 分词器\n  naïve"
    assert len(tokenizer.encode(text)) == len(text)
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.encode("λ")[0] != tokenizer.encode("☃")[0] == tokenizer.id_of("<unk>")


def test_wordpiece_marks_word_continuations_and_separates_chinese_characters(trained):
    tokens = trained["wordpiece"].backend.encode("lowered 天气 ☃").tokens
    assert tokens[-3:] == ["天", "气", "[UNK]"]
    assert not tokens[0].startswith("##")
    assert all(token.startswith("##") for token in tokens[1:-3])
    assert "".join(token.removeprefix("##") for token in tokens[:-3]) == "lowered"


def test_words_are_complete_or_unknown(trained):
    tokens = trained["wordlevel"].backend.encode("the newest, flurb").tokens
    assert tokens == ["the", "newest", ",", "[UNK]"]


def test_normalizers_apply_in_order():
    config = TokenizerConfig(
        normalizer=NormalizerConfig(form="nfkd", strip_accents=True, lowercase=True)
    )
    tokenizer = train_tokenizer(["x"], config)
    assert tokenizer.decode(tokenizer.encode("ＣＡＦÉ ﬁ")) == "cafe fi"


@pytest.mark.parametrize(("digits", "count"), [("individual", 7), ("groups", 3)])
def test_numbers_are_split_as_configured(digits, count):
    numbers = ["1234567"] * 50
    for model in (BPEConfig(digits=digits), UnigramConfig(digits=digits)):
        tokenizer = train_tokenizer(numbers, TokenizerConfig(model=model, vocab_size=400))
        cut = tokenizer.backend.pre_tokenizer.pre_tokenize_str("1234567")
        assert len(cut) == count
        assert tokenizer.decode(tokenizer.encode("1234567")) == "1234567"


# ---- special tokens, chat, files


def test_special_tokens_take_the_first_ids_in_order_and_roles_follow(trained):
    config = TokenizerConfig(
        model=WordLevelConfig(), special_tokens=("<a>", "<pad>"), bos="<s>", pad="<pad>"
    )
    tokenizer = train_tokenizer(CORPUS, config)
    ids = [tokenizer.id_of(token) for token in ("<a>", "<pad>", "<s>", "<|endoftext|>", "[UNK]")]
    assert ids == [0, 1, 2, 3, 4]
    assert tokenizer.special_ids == {0, 1, 2, 3, 4}
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.pad_id) == (2, 3, 1)


@pytest.mark.parametrize("kind", KINDS)
def test_bos_and_eos_are_added_as_configured(kind):
    config = TokenizerConfig(
        model=KINDS[kind], vocab_size=700, bos="<s>", eos="</s>", add_bos=True, add_eos=True
    )
    tokenizer = train_tokenizer(CORPUS, config)
    plain = tokenizer.encode("the lower", special_tokens=False)
    assert tokenizer.encode("the lower") == [tokenizer.bos_id, *plain, tokenizer.eos_id]


def test_chatml_renders_turns_and_trains_the_token_that_ends_them(trained):
    messages = [{"role": "user", "content": "the"}, {"role": "assistant", "content": "lower"}]
    chat = trained["bpe"].encode_chat(messages, with_mask=True)
    assert chat.text == "<|im_start|>user\nthe<|im_end|>\n<|im_start|>assistant\nlower<|im_end|>\n"
    kept = [i for i, keep in zip(chat.token_ids, chat.mask, strict=True) if keep]
    assert trained["bpe"].decode(kept, skip_special=False) == "lower<|im_end|>"
    assert trained["bpe"].id_of("<|im_end|>") in trained["bpe"].special_ids


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_ids_from_the_saved_files(trained, tmp_path, kind):
    from transformers import AutoTokenizer

    tokenizer = trained[kind]
    tokenizer.save(tmp_path)
    reference = AutoTokenizer.from_pretrained(tmp_path)
    texts = [*CORPUS[:7], *HELD_OUT, "x<|im_end|>y", "<unk> [UNK]"]
    assert [reference(t)["input_ids"] for t in texts] == [tokenizer.encode(t) for t in texts]
    assert reference.eos_token == tokenizer.special.eos
    assert Tokenizer.from_folder(tmp_path).fingerprint == tokenizer.fingerprint


@pytest.mark.parametrize("kind", KINDS)
def test_a_vocabulary_is_no_larger_than_requested(trained, kind):
    assert trained[kind].vocab_size <= 700


# ---- errors


@pytest.mark.parametrize(
    ("model", "size", "message"),
    [
        (
            BPEConfig(),
            256,
            r"vocab_size=256 is too small for 256 bytes and 1 special .* 257 or more",
        ),
        (UnigramConfig(), 100, r"vocab_size=100 is too small for 257 byte pieces"),
        (
            UnigramConfig(byte_fallback=False),
            20,
            r"vocab_size=20 is too small for \d+ byte pieces and different characters",
        ),
        (WordPieceConfig(), 20, r"vocab_size=20 is too small for \d+ letters"),
        (WordLevelConfig(), 1, r"vocab_size=1 is too small for 1 word and 2 special"),
        (CharactersConfig(), 9, r"is too small for \d+ different .* or raise model\.min_frequency"),
    ],
)
def test_a_vocabulary_smaller_than_the_alphabet_is_refused_with_the_numbers(model, size, message):
    with pytest.raises(ConfigError, match=message) as caught:
        train_tokenizer(CORPUS, TokenizerConfig(model=model, vocab_size=size))
    enough = int(re.search(r"set it to (\d+) or more", str(caught.value))[1])
    while True:  # the size in the error must be enough, or that in the next one
        try:
            train_tokenizer(CORPUS, TokenizerConfig(model=model, vocab_size=enough))
            break
        except ConfigError as error:
            assert isinstance(model, UnigramConfig)
            enough = int(re.search(r"set it to (\d+) or more", str(error))[1])


def test_rare_characters_need_no_vocabulary():
    model = CharactersConfig(min_frequency=2)
    tokenizer = train_tokenizer(["aab", "aac\u0301"], TokenizerConfig(model=model, vocab_size=3))
    assert tokenizer.vocab_size == 3
    assert tokenizer.decode(tokenizer.encode("aa")) == "aa"


@pytest.mark.parametrize("kind", KINDS)
def test_no_vocabulary_exceeds_the_requested_size(kind):
    """The library itself exceeds a size smaller than its alphabet."""
    text = "the quick brown fox, 你好世界 " * 3
    made, refused = [], {}
    for size in (1, 10, 100, 256, 257, 258, 300, 700):
        config = TokenizerConfig(model=KINDS[kind], vocab_size=size)
        try:
            tokenizer = train_tokenizer([text], config)
        except ConfigError as error:
            refused[size] = str(error)
            continue
        made.append(size)
        assert tokenizer.vocab_size <= size
        told = vocab_size_warning(tokenizer, config)
        assert (told is None) is (tokenizer.vocab_size == size)
        if told is not None:
            assert f"yields {tokenizer.vocab_size} ids, fewer than vocab_size={size}" in told
    assert 700 in made
    assert all(f"vocab_size={size} " in reason for size, reason in refused.items())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("texts", [[], ["", ""]])
def test_training_without_text_is_refused(kind, texts):
    with pytest.raises(DataError, match="no text to train a tokenizer on"):
        train_tokenizer(iter(texts), TokenizerConfig(model=KINDS[kind]))


def test_lone_surrogates_in_a_corpus_are_harmless():
    assert train_tokenizer(["a\ud83db"], TokenizerConfig()).encode("a?b")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"model": {"kind": "bpe", "own_pattern": "("}},
            "own_pattern is not a valid regular expression",
        ),
        ({"model": {"kind": "bpe", "own_pattern": "a", "pattern": "qwen2"}}, "both set"),
        ({"model": {"kind": "bpe", "patern": "gpt2"}}, "did you mean 'pattern'"),
        ({"vocab_size": 999_999_999}, "vocab_size.*4194304"),
        ({"model": {"kind": "bpe", "min_frequency": 10**30}}, "min_frequency.*9223372036854775807"),
        ({"model": {"kind": "unigram", "max_piece_length": 10**30}}, "max_piece_length"),
        ({"model": {"kind": "wordpiece", "max_word_length": 10**30}}, "max_word_length"),
        ({"normalizer": {"strip_accents": True}}, "set form: nfd"),
        ({"add_bos": True}, "add_bos needs a bos token"),
        ({"chat_template": "chat-ml"}, "neither chatml nor Jinja"),
        ({"special_tokens": ["<a>", "<a>"]}, "is empty or duplicated"),
    ],
)
def test_invalid_options_are_refused(values, message):
    with pytest.raises(ConfigError, match=message):
        validate(TokenizerConfig, values, source="tokenizer.yaml")


def test_a_broken_configuration_is_a_validation_error_in_python():
    with pytest.raises(ValidationError, match="both set"):
        BPEConfig(pattern="gpt2", own_pattern="a")
