"""The invariants ("laws") that must hold for every checkpoint, measured in fp32.

Each law is an equality that is exact in real arithmetic. Summation in a different order rounds
differently, so each bound is a fraction of the largest logit; a wrong mask, position or key changes
logits thousands of times as much.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.core.progress import Progress
from easyllm.engine.compiled_step import CompiledStep
from easyllm.engine.runner import logits_in_passes
from easyllm.models import load_model, open_source, save_model
from easyllm.models.load import OpenSource
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.nn.deterministic import (
    deterministic_unsupported_reason,
    rowwise_logprobs,
)
from easyllm.nn.storage import PackedStorage
from easyllm.tokenizer.tokenizer import Tokenizer

ROUNDING = 2e-5
"""Bound on the difference of two fp32 forward passes, as a fraction of the largest logit (measured:
5e-6 on SmolLM2)."""
ROUNDED_ROWS = 0.1
"""The same between ways of computing whose fp32 sums differ in order (law 3), for weights whose
kernels round the rows: a difference in the last bits can change a code."""
DECODED = 8
CHAT = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "谢谢！ And 3 + 3?"},
)


@dataclass(frozen=True, slots=True)
class Finding:
    """Result of checking one law on one checkpoint.

    Attributes:
        law: number of the law (docs/verify.md).
        claim: the equality that is checked.
        figure: the largest difference found.
        bound: the largest difference allowed.
    """

    law: int
    claim: str
    figure: float
    bound: float

    @property
    def holds(self) -> bool:
        """Whether the difference is within the bound."""
        return self.figure <= self.bound

    def as_dict(self) -> JsonObject:
        """Returns the fields and `holds` as a dict."""
        return asdict(self) | {"holds": self.holds}


def verify(
    source: str | Path,
    *,
    against: Literal["transformers"] | None = None,
    num_tokens: int = 256,
    seed: int = 0,
) -> list[Finding]:
    """Checks every law that applies to a model.

    Args:
        source: the model, in any form that `load_model` accepts; computed in fp32 on the CPU.
        against: `transformers` also compares with that library: it loads the checkpoint saved by
            this package, and its forward pass and chat template are compared.
        num_tokens: number of random tokens to compare on; the model's context is the upper bound.
        seed: seed of the random tokens.

    Returns:
        One finding per check.

    Raises:
        SourceError, CheckpointError: the model does not exist or cannot be loaded.
        ConfigError: there are too few tokens, or `transformers` is not installed.
    """
    opened = open_source(source)
    if against is not None and opened.config.num_labels is not None:
        raise ConfigError(
            "a model with a classification head has no logits to compare; leave out --against"
        )
    num_tokens = min(num_tokens, opened.config.max_seq_len)
    if num_tokens < 2 * DECODED:
        raise ConfigError(
            f"{num_tokens} tokens are too few to compare; give at least {2 * DECODED}"
        )
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, opened.config.vocab_size, (num_tokens,), generator=generator)
    findings = []
    with Progress("verifying", unit="law") as progress, tempfile.TemporaryDirectory() as work:
        for finding in _measure(opened, ids, against, Path(work) / "model"):
            findings.append(finding)
            progress.advance(1, law=finding.claim)
    return findings


@torch.inference_mode()
def _measure(
    opened: OpenSource, ids: Tensor, against: str | None, folder: Path
) -> Iterator[Finding]:
    tokenizer = _tokenizer(opened)
    model = opened.model(torch.float32, torch.device("cpu"))
    save_model(model, folder, tokenizer=tokenizer)
    alone = model.logits(ids)
    largest = float(alone.abs().max())
    bound = ROUNDING * largest
    reordered = ROUNDED_ROWS * largest if _rounds_rows(model) else bound
    if against is not None:
        yield from _against_reference(folder, ids, alone, tokenizer)
    again = load_model(folder, dtype="float32")
    yield Finding(1, "saved and reloaded = the original", _distance(again.logits(ids), alone), 0.0)
    del again
    yield Finding(2, "packed = each sequence alone", packed_difference(model, ids), bound)
    for pieces, name in (([len(ids) - DECODED], "one chunk"), (_pieces(len(ids)), "chunks")):
        logits = through_cache(model, ids, [*pieces, *[1] * DECODED])
        claim = f"prefill in {name} + {DECODED} tokens decoded with the KV cache = one forward pass"
        yield Finding(3, claim, _distance(logits, alone), reordered)
    if CompiledStep.unsupported_reason(model) is None:
        stepped = logits_in_passes(model, [ids.tolist()], [[1] * len(ids)], compiled=True)[0]
        claim = "every token with the compiled step = one forward pass"
        yield Finding(3, claim, _distance(stepped, alone), reordered)
    if model.config.num_labels is None and deterministic_unsupported_reason(model) is None:
        claim = (
            "deterministic mode: log-probabilities in a batch with the KV cache = those of one "
            "forward pass, bitwise"
        )
        yield Finding(6, claim, count_batch_variant_logprobs(model, ids), 0)


def _rounds_rows(model: Decoder) -> bool:
    """Returns whether the kernels of quantized weights round the rows that they multiply."""
    storages = (layer.storage for _, layer in model.weight_modules())
    return any(isinstance(its, PackedStorage) and its.rounds_rows for its in storages)


def _against_reference(
    folder: Path, ids: Tensor, ours: Tensor, tokenizer: Tokenizer | None
) -> Iterator[Finding]:
    from easyllm.verify.reference import Reference, chat_ids

    reference = Reference(folder, dtype=torch.float32)
    theirs = reference.logits(ids)
    reference.to_at_least_fp32()
    exact = reference.logits(ids)
    claim = "error of fp32 logits against fp64 ≤ twice that of transformers"
    yield Finding(1, claim, _distance(ours, exact), 2 * _distance(theirs, exact))
    if tokenizer is not None and tokenizer.chat_template is not None:
        mine = tokenizer.encode_chat([dict(m) for m in CHAT], add_generation_prompt=True).token_ids
        other = chat_ids(folder, [dict(m) for m in CHAT], generation_prompt=True)
        yield Finding(7, "chat template ids = apply_chat_template ids", _unequal(mine, other), 0)


def packed_difference(model: Decoder, ids: Tensor) -> float:
    """Returns the largest difference between the logits of packed sequences and of each alone."""
    lengths = [len(ids) // 2, 1, len(ids) // 8]
    lengths.append(len(ids) - sum(lengths))
    packed = model.head(model(ids, ForwardContext.packed(lengths)))
    return max(
        _distance(rows, model.logits(part))
        for rows, part in zip(packed.split(lengths), ids.split(lengths), strict=True)
    )


def through_cache(model: Decoder, ids: Tensor, pieces: Sequence[int]) -> Tensor:
    """Returns the logits [T, V] of one sequence computed in pieces with the paged KV cache.

    Args:
        model: the model, in inference mode.
        ids: token ids [T].
        pieces: number of tokens in each pass.
    """
    return logits_in_passes(model, [ids.tolist()], [list(pieces)])[0]


def count_batch_variant_logprobs(model: Decoder, ids: Tensor) -> int:
    """Counts log-probabilities that are not bitwise identical in a batch and in one forward pass.

    Compares the log-probabilities of `ids` when they are computed in chunks, in a batch with other
    sequences, with those of a single forward pass of `ids` alone; both in deterministic mode.
    """
    expected = rowwise_logprobs(model.logits(ids, deterministic=True)[:-1], ids[1:])
    batch = [ids.tolist(), ids.flip(0)[: len(ids) // 2].tolist(), ids[1:6].tolist()]
    passes = [[*_pieces(len(ids)), *[1] * DECODED], [7, len(ids) // 2 - 7], [1] * 5]
    logits = logits_in_passes(model, batch, passes, compiled=True, deterministic=True)[0]
    return int((rowwise_logprobs(logits[:-1], ids[1:]) != expected).sum())


def _pieces(length: int) -> list[int]:
    """Returns the lengths of uneven chunks of a prompt that leaves `DECODED` tokens to decode."""
    prompt = length - DECODED
    return [prompt // 3, prompt // 2 - prompt // 3, prompt - prompt // 2]


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _unequal(a: Sequence[int], b: Sequence[int]) -> int:
    """Returns the number of positions in which two lists differ."""
    return sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))


def _tokenizer(opened: OpenSource) -> Tokenizer | None:
    """Returns the model's tokenizer; None if the folder contains only weights."""
    try:
        return opened.tokenizer()
    except CheckpointError:
        return None
