"""Tokens of documents in memory-mapped shards: what pretraining reads.

shards/tokens-00000.bin      ids end to end, little-endian uint16 (uint32 where the vocabulary is larger)
shards/offsets-00000.npy     int64, where each document begins, and the end
shards/manifest.json         dtype, tokenizer, shards with their hashes, composition: written last
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import NonNegativeInt, PositiveInt, ValidationError

from easyllm.core.atomic import output_errors, write_json
from easyllm.core.config import Config
from easyllm.core.errors import DataError
from easyllm.core.manifest import hash_file
from easyllm.tokenizer.tokenizer import Tokenizer

MANIFEST = "manifest.json"
FORMAT = "easyllm-token-shards-1"
Tokens = NDArray[np.unsignedinteger[Any]]


class ShardInfo(Config):
    """One shard: its files' stem, what it holds, and the hash of its ids."""

    tokens: NonNegativeInt
    documents: NonNegativeInt
    sha256: str


class ShardsManifest(Config):
    """What a folder of shards says of itself.

    Attributes:
        tokenizer: `Tokenizer.fingerprint` of the one that made the ids.
        end_id: the id behind every document, where there is one.
        composition: tokens, documents and epochs of each source.
    """

    format: str = FORMAT
    dtype: str
    vocab_size: PositiveInt
    tokenizer: str
    end_id: int | None
    bytes_of_text: NonNegativeInt
    shards: tuple[ShardInfo, ...]
    composition: dict[str, dict[str, float]]

    @property
    def tokens(self) -> int:
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        return sum(shard.documents for shard in self.shards)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """uint16 while every id fits, else uint32; little-endian on every machine."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class ShardWriter:
    """Writes documents' ids to shards of about `shard_tokens` in a folder (an atomic one, so that all of it counts or
    nothing)."""

    def __init__(self, folder: Path, *, vocab_size: int, shard_tokens: int) -> None:
        self.folder, self.shard_tokens = folder, shard_tokens
        self.dtype, self.vocab_size = token_dtype(vocab_size), vocab_size
        self.infos: list[ShardInfo] = []
        self._parts: list[Tokens] = []
        self._filled = 0

    def add(self, ids: Tokens) -> None:
        """Appends one document; a document never crosses shards."""
        if self._parts and self._filled + len(ids) > self.shard_tokens:
            self._write()
        self._parts.append(ids.astype(self.dtype))
        self._filled += len(ids)

    def finish(
        self,
        tokenizer: Tokenizer,
        *,
        end_id: int | None,
        bytes_of_text: int,
        composition: dict[str, dict[str, float]],
    ) -> ShardsManifest:
        """Writes what is left, and the manifest."""
        self._write()
        manifest = ShardsManifest(
            dtype=self.dtype.str,
            vocab_size=self.vocab_size,
            tokenizer=tokenizer.fingerprint,
            end_id=end_id,
            bytes_of_text=bytes_of_text,
            shards=tuple(self.infos),
            composition=composition,
        )
        write_json(self.folder / MANIFEST, manifest.model_dump(mode="json"))
        return manifest

    def _write(self) -> None:
        if not self._parts:
            return
        tokens_file, offsets_file = _files(self.folder, len(self.infos))
        offsets = np.cumsum([0, *(len(part) for part in self._parts)], dtype=np.int64)
        with output_errors(tokens_file):
            self.folder.mkdir(parents=True, exist_ok=True)
            with tokens_file.open("wb") as file:
                for part in self._parts:
                    part.tofile(file)
            np.save(offsets_file, offsets)
        self.infos.append(
            ShardInfo(
                tokens=self._filled, documents=len(self._parts), sha256=hash_file(tokens_file)
            )
        )
        self._parts, self._filled = [], 0


class TokenShards:
    """Shards opened for reading; ids stay on disk until they are asked for.

    Args:
        folder: where a manifest lies.
        tokenizer: the one in use; ids of another would be nonsense.

    Raises:
        DataError: no shards there, damaged ones, or ones of another tokenizer.
    """

    def __init__(self, folder: Path, *, tokenizer: Tokenizer | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if tokenizer is not None and tokenizer.fingerprint != self.manifest.tokenizer:
            raise DataError(
                f"{str(folder)!r} was packed with another tokenizer (vocabulary of {self.manifest.vocab_size}, "
                f"fingerprint {self.manifest.tokenizer[:12]}; the model's has {tokenizer.vocab_size}, "
                f"{tokenizer.fingerprint[:12]}); build the data again with this model's tokenizer"
            )
        self._tokens, self._offsets = self._open()
        counts = [len(offsets) - 1 for offsets in self._offsets]
        self._first = np.cumsum([0, *counts])

    def __len__(self) -> int:
        """Documents in all shards."""
        return int(self._first[-1])

    def document(self, number: int) -> Tokens:
        """The ids of one document, end token included."""
        return self.documents(np.array([number]))[0]

    def documents(self, numbers: NDArray[np.int64]) -> list[Tokens]:
        """The ids of several, each a view of the file: what is not looked at is not read."""
        shards = np.searchsorted(self._first, numbers, side="right") - 1
        places = (numbers - self._first[shards]).tolist()
        found = []
        for shard, place in zip(shards.tolist(), places, strict=True):
            begin, end = self._offsets[shard][place : place + 2].tolist()
            found.append(self._tokens[shard][begin:end])
        return found

    def lengths(self) -> NDArray[np.int64]:
        """Ids of every document."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets] or [np.empty(0, int)])

    def __iter__(self) -> Iterator[Tokens]:
        return (self.document(number) for number in range(len(self)))

    def verify(self) -> None:
        """Reads every shard and compares its hash.

        Raises:
            DataError: one was changed or damaged.
        """
        for number, info in enumerate(self.manifest.shards):
            file, _ = _files(self.folder, number)
            if hash_file(file) != info.sha256:
                raise DataError(f"{file} is not what was written; build the data again")

    def _open(self) -> tuple[list[Tokens], list[NDArray[np.int64]]]:
        tokens: list[Tokens] = []
        offsets: list[NDArray[np.int64]] = []
        dtype = np.dtype(self.manifest.dtype)
        for number, info in enumerate(self.manifest.shards):
            tokens_file, offsets_file = _files(self.folder, number)
            try:
                size = tokens_file.stat().st_size
                bounds = np.load(offsets_file, allow_pickle=False)
            except (OSError, ValueError) as error:
                raise DataError(f"{tokens_file} cannot be read ({error}); build again") from None
            whole = size == info.tokens * dtype.itemsize and len(bounds) == info.documents + 1
            if not whole or bounds[-1] != info.tokens or (np.diff(bounds) < 0).any():
                raise DataError(
                    f"{tokens_file} holds {size} bytes, expected {info.tokens} tokens; build again"
                )
            mapped = np.memmap(tokens_file, dtype=dtype, mode="r") if size else np.empty(0, dtype)
            tokens.append(mapped.view(np.ndarray))  # slicing a plain array is several times faster
            offsets.append(bounds)
        return tokens, offsets


def read_manifest(folder: Path) -> ShardsManifest:
    """The manifest of a folder of shards.

    Raises:
        DataError: there is none, or it is not one.
    """
    path = folder / MANIFEST
    inside = folder / "shards"
    if (inside / MANIFEST).is_file():
        raise DataError(
            f"folder {str(folder)!r} holds a corpus, and its token shards one further in; name {str(inside)!r}"
        )
    if not path.is_file():
        raise DataError(
            f"folder {str(folder)!r} holds no {MANIFEST} of token shards; name one that `easyllm data build` made"
        )
    try:
        return ShardsManifest.model_validate(json.loads(path.read_text("utf-8")))
    except ValidationError as error:
        first = error.errors()[0]
        why = f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    except ValueError as error:
        why = str(error)
    raise DataError(f"{path} is no manifest of shards ({why}); build again")


def write_shards(
    folder: Path,
    documents: Iterable[Sequence[int] | Tokens],
    tokenizer: Tokenizer,
    *,
    end_id: int | None = None,
    shard_tokens: int = 2**27,
) -> ShardsManifest:
    """Shards of documents already tokenized."""
    writer = ShardWriter(folder, vocab_size=tokenizer.vocab_size, shard_tokens=shard_tokens)
    for ids in documents:
        writer.add(np.asarray(ids))
    return writer.finish(tokenizer, end_id=end_id, bytes_of_text=0, composition={})


def _files(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"tokens-{number:05d}.bin", folder / f"offsets-{number:05d}.npy"
