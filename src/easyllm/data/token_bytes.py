"""How many bytes of text each token id stands for, so that losses of different tokenizers can be compared.

bits per byte = Σ loss in nats / ln 2 / Σ bytes of the predicted tokens        (Gao et al. 2020, arXiv 2101.00027, section 3.1)
"""

import json
import re

import numpy as np
from numpy.typing import NDArray

from easyllm.tokenizer.tokenizer import Tokenizer

BYTE_PIECE = re.compile("<0x[0-9A-F]{2}>")


def token_bytes(tokenizer: Tokenizer) -> NDArray[np.int64]:
    """Bytes of UTF-8 of every id, [V]; control tokens have none.

    Exact for byte-level vocabularies and byte pieces, also where a token holds a part of a character. Of other kinds,
    what the token adds to a text that is being decoded, with the space before a word where decoding puts one.
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
            sizes[number] = len(token)  # each of its characters stands for a byte
        elif "ByteFallback" in decoders and BYTE_PIECE.fullmatch(token):
            sizes[number] = 1
        else:
            others.append(number)
    if others:
        sizes[others] = _decoded_sizes(tokenizer, others)
    return sizes


def _decoded_sizes(tokenizer: Tokenizer, numbers: list[int]) -> list[int]:
    """What each id adds behind another one: at the beginning of a text, decoders drop a space."""
    before = next((n for n in numbers if tokenizer.decode([n]).strip().isalnum()), numbers[0])
    offset = len(tokenizer.decode([before]).encode("utf-8"))
    pairs = tokenizer.backend.decode_batch([[before, n] for n in numbers])
    return [len(text.encode("utf-8")) - offset for text in pairs]


def _decoders(tokenizer: Tokenizer) -> set[str]:
    """Names of the steps of decoding."""
    decoder = json.loads(tokenizer.backend.to_str())["decoder"] or {}
    return {step["type"] for step in decoder.get("decoders", [decoder]) if step}
