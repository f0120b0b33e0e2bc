"""Incremental decoding: the chunks concatenate to the text, and none ends within a character."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from easyllm.tokenizer import SpecialTokens, StreamDecoder, Tokenizer
from token_texts import BYTE_FALLBACK, IDS, TEXTS

BYTE_IDS = st.lists(st.integers(17, 272), max_size=40)  # single bytes, mostly invalid characters


def streamed(tokenizer, ids, **options):
    """Returns the chunks of a stream, including the final flush."""
    decoder = StreamDecoder(tokenizer, **options)
    return [decoder.push(i) for i in ids], decoder.flush()


def check(tokenizer, ids, **options):
    pieces, rest = streamed(tokenizer, ids, **options)
    assert "".join(pieces) + rest == tokenizer.decode(ids, **options)
    assert not [p for p in pieces if p.endswith("\ufffd")]


@settings(deadline=None, max_examples=100)
@given(text=TEXTS)
@example("😀😀 你好，世界 e\u0301 \ufffd\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd\ufffd\ufffdé")
def test_chunks_of_a_text_concatenate_to_the_text(smollm2_tokenizer, tiny_tokenizer, text):
    for tokenizer in (smollm2_tokenizer, tiny_tokenizer, BYTE_FALLBACK):
        check(tokenizer, tokenizer.encode(text))


@pytest.mark.parametrize("skip_special", [True, False])
@settings(deadline=None, max_examples=100)
@given(ids=st.one_of(IDS, BYTE_IDS))
def test_chunks_of_any_ids_concatenate_to_their_decoding(smollm2_tokenizer, skip_special, ids):
    check(smollm2_tokenizer, ids, skip_special=skip_special)


def test_a_character_after_many_invalid_bytes_is_complete(smollm2_tokenizer):
    (lone,) = smollm2_tokenizer.encode("\u00ff")[:1]
    ids = [lone] * 9 + smollm2_tokenizer.encode("世")
    check(smollm2_tokenizer, ids)
    assert smollm2_tokenizer.decode(ids).endswith("世")


def test_text_before_an_incomplete_character_is_not_held_back():
    from tokenizers import Tokenizer as Backend
    from tokenizers import decoders, models

    vocab = {"aðŁ": 0, "ĺ": 1, "Ģ": 2}  # "a" with two bytes of an emoji, then its other bytes
    backend = Backend(models.BPE(vocab=vocab, merges=[]))
    backend.decoder = decoders.ByteLevel()
    pieces, rest = streamed(Tokenizer(backend, SpecialTokens()), [0, 1, 2])
    assert (pieces, rest) == (["a", "", "😀"], "")


def test_a_character_is_released_as_soon_as_it_is_complete(smollm2_tokenizer):
    ids = smollm2_tokenizer.encode("😀")
    assert len(ids) > 1
    pieces, rest = streamed(smollm2_tokenizer, ids)
    assert pieces == [*([""] * (len(ids) - 1)), "😀"]
    assert rest == ""


def test_flush_releases_an_incomplete_character_once_as_a_replacement(smollm2_tokenizer):
    decoder = StreamDecoder(smollm2_tokenizer)
    assert decoder.push(smollm2_tokenizer.encode("😀")[0]) == ""
    assert decoder.flush() == "\ufffd"
    assert decoder.flush() == ""


def test_spaces_survive_special_tokens_and_leading_ones_are_stripped_as_in_decode():
    first, second = BYTE_FALLBACK.encode("a", special_tokens=False), [BYTE_FALLBACK.bos_id]
    ids = [*second, *first, *second, *first, *second, *second, *first]
    assert BYTE_FALLBACK.decode(ids) == "a a a"
    check(BYTE_FALLBACK, ids)


def test_a_long_text_is_decoded_in_short_windows(smollm2_tokenizer):
    lengths = []

    class Counting:
        def decode(self, ids, *, skip_special=True):
            lengths.append(len(ids))
            return smollm2_tokenizer.decode(ids, skip_special=skip_special)

    ids = smollm2_tokenizer.encode("the quick brown 狐狸 jumps 😀 " * 20)
    pieces, rest = streamed(Counting(), ids)
    assert "".join(pieces) + rest == smollm2_tokenizer.decode(ids)
    assert max(lengths) < 16
