"""Vocabularies of tiktoken: a line per token, its bytes in base64 and its rank (GLM-4-9B).

Text is split by a regular expression, which the file does not contain; in each piece, the two
neighbours whose joined bytes have the lowest rank are merged until none are left. Ranks are ids.
"""

import base64
import binascii
import itertools
import re
from pathlib import Path

from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models

from easyllm.core.errors import CheckpointError
from easyllm.tokenizer.from_gguf import PRE_TOKENIZERS
from easyllm.tokenizer.token_bytes import byte_values

RULES = {"ChatGLM4Tokenizer": "glm4"}
"""Name of the regular expression, as llama.cpp calls it, by the class of the authors' code."""
MAX_BYTES = 64 << 20
_LINE = re.compile(rb"([A-Za-z0-9+/]+={0,2}) (\d{1,7})")


def is_tiktoken(path: Path) -> bool:
    """Returns whether a file starts like a vocabulary of tiktoken."""
    with path.open("rb") as file:
        return _LINE.fullmatch(file.readline(4096).rstrip(b"\r\n")) is not None


def tiktoken_backend(path: Path, kind: str) -> Backend:
    """Returns the backend of a vocabulary file.

    Args:
        path: the file.
        kind: the class that `tokenizer_config.json` names, which implies the regular expression.

    Raises:
        CheckpointError: the class is unknown, or the file is damaged.
    """
    if kind not in RULES:
        raise CheckpointError(
            f"{path} is a vocabulary of tiktoken, which does not say how text is split, and the "
            f"class {kind or 'of the tokenizer'!r} is not known ({', '.join(RULES)}); copy a "
            "tokenizer.json, or set tokenizer_class in tokenizer_config.json"
        )
    ranks = read_ranks(path)
    letters = {value: letter for letter, value in byte_values().items()}
    names = {token: "".join(letters[byte] for byte in token) for token in ranks}
    pairs = filter(None, (_last_merge(token, ranks) for token in ranks if len(token) > 1))
    vocab = {names[token]: rank for token, rank in ranks.items()}
    merges = [(names[left], names[right]) for left, right in pairs]
    backend = Backend(models.BPE(vocab=vocab, merges=merges, ignore_merges=True))
    backend.pre_tokenizer = PRE_TOKENIZERS[RULES[kind]]()
    backend.decoder = decoders.ByteLevel()
    return backend


def read_ranks(path: Path) -> dict[bytes, int]:
    """Returns the rank of each token by its bytes, in the order of ranks.

    Raises:
        CheckpointError: a line is damaged, ranks are not 0, 1, ..., or a single byte is missing.
    """
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_BYTES >> 20} MiB; copy it again")
    ranks = dict[bytes, int]()
    for number, line in enumerate(path.read_bytes().splitlines()):
        match = _LINE.fullmatch(line)
        try:
            token = base64.b64decode(match[1], validate=True) if match else b""
        except binascii.Error:
            token = b""
        if not token or token in ranks or match is None or int(match[2]) != number:
            raise CheckpointError(f"line {number + 1} of {path} is damaged; copy the file again")
        ranks[token] = number
    missing = [byte for byte in range(256) if bytes([byte]) not in ranks]
    if missing:
        raise CheckpointError(
            f"{path} lacks {len(missing)} of the 256 single bytes; copy the file again"
        )
    return ranks


def _last_merge(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """Returns the two parts of a token that are left when only tokens of lower rank are merged.

    None for a token that lower ranks leave in more parts: it is found as a complete piece alone.
    """
    parts, most = [token[i : i + 1] for i in range(len(token))], ranks[token]
    while len(parts) > 2:
        joined = [ranks.get(a + b, most) for a, b in itertools.pairwise(parts)]
        best = min(joined)
        if best >= most:
            break
        at = joined.index(best)
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


__all__ = ["is_tiktoken", "read_ranks", "tiktoken_backend"]
