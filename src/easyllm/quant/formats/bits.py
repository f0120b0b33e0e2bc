"""Codes of 2, 3, 4 or 8 bits in 32-bit words, the first code in the lowest bits.

Codes follow each other without gaps, so a code of 3 bits may be stored in two words.
"""

import torch
from torch import Tensor

WORD = 32


def packed_words(count: int, bits: int) -> int:
    """Returns the number of words that `count` codes take."""
    return -(-count * bits // WORD)


def pack_bits(codes: Tensor, bits: int, *, dim: int = 1) -> Tensor:
    """Packs `codes: [R, n]` to int32 [R, ⌈n · bits / 32⌉]; unused bits are zero.

    Args:
        codes: whole numbers in 0 .. 2^bits − 1, of any dtype.
        bits: 2, 3, 4 or 8.
        dim: 0 packs along the first dim instead: [n, C] to [⌈n · bits / 32⌉, C].
    """
    if dim == 0:
        return pack_bits(codes.T, bits).T.contiguous()
    places, words = _places(bits), packed_words(codes.shape[1], bits)
    result = torch.zeros(len(codes), words, dtype=torch.int64, device=codes.device)
    for place, index in enumerate(places):
        column = codes[:, place :: len(places)].long()
        for word, shift in index:
            its = result[:, word :: _words_of(bits)][:, : column.shape[1]]
            its |= (column << shift if shift >= 0 else column >> -shift) & 0xFFFFFFFF
    return torch.where(result >= 1 << 31, result - (1 << 32), result).to(torch.int32)


def unpack_bits(words: Tensor, bits: int, count: int, *, dim: int = 1) -> Tensor:
    """Returns the codes [R, count] uint8 in `words: [R, ⌈count · bits / 32⌉]` int32.

    Args:
        words: as `pack_bits` returns them.
        bits: 2, 3, 4 or 8.
        count: number of codes.
        dim: 0 for words [⌈count · bits / 32⌉, C], whose codes are [count, C].
    """
    if dim == 0:
        return unpack_bits(words.T, bits, count).T.contiguous()
    unsigned, places = words.long() & 0xFFFFFFFF, _places(bits)
    result = torch.zeros(len(words), count, dtype=torch.uint8, device=words.device)
    for place, index in enumerate(places):
        target = result[:, place :: len(places)]
        value = torch.zeros(target.shape, dtype=torch.int64, device=words.device)
        for word, shift in index:
            part = unsigned[:, word :: _words_of(bits)][:, : target.shape[1]]
            value[:, : part.shape[1]] |= part >> shift if shift >= 0 else part << -shift
        target.copy_((value & ((1 << bits) - 1)).to(torch.uint8))
    return result


def _words_of(bits: int) -> int:
    """Words after which the pattern repeats: 3 for 3 bits, else 1."""
    return 3 if bits == 3 else 1


def _places(bits: int) -> list[list[tuple[int, int]]]:
    """Returns, for each code of a period, the words that it is stored in and its shift there.

    A negative shift is that of the upper part of a code, of which the lower bits are in the word
    before.
    """
    found = list[list[tuple[int, int]]]()
    for code in range(WORD * _words_of(bits) // bits):
        word, shift = divmod(code * bits, WORD)
        places = [(word, shift)]
        if shift + bits > WORD:
            places.append((word + 1, shift - WORD))
        found.append(places)
    return found


__all__ = ["pack_bits", "packed_words", "unpack_bits"]
