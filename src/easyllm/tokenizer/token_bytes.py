"""The bytes of single tokens, independent of what precedes them.

Decoding a single token loses information in two ways: a token that contains part of a character
becomes U+FFFD, and SentencePiece's decoder drops the first space of a text, so that `▁Paris` and
`Paris` decode to the same text.
"""

import json
import re
from functools import lru_cache

from tokenizers import Tokenizer as Backend

_BYTE_PIECE = re.compile(r"<0x([0-9A-F]{2})>")


def byte_values() -> dict[str, int]:
    """Returns the byte that each character of a byte-level vocabulary represents.

    Printable Latin-1 characters represent themselves; the characters from U+0100 on represent the
    remaining bytes in order (Radford et al. 2019, `bytes_to_unicode`).
    """
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [value for value in range(256) if value not in printable]
    return {chr(v): v for v in printable} | {chr(256 + n): v for n, v in enumerate(others)}


class TokenBytes:
    """Looks up the bytes that a token adds to a text when it is not the first token.

    Args:
        backend: the backend whose vocabulary and decoder are used. The decoders of byte-level BPE
            and of SentencePiece with byte fallback are recognised; with any other, the token is
            decoded after a letter.

    Attributes:
        decoder_kinds: types of the backend's decoder and of those in it.

    Example:
        TokenBytes(backend)(token_id)     # b" Paris", b"\\xe4\\xbd"
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        kinds = _kinds(json.loads(backend.decoder.__getstate__())) if backend.decoder else set()
        self.decoder_kinds = frozenset(kinds)
        self._letters = byte_values() if "ByteLevel" in kinds else None
        self._has_byte_pieces = "ByteFallback" in kinds
        self._anchor, self._anchor_text = _anchor(backend)
        self._cached = lru_cache(maxsize=65_536)(self._look_up)

    def __call__(self, token_id: int) -> bytes | None:
        """Returns the token's bytes (the name, for a special token); None for an unused id."""
        return self._cached(token_id)

    def _look_up(self, token_id: int) -> bytes | None:
        token = self._backend.id_to_token(token_id)
        if token is None:
            return None
        if self._letters is not None:
            if all(letter in self._letters for letter in token):
                return bytes(self._letters[letter] for letter in token)
            return token.encode()  # an added token with characters outside the byte alphabet
        piece = _BYTE_PIECE.fullmatch(token) if self._has_byte_pieces else None
        if piece is not None:
            return bytes([int(piece[1], 16)])
        return self._decode(token_id).encode()

    def _decode(self, token_id: int) -> str:
        if self._anchor is not None:
            both: str = self._backend.decode([self._anchor, token_id], skip_special_tokens=False)
            if both.startswith(self._anchor_text):
                return both[len(self._anchor_text) :]
        text: str = self._backend.decode([token_id], skip_special_tokens=False)
        return text


def shown(token: bytes) -> str:
    """Returns a token's bytes as text; invalid UTF-8 is escaped as OpenAI does: `\\xe4\\xbd`."""
    return token.decode("utf-8", "backslashreplace")


def _kinds(decoder: object) -> set[str]:
    """Returns the types of a serialised decoder and of its nested decoders."""
    if not isinstance(decoder, dict):
        return set()
    inner = decoder.get("decoders") or []
    return {str(decoder.get("type"))}.union(*map(_kinds, inner))


def _anchor(backend: Backend) -> tuple[int | None, str]:
    """Returns the id of a token whose text is a single letter, and that text."""
    for letter in "aeinorstAEINORST":
        for token in (letter, f"▁{letter}", f"##{letter}"):
            found = backend.token_to_id(token)
            if found is not None and backend.decode([found]).strip() == letter:
                return found, backend.decode([found])
    return None, ""
