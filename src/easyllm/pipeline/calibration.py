"""Calibration text for quantization: sequences of token ids from a file, or from a default set.

The default set has English, Chinese and code in equal parts, from what the package brings along:
its documentation in both languages, small sets of rows, and the sources of Python's standard
library. A quantizer that sees only English spends its precision there (docs/quantization.md).
"""

import hashlib
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from easyllm.core.errors import DataError
from easyllm.core.json_types import JsonMapping
from easyllm.core.jsonl import json_objects
from easyllm.core.run_folder import docs_folder, recipes_folder
from easyllm.examples.sample import SampleGroup
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.text_samples import samples_of_file

LANGUAGES = ("English", "Chinese", "code")


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibration:
    """The text that a model is calibrated on.

    Attributes:
        sequences: token ids [n] of each sequence.
        source: where the text comes from.
        sha256: hash of all token ids, in hexadecimal.
    """

    sequences: tuple[Tensor, ...]
    source: str
    sha256: str

    @property
    def num_tokens(self) -> int:
        """Number of tokens of all sequences."""
        return sum(map(len, self.sequences))


def calibration(
    tokenizer: Tokenizer,
    *,
    path: Path | None = None,
    count: int = 128,
    length: int = 512,
    languages: Sequence[str] = LANGUAGES,
) -> Calibration:
    """Returns sequences of calibration text.

    Args:
        tokenizer: the model's tokenizer.
        path: a file of texts or conversations; None for the default set.
        count: number of sequences.
        length: tokens of each.
        languages: the parts of the default set.

    Raises:
        DataError: the file cannot be read, or the text has fewer than `count` sequences.
    """
    if path is None:
        most = -(-count // len(languages))
        parts = [_cut(_encoded(tokenizer, name, most * length), length) for name in languages]
        source = f"default set ({', '.join(languages)})"
        each = [its[:most] for its in parts]
        # alternate, so that any number of first sequences has all languages
        found = [its[i] for i in range(max(map(len, each))) for its in each if i < len(its)]
    else:
        samples = samples_of_file(str(path), tokenizer, length)
        parts_of = [s.parts if isinstance(s, SampleGroup) else (s,) for s in samples]
        every = [token for parts in parts_of for part in parts for token in part.token_ids]
        found, source = _cut(every, length), str(path)
    found = found[:count]
    if len(found) < count:
        got = sum(map(len, found))
        raise DataError(
            f"{source} has {len(found)} sequences of {length} tokens ({got} tokens), expected "
            f"{count}; give more text, or fewer sequences (--samples) or shorter ones (--length)"
        )
    digest = hashlib.sha256()
    for ids in found:
        digest.update(ids.numpy().tobytes())
    return Calibration(sequences=tuple(found), source=source, sha256=digest.hexdigest())


def _cut(ids: Sequence[int], length: int) -> list[Tensor]:
    """Returns the sequences [length] of joined texts; a rest is left out."""
    whole = len(ids) // length * length
    return list(torch.tensor(ids[:whole], dtype=torch.int64).split(length)) if whole else []


def _encoded(tokenizer: Tokenizer, language: str, most: int) -> list[int]:
    """Returns the first `most` tokens of a part of the default set."""
    ids = list[int]()
    for text in _default(language):
        ids += tokenizer.encode(text)
        if len(ids) >= most:
            break
    return ids


def _default(language: str) -> Iterator[str]:
    """Yields the texts of a part of the default set, in a fixed order."""
    if language == "code":
        paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    else:
        pages = sorted(docs_folder().glob("*.md")) if docs_folder().is_dir() else []
        paths = [p for p in pages if p.name.endswith(".zh.md") == (language == "Chinese")]
    rows = {
        "English": ("easyllm_facts_train.jsonl", "rehearsal.jsonl"),
        "Chinese": ("zh_text.jsonl", "zh_train.jsonl"),
    }
    for name in rows.get(language, ()):
        data = (recipes_folder() / "data" / name).read_bytes()
        yield "\n".join(_text(row) for row in json_objects(data))
    for path in paths:
        yield path.read_text(encoding="utf-8", errors="replace")


def _text(row: JsonMapping) -> str:
    """Returns the text of a row of the shipped data."""
    keys = ("text", "prompt", "completion", "question", "answer")
    return "\n".join(str(row[key]) for key in keys if key in row)


__all__ = ["LANGUAGES", "Calibration", "calibration"]
