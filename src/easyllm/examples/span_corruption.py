"""Span corruption: spans of a text are replaced by sentinels, and listed after them (T5).

    text      x1 x2 x3 x4 x5 x6              spans x2 x3 and x6
    encoder   x1 <0> x4 x5 <1> </s>
    decoder   start <0> x2 x3 <1> x6 <2> </s>     each token predicts the next one

(Raffel et al. 2019, arXiv 1910.10683, figure 2.) The tokens of the encoder are the prompt of a
sample and have no loss.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from pathlib import Path
from random import Random

from easyllm.core.errors import ConfigError
from easyllm.examples.blank_infilling import Span, poisson_spans, prepare_texts
from easyllm.examples.prepare import PreparationStats
from easyllm.examples.sample import Sample
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.tokenizer.tokenizer import Tokenizer


@dataclass(frozen=True, slots=True, kw_only=True)
class SpanTokens:
    """Ids of the tokens of span corruption.

    Attributes:
        sentinels: the tokens that stand for a span, in order; the last one used ends the target.
        end: ends both texts.
        start: starts the decoder.
    """

    sentinels: tuple[int, ...]
    end: int
    start: int

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> "SpanTokens":
        """Returns the tokens of a tokenizer; PAD starts the decoder, as in T5.

        Raises:
            ConfigError: it lacks EOS, PAD or the first two sentinels.
        """
        ids = (tokenizer.id_of(f"<extra_id_{n}>") for n in count())
        sentinels = tuple(i for i in takewhile(lambda i: i is not None, ids) if i is not None)
        if len(sentinels) < 2 or tokenizer.eos_id is None or tokenizer.pad_id is None:
            lacking = [
                name
                for name, there in (
                    ("<extra_id_0>, <extra_id_1>, ...", len(sentinels) > 1),
                    ("an EOS token", tokenizer.eos_id is not None),
                    ("a PAD token", tokenizer.pad_id is not None),
                )
                if not there
            ]
            raise ConfigError(
                f"span corruption needs {' and '.join(lacking)}, which the tokenizer lacks; "
                "train one with them (easyllm tokenizer train --special; see docs/train.md)"
            )
        return cls(sentinels=sentinels, end=tokenizer.eos_id, start=tokenizer.pad_id)


def corrupted(ids: Sequence[int], spans: Sequence[Span], tokens: SpanTokens) -> Sample:
    """Returns the sample in which spans of a text are replaced and listed.

    Args:
        ids: the token ids of the text.
        spans: (start, end) of each span, ascending and apart; at least one sentinel more than
            spans is needed.
        tokens: the sentinels, start and end tokens.
    """
    source, target, at = list[int](), list[int](), 0
    for (start, end), sentinel in zip(spans, tokens.sentinels, strict=False):
        source += [*ids[at:start], sentinel]
        target += [sentinel, *ids[start:end]]
        at = end
    source += [*ids[at:], tokens.end]
    target += [tokens.sentinels[len(spans)], tokens.end]
    inputs = (*source, tokens.start, *target[:-1])
    return Sample(inputs, (*([IGNORE_INDEX] * len(source)), *target))


def prepare_spans(
    files: Iterable[Path],
    tokenizer: Tokenizer,
    *,
    ratio: float,
    mean_span: float,
    copies: int,
    seed: int,
    text_key: str,
    max_seq_len: int,
) -> tuple[list[Sample], PreparationStats]:
    """Prepares samples of span corruption from the texts of rows; longer texts are split.

    Args:
        ratio: share of the tokens in spans.
        mean_span: mean of the Poisson distribution of the lengths of spans.
        copies: number of differently corrupted copies of each text.
        seed: seed of the choice.

    Raises:
        ConfigError: the tokenizer lacks a token.
        DataError: a row has no text (the message gives its location), or none remains.
    """
    tokens, rng = SpanTokens.of(tokenizer), Random(seed)
    most = len(tokens.sentinels) - 1

    def made(ids: Sequence[int], _ends: Sequence[int]) -> list[Sample]:
        chosen = (
            poisson_spans(len(ids), ratio=ratio, mean=mean_span, rng=rng)[:most]
            for _ in range(copies)
        )
        return [corrupted(ids, spans, tokens) for spans in chosen]

    return prepare_texts(files, tokenizer, made, text_key=text_key, max_seq_len=max_seq_len)


__all__ = ["SpanTokens", "corrupted", "prepare_spans"]
