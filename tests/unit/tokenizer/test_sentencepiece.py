"""sentencepiece's files: the same ids, unsupported options, damaged files."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from easyllm.core.errors import CheckpointError, SourceError
from easyllm.tokenizer import SpecialTokens, Tokenizer
from easyllm.tokenizer.sentencepiece import build_backend, read_model, special_tokens
from tokenizer_training import SP_TEXTS, sentencepiece_file


def build_tokenizer(model):
    return Tokenizer(build_backend(model), SpecialTokens(**special_tokens(model)))


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"normalization_rule_name": "identity"},
        {"byte_fallback": False, "vocab_size": 160},
        {"add_dummy_prefix": False},
        {"normalization_rule_name": "identity", "remove_extra_whitespaces": False},
        {"split_by_whitespace": False},
        {"pad_id": 0, "unk_id": 1, "bos_id": 2, "eos_id": 3, "control_symbols": "<sep>"},
    ],
    ids=str,
)
def test_an_imported_model_gives_the_same_ids_as_sentencepiece(tmp_path, kind, options):
    theirs, data = sentencepiece_file(kind, **options)
    (tmp_path / "a.model").write_bytes(data)
    ours = Tokenizer.from_sentencepiece(tmp_path / "a.model")
    assert [ours.encode(t) for t in SP_TEXTS] == [theirs.encode(t) for t in SP_TEXTS]
    assert ours.vocab_size == theirs.get_piece_size()
    roles = (ours.bos_id, ours.eos_id, ours.pad_id, ours.id_of(ours.special.unk))
    expected = (theirs.bos_id(), theirs.eos_id(), theirs.pad_id(), theirs.unk_id())
    assert [-1 if i is None else i for i in roles] == list(expected)
    if options.get("byte_fallback", True):
        plain = [text for text in SP_TEXTS if "▁" not in text]
        assert [ours.decode(ours.encode(t)) for t in plain] == [
            theirs.decode(theirs.encode(t)) for t in plain
        ]


@pytest.fixture(scope="module")
def sentencepieces():
    """Both kinds: sentencepiece's processor, and the tokenizer imported from the same file."""
    files = [sentencepiece_file(kind, split_by_whitespace=False) for kind in ("unigram", "bpe")]
    return [(theirs, build_tokenizer(read_model(data))) for theirs, data in files]


@settings(deadline=None, max_examples=200)
@given(text=st.text(st.sampled_from("the lowr我们训练公园😀é①  ▁\n,."), max_size=40))
def test_any_mixture_of_scripts_has_the_same_ids_as_sentencepiece(sentencepieces, text):
    for theirs, ours in sentencepieces:
        assert ours.encode(text) == theirs.encode(text)


@pytest.mark.parametrize("kind", ["unigram", "bpe"])
def test_an_imported_model_can_be_saved_and_transformers_agrees(tmp_path, kind):
    from transformers import AutoTokenizer

    (tmp_path / "a.model").write_bytes(sentencepiece_file(kind)[1])
    ours = Tokenizer.from_sentencepiece(tmp_path / "a.model", add_bos=True, add_eos=True)
    ours.save(tmp_path / "out")
    reference = AutoTokenizer.from_pretrained(tmp_path / "out")
    expected = [ours.encode(t) for t in [*SP_TEXTS, "a</s>b<unk>"]]
    assert [reference(t)["input_ids"] for t in [*SP_TEXTS, "a</s>b<unk>"]] == expected
    assert all(ids[0] == ours.bos_id and ids[-1] == ours.eos_id for ids in expected)


@pytest.fixture(scope="module")
def with_symbols():
    """Like `sentencepieces`, with user-defined symbols (runs of spaces tie in unigram models)."""
    options = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}
    symbols = {"unigram": "<sep>,low,er s", "bpe": "<sep>,low,er s,▁▁"}
    files = [sentencepiece_file(k, user_defined_symbols=s, **options) for k, s in symbols.items()]
    return [(theirs, build_tokenizer(read_model(data))) for theirs, data in files]


@settings(deadline=None, max_examples=200)
@given(
    parts=st.lists(st.sampled_from(["<sep>", "low", " ", "  ", "er s", "est", "我们", "the", "<"]))
)
def test_user_defined_symbols_are_not_split(with_symbols, parts):
    for theirs, ours in with_symbols:
        assert ours.encode("".join(parts)) == theirs.encode("".join(parts))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"treat_whitespace_as_suffix": True}, "attaches spaces to the preceding word"),
        ({"kind": "char"}, "it is a character model, but only unigram and BPE"),
        ({"kind": "word", "byte_fallback": False}, "it is a word model"),
    ],
)
def test_unsupported_options_of_a_model_are_named(tmp_path, options, message):
    options = {"kind": "unigram"} | options
    (tmp_path / "a.model").write_bytes(sentencepiece_file(**options)[1])
    with pytest.raises(CheckpointError, match=rf"a\.model: .*{message}"):
        Tokenizer.from_sentencepiece(tmp_path / "a.model")


def test_a_model_without_the_token_to_add_is_refused(tmp_path):
    (tmp_path / "a.model").write_bytes(sentencepiece_file("bpe", bos_id=-1)[1])
    with pytest.raises(CheckpointError, match="has no bos token to add"):
        Tokenizer.from_sentencepiece(tmp_path / "a.model", add_bos=True)


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(SourceError, match=r"no\.model' does not exist"):
        Tokenizer.from_sentencepiece(tmp_path / "no.model")


@pytest.fixture(scope="module")
def damaged():
    return [
        sentencepiece_file("unigram")[1],
        sentencepiece_file("bpe", normalization_rule_name="identity")[1],
    ]


@settings(deadline=None, max_examples=300)
@given(
    which=st.integers(0, 1),
    changes=st.lists(st.tuples(st.integers(0, 2**20), st.integers(0, 255)), max_size=20),
    end=st.integers(0, 2**19),
)
def test_a_damaged_file_is_refused_or_works(damaged, which, changes, end):
    data = bytearray(damaged[which])
    for place, value in changes:
        data[place % len(data)] = value
    if end < len(data):
        del data[end:]
    try:
        tokenizer = build_tokenizer(read_model(bytes(data)))
    except CheckpointError:
        return
    for text in SP_TEXTS:
        tokenizer.decode(tokenizer.encode(text))


@settings(deadline=None, max_examples=100)
@given(data=st.data())
def test_damaged_normalisation_rules_are_refused_or_work(damaged, data):
    """The rules are most of the file, and the library parses them without bounds checks."""
    from dataclasses import replace

    from easyllm.tokenizer import sentencepiece

    model = read_model(damaged[0])
    rules = bytearray(model.charsmap)
    places = st.integers(0, len(rules) - 1) | st.integers(0, 4000)
    for place in data.draw(st.lists(places, min_size=1, max_size=200)):
        rules[place] = data.draw(st.integers(0, 255))
    broken = replace(model, charsmap=bytes(rules))
    try:
        sentencepiece._check(broken)
    except CheckpointError:
        return
    everything = "".join(map(chr, range(0x20, 0x3100)))
    build_tokenizer(broken).encode(everything)
