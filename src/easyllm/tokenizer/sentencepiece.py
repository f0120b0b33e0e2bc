"""Reading SentencePiece `.model` files without the sentencepiece package.

A file is one protobuf message, `ModelProto`: the pieces with scores and types, the trainer
settings, and the normalisation rules (sentencepiece_model.proto). Unigram and BPE models are
converted to a `tokenizers` backend that produces the same ids, with one exception: the name of a
control token in a text is encoded as that token, as in all other tokenizers here. Some helpers are
shared with other tokenizer types.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as Backend

from easyllm.core.errors import CheckpointError, SourceError
from easyllm.tokenizer.bos_eos import add_bos_eos
from easyllm.tokenizer.from_gguf import backend_from_gguf

if TYPE_CHECKING:
    from easyllm.core.json_types import Json

SPACE = "▁"
"""The character that represents a space in pieces."""
BYTE_PIECES = tuple(f"<0x{value:02X}>" for value in range(256))
"""The byte-fallback pieces, one per byte value."""
NEVER_SCORE = -10_000.0
"""Score of a unigram piece that must never match text: its characters always score better."""
MAX_BYTES = 256 * 2**20
MAX_CHARSMAP_BYTES = 16 * 2**20

_UNIGRAM, _BPE = 1, 2
_KINDS = {_UNIGRAM: "unigram", _BPE: "BPE", 3: "word", 4: "character"}
_USER_DEFINED_SCORE = -0.1  # SentencePiece's fixed score, whatever the file contains
_UNICODE_RULES = ("nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")


class PieceType(IntEnum):
    """Types of pieces, numbered as in `.model` files (and in GGUF)."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its index in the list is its id."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """The contents of a `.model` file that encoding needs.

    Attributes:
        kind: type of the model as the file numbers it: 1 is unigram, 2 is BPE.
        pieces: the vocabulary in the order of ids.
        byte_fallback: whether unknown characters are encoded as byte pieces.
        roles: texts of the BOS, EOS and PAD tokens by role (`bos`, `eos`, `pad`).
        rules: name of the normalisation rules.
        charsmap: the compiled normalisation rules; empty for identity.
        add_dummy_prefix: whether a space is prepended to a text.
        remove_extra_whitespaces: whether leading, trailing and repeated spaces are removed.
    """

    kind: int
    pieces: tuple[Piece, ...]
    byte_fallback: bool
    roles: dict[str, str]
    rules: str
    charsmap: bytes
    add_dummy_prefix: bool
    remove_extra_whitespaces: bool


# ---- import


def read_model_file(path: Path) -> SentencePieceModel:
    """Reads a `.model` file.

    Raises:
        SourceError: there is no such file.
        CheckpointError: it is damaged, or requires a feature that is not implemented.
    """
    if not path.is_file():
        raise SourceError(f"{str(path)!r} does not exist; give a SentencePiece .model file")
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(
            f"{path} is larger than {MAX_BYTES >> 20} MiB; give a SentencePiece .model file"
        )
    with prefix_errors_with_path(path):
        return read_model(path.read_bytes())


def build_backend(
    model: SentencePieceModel,
    *,
    add_bos: bool = False,
    add_eos: bool = False,
    prefix_at_start_only: bool = False,
) -> Backend:
    """Builds a backend that produces the model's ids.

    Args:
        model: the SentencePiece model.
        add_bos: whether encoding prepends BOS, as for Llama; the file does not store this.
        add_eos: whether encoding appends EOS, as for T5; the file does not store this.
        prefix_at_start_only: adds the dummy prefix (a space) only at the start of a text, not also
            after each control token in it.

    Raises:
        CheckpointError: the model lacks a token that is to be added.
    """
    backend = _unigram(model) if model.kind == _UNIGRAM else _bpe(model)
    at_start = prefix_at_start_only and model.add_dummy_prefix
    backend.normalizer = _normalizer(model, prefix=model.add_dummy_prefix and not at_start)
    words = _words(model)
    if at_start:
        start = pre_tokenizers.Metaspace(SPACE, prepend_scheme="first", split=False)
        words = pre_tokenizers.Sequence([start, words]) if words else start
    if words is not None:
        backend.pre_tokenizer = words
    backend.decoder = space_decoder(strip_prefix=model.add_dummy_prefix)
    controls = [p.text for p in model.pieces if p.type in (PieceType.CONTROL, PieceType.UNKNOWN)]
    mark_special(backend, controls)
    special = special_tokens(model)
    for role, wanted in (("bos", add_bos), ("eos", add_eos)):
        if wanted and role not in special:
            raise CheckpointError(f"the model has no {role} token to add; leave out add_{role}")
    bos, eos = special.get("bos"), special.get("eos")
    add_bos_eos(backend, bos=bos if add_bos else None, eos=eos if add_eos else None)
    return backend


def special_tokens(model: SentencePieceModel) -> dict[str, str]:
    """Returns the texts of the BOS, EOS, PAD and UNK tokens that the model has, by role."""
    unknown = next(p.text for p in model.pieces if p.type is PieceType.UNKNOWN)
    return {**model.roles, "unk": unknown}


@contextmanager
def prefix_errors_with_path(path: Path) -> Iterator[None]:
    """Prefixes the message of a `CheckpointError` with the path of the file."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


# ---- helpers shared with other tokenizer types


def mark_special(backend: Backend, tokens: Iterable[str]) -> None:
    """Makes tokens special: matched verbatim in text, and skipped by decoding."""
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens]
    )


def space_decoder(*, strip_prefix: bool) -> decoders.Decoder:
    """Returns a decoder that converts ▁ to spaces and byte pieces to characters.

    Args:
        strip_prefix: whether it also removes the leading space that encoding prepended.
    """
    strip = [decoders.Strip(" ", 1, 0)] if strip_prefix else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *strip])


# ---- the file


def read_model(data: bytes) -> SentencePieceModel:
    """Parses the bytes of a `.model` file.

    Raises:
        CheckpointError: they are damaged, or require a feature that is not implemented.
    """
    pieces, trainer, normalizer, denormalizer = [], b"", b"", b""
    for number, value in _fields(data):
        if number == 1:
            pieces.append(_piece(_bytes(value)))
        elif number == 2:
            trainer = _bytes(value)
        elif number == 3:
            normalizer = _bytes(value)
        elif number == 5:
            denormalizer = _bytes(value)
    training, rules = dict(_fields(trainer)), dict(_fields(normalizer))
    if dict(_fields(denormalizer)).get(2):
        raise CheckpointError("it rewrites text when decoding, which is not implemented")
    if training.get(24):
        raise CheckpointError("it attaches spaces to the preceding word, which is not implemented")
    if not rules.get(5, 1):
        raise CheckpointError("it does not escape spaces, which is not implemented")
    model = SentencePieceModel(
        kind=_number(training.get(3, _UNIGRAM)),
        pieces=tuple(pieces),
        byte_fallback=bool(training.get(35, 0)),
        roles=_roles(training, {p.text for p in pieces if p.type is PieceType.CONTROL}),
        rules=_text(rules.get(1, b"")),
        charsmap=_bytes(rules.get(2, b"")),
        add_dummy_prefix=bool(rules.get(3, 1)),
        remove_extra_whitespaces=bool(rules.get(4, 1)),
    )
    _check(model)
    return model


def _fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """Yields field numbers and values of a protobuf message: varints as int, others as bytes."""
    at = 0
    while at < len(data):
        key, at = _varint(data, at)
        number, wire = key >> 3, key & 7
        if wire == 0:
            value, at = _varint(data, at)
            yield number, value
            continue
        if wire == 2:
            size, at = _varint(data, at)
        elif wire in (1, 5):
            size = 8 if wire == 1 else 4
        else:
            raise CheckpointError("it is not a SentencePiece model; copy it again")
        if size > len(data) - at:
            raise CheckpointError("it is truncated; copy it again")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise CheckpointError("it is truncated; copy it again")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise CheckpointError("it is not a SentencePiece model; copy it again")


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = _bytes(fields.get(2, bytes(4)))
    kind = _number(fields.get(3, PieceType.NORMAL))
    if len(score) != 4 or kind not in PieceType.__members__.values():
        raise CheckpointError("one of its pieces is damaged; copy it again")
    return Piece(_text(fields.get(1, b"")), struct.unpack("<f", score)[0], PieceType(kind))


def _roles(training: dict[int, int | bytes], controls: set[str]) -> dict[str, str]:
    """Returns the texts of BOS, EOS and PAD, which SentencePiece identifies by their texts."""
    names = {"bos": (46, b"<s>"), "eos": (47, b"</s>"), "pad": (48, b"<pad>")}
    texts = {role: _text(training.get(number, text)) for role, (number, text) in names.items()}
    return {role: text for role, text in texts.items() if text in controls}


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise CheckpointError("it is not a SentencePiece model; copy it again")
    return value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise CheckpointError("it is not a SentencePiece model; copy it again")
    return value


def _text(value: int | bytes) -> str:
    try:
        return _bytes(value).decode("utf-8")
    except UnicodeDecodeError:
        raise CheckpointError("one of its texts is not UTF-8; copy it again") from None


def _check(model: SentencePieceModel) -> None:
    texts = [piece.text for piece in model.pieces]
    types = [piece.type for piece in model.pieces]
    if model.kind not in (_UNIGRAM, _BPE):
        name = _KINDS.get(model.kind, f"kind {model.kind}")
        raise CheckpointError(f"it is a {name} model, but only unigram and BPE are implemented")
    if len(set(texts)) < len(texts) or "" in texts:
        raise CheckpointError("a piece is empty or duplicated; copy it again")
    if not all(np.isfinite(piece.score) for piece in model.pieces):
        raise CheckpointError("the score of a piece is NaN or infinite; copy it again")
    if types.count(PieceType.UNKNOWN) != 1:
        raise CheckpointError("it must have exactly one unknown piece; copy it again")
    if model.byte_fallback and set(BYTE_PIECES) - set(texts):
        raise CheckpointError("it uses byte fallback but lacks some byte pieces; copy it again")
    if model.kind == _BPE and PieceType.UNUSED in types:
        raise CheckpointError("it is BPE with unused pieces, which is not implemented")
    if model.charsmap:
        _check_charsmap(model.charsmap)


# ---- the backend


def _unigram(model: SentencePieceModel) -> Backend:
    scores = {PieceType.USER_DEFINED: _USER_DEFINED_SCORE}
    scores |= dict.fromkeys(
        set(PieceType) - {PieceType.NORMAL, PieceType.USER_DEFINED}, NEVER_SCORE
    )
    vocab = [(piece.text, scores.get(piece.type, piece.score)) for piece in model.pieces]
    unknown = next(i for i, p in enumerate(model.pieces) if p.type is PieceType.UNKNOWN)
    return Backend(models.Unigram(vocab, unk_id=unknown, byte_fallback=model.byte_fallback))


def _bpe(model: SentencePieceModel) -> Backend:
    """Builds the BPE backend from the equivalent GGUF metadata of a `llama` tokenizer.

    A user-defined symbol reaches the model as a separate word (`_words`), and complete words are
    looked up in the vocabulary before merges apply.
    """
    types = [piece.type for piece in model.pieces]
    normal = {PieceType.USER_DEFINED: PieceType.NORMAL}
    backend = backend_from_gguf(
        {
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": [piece.text for piece in model.pieces],
            "tokenizer.ggml.scores": [piece.score for piece in model.pieces],
            "tokenizer.ggml.token_type": [int(normal.get(kind, kind)) for kind in types],
            "tokenizer.ggml.unknown_token_id": types.index(PieceType.UNKNOWN),
            "tokenizer.ggml.add_bos_token": False,
        }
    )
    backend.model.ignore_merges = PieceType.USER_DEFINED in types
    return backend


def _words(model: SentencePieceModel) -> pre_tokenizers.PreTokenizer | None:
    """Returns the pre-tokenizer of normalised text, or None; it does not change any id.

    For speed, text is split at spaces if no piece extends across a space.
    """
    symbols = [p.text for p in model.pieces if p.type is PieceType.USER_DEFINED]
    if model.kind == _BPE and symbols:
        longest_first = "|".join(map(re.escape, sorted(symbols, key=len, reverse=True)))
        return pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
    if any(SPACE in piece.text[1:] for piece in model.pieces):
        return None
    return pre_tokenizers.Split(SPACE, behavior="merged_with_next")


def _normalizer(model: SentencePieceModel, *, prefix: bool) -> normalizers.Normalizer:
    steps: list[Json] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.charsmap and model.rules in _UNICODE_RULES:
        # For a letter with combining marks, the library applies the shortest matching rule or none,
        # while SentencePiece applies the longest. This would lose the tone of a decomposed
        # Vietnamese vowel. With NFC before and after, only one rule matches each character.
        steps = [normalizers.NFC(), *steps, normalizers.NFC()]
    trim = model.remove_extra_whitespaces
    if trim:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if prefix else []
    steps.append(normalizers.Replace(" ", SPACE))
    steps += [normalizers.Replace(Regex(rf"{SPACE}+\z"), "")] if trim else []
    return normalizers.Sequence(steps)


def _check_charsmap(charsmap: bytes) -> None:
    """Validates the compiled normalisation rules, because the library does not check bounds.

    The rules are a double-array trie (Aoe 1989) of uint32 units, followed by the replacement texts.
    The check walks every path: a step outside the array, or to an offset at which no text begins,
    would crash the library. A unit contains a label (bits 0-7, 31), whether a rule ends there
    (bit 8), and the distance to its children.
    """
    damaged = CheckpointError("its normalisation rules are damaged; copy it again")
    size = int.from_bytes(charsmap[:4], "little")
    if size % 4 or not size or size + 4 > len(charsmap) or len(charsmap) > MAX_CHARSMAP_BYTES:
        raise damaged
    _text(charsmap[4 + size :])
    units = np.frombuffer(charsmap, "<u4", size // 4, 4).astype(np.int64)
    texts = np.frombuffer(charsmap, np.uint8, offset=4 + size)
    children = (units >> 10) << ((units & 512) >> 6)
    labels = np.arange(1, 256)
    seen = np.zeros(len(units), bool)
    bases = children[:1]
    while bases.size:
        if (bases | 255).max() >= len(units):
            raise damaged
        seen[bases] = True
        places = (bases[:, None] ^ labels).ravel()
        found = (units[places] & 0x800000FF) == np.tile(labels, len(bases))
        places = places[found]
        bases = places ^ children[places]
        ends = bases[(units[places] & 256) > 0]
        if ends.size and ends.max() >= len(units):
            raise damaged
        starts = units[ends] & 0x7FFFFFFF
        if starts.size and (starts.max() >= len(texts) or ((texts[starts] & 0xC0) == 0x80).any()):
            raise damaged
        bases = np.unique(bases)
        bases = bases[~seen[np.minimum(bases, len(units) - 1)]]
