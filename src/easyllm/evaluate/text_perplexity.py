"""Perplexity of a model on the texts of a file, with figures for each word and byte."""

import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonObject
from easyllm.corpus.document import Document
from easyllm.corpus.sources import FIX, SourceConfig, list_splits, read_split
from easyllm.evaluate.perplexity import Perplexity, perplexity, window_of
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.tokenizer import Tokenizer

WORD = re.compile(r"\S+")


@dataclass(frozen=True, slots=True, kw_only=True)
class TextPerplexity:
    """Perplexity of the texts of a file.

    Attributes:
        perplexity: for each token and byte.
        word_perplexity: exp(summed loss / words); None without words. Comparable between models
            with different tokenizers, for languages that separate words by spaces.
        words: characters without white space between them, counted in all texts.
        texts: number of texts.
        context, stride: tokens of a window, and from one to the next.
    """

    perplexity: Perplexity
    word_perplexity: float | None
    words: int
    texts: int
    context: int
    stride: int

    def as_dict(self) -> JsonObject:
        """Returns all figures as one dict."""
        values = asdict(self)
        return {**values.pop("perplexity"), **values}


def perplexity_of_file(
    model: Decoder,
    tokenizer: Tokenizer,
    path: str | Path,
    *,
    key: str = "text",
    context: int | None = None,
    stride: int | None = None,
) -> TextPerplexity:
    """Computes the perplexity of the texts of a file.

    Args:
        model: the model.
        tokenizer: its tokenizer.
        path: plain text or Markdown (one text), JSONL, Parquet ... (a text per row).
        key: the key or column of the text.
        context: tokens per window; by default the model's context.
        stride: tokens from one window to the next; by default half the context.

    Raises:
        ConfigError: the window or stride is out of range, or the model is not causal.
        DataError: the file cannot be read, or has nothing to score.
    """
    words = texts = 0

    def counted() -> Iterator[str]:
        nonlocal words, texts
        for text in _texts(path, key):
            words, texts = words + len(WORD.findall(text)), texts + 1
            yield text

    window, step = window_of(model, context, stride)
    found = perplexity(model, tokenizer, counted(), context=window, stride=step)
    per_word = found.loss_nats * found.tokens / words if words else None
    return TextPerplexity(
        perplexity=found,
        word_perplexity=None if per_word is None else math.exp(min(per_word, 700.0)),
        words=words,
        texts=texts,
        context=window,
        stride=step,
    )


def check_text_file(path: str | Path, *, key: str = "text") -> None:
    """Checks that a file can be read and begins with a text, before a model is loaded.

    Args:
        path, key: as for `perplexity_of_file`.

    Raises:
        DataError: it cannot be read, or has no text.
    """
    if next(_texts(path, key), None) is None:
        raise DataError(f"the file {str(path)!r} has no text; give a file of texts")


def _texts(path: str | Path, key: str) -> Iterator[str]:
    """Yields the texts of a file."""
    if not Path(path).is_file():
        state = "is a folder" if Path(path).is_dir() else "does not exist"
        raise DataError(f"{str(path)!r} {state}; give a file of texts")
    source = SourceConfig(paths=(str(path),), on_error="stop", text_key=key)
    for split in list_splits("text", source, remedy=FIX):
        for item in read_split(split, source, remedy=FIX):
            if isinstance(item, Document):
                yield item.text


__all__ = ["TextPerplexity", "check_text_file", "perplexity_of_file"]
