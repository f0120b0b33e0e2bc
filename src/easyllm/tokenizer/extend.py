"""Extending a tokenizer's vocabulary without changing how it encodes existing text.

Byte-level BPE training is continued where it stopped: the new text is encoded with the old
tokenizer, and further merges are learned over the old tokens. (Cui et al. 2023, arXiv 2304.08177,
add the vocabulary of a second tokenizer instead, which changes how old text is tokenized.) The new
merges come after all old ones, so encoding is the old encoding followed by the new merges. This
gives the extension invariant:

    replacing each new id of a text by its old pieces gives the text's old ids

To preserve it, a merge is discarded if its result is already in the vocabulary (a piece that the
vocabulary's own merges never produce), and so are merges built on it. Every new piece contains a
byte above 127, so ASCII text keeps its ids.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, pairwise, repeat
from typing import Literal

from tokenizers import Tokenizer as Backend
from tokenizers import models, trainers

from easyllm.core.errors import ConfigError, DataError
from easyllm.core.json_types import JsonObject
from easyllm.tokenizer.report import HAN
from easyllm.tokenizer.token_bytes import byte_values
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.tokenizer.train import replace_surrogates
from easyllm.tokenizer.train_config import MAX_VOCAB_SIZE

Script = Literal["non_ascii", "han"]
SCRIPTS: tuple[Script, ...] = ("non_ascii", "han")
BATCH_TEXTS = 256


@dataclass(frozen=True, slots=True)
class Extension:
    """An extended tokenizer.

    Attributes:
        tokenizer: the tokenizer with the additional pieces.
        old_pieces: for each new id, in order, the old ids that encoded its text before.
    """

    tokenizer: Tokenizer
    old_pieces: Mapping[int, tuple[int, ...]]

    @property
    def num_new(self) -> int:
        """Number of added pieces."""
        return len(self.old_pieces)


def extend_tokenizer(
    tokenizer: Tokenizer,
    texts: Iterable[str],
    *,
    num_new: int | None = None,
    vocab_size: int | None = None,
    script: Script = "non_ascii",
    min_frequency: int = 2,
) -> Extension:
    """Extends a byte-level BPE tokenizer with pieces learned from `texts`.

    Args:
        tokenizer: the tokenizer to extend; it is not changed.
        texts: texts in the language to add; read once.
        num_new: number of pieces to add; exclusive with `vocab_size`.
        vocab_size: number of ids after the extension; a small corpus may yield fewer.
        script: learn from all non-ASCII text (`non_ascii`), or from Han characters only (`han`).
        min_frequency: pairs that occur less often than this are not merged.

    Raises:
        ConfigError: the tokenizer is not byte-level BPE, or the requested size is not valid.
        DataError: the texts contain nothing to learn from.
    """
    wanted = _num_wanted(tokenizer, num_new, vocab_size)
    state = _read_state(tokenizer)
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    spelling = {_letter(index): piece for piece, index in vocab.items()}
    words = Counter(_foreign_runs(tokenizer, texts, spelling, script))
    if not words:
        what = "Han characters" if script == "han" else "non-ASCII text"
        raise DataError(
            f"the texts contain no {what} to learn from; give texts in the new language"
        )
    pieces, pairs = _learn(words, spelling, wanted, min_frequency)
    first = len(vocab)
    vocab |= {piece: first + place for place, piece in enumerate(pieces.values())}
    spelled = spelling | pieces
    merges += [[spelled[left], spelled[right]] for left, right in pairs]
    extended = Tokenizer(
        Backend.from_str(json.dumps(state)),
        tokenizer.special,
        chat_template=tokenizer.template_sources,
        max_seq_len=tokenizer.max_seq_len,
    )
    return Extension(extended, {first + n: _ids(word) for n, word in enumerate(pieces)})


# ---- each old id is encoded as one character ("letter"), so that a sequence of old tokens becomes
# ---- a word on which the BPE trainer can learn merges


def _letter(index: int) -> str:
    return chr(index if index < 0xD800 else index + 0x800)  # skips the surrogates


def _ids(word: str) -> tuple[int, ...]:
    codes = map(ord, word)
    return tuple(code if code < 0xD800 else code - 0x800 for code in codes)


def _foreign_runs(
    tokenizer: Tokenizer, texts: Iterable[str], spelling: Mapping[str, str], script: Script
) -> Iterator[str]:
    """Yields runs of letters that new merges may join, each within one word of the text.

    They contain only bytes above 127, except for an optional leading space, because words include
    the space before them.
    """
    values = byte_values()
    special = {_letter(index) for index in tokenizer.backend.get_added_tokens_decoder()}
    raw = {
        letter: bytes(map(values.__getitem__, piece))
        for letter, piece in spelling.items()
        if letter not in special and values.keys() >= set(piece)
    }
    usable = {letter for letter, piece in raw.items() if _is_foreign(piece)}
    for word in _words(tokenizer, texts):
        allowed = [letter in usable for letter in word]
        if script == "han" and any(allowed):
            allowed = _only_han([raw.get(letter, b"?") for letter in word], allowed)
        start = 0
        for at, letter in enumerate([*word, ""]):
            fits = at < len(word) and allowed[at]
            if not fits or raw[letter].startswith(b" "):
                if at - start > 1:
                    yield word[start:at]
                start = at + (not fits)


def _is_foreign(piece: bytes) -> bool:
    return piece == b" " or (piece > b" " and min(piece.removeprefix(b" ")) > 127)


def _words(tokenizer: Tokenizer, texts: Iterable[str]) -> Iterator[str]:
    """Yields the words of the texts (as split by the pre-tokenizer), written in letters."""
    source = replace_surrogates(texts)
    letters: dict[int, str] = {i: _letter(i) for i in range(tokenizer.vocab_size)}
    while batch := list(islice(source, BATCH_TEXTS)):
        for encoding in tokenizer.backend.encode_batch(batch, add_special_tokens=False):
            text = "".join(map(letters.__getitem__, encoding.ids))
            numbers = encoding.word_ids
            start = 0
            for at in range(1, len(text) + 1):
                if at == len(text) or numbers[at] != numbers[start]:
                    yield text[start:at]
                    start = at


def _only_han(pieces: list[bytes], allowed: list[bool]) -> list[bool]:
    """Returns for each piece of a word whether it is allowed and covers only Han characters.

    A leading space is permitted.
    """
    text = b"".join(pieces).decode("utf-8", "surrogateescape")
    fits = b"".join(
        (b"\1" if HAN.match(char) or char == " " else b"\0")
        * len(char.encode("utf-8", "surrogateescape"))
        for char in text
    )
    ends = [0]
    for piece in pieces:
        ends.append(ends[-1] + len(piece))
    inside = [b"\0" not in fits[a:b] for a, b in pairwise(ends)]
    return [a and b for a, b in zip(allowed, inside, strict=True)]


# ---- learning


def _learn(
    words: Mapping[str, int], spelling: Mapping[str, str], wanted: int, min_frequency: int
) -> tuple[dict[str, str], list[tuple[str, str]]]:
    """Learns new pieces.

    Returns:
        The new pieces in letters, mapped to their spelling in the vocabulary, and the merges that
        produce them, in order.
    """
    alphabet = len(set().union(*words))
    spare = wanted // 4 + 64  # replaces the few pieces that would violate the invariant
    trained, merges = _train(words, alphabet + wanted + spare, min_frequency)
    pieces = _choose(trained, merges, spelling, wanted)
    known = spelling.keys() | pieces.keys()
    pairs = [(a, b) for a, b in merges if a in known and b in known and a + b in pieces]
    return pieces, pairs


def _train(
    words: Mapping[str, int], vocab_size: int, min_frequency: int
) -> tuple[list[str], list[tuple[str, str]]]:
    """Trains BPE on words in letters; returns pieces and merges, each in the order of training."""
    backend = Backend(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, min_frequency=min_frequency, show_progress=False
    )
    backend.train_from_iterator(chain.from_iterable(map(repeat, words, words.values())), trainer)
    model = json.loads(backend.to_str())["model"]
    merges = [(left, right) for left, right in model["merges"]]
    return sorted(model["vocab"], key=model["vocab"].__getitem__), merges


def _choose(
    trained: Iterable[str],
    merges: Iterable[tuple[str, str]],
    spelling: Mapping[str, str],
    wanted: int,
) -> dict[str, str]:
    """Returns the first `wanted` pieces that preserve the extension invariant.

    A piece qualifies if its spelling is not in the vocabulary and both parts of one of its merges
    are known pieces.
    """
    parts: dict[str, list[tuple[str, str]]] = {}
    for left, right in merges:
        parts.setdefault(left + right, []).append((left, right))
    taken = set(spelling.values())
    pieces: dict[str, str] = {}
    for word in trained:
        if len(pieces) == wanted:
            break
        known = (
            (a in spelling or a in pieces) and (b in spelling or b in pieces)
            for a, b in parts.get(word, ())
        )
        piece = "".join(map(spelling.__getitem__, word))
        if piece not in taken and any(known):
            pieces[word] = piece
            taken.add(piece)
    return pieces


# ---- the old tokenizer


def _num_wanted(tokenizer: Tokenizer, num_new: int | None, vocab_size: int | None) -> int:
    if (num_new is None) == (vocab_size is None):
        raise ConfigError("give exactly one of num_new and vocab_size")
    wanted = num_new if num_new is not None else (vocab_size or 0) - tokenizer.vocab_size
    if wanted < 1:
        what = f"num_new={num_new}" if vocab_size is None else f"vocab_size={vocab_size}"
        raise ConfigError(f"{what} adds nothing to {tokenizer.vocab_size} ids; raise it")
    if tokenizer.vocab_size + wanted > MAX_VOCAB_SIZE:
        raise ConfigError(
            f"{wanted:,} new pieces in addition to the {tokenizer.vocab_size:,} existing ids "
            f"exceed the maximum of {MAX_VOCAB_SIZE:,} ids; request fewer"
        )
    return wanted


def _read_state(tokenizer: Tokenizer) -> JsonObject:
    """Returns the backend as JSON, with its added tokens included in the model's vocabulary.

    This keeps the ids contiguous when new ones are appended.

    Raises:
        ConfigError: it is not byte-level BPE, or its ids are not contiguous.
    """
    state: JsonObject = json.loads(tokenizer.backend.to_str())
    model, decoder = state["model"], (state["decoder"] or {}).get("type")
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or decoder != "ByteLevel" or affixes:
        raise ConfigError(
            f"a {model['type']} tokenizer with a {decoder} decoder cannot be extended, only "
            "byte-level BPE; train a new tokenizer instead"
        )
    model["vocab"] |= {token["content"]: token["id"] for token in state["added_tokens"]}
    if len(model["vocab"]) != max(model["vocab"].values()) + 1:
        raise ConfigError(
            "the tokenizer's ids are not contiguous, so new ids cannot be appended; "
            "renumber them without gaps"
        )
    return state
