"""SentencePiece tokenizers as GGUF metadata: the same ids when read again, other rules refused."""

import json

import pytest

from easyllm.core.errors import CheckpointError
from easyllm.tokenizer import Tokenizer
from easyllm.tokenizer.sentencepiece_to_gguf import sentencepiece_metadata
from easyllm.tokenizer.to_gguf import tokenizer_metadata
from tokenizer_training import SP_TEXTS, sentencepiece_file

PLAIN = {"normalization_rule_name": "identity", "remove_extra_whitespaces": False}


def tokenizer_of(tmp_path, **options):
    theirs, data = sentencepiece_file("bpe", **PLAIN | options)
    (tmp_path / "a.model").write_bytes(data)
    return theirs, Tokenizer.from_sentencepiece(tmp_path / "a.model", add_bos=True)


@pytest.mark.parametrize(
    "options", [{}, {"add_dummy_prefix": False}, {"split_by_whitespace": False}], ids=str
)
def test_a_file_gives_the_same_ids(tmp_path, options):
    theirs, ours = tokenizer_of(tmp_path, **options)
    metadata = tokenizer_metadata(ours, ours.vocab_size + 3)
    assert metadata["tokenizer.ggml.model"] == "llama"
    assert metadata["tokenizer.ggml.tokens"][-1] == f"[PAD{ours.vocab_size + 2}]"
    again = Tokenizer.from_gguf(metadata)
    texts = [*SP_TEXTS, "  two  spaces\n\n", "x = 3.14  # ok", "你好，世界 🙂", "", " "]
    for text in texts:
        assert again.encode(text) == ours.encode(text) == [ours.bos_id, *theirs.encode(text)]
        assert again.decode(again.encode(text)) == ours.decode(ours.encode(text))
    assert again.special == ours.special


def test_types_and_scores_are_those_of_the_model_file(tmp_path):
    theirs, ours = tokenizer_of(tmp_path)
    metadata = tokenizer_metadata(ours, ours.vocab_size)
    count = theirs.get_piece_size()
    kinds = [
        2 if theirs.is_unknown(i) else 3 if theirs.is_control(i) else 6 if theirs.is_byte(i) else 1
        for i in range(count)
    ]
    assert metadata["tokenizer.ggml.token_type"] == kinds
    long = [i for i in range(count) if kinds[i] == 1 and len(theirs.id_to_piece(i)) > 1]
    scores = metadata["tokenizer.ggml.scores"]
    by_score = sorted(long, key=lambda i: -scores[i])
    assert by_score == sorted(long, key=lambda i: -theirs.get_score(i))


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"normalization_rule_name": "nmt_nfkc"}, r"normalises text \(.*Precompiled"),
        ({"remove_extra_whitespaces": True}, r"normalises text \(Replace"),
        ({"byte_fallback": False, "vocab_size": 160}, "got BPE|tokenizer"),
        ({"user_defined_symbols": "<sep>,low"}, "looks up or splits words"),
    ],
)
def test_rules_that_llama_cpp_lacks_are_refused(tmp_path, options, words):
    _, ours = tokenizer_of(tmp_path, **options)
    with pytest.raises(CheckpointError, match=words):
        tokenizer_metadata(ours, ours.vocab_size)


def test_merges_without_scores_are_refused(tmp_path):
    _, ours = tokenizer_of(tmp_path)
    state = json.loads(ours.backend.to_str())
    tokens = [text for text, _ in sorted(ours.backend.get_vocab().items(), key=lambda e: e[1])]
    kinds = [3] * 3 + [1] * (len(tokens) - 3)
    merges = state["model"]["merges"]
    assert sentencepiece_metadata(state, tokens, kinds)
    state["model"]["merges"] = merges[1:]
    with pytest.raises(CheckpointError, match="are pieces, and never merged"):
        sentencepiece_metadata(state, tokens, kinds)
    piece = "".join(merges[-1])
    state["model"]["merges"] = [[piece[:1], piece[1:]], *merges]  # also formed by the last merge
    with pytest.raises(CheckpointError, match="do not have adjacent ranks"):
        sentencepiece_metadata(state, tokens, kinds)
