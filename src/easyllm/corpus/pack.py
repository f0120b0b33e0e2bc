"""Packs a corpus: samples the documents of each source by the mixture and writes the shards."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from easyllm.core.atomic import atomic_directory
from easyllm.core.progress import Progress
from easyllm.corpus.config import CorpusConfig
from easyllm.corpus.mixture import Composition, choose_documents, plan_tokens
from easyllm.corpus.shards import ShardWriter
from easyllm.corpus.token_pool import TokenPool
from easyllm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class Packed:
    """What the shards contain of each source.

    Attributes:
        composition: source name -> its part of the mixture.
        held_out: source name -> number of documents held out for validation.
    """

    composition: dict[str, Composition]
    held_out: dict[str, int]


def pack(
    config: CorpusConfig,
    tokenizer: Tokenizer,
    stems: Mapping[str, Sequence[Path]],
    output: Path,
    *,
    end_id: int | None,
) -> Packed:
    """Samples documents from every source and writes the shards.

    Args:
        config: the recipe of the corpus.
        tokenizer: the tokenizer that produced the token ids.
        stems: for each source, the path stems of the token ids of its splits.
        output: the folder of the shards; held-out documents are written to its `validation` folder.
        end_id: the id at the end of every document, if any.

    Returns:
        For each source, the composition of the mixture, and the number of held-out documents.

    Raises:
        ConfigError: the mixture names an unknown source, or a source with a weight is empty.
    """
    pools = {name: TokenPool(paths, tokenizer) for name, paths in stems.items()}
    generator = np.random.default_rng([config.seed, config.mixture.seed])
    share, tail = config.pack.holdout, config.pack.holdout_tail
    held = {
        n: pool.hold_out_tail(share) if tail else pool.hold_out(share, generator)
        for n, pool in pools.items()
    }
    wanted = plan_tokens(config.mixture, {n: pool.tokens for n, pool in pools.items()})
    chosen = {
        n: pool.numbers[choose_documents(pool.lengths[pool.numbers], wanted[n], generator)]
        for n, pool in pools.items()
    }
    composition = {
        n: Composition(
            wanted=wanted[n],
            tokens=int(pools[n].lengths[numbers].sum()),
            available=pools[n].tokens,
            documents=len(numbers),
        )
        for n, numbers in chosen.items()
    }
    writing = _Writing(pools, tokenizer, config.pack.shard_tokens, end_id, generator)
    with atomic_directory(output, replace=True) as work:
        writing.write(work, chosen, composition)
        if any(len(numbers) for numbers in held.values()):
            writing.write(work / "validation", held, {})
    held_out = {n: len(numbers) for n, numbers in held.items()}
    return Packed(composition=composition, held_out=held_out)


@dataclass(frozen=True, slots=True)
class _Writing:
    """What the shards of the training and of the held-out documents have in common."""

    pools: Mapping[str, TokenPool]
    tokenizer: Tokenizer
    shard_tokens: int
    end_id: int | None
    generator: np.random.Generator

    def write(
        self,
        folder: Path,
        chosen: Mapping[str, NDArray[np.int64]],
        composition: Mapping[str, Composition],
    ) -> None:
        """Writes the chosen documents of all sources in one shuffled order."""
        names = list(chosen)
        sources = np.repeat(np.arange(len(names)), [len(chosen[name]) for name in names])
        numbers = np.concatenate([chosen[name] for name in names])
        vocab_size = self.tokenizer.vocab_size
        writer = ShardWriter(folder, vocab_size=vocab_size, shard_tokens=self.shard_tokens)
        size = 0
        with Progress("packing", total=len(numbers), unit="document") as progress:
            for i in self.generator.permutation(len(numbers)):
                pool = self.pools[names[sources[i]]]
                writer.add(pool.document(int(numbers[i])))
                size += int(pool.bytes[numbers[i]])
                progress.advance()
        writer.finish(
            self.tokenizer,
            end_id=self.end_id,
            bytes_of_text=size,
            composition={name: part.as_dict() for name, part in composition.items()},
        )
