"""Control tokens, and encoding text in which some of their names are ordinary text.

A tokenizer replaces every name of an added token in a text by that token. In a rendered chat only
the names that the template wrote may become tokens; a name in a user's text is text. Text cannot
tell the two apart, so the second kind is disguised before rendering (`user_text`): one character of
each such name is replaced by a private-use character. `ControlTokens.encode` encodes the disguised
rendering in two steps:

1. The tokenizer itself finds the names that are not disguised: the template's own.
2. A copy of the tokenizer, in which every control token has a secret name, encodes the text with
   the disguise removed and each of the template's own tokens under its secret name.

The copy knows no name that occurs in a text, and is otherwise the same tokenizer: normalisation,
splitting, spaces at the beginning and the whitespace that tokens remove are those of the original.
"""

import json
import re
import secrets
from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from threading import Lock

from tokenizers import Encoding, models
from tokenizers import Tokenizer as Backend

from easyllm.core.json_types import Json, JsonObject

Span = tuple[int, int]

_MARKUP = re.compile(r"[<\[{(|｜]\S+[>\])}|｜]")
_HTML = re.compile(
    r"</?(a|b|blockquote|body|br|caption|code|div|em|h[1-6]|head|hr|html|i|img|li|ol|p|pre|span|"
    r"strong|sub|sup|table|tbody|td|tfoot|th|thead|tr|u|ul) ?/?>"
)
_MIN_PART = 2
"""Minimum length of a part of a name at the border of a text that counts as an occurrence."""


@dataclass(frozen=True, slots=True)
class _Name:
    """A control token."""

    text: str
    token_id: int
    is_special: bool
    is_normalised: bool


class ControlTokens:
    """The control tokens of a tokenizer.

    These are its special tokens, and those other added tokens whose names are markup, such as
    `<tool_call>`. Added words, runs of spaces and HTML elements are ordinary vocabulary.

    Args:
        backend: the tokenizer.

    Attributes:
        names: the names of the special tokens, in the order of their ids.
    """

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._names = {
            token_id: _Name(token.content, token_id, token.special, token.normalized)
            for token_id, token in sorted(backend.get_added_tokens_decoder().items())
            if _is_control(token.content, is_special=token.special)
        }
        self.names = tuple(name.text for name in self._names.values() if name.is_special)
        self._all = _Finder([name.text for name in self._names.values()])
        self._special = _Finder(self.names)
        # a normaliser may turn other characters into a name, which a token that is normalised, or
        # a model whose vocabulary contains whole words, then matches
        self._is_normalising = backend.normalizer is not None and (
            not isinstance(backend.model, models.BPE)
            or any(name.is_normalised for name in self._names.values())
        )
        self._lock = Lock()

    def positions(self, text: str, *, special_only: bool = False, parts: bool = True) -> set[int]:
        """Returns the positions at which a character must change so that no name occurs.

        Args:
            text: a string of a conversation.
            special_only: whether names of tokens that are not special are left alone.
            parts: whether a name of which only a part is in the text, at its beginning or end,
                counts too, because the neighbouring text may complete it.
        """
        finder = self._special if special_only else self._all
        found = finder.positions(text, parts=parts)
        if self._is_normalising:
            found |= self._normalised_positions(text, special_only)
        return found

    def encode(self, text: str, originals: Mapping[str, str]) -> tuple[list[int], list[Span]]:
        """Returns the ids of a disguised text without BOS or EOS, and their character spans.

        Args:
            text: the text; a name with a disguised character is ordinary text.
            originals: for each private-use character of the disguise, the character it replaces;
                each is one character, so positions in `text` hold for the plain text too.
        """
        encoding, borders = self._encoding(text, originals)
        moved = _Moved(borders)
        spans = [(moved(begin), moved(end)) for begin, end in encoding.offsets]
        return self._ids(encoding), spans

    def encode_ids(self, text: str, originals: Mapping[str, str]) -> list[int]:
        """Returns the ids of a disguised text as `encode` does, without their spans."""
        return self._ids(self._encoding(text, originals)[0])

    def _ids(self, encoding: Encoding) -> list[int]:
        ids: list[int] = encoding.ids
        changed = self._original_ids
        return [changed.get(token_id, token_id) for token_id in ids] if changed else ids

    def _encoding(self, text: str, originals: Mapping[str, str]) -> tuple[Encoding, list[Span]]:
        """Returns the encoding of the text with secret names, and the borders for `_Moved`."""
        text = text.encode("utf-8", "replace").decode("utf-8")  # lone surrogates become "?"
        plain = text.translate({ord(private): original for private, original in originals.items()})
        pieces, borders, length, at = list[str](), [(0, 0)], 0, 0
        for token_id, (begin, end) in self._own(text):
            if not originals.keys().isdisjoint(text[begin:end]):
                continue  # a name only for a normaliser that removes private-use characters
            pieces += [plain[at:begin], self._secret_names[token_id]]
            length += begin - at + len(pieces[-1])
            at = end
            borders.append((length, at))
        pieces.append(plain[at:])
        return self._renamed.encode("".join(pieces), add_special_tokens=False), borders

    def _own(self, text: str) -> Iterator[tuple[int, Span]]:
        """Yields the control tokens in a disguised text, each with the span of its name."""
        encoding = self._backend.encode(text, add_special_tokens=False)
        found = [(at, i) for at, i in enumerate(encoding.ids) if i in self._names]
        offsets = encoding.offsets if found else []
        for at, token_id in found:
            span = self._named(text, token_id, *offsets[at])
            if span is not None:
                yield token_id, span

    def _named(self, text: str, token_id: int, begin: int, end: int) -> Span | None:
        """Returns where in a control token's span its name is; None if it is not there.

        The span may include whitespace that the token removes; the unknown token's has other text.
        """
        name = self._names[token_id]
        at = text.find(name.text, begin, end)
        if at >= 0:
            return at, at + len(name.text)
        words = text[begin:end]
        if not self._is_normalising or not words.strip():
            return None
        normalise = self._backend.normalizer.normalize_str
        if normalise(words.strip()).strip() != normalise(name.text).strip():
            return None
        first = begin + len(words) - len(words.lstrip())
        return first, first + len(words.strip())

    def _normalised_positions(self, text: str, special_only: bool) -> set[int]:
        """Returns the positions of names that only the normalised text contains."""
        text = text.encode("utf-8", "replace").decode("utf-8")
        return {
            begin
            for token_id, (begin, _) in self._own(text)
            if self._names[token_id].is_special or not special_only
        }

    @cached_property
    def _secret_names(self) -> dict[int, str]:
        nonce = secrets.token_hex(8)  # no text contains it
        width = len(str(len(self._names)))
        return {
            token_id: f"<{nonce}{number:0{width}}>" for number, token_id in enumerate(self._names)
        }

    @property
    def _renamed(self) -> Backend:
        """The copy of the tokenizer with secret names; built once, which may take seconds."""
        with self._lock:
            return self._copy

    @cached_property
    def _copy(self) -> Backend:
        secret = {name.text: self._secret_names[i] for i, name in self._names.items()}
        return _renamed_copy(self._backend, secret)

    @cached_property
    def _original_ids(self) -> dict[int, int]:
        """Maps ids of the copy that differ from the original's to these."""
        ids = [(self._renamed.token_to_id(n), i) for i, n in self._secret_names.items()]
        return {new: old for new, old in ids if new is not None and new != old}


def without_special_tokens(backend: Backend) -> Backend:
    """Returns a copy of a tokenizer that encodes the names of special tokens as ordinary text.

    The vocabulary of a model of whole words or pieces (unigram) contains these names, so that it
    would find them in a text itself.
    """
    special = [t.content for t in backend.get_added_tokens_decoder().values() if t.special]
    nonce = secrets.token_hex(8)
    is_bpe = isinstance(backend.model, models.BPE)
    names = {} if is_bpe else {name: f"<{nonce}{n}>" for n, name in enumerate(special)}
    copy = _renamed_copy(backend, names)
    copy.encode_special_tokens = True
    return copy


class _Finder:
    """Finds names, and parts of names at the border of a text."""

    def __init__(self, names: Sequence[str]) -> None:
        first = re.escape("".join({name[0] for name in names}))
        self._first = re.compile(f"[{first}]" if first else r"(?!)")
        self._names = re.compile("|".join(map(re.escape, names)) or r"(?!)")
        self._beginnings = {name[:n] for name in names for n in range(_MIN_PART, len(name))}
        self._ends = {name[n:] for name in names for n in range(1, len(name) - _MIN_PART + 1)}
        self._longest = max(map(len, names), default=0)

    def positions(self, text: str, *, parts: bool) -> set[int]:
        """Returns the position of a visible character of each name, of names that overlap too."""
        starts = (match.start() for match in self._first.finditer(text))
        found = {_first_visible(text, at) for at in starts if self._names.match(text, at)}
        return found | self._parts(text) if parts else found

    def _parts(self, text: str) -> set[int]:
        begin, end = len(text) - len(text.lstrip()), len(text.rstrip())
        lengths = range(_MIN_PART, min(self._longest, end - begin + 1))
        found = {end - n for n in lengths if text[end - n : end] in self._beginnings}
        if any(text[begin : begin + n] in self._ends for n in lengths):
            found.add(begin)
        return found


def _is_control(name: str, *, is_special: bool) -> bool:
    if not name.strip():
        return False
    if is_special:
        return True
    return _MARKUP.fullmatch(name) is not None and _HTML.fullmatch(name) is None


def _first_visible(text: str, position: int) -> int:
    while text[position].isspace():
        position += 1
    return position


class _Moved:
    """Maps positions of the text with secret names to positions of the plain text.

    Args:
        borders: (0, 0), then for each secret name its end in the first text and in the second.
    """

    def __init__(self, borders: list[Span]) -> None:
        self._borders = borders
        self._ends = [end for end, _ in borders]

    def __call__(self, position: int) -> int:
        secret, plain = self._borders[bisect_right(self._ends, position) - 1]
        return plain + position - secret


def _renamed_copy(backend: Backend, names: Mapping[str, str]) -> Backend:
    serialised = backend.to_str()
    copy = Backend.from_str(_rename(serialised, names) if names else serialised)
    copy.encode_special_tokens = backend.encode_special_tokens
    return copy


def _rename(serialised: str, names: Mapping[str, str]) -> str:
    """Returns a serialised tokenizer in which tokens have other names.

    Merges that would build one of the old names are dropped, so that no text is encoded as it.
    """
    data: JsonObject = json.loads(serialised)
    for token in data["added_tokens"]:
        if token["content"] in names:
            # its neighbours no longer decide: only places where it matched carry the new name
            token |= {"content": names[token["content"]], "single_word": False}
    model = data["model"]
    if isinstance(model.get("vocab"), dict):
        model["vocab"] = {names.get(name, name): i for name, i in model["vocab"].items()}
    elif model.get("vocab"):
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if model.get("merges"):
        model["merges"] = [m for m in model["merges"] if not _makes(m, names)]
    return json.dumps(data)


def _makes(merge: Json, names: Mapping[str, str]) -> bool:
    """Whether a merge (two pieces, or their text with a space between) uses or builds a name."""
    first, second = merge.split(" ", 1) if isinstance(merge, str) else merge
    return first in names or second in names or first + second in names
