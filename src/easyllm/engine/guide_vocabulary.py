"""The vocabulary of a tokenizer as llguidance reads it: the bytes of every token."""

from collections.abc import Iterable
from functools import cached_property

import torch
from torch import Tensor

from easyllm.engine.guide_spec import GuideError
from easyllm.tokenizer.tokenizer import Tokenizer

BYTE_DECODERS = frozenset(("ByteLevel", "ByteFallback", "Metaspace", "Fuse"))
"""Decoders with which the bytes of a token do not depend on its neighbours."""


class VocabularyBytes:
    """The bytes of the tokens of a model, with the attributes that llguidance's tokenizer reads.

    Args:
        tokenizer: the tokenizer of the model.
        vocab_size: number of ids of the model; those without a token get no bytes.
        eos_ids: ids of the EOS tokens.

    Attributes:
        tokens: bytes of each token, for ids 0 to `vocab_size` - 1.
        special_token_ids: ids of special tokens, which are never part of a text.
        eos_ids: ids of the EOS tokens.

    Raises:
        GuideError: there is no EOS id, or the bytes of a token depend on its neighbours.
    """

    def __init__(self, tokenizer: Tokenizer, vocab_size: int, eos_ids: Iterable[int]) -> None:
        self.eos_ids = tuple(dict.fromkeys(i for i in eos_ids if 0 <= i < vocab_size))
        if not self.eos_ids:
            raise GuideError(
                "guided decoding needs a model with an EOS token, with which a completion ends; "
                "set eos_token_id in its config.json"
            )
        kinds = tokenizer.token_bytes.decoder_kinds
        if not kinds & BYTE_DECODERS:
            raise GuideError(
                "guided decoding needs a tokenizer of bytes or SentencePiece pieces, but the "
                f"decoder of this one is {', '.join(sorted(kinds)) or 'missing'}; use another model"
            )
        self._encode = tokenizer.encode_documents
        known = [tokenizer.token_bytes(i) for i in range(min(vocab_size, tokenizer.vocab_size))]
        self.tokens = [each or b"" for each in known]
        self.tokens += [b""] * (vocab_size - len(self.tokens))
        self.special_token_ids = sorted(i for i in tokenizer.special_ids if i < vocab_size)
        self.eos_token_id, self.bos_token_id = self.eos_ids[0], tokenizer.bos_id

    def __call__(self, text: str) -> list[int]:
        """Returns the token ids of a text; llguidance asks for it only to force tokens."""
        return self._encode([text])[0]

    def known_words(self) -> Tensor | None:
        """Returns a bitmask [⌈V/32⌉] int32 of the ids with a token; None if all have one."""
        if all(self.tokens):
            return None
        bits = torch.zeros(-(-len(self.tokens) // 32) * 32, dtype=torch.bool)
        bits[: len(self.tokens)] = torch.tensor([bool(each) for each in self.tokens])
        weights = 1 << torch.arange(32, dtype=torch.int64)
        words = (bits.view(-1, 32) * weights).sum(1)
        return torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)

    def missing_characters(self, text: str) -> str:
        """Returns the characters of a text that no sequence of tokens contains."""
        return "".join(c for c in dict.fromkeys(text) if not self._has_character(c))

    def _has_character(self, character: str) -> bool:
        by_bytes = all(bytes([value]) in self._plain for value in character.encode())
        return by_bytes or character in self._characters

    @cached_property
    def _plain(self) -> frozenset[bytes]:
        special = set(self.special_token_ids)
        return frozenset(each for i, each in enumerate(self.tokens) if i not in special)

    @cached_property
    def _characters(self) -> frozenset[str]:
        return frozenset().union(*(each.decode(errors="ignore") for each in self._plain))
