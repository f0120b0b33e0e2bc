"""Number of bytes of text per token id, for bits per byte (BPB).

BPB makes losses of models with different tokenizers comparable (Gao et al. 2020, arXiv 2101.00027,
section 3.1):

bits per byte = Σ loss in nats / ln 2 / Σ bytes of the predicted tokens
"""

import json
import re

import numpy as np
from numpy.typing import NDArray

from easyllm.tokenizer.tokenizer import Tokenizer

BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Returns [V] int64, the number of UTF-8 bytes of every token id; 0 for special tokens.

    Exact for byte-level vocabularies and byte-fallback tokens, even if a token is only part of a
    character. For other tokens it is the number of bytes that the token adds when text is decoded,
    including the space before a word if decoding inserts one.
    """
    vocabulary = tokenizer.backend.get_vocab(with_added_tokens=True)
    added = tokenizer.backend.get_added_tokens_decoder()
    decoders = _decoders(tokenizer)
    sizes = np.zeros(max(vocabulary.values(), default=-1) + 1, dtype=np.int64)
    others = []
    for token, number in vocabulary.items():
        if number in tokenizer.special_ids:
            continue
        if number in added:
            sizes[number] = len(token.encode("utf-8"))
        elif "ByteLevel" in decoders:
            sizes[number] = len(token)  # in byte-level vocabularies each character is one byte
        elif "ByteFallback" in decoders and BYTE_PIECE.fullmatch(token):
            sizes[number] = 1
        else:
            others.append(number)
    if others:
        sizes[others] = _decoded_sizes(tokenizer, others)
    return sizes


def _decoded_sizes(tokenizer: Tokenizer, numbers: list[int]) -> list[int]:
    """Returns the bytes each id adds after another token, since decoders strip a leading space."""
    before = next((n for n in numbers if tokenizer.decode([n]).strip().isalnum()), numbers[0])
    offset = len(tokenizer.decode([before]).encode("utf-8"))
    pairs = tokenizer.backend.decode_batch([[before, n] for n in numbers])
    return [len(text.encode("utf-8")) - offset for text in pairs]


def _decoders(tokenizer: Tokenizer) -> set[str]:
    """Returns the type names of the decoder's steps."""
    decoder = json.loads(tokenizer.backend.to_str())["decoder"] or {}
    return {step["type"] for step in decoder.get("decoders", [decoder]) if step}
