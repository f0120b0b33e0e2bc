"""New pieces for an old tokenizer, without touching what it does to the text it was made for.

Byte-level BPE goes on where its training stopped: the new text is encoded with the old tokenizer, and further merges
are learned over the old tokens. (Cui et al. 2023, arXiv 2304.08177, add a second tokenizer's vocabulary instead, which
changes how old text is cut.) The new merges stand behind all old ones, so encoding is the old encoding followed by
the new merges, and

    a text's new ids, each written as its old pieces, are the text's old ids        (the law of extension)

To keep the law, a merge is left out whose result the vocabulary holds already (a piece that its own merges never make),
and what is built on it. Every new piece holds a byte above 127, so text in ASCII keeps its ids.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import chain, islice, pairwise, repeat
from typing import Any, Literal

from tokenizers import Tokenizer as Backend
from tokenizers import models, trainers

from easyllm.core.errors import ConfigError, DataError
from easyllm.tokenizer.report import HAN
from easyllm.tokenizer.token_bytes import byte_values
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.tokenizer.train import MAX_VOCAB_SIZE, sound

Script = Literal["non_ascii", "han"]
SCRIPTS: tuple[Script, ...] = ("non_ascii", "han")
BATCH_TEXTS = 256


@dataclass(frozen=True, slots=True)
class Extension:
    """A tokenizer with more pieces.

    Attributes:
        old_pieces: for each new id, in order, the old ids that stood for its text before.
    """

    tokenizer: Tokenizer
    old_pieces: Mapping[int, tuple[int, ...]]

    @property
    def num_new(self) -> int:
        """How many pieces were added."""
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
    """The tokenizer with pieces learned from `texts` behind its own.

    Args:
        texts: in the language to add; read once.
        num_new: how many pieces to add; or
        vocab_size: how many ids to have in the end. A small corpus may give fewer.
        script: learn from all text beyond ASCII, or from Han characters alone.
        min_frequency: pairs rarer than this are not merged.

    Raises:
        ConfigError: the tokenizer is not byte-level BPE, or the numbers add nothing.
        DataError: the texts hold nothing to learn from.
    """
    wanted = _num_wanted(tokenizer, num_new, vocab_size)
    state = _read_state(tokenizer)
    vocab, merges = state["model"]["vocab"], state["model"]["merges"]
    spelling = {_letter(index): piece for piece, index in vocab.items()}
    words = Counter(_foreign_runs(tokenizer, texts, spelling, script))
    if not words:
        what = "Han characters" if script == "han" else "text beyond ASCII"
        raise DataError(f"the texts hold no {what} to learn from; name texts in the new language")
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


# ---- an old id as a letter, so that old tokens in a row are a word to learn merges on


def _letter(index: int) -> str:
    return chr(index if index < 0xD800 else index + 0x800)  # around the surrogates


def _ids(word: str) -> tuple[int, ...]:
    codes = map(ord, word)
    return tuple(code if code < 0xD800 else code - 0x800 for code in codes)


def _foreign_runs(
    tokenizer: Tokenizer, texts: Iterable[str], spelling: Mapping[str, str], script: Script
) -> Iterator[str]:
    """Stretches of letters, each inside one word of the text, that new merges may join.

    They hold bytes above 127 only; a space may stand in front, because words carry theirs with them.
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
    """The texts' words (what the pre-tokenizer cuts) in letters."""
    source = sound(texts)
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
    """Of the pieces of one word, those that touch no other character than Han ones (and a space in front)."""
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
    """New pieces in letters, with their spelling in the vocabulary, and the merges that make them, in order."""
    alphabet = len(set().union(*words))
    spare = wanted // 4 + 64  # for the few pieces that would break the law
    trained, merges = _train(words, alphabet + wanted + spare, min_frequency)
    pieces = _choose(trained, merges, spelling, wanted)
    known = spelling.keys() | pieces.keys()
    pairs = [(a, b) for a, b in merges if a in known and b in known and a + b in pieces]
    return pieces, pairs


def _train(
    words: Mapping[str, int], vocab_size: int, min_frequency: int
) -> tuple[list[str], list[tuple[str, str]]]:
    """Byte pair encoding on words in letters: pieces and merges, each in the order they were made."""
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
    """The first `wanted` pieces that keep the law: the vocabulary does not spell them, and so it is with their parts."""
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
        raise ConfigError("give either num_new or vocab_size, and not both")
    wanted = num_new if num_new is not None else (vocab_size or 0) - tokenizer.vocab_size
    if wanted < 1:
        what = f"num_new={num_new}" if vocab_size is None else f"vocab_size={vocab_size}"
        raise ConfigError(f"{what} adds nothing to {tokenizer.vocab_size} ids; raise it")
    if tokenizer.vocab_size + wanted > MAX_VOCAB_SIZE:
        raise ConfigError(
            f"{wanted:,} new pieces make more than {MAX_VOCAB_SIZE:,} ids with the {tokenizer.vocab_size:,} there are; "
            "ask for fewer"
        )
    return wanted


def _read_state(tokenizer: Tokenizer) -> dict[str, Any]:
    """The backend as JSON, its added tokens in the model's vocabulary too, so that new ids follow without a hole.

    Raises:
        ConfigError: it is not byte-level BPE.
    """
    state: dict[str, Any] = json.loads(tokenizer.backend.to_str())
    model, decoder = state["model"], (state["decoder"] or {}).get("type")
    affixes = model.get("continuing_subword_prefix") or model.get("end_of_word_suffix")
    if model["type"] != "BPE" or decoder != "ByteLevel" or affixes:
        raise ConfigError(
            f"a {model['type']} tokenizer with a {decoder} decoder cannot be extended, only byte-level BPE; "
            "train a new tokenizer instead"
        )
    model["vocab"] |= {token["content"]: token["id"] for token in state["added_tokens"]}
    if len(model["vocab"]) != max(model["vocab"].values()) + 1:
        raise ConfigError(
            "the tokenizer's ids have holes, so new ids cannot follow; save it without"
        )
    return state
