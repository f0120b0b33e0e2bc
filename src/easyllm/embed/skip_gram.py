"""Word vectors by skip-gram with negative sampling, trained from scratch.

    L = -log σ(u_o·v_c) - Σ_k log σ(-u_k·v_c)      c: centre word, o: a word near it, k: noise words

Mikolov et al. 2013 (arXiv 1310.4546, eq. 4): noise words are drawn from the unigram distribution
to the power ¾, frequent words are left out with probability 1 - √(t / f) (eq. 5), and the window
of each centre word is drawn from 1 to its maximum. A centre's vector is looked up, which equals the
product of its one-hot vector and the table.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.core.errors import DataError
from easyllm.core.progress import Progress
from easyllm.embed.word_config import SkipGramConfig
from easyllm.embed.word_vectors import WordVectors

Array = np.ndarray[Any, Any]
NOISE_POWER = 0.75


def train_word_vectors(
    sentences: Iterable[Sequence[str]], config: SkipGramConfig | None = None
) -> WordVectors:
    """Trains word vectors.

    Args:
        sentences: texts as words; a window does not reach beyond a text.
        config: the settings.

    Raises:
        DataError: fewer than two words occur often enough.
    """
    config = config or SkipGramConfig()
    texts = [list(words) for words in sentences]
    counted = Counter(word for words in texts for word in words)
    kept = [(word, n) for word, n in counted.most_common() if n >= config.min_count]
    if len(kept) < 2:
        raise DataError(
            f"{len(kept)} words occur at least {config.min_count} times, expected 2; give more "
            "text, or lower min_count"
        )
    number = {word: i for i, (word, _) in enumerate(kept)}
    encoded = [np.asarray([number[w] for w in words if w in number], np.int64) for words in texts]
    counts = np.asarray([n for _, n in kept], np.float64)
    model = SkipGram(len(kept), config.dim, torch.Generator().manual_seed(config.seed))
    _fit(model, encoded, counts, config)
    return WordVectors(tuple(number), model.centre.weight.detach().numpy())


class SkipGram(nn.Module):
    """The tables of centre and context vectors.

    Args:
        num_words: size of the vocabulary.
        dim: number of dimensions.
        generator: of the initial centre vectors, uniform in ±½ / dim; context vectors are 0.
    """

    def __init__(self, num_words: int, dim: int, generator: torch.Generator) -> None:
        super().__init__()
        self.centre = nn.Embedding(num_words, dim, sparse=True)
        self.context = nn.Embedding(num_words, dim, sparse=True)
        nn.init.uniform_(self.centre.weight, -0.5 / dim, 0.5 / dim, generator=generator)
        nn.init.zeros_(self.context.weight)

    def forward(self, centres: Tensor, contexts: Tensor, noise: Tensor) -> Tensor:
        """Returns the loss, summed over the pairs.

        Args:
            centres, contexts: [B] int64.
            noise: [B, K] int64.
        """
        vectors = self.centre(centres)
        near = (vectors * self.context(contexts)).sum(1)
        far = torch.einsum("bd,bkd->bk", vectors, self.context(noise))
        return -(F.logsigmoid(near).sum() + F.logsigmoid(-far).sum())


def _fit(model: SkipGram, texts: Sequence[Array], counts: Array, config: SkipGramConfig) -> None:
    """Trains the tables."""
    generator = np.random.default_rng(config.seed)
    noise = np.cumsum(counts**NOISE_POWER / (counts**NOISE_POWER).sum())
    share = counts / counts.sum()
    keep = np.minimum(1.0, np.sqrt(config.subsample / share))
    optimizer = torch.optim.SparseAdam(list(model.parameters()), lr=config.learning_rate)
    with Progress("words", total=config.epochs, unit="epoch") as progress:
        for epoch in range(config.epochs):
            centres, contexts = _pairs(texts, keep, config.window, generator)
            order = generator.permutation(len(centres))
            total = 0.0
            for start in range(0, len(order), config.batch_size):
                chosen = order[start : start + config.batch_size]
                done = (epoch + start / max(1, len(order))) / config.epochs
                optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - done)
                draws = np.searchsorted(noise, generator.random((len(chosen), config.negatives)))
                optimizer.zero_grad(set_to_none=True)
                loss = model(
                    torch.from_numpy(centres[chosen]),
                    torch.from_numpy(contexts[chosen]),
                    torch.from_numpy(np.minimum(draws, len(counts) - 1)),
                )
                (loss / len(chosen)).backward()
                optimizer.step()
                total += float(loss.detach())
            progress.advance(1, loss=total / max(1, len(order)))


def _pairs(
    texts: Sequence[Array], keep: Array, window: int, generator: np.random.Generator
) -> tuple[Array, Array]:
    """Returns the centre and context words [P] of one epoch."""
    centres, contexts = list[Array](), list[Array]()
    for text in texts:
        left = text[generator.random(len(text)) < keep[text]]
        reach = generator.integers(1, window + 1, size=len(left))
        for distance in range(1, min(window, len(left) - 1) + 1):
            first, second = left[:-distance], left[distance:]
            forward = reach[:-distance] >= distance
            backward = reach[distance:] >= distance
            centres += [first[forward], second[backward]]
            contexts += [second[forward], first[backward]]
    empty = np.zeros(0, np.int64)
    return np.concatenate([empty, *centres]), np.concatenate([empty, *contexts])


__all__ = ["SkipGram", "train_word_vectors"]
