"""Blank infilling: spans of a text are removed, and generated one after another after it (GLM).

    text    x1 x2 x3 x4 x5 x6           spans x3 and x5 x6, generated in the order 2, 1
    input   x1 x2 M  x4 M  | S  x5 x6 | S  x3
    label    -  -  -  -  -   x5 x6 E    x3 E
    text position   1 2 3 4 5   5 5 5   3 3      block position   0 0 0 0 0   1 2 3   1 2

(Du et al. 2021, arXiv 2103.10360, figure 2; positions count from 0 here.) The corrupted text sees
itself in both directions, a span the text and the spans before it: the mask of a model with
`prompt_mask` `prefix_before_last`, whose prompt ends before the first start token S.
"""

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import exp, lgamma, log
from pathlib import Path
from random import Random

from easyllm.core.errors import ConfigError, DataError
from easyllm.examples.data_file import read_rows
from easyllm.examples.prepare import PreparationStats
from easyllm.examples.sample import POSITION_ROWS, Sample
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.tokenizer.tokenizer import Tokenizer

MAX_SPAN = 39
"""Longest span in tokens; lengths are drawn from a Poisson distribution cut to 1 .. 39, as in the
authors' code."""
SENTENCE_END = re.compile(r"[.!?。！？…\n]+[\"'”’）)]*\s*")
NAMES = {
    "mask": ("[MASK]",),
    "sentence_mask": ("[sMASK]",),
    "document_mask": ("[gMASK]",),
    "start": ("<sop>", "sop", "<|startofpiece|>"),
    "end": ("<eop>", "eop", "<|endofpiece|>"),
}
"""Tokens of blank infilling, by the names that GLM's vocabularies give them."""
Span = tuple[int, int]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlankTokens:
    """Ids of the tokens of blank infilling.

    Attributes:
        mask: replaces a short span.
        sentence_mask: replaces a sentence.
        document_mask: replaces the rest of a text.
        start: begins a span that is generated.
        end: ends it.
    """

    mask: int
    sentence_mask: int
    document_mask: int
    start: int
    end: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "BlankTokens":
        """Returns the tokens of a tokenizer.

        Raises:
            ConfigError: it lacks one.
        """
        found = {}
        for role, names in NAMES.items():
            ids = [i for name in names if (i := tokenizer.id_of(name)) is not None]
            if not ids:
                raise ConfigError(
                    f"blank infilling needs the token {' or '.join(names)}, which the tokenizer "
                    "lacks; add it with easyllm tokenizer extend"
                )
            found[role] = ids[0]
        return cls(**found)


def infilled(
    ids: Sequence[int], spans: Sequence[Span], order: Sequence[int], mask: int, tokens: BlankTokens
) -> Sample:
    """Returns the sample in which spans of a text are masked and then generated.

    Args:
        ids: the token ids of the text.
        spans: (start, end) of each span, ascending and apart.
        order: indices of the spans in the order in which they are generated.
        mask: the token that replaces a span.
        tokens: the start and end tokens.
    """
    inputs, positions, at = list[int](), list[Span](), 0
    places = []
    for start, end in spans:
        inputs += [*ids[at:start], mask]
        places.append(len(inputs) - 1)
        at = end
    inputs += ids[at:]
    positions += [(p, 0) for p in range(len(inputs))]
    labels = [IGNORE_INDEX] * len(inputs)
    for number in order:
        start, end = spans[number]
        inputs += [tokens.start, *ids[start:end]]
        labels += [*ids[start:end], tokens.end]
        positions += [(places[number], n + 1) for n in range(end - start + 1)]
    return Sample(tuple(inputs), tuple(labels), {POSITION_ROWS: positions})


def poisson_spans(length: int, *, ratio: float, mean: float, rng: Random) -> list[Span]:
    """Returns spans that cover `ratio` of a text, at least one token apart.

    Args:
        length: number of tokens of the text.
        ratio: share of the tokens to mask.
        mean: λ of the Poisson distribution of the lengths.
        rng: source of randomness.
    """
    left, sizes = max(1, round(length * ratio)), list[int]()
    while left > 0:
        sizes.append(min(left, rng.choices(range(1, MAX_SPAN + 1), _poisson(mean))[0]))
        left -= sizes[-1]
    gaps = length - sum(sizes) - (len(sizes) - 1)  # tokens that may be anywhere between the spans
    while gaps < 0:  # a text of a few tokens
        gaps += sizes.pop() + 1
    cuts = sorted(rng.randint(0, gaps) for _ in sizes)
    spans, moved = list[Span](), 0
    for cut, size in zip(cuts, sizes, strict=True):
        spans.append((cut + moved, cut + moved + size))
        moved += size + 1
    return spans


def sentence_spans(ends: Sequence[int], *, ratio: float, rng: Random) -> list[Span]:
    """Returns whole sentences, in random choice, until `ratio` of the tokens are covered.

    Neighbouring sentences that are both chosen stay separate spans.

    Args:
        ends: the end of each sentence, in tokens; the last is the length of the text.
        ratio: share of the tokens to mask.
        rng: source of randomness.
    """
    sentences = list(zip([0, *ends[:-1]], ends, strict=True))
    wanted, chosen = ratio * ends[-1], list[Span]()
    for sentence in rng.sample(sentences, len(sentences)):
        if wanted <= 0:
            break
        chosen.append(sentence)
        wanted -= sentence[1] - sentence[0]
    return sorted(chosen)


def document_span(length: int, *, rng: Random) -> Span:
    """Returns the end of a text that is generated from its beginning: 50% to 100% of its tokens."""
    return length - max(1, round(length * rng.uniform(0.5, 1.0))), length


@lru_cache(maxsize=8)
def _poisson(mean: float) -> list[float]:
    """Returns the probabilities of 1 .. `MAX_SPAN`, not normalised."""
    return [exp(n * log(mean) - mean - lgamma(n + 1)) for n in range(1, MAX_SPAN + 1)]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlankMixture:
    """How texts are corrupted.

    Attributes:
        ratio: share of the tokens in short spans, or in sentences.
        mean_span: λ of the lengths of short spans.
        sentences: share of the texts whose sentences are masked.
        documents: share of the texts whose end is masked.
        copies: number of differently masked copies of each text.
        seed: seed of the choice.
    """

    ratio: float
    mean_span: float
    sentences: float
    documents: float
    copies: int
    seed: int


def prepare_blanks(
    files: Iterable[Path],
    tokenizer: Tokenizer,
    mixture: BlankMixture,
    *,
    text_key: str,
    max_seq_len: int,
) -> tuple[list[Sample], PreparationStats]:
    """Prepares samples of blank infilling from the texts of rows; longer texts are split.

    Raises:
        ConfigError: the tokenizer lacks a token.
        DataError: a row has no text (the message gives its location), or none remains.
    """
    tokens, rng = BlankTokens.of(tokenizer), Random(mixture.seed)

    def corrupted(ids: Sequence[int], ends: Sequence[int]) -> list[Sample]:
        return [_corrupted(ids, ends, mixture, tokens, rng) for _ in range(mixture.copies)]

    return prepare_texts(files, tokenizer, corrupted, text_key=text_key, max_seq_len=max_seq_len)


def prepare_texts(
    files: Iterable[Path],
    tokenizer: Tokenizer,
    corrupted: Callable[[Sequence[int], Sequence[int]], list[Sample]],
    *,
    text_key: str,
    max_seq_len: int,
) -> tuple[list[Sample], PreparationStats]:
    """Prepares samples of the texts of rows; longer texts are split.

    Args:
        files: JSONL and other files of rows.
        tokenizer: the tokenizer.
        corrupted: returns samples of a text, given its token ids and the ends of its sentences.
        text_key: the key of the text in a row.
        max_seq_len: longest sample, in tokens; longer ones are dropped.

    Raises:
        DataError: a row has no text (the message gives its location), or none remains.
    """
    stats, samples = PreparationStats(), list[Sample]()
    for file in files:
        for row in read_rows(file):
            text = row.values.get(text_key)
            if not isinstance(text, str):
                raise DataError(
                    f"{row.location} has no text under {text_key!r} (keys: "
                    f"{', '.join(sorted(row.values))}); set data.text_key"
                )
            stats.rows += 1
            for ids, ends in _pieces(text, tokenizer, max_seq_len):
                made = corrupted(ids, ends)
                fits = [sample for sample in made if len(sample.token_ids) <= max_seq_len]
                stats.dropped_overlong += len(made) - len(fits)
                samples += fits
    stats.samples = len(samples)
    stats.tokens = sum(len(sample.token_ids) for sample in samples)
    stats.trained_tokens = sum(sample.num_trained for sample in samples)
    if not samples:
        raise DataError(f"no trainable rows remain ({stats.summary()}); check the data files")
    return samples, stats


def _corrupted(
    ids: Sequence[int],
    ends: Sequence[int],
    mixture: BlankMixture,
    tokens: BlankTokens,
    rng: Random,
) -> Sample:
    kind = rng.random()
    if kind < mixture.documents:
        spans, mask = [document_span(len(ids), rng=rng)], tokens.document_mask
    elif kind < mixture.documents + mixture.sentences:
        spans, mask = sentence_spans(ends, ratio=mixture.ratio, rng=rng), tokens.sentence_mask
    else:
        mean = mixture.mean_span
        spans, mask = poisson_spans(len(ids), ratio=mixture.ratio, mean=mean, rng=rng), tokens.mask
    return infilled(ids, spans, rng.sample(range(len(spans)), len(spans)), mask, tokens)


def _pieces(
    text: str, tokenizer: Tokenizer, max_seq_len: int
) -> Iterator[tuple[list[int], list[int]]]:
    """Yields the token ids of parts of a text, and where their sentences end, in tokens.

    A part is shorter than a sample, which also has a mask and a start token for each span.
    """
    encoded = tokenizer.backend.encode(text, add_special_tokens=False)
    ids, last = list(encoded.ids), [offsets[1] for offsets in encoded.offsets]
    chars = [match.end() for match in SENTENCE_END.finditer(text)]
    ends = sorted({sum(end <= char for end in last) for char in chars} | {len(ids)} - {0})
    most = max(1, int(max_seq_len / 1.4))
    for start in range(0, len(ids), most):
        part = ids[start : start + most]
        inside = [e - start for e in ends if start < e < start + len(part)]
        yield part, [*inside, len(part)]


__all__ = [
    "BlankMixture",
    "BlankTokens",
    "document_span",
    "infilled",
    "poisson_spans",
    "prepare_blanks",
    "prepare_texts",
    "sentence_spans",
]
