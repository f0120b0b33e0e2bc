"""The bytes of single tokens concatenate to the text, for every kind of vocabulary."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import AddedToken, decoders, models, pre_tokenizers
from tokenizers import Tokenizer as Backend

from easyllm.tokenizer import SpecialTokens, Tokenizer
from easyllm.tokenizer.token_bytes import shown
from token_texts import BYTE_FALLBACK, IDS, TEXTS


def bytes_of(tokenizer, ids):
    return [tokenizer.token_bytes(i) for i in ids]


def of_backend(backend):
    return Tokenizer(backend, SpecialTokens())


@settings(deadline=None, max_examples=60)
@given(text=TEXTS, ids=IDS)
def test_bytes_of_tokens_concatenate_to_the_decoded_text(
    smollm2_tokenizer, tiny_tokenizer, text, ids
):
    for tokenizer in (smollm2_tokenizer, tiny_tokenizer):
        for tokens in (tokenizer.encode(text), [i for i in ids if i < tokenizer.vocab_size]):
            joined = b"".join(bytes_of(tokenizer, tokens))
            assert joined.decode("utf-8", "replace") == tokenizer.decode(tokens, skip_special=False)


@settings(deadline=None, max_examples=60)
@given(text=st.text("a你好é😀 ", min_size=1, max_size=20))
def test_sentencepiece_tokens_include_the_first_space_that_decoding_drops(text):
    ids = BYTE_FALLBACK.encode(text, special_tokens=False)
    assert b"".join(bytes_of(BYTE_FALLBACK, ids)) == b" " + BYTE_FALLBACK.decode(ids).encode()


def test_tokens_with_and_without_a_space_differ():
    backend = BYTE_FALLBACK.backend
    found = {t: BYTE_FALLBACK.token_bytes(backend.token_to_id(t)) for t in ("a", "▁a", "▁", "你")}
    assert found == {"a": b"a", "▁a": b" a", "▁": b" ", "你": "你".encode()}
    assert BYTE_FALLBACK.token_bytes(backend.token_to_id("<0xE4>")) == b"\xe4"
    assert BYTE_FALLBACK.token_bytes(backend.token_to_id("<s>")) == b"<s>"


def test_a_byte_name_is_text_without_byte_fallback():
    backend = Backend(models.WordLevel({"<0x41>": 0, "a": 1, "<unk>": 2}, unk_token="<unk>"))
    backend.decoder = decoders.Fuse()
    assert of_backend(backend).token_bytes(0) == b"<0x41>"


@pytest.mark.parametrize(
    ("decoder", "tokens", "expected"),
    [
        (decoders.WordPiece(), ["a", "un", "##able"], [b" a", b" un", b"able"]),
        (decoders.Metaspace(), ["a", "▁un", "able"], [b"a", b" un", b"able"]),
    ],
    ids=["wordpiece", "metaspace"],
)
def test_other_decoders_are_queried_after_a_letter(decoder, tokens, expected):
    backend = Backend(models.WordLevel({t: i for i, t in enumerate([*tokens, "[UNK]"])}, "[UNK]"))
    backend.decoder = decoder
    assert bytes_of(of_backend(backend), range(3)) == expected


def test_added_tokens_have_bytes_and_ids_without_a_token_have_none():
    backend = Backend(models.BPE())
    backend.decoder = decoders.ByteLevel()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.add_tokens([AddedToken("<x y>"), AddedToken("你好")])
    backend.add_special_tokens([AddedToken("<|end|>", special=True)])
    tokenizer = of_backend(backend)
    assert bytes_of(tokenizer, range(4)) == [b"<x y>", "你好".encode(), b"<|end|>", None]


def test_bytes_that_are_not_a_character_are_shown_escaped():
    assert shown("你".encode()) == "你"
    assert shown(b" \xe4\xbd") == " \\xe4\\xbd"
    assert shown(b"\xa0") == "\\xa0"
