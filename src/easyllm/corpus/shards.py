"""Memory-mapped token shards, the input of pretraining.

shards/tokens-00000.bin      concatenated token ids of the documents, little-endian uint16, or
                             uint32 for larger vocabularies
shards/offsets-00000.npy     int64, the start of each document, and the end
shards/manifest.json         dtype, tokenizer, shards with their hashes, composition; written last
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from pydantic import Field, NonNegativeInt, PositiveInt, ValidationError

from easyllm.core.atomic import output_errors, write_json
from easyllm.core.config import Config, first_problem
from easyllm.core.errors import DataError
from easyllm.core.manifest import hash_file
from easyllm.tokenizer.tokenizer import Tokenizer

MANIFEST = "manifest.json"
FORMAT = "easyllm-token-shards-1"
Tokens = NDArray[np.unsignedinteger[Any]]


class ShardInfo(Config):
    """One shard: its numbers of tokens and documents, and the SHA-256 of its tokens file."""

    tokens: NonNegativeInt = Field(description="Number of tokens.")
    documents: NonNegativeInt = Field(description="Number of documents.")
    sha256: str = Field(description="SHA-256 of the tokens file.")


class ShardsManifest(Config):
    """The manifest of a folder of token shards."""

    format: str = Field(FORMAT, description="Name of the file format.")
    dtype: str = Field(description="Numpy dtype of the token ids.")
    vocab_size: PositiveInt = Field(description="Size of the vocabulary.")
    tokenizer: str = Field(
        description="`Tokenizer.fingerprint` of the tokenizer that produced the ids."
    )
    end_id: int | None = Field(
        description="The id appended to every document; None if there is none."
    )
    bytes_of_text: NonNegativeInt = Field(description="Number of UTF-8 bytes of the documents.")
    shards: tuple[ShardInfo, ...] = Field(description="The shards, in order.")
    composition: dict[str, dict[str, float]] = Field(
        description="Tokens, documents and epochs of each source."
    )

    @property
    def tokens(self) -> int:
        """The number of tokens in all shards."""
        return sum(shard.tokens for shard in self.shards)

    @property
    def documents(self) -> int:
        """The number of documents in all shards."""
        return sum(shard.documents for shard in self.shards)


def token_dtype(vocab_size: int) -> np.dtype[Any]:
    """Returns little-endian uint16 if every id fits, else little-endian uint32."""
    return np.dtype("<u2" if vocab_size <= 2**16 else "<u4")


class ShardWriter:
    """Writes the token ids of documents to shards.

    Args:
        folder: where to write; use an atomic folder, so that a partial result is never visible.
        vocab_size: size of the vocabulary, which determines the dtype.
        shard_tokens: maximum number of tokens per shard, exceeded only by a longer document.
    """

    def __init__(self, folder: Path, *, vocab_size: int, shard_tokens: int) -> None:
        self.folder, self.shard_tokens = folder, shard_tokens
        self.dtype, self.vocab_size = token_dtype(vocab_size), vocab_size
        self.infos: list[ShardInfo] = []
        self._parts: list[Tokens] = []
        self._filled = 0

    def add(self, ids: Tokens) -> None:
        """Appends one document; a document is never split across shards."""
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
        """Writes the last shard and the manifest.

        Args:
            tokenizer: the tokenizer that produced the ids.
            end_id: the id appended to every document; None if there is none.
            bytes_of_text: number of UTF-8 bytes of the documents.
            composition: tokens, documents and epochs of each source.
        """
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
    """Token shards opened for reading; the token ids are memory-mapped.

    Args:
        folder: the folder that contains the manifest.
        tokenizer: the tokenizer in use, which must be the one that produced the ids.

    Raises:
        DataError: the folder contains no shards, or damaged ones, or ones of another tokenizer.
    """

    def __init__(self, folder: Path, *, tokenizer: Tokenizer | None = None) -> None:
        self.folder = Path(folder)
        self.manifest = read_manifest(self.folder)
        if tokenizer is not None and tokenizer.fingerprint != self.manifest.tokenizer:
            raise DataError(
                f"{str(folder)!r} was packed with another tokenizer (vocabulary of "
                f"{self.manifest.vocab_size}, fingerprint {self.manifest.tokenizer[:12]}; the "
                f"model's has {tokenizer.vocab_size}, {tokenizer.fingerprint[:12]}); build the "
                "data again with this model's tokenizer"
            )
        self._tokens, self._offsets = self._open()
        counts = [len(offsets) - 1 for offsets in self._offsets]
        self._first = np.cumsum([0, *counts])

    def __len__(self) -> int:
        """Returns the number of documents in all shards."""
        return int(self._first[-1])

    def document(self, number: int) -> Tokens:
        """Returns the token ids of one document, including the end token."""
        return self.documents(np.array([number]))[0]

    def documents(self, numbers: NDArray[np.int64]) -> list[Tokens]:
        """Returns the token ids of several documents.

        Each is a view of the memory-mapped file, so pages that are not accessed are not read.
        """
        shards = np.searchsorted(self._first, numbers, side="right") - 1
        places = (numbers - self._first[shards]).tolist()
        found = []
        for shard, place in zip(shards.tolist(), places, strict=True):
            begin, end = self._offsets[shard][place : place + 2].tolist()
            found.append(self._tokens[shard][begin:end])
        return found

    def lengths(self) -> NDArray[np.int64]:
        """Returns [n] int64, the number of tokens of every document."""
        return np.concatenate([np.diff(offsets) for offsets in self._offsets] or [np.empty(0, int)])

    def __iter__(self) -> Iterator[Tokens]:
        return (self.document(number) for number in range(len(self)))

    def verify(self) -> None:
        """Reads every shard and verifies its hash.

        Raises:
            DataError: a shard was modified or is damaged.
        """
        for number, info in enumerate(self.manifest.shards):
            file, _ = _files(self.folder, number)
            if hash_file(file) != info.sha256:
                raise DataError(
                    f"{file} was modified or is damaged (its hash differs from the manifest); "
                    "build the data again"
                )

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
                raise DataError(
                    f"{tokens_file} cannot be read ({error}); build the data again"
                ) from None
            whole = size == info.tokens * dtype.itemsize and len(bounds) == info.documents + 1
            if not whole or bounds[-1] != info.tokens or (np.diff(bounds) < 0).any():
                raise DataError(
                    f"{tokens_file} has {size} bytes, expected {info.tokens} tokens; "
                    "build the data again"
                )
            mapped = np.memmap(tokens_file, dtype=dtype, mode="r") if size else np.empty(0, dtype)
            tokens.append(mapped.view(np.ndarray))  # slicing a plain array is several times faster
            offsets.append(bounds)
        return tokens, offsets


def read_manifest(folder: Path) -> ShardsManifest:
    """Reads the manifest of a folder of shards.

    Raises:
        DataError: the folder has no manifest, or an invalid one.
    """
    path = folder / MANIFEST
    inside = folder / "shards"
    if (inside / MANIFEST).is_file():
        raise DataError(
            f"folder {str(folder)!r} contains a corpus, whose token shards are in a subfolder; "
            f"name {str(inside)!r}"
        )
    if not path.is_file():
        raise DataError(
            f"folder {str(folder)!r} contains no {MANIFEST} of token shards; "
            "name a folder built by `easyllm data build`"
        )
    try:
        return ShardsManifest.model_validate(json.loads(path.read_text("utf-8")))
    except ValueError as error:
        why = first_problem(error) if isinstance(error, ValidationError) else str(error)
    raise DataError(f"{path} is not a manifest of token shards ({why}); build the data again")


def write_shards(
    folder: Path,
    documents: Iterable[Sequence[int] | Tokens],
    tokenizer: Tokenizer,
    *,
    end_id: int | None = None,
    shard_tokens: int = 2**27,
) -> ShardsManifest:
    """Writes shards of tokenized documents, and returns their manifest.

    Args:
        folder: where to write.
        documents: the token ids of each document.
        tokenizer: the tokenizer that produced the ids.
        end_id: the id appended to every document; None if there is none.
        shard_tokens: maximum number of tokens per shard, exceeded only by a longer document.
    """
    writer = ShardWriter(folder, vocab_size=tokenizer.vocab_size, shard_tokens=shard_tokens)
    for ids in documents:
        writer.add(np.asarray(ids))
    return writer.finish(tokenizer, end_id=end_id, bytes_of_text=0, composition={})


def _files(folder: Path, number: int) -> tuple[Path, Path]:
    return folder / f"tokens-{number:05d}.bin", folder / f"offsets-{number:05d}.npy"
