"""Sentencepiece's `.model` files, read without the sentencepiece package, and its ways that other kinds share.

A file is one protobuf message, `ModelProto`: the pieces with scores and types, how it was trained, how it normalises
(sentencepiece_model.proto). Unigram and BPE models become a `tokenizers` backend that gives the same ids, but for one
thing: the name of a control token in a text is that token, as with every tokenizer here.
"""

import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers import Tokenizer as Backend

from easyllm.core.errors import CheckpointError, SourceError
from easyllm.tokenizer.from_gguf import backend_from_gguf

SPACE = "▁"
"""What stands for a space in pieces."""
BYTE_PIECES = tuple(f"<0x{value:02X}>" for value in range(256))
NEVER = -10_000.0
"""Score of a unigram piece that text is not to match: its letters one by one always score better."""
MAX_BYTES = 256 * 2**20
MAX_CHARSMAP_BYTES = 16 * 2**20

_UNIGRAM, _BPE = 1, 2
_KINDS = {_UNIGRAM: "unigram", _BPE: "BPE", 3: "word", 4: "character"}
_USER_DEFINED_SCORE = -0.1  # as sentencepiece scores them, whatever the file says
_UNICODE_RULES = ("nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf")


class PieceType(IntEnum):
    """What a piece is, as the file (and GGUF after it) numbers them."""

    NORMAL = 1
    UNKNOWN = 2
    CONTROL = 3
    USER_DEFINED = 4
    UNUSED = 5
    BYTE = 6


@dataclass(frozen=True, slots=True)
class Piece:
    """One entry of the vocabulary; its place in the list is its id."""

    text: str
    score: float
    type: PieceType


@dataclass(frozen=True, slots=True, kw_only=True)
class SentencePieceModel:
    """What encoding needs of a `.model` file.

    Attributes:
        roles: texts of the tokens that bos, eos and pad name.
        rules: name of the normalisation rules; `charsmap` holds them compiled, empty for identity.
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
    """What a `.model` file says.

    Raises:
        SourceError: there is no such file.
        CheckpointError: it is damaged, or asks for what is not implemented.
    """
    if not path.is_file():
        raise SourceError(f"{str(path)!r} does not exist; name a sentencepiece .model file")
    if path.stat().st_size > MAX_BYTES:
        raise CheckpointError(f"{path} is larger than {MAX_BYTES >> 20} MiB; is it a tokenizer?")
    with naming(path):
        return read_model(path.read_bytes())


def build_backend(
    model: SentencePieceModel,
    *,
    add_bos: bool = False,
    add_eos: bool = False,
    prefix_at_start_only: bool = False,
) -> Backend:
    """A backend that gives the model's ids.

    Args:
        add_bos, add_eos: whether encoding adds them (the file does not say; Llama adds bos, T5 eos).
        prefix_at_start_only: the space in front of a text is not put after a control token inside it, too.

    Raises:
        CheckpointError: a token to add is not in the model.
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
            raise CheckpointError(f"the model has no {role} token to add; leave add_{role} out")
    bos, eos = special.get("bos"), special.get("eos")
    surround(backend, bos=bos if add_bos else None, eos=eos if add_eos else None)
    return backend


def special_tokens(model: SentencePieceModel) -> dict[str, str]:
    """Texts of bos, eos, pad and unk, those that the model has."""
    unknown = next(p.text for p in model.pieces if p.type is PieceType.UNKNOWN)
    return {**model.roles, "unk": unknown}


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Puts the file's name in front of what is wrong with it."""
    try:
        yield
    except CheckpointError as error:
        raise CheckpointError(f"{path}: {error}") from None


# ---- ways shared with other kinds


def mark_special(backend: Backend, tokens: Iterable[str]) -> None:
    """Makes tokens control tokens: found in text as they stand, left out of what is decoded."""
    backend.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in tokens]
    )


def surround(backend: Backend, *, bos: str | None, eos: str | None) -> None:
    """Makes encoding put `bos` in front and `eos` behind, where they are given."""
    if bos or eos:
        around = [*([bos] if bos else []), "$A", *([eos] if eos else [])]
        ids = [(token, backend.token_to_id(token)) for token in (bos, eos) if token]
        backend.post_processor = processors.TemplateProcessing(single=around, special_tokens=ids)


def space_decoder(*, strip_prefix: bool) -> decoders.Decoder:
    """▁ to space, byte pieces to characters, and the space that was put in front removed again."""
    strip = [decoders.Strip(" ", 1, 0)] if strip_prefix else []
    steps = [decoders.Replace(SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    return decoders.Sequence([*steps, *strip])


# ---- the file


def read_model(data: bytes) -> SentencePieceModel:
    """What a `.model` file's bytes say.

    Raises:
        CheckpointError: they are damaged, or ask for what is not implemented.
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
        raise CheckpointError("it keeps spaces behind words, which is not implemented")
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
    """Numbers and values of a protobuf message: varints as int, everything else as bytes."""
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
            raise CheckpointError("it is no sentencepiece model; copy it again")
        if size > len(data) - at:
            raise CheckpointError("it is cut short; copy it again")
        yield number, data[at : at + size]
        at += size


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = 0
    for shift in range(0, 70, 7):
        if at >= len(data):
            raise CheckpointError("it is cut short; copy it again")
        byte = data[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise CheckpointError("it is no sentencepiece model; copy it again")


def _piece(data: bytes) -> Piece:
    fields = dict(_fields(data))
    score = _bytes(fields.get(2, bytes(4)))
    kind = _number(fields.get(3, PieceType.NORMAL))
    if len(score) != 4 or kind not in PieceType.__members__.values():
        raise CheckpointError("one of its pieces is damaged; copy it again")
    return Piece(_text(fields.get(1, b"")), struct.unpack("<f", score)[0], PieceType(kind))


def _roles(training: dict[int, int | bytes], controls: set[str]) -> dict[str, str]:
    """Sentencepiece finds bos, eos and pad by their texts."""
    names = {"bos": (46, b"<s>"), "eos": (47, b"</s>"), "pad": (48, b"<pad>")}
    texts = {role: _text(training.get(number, text)) for role, (number, text) in names.items()}
    return {role: text for role, text in texts.items() if text in controls}


def _bytes(value: int | bytes) -> bytes:
    if isinstance(value, int):
        raise CheckpointError("it is no sentencepiece model; copy it again")
    return value


def _number(value: int | bytes) -> int:
    if isinstance(value, bytes):
        raise CheckpointError("it is no sentencepiece model; copy it again")
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
        raise CheckpointError(f"it is a {name} model; unigram and BPE are implemented")
    if len(set(texts)) < len(texts) or "" in texts:
        raise CheckpointError("a piece is empty or stands there twice; copy it again")
    if not all(np.isfinite(piece.score) for piece in model.pieces):
        raise CheckpointError("a score is not a number; copy it again")
    if types.count(PieceType.UNKNOWN) != 1:
        raise CheckpointError("it must have one unknown piece; copy it again")
    if model.byte_fallback and set(BYTE_PIECES) - set(texts):
        raise CheckpointError("it falls back to bytes and lacks some; copy it again")
    if model.kind == _BPE and PieceType.UNUSED in types:
        raise CheckpointError("it is BPE with unused pieces, which is not implemented")
    if model.charsmap:
        _check_charsmap(model.charsmap)


# ---- the backend


def _unigram(model: SentencePieceModel) -> Backend:
    scores = {PieceType.USER_DEFINED: _USER_DEFINED_SCORE}
    scores |= dict.fromkeys(set(PieceType) - {PieceType.NORMAL, PieceType.USER_DEFINED}, NEVER)
    vocab = [(piece.text, scores.get(piece.type, piece.score)) for piece in model.pieces]
    unknown = next(i for i, p in enumerate(model.pieces) if p.type is PieceType.UNKNOWN)
    return Backend(models.Unigram(vocab, unk_id=unknown, byte_fallback=model.byte_fallback))


def _bpe(model: SentencePieceModel) -> Backend:
    """The facts are those of a GGUF file's `llama` tokenizer, by other names.

    A user-defined symbol reaches the model as a word of its own (`_words`), and whole words are looked up first.
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
    """How normalised text is cut where that changes no id: not at all, or, for speed, at spaces no piece reaches over."""
    symbols = [p.text for p in model.pieces if p.type is PieceType.USER_DEFINED]
    if model.kind == _BPE and symbols:
        longest_first = "|".join(map(re.escape, sorted(symbols, key=len, reverse=True)))
        return pre_tokenizers.Split(Regex(longest_first), behavior="isolated")
    if any(SPACE in piece.text[1:] for piece in model.pieces):
        return None
    return pre_tokenizers.Split(SPACE, behavior="merged_with_next")


def _normalizer(model: SentencePieceModel, *, prefix: bool) -> normalizers.Normalizer:
    steps: list[Any] = [normalizers.Precompiled(model.charsmap)] if model.charsmap else []
    if model.charsmap and model.rules in _UNICODE_RULES:
        # the library applies the shortest rule to a letter with its marks, or none, where sentencepiece applies the
        # longest (it would lose the tone of a decomposed Vietnamese vowel); composing around it leaves one rule each
        steps = [normalizers.NFC(), *steps, normalizers.NFC()]
    trim = model.remove_extra_whitespaces
    if trim:
        steps += [normalizers.Replace(Regex(r"\A +"), ""), normalizers.Replace(Regex(" {2,}"), " ")]
    steps += [normalizers.Prepend(SPACE)] if prefix else []
    steps.append(normalizers.Replace(" ", SPACE))
    steps += [normalizers.Replace(Regex(rf"{SPACE}+\z"), "")] if trim else []
    return normalizers.Sequence(steps)


def _check_charsmap(charsmap: bytes) -> None:
    """Walks every path of the compiled rules, a double array (Aoe 1989) of uint32 before the texts they lead to, as the
    library does without looking: a step outside the array, or to a text that does not begin there, would crash it.

    A unit holds a label (bits 0-7, 31), whether a rule ends there (bit 8) and the distance to its children.
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
