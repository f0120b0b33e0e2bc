"""Arbitrary texts and token ids, and a tokenizer with byte fallback."""

from hypothesis import strategies as st

from easyllm.tokenizer import Tokenizer

TEXTS = st.text(
    st.one_of(
        st.characters(exclude_categories=["Cs"]),
        st.sampled_from("😀👩‍💻🇨🇳你好世界é\u0301\u0928\u093f\ufffd \n"),
    ),
    max_size=40,
)


IDS = st.lists(st.integers(0, 49151), max_size=40)


def with_byte_fallback():
    """Returns a sentencepiece tokenizer; decoding strips the first space and joins byte tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{v:02X}>" for v in range(256)), "▁", "a", "▁a", "你"]
    metadata = {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * (len(tokens) - 1) + [-1.0],
        "tokenizer.ggml.token_type": [2, 3, 3, *([6] * 256), 1, 1, 1, 1],
        "tokenizer.ggml.unknown_token_id": 0,
        "tokenizer.ggml.bos_token_id": 1,
    }
    return Tokenizer.from_gguf(metadata)


BYTE_FALLBACK = with_byte_fallback()
