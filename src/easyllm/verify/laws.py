"""The laws of the house on one checkpoint: what is equal on paper, measured in fp32.

Sums in another order round differently, so a bound is a share of the largest logit; a wrong mask, position or key
moves logits by thousands of times as much.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.core.progress import Progress
from easyllm.engine.compiled_step import CompiledStep
from easyllm.engine.runner import logits_in_passes
from easyllm.models import load_model, open_source, save_model
from easyllm.models.load import OpenSource
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.nn.deterministic import (
    deterministic_unsupported_reason,
    one_row_logprobs,
)
from easyllm.tokenizer.tokenizer import Tokenizer

ROUNDING = 2e-5
"""Bound of two fp32 forwards' difference, as a share of the largest logit (5e-6 on SmolLM2)."""
DECODED = 8
CHAT = (
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
    {"role": "user", "content": "谢谢！ And 3 + 3?"},
)


@dataclass(frozen=True, slots=True)
class Finding:
    """One law on one checkpoint.

    Attributes:
        law: its number (docs/verify.md).
        claim: what must be equal.
        figure: the largest difference found; bound: the largest allowed.
    """

    law: int
    claim: str
    figure: float
    bound: float

    @property
    def holds(self) -> bool:
        return self.figure <= self.bound

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"holds": self.holds}


def verify(
    source: str | Path,
    *,
    against: Literal["transformers"] | None = None,
    num_tokens: int = 256,
    seed: int = 0,
) -> list[Finding]:
    """Measures every law that applies.

    Args:
        source: as `load_model` takes it; computed in fp32 on the CPU.
        against: `transformers` adds its forward, its loading of what is saved here, and its chat template.
        num_tokens: random tokens to compare on, at most the model's context.

    Raises:
        SourceError, CheckpointError: no such model. ConfigError: too few tokens, or the reference is not installed.
    """
    opened = open_source(source)
    if against is not None and opened.config.num_labels is not None:
        raise ConfigError(
            "a model with a head of labels has no logits to compare; leave --against out"
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
    bound = ROUNDING * float(alone.abs().max())
    if against is not None:
        yield from _against_reference(folder, ids, alone, tokenizer)
    again = load_model(folder, dtype="float32")
    yield Finding(1, "saved and loaded again = the same", _distance(again.logits(ids), alone), 0.0)
    del again
    yield Finding(2, "packed = each sequence alone", packed_difference(model, ids), bound)
    for pieces, name in (([len(ids) - DECODED], "one piece"), (_pieces(len(ids)), "pieces")):
        logits = through_cache(model, ids, [*pieces, *[1] * DECODED])
        claim = f"prefill in {name} + {DECODED} tokens through the cache = one forward"
        yield Finding(3, claim, _distance(logits, alone), bound)
    if CompiledStep.supports(model):
        stepped = logits_in_passes(model, [ids.tolist()], [[1] * len(ids)], compiled=True)[0]
        yield Finding(
            3, "every token by the compiled step = one forward", _distance(stepped, alone), bound
        )
    if model.config.num_labels is None and deterministic_unsupported_reason(model) is None:
        claim = "deterministic: log-probabilities in company, from the cache = the forward's, to the bit"
        yield Finding(6, claim, deterministic_difference(model, ids), 0)


def _against_reference(
    folder: Path, ids: Tensor, ours: Tensor, tokenizer: Tokenizer | None
) -> Iterator[Finding]:
    from easyllm.verify.reference import Reference, chat_ids

    reference = Reference(folder, dtype=torch.float32)
    theirs = reference.logits(ids)
    reference.widen()
    exact = reference.logits(ids)
    claim = "fp32 logits' distance from fp64's ≤ twice transformers'"
    yield Finding(1, claim, _distance(ours, exact), 2 * _distance(theirs, exact))
    if tokenizer is not None and tokenizer.chat_template is not None:
        mine = tokenizer.encode_chat([dict(m) for m in CHAT], add_generation_prompt=True).token_ids
        other = chat_ids(folder, [dict(m) for m in CHAT], generation_prompt=True)
        yield Finding(7, "chat template's ids = apply_chat_template's", _unequal(mine, other), 0)


def packed_difference(model: Decoder, ids: Tensor) -> float:
    """The largest difference between sequences packed together and each alone."""
    lengths = [len(ids) // 2, 1, len(ids) // 8]
    lengths.append(len(ids) - sum(lengths))
    packed = model.head(model(ids, ForwardContext.packed(lengths)))
    return max(
        _distance(rows, model.logits(part))
        for rows, part in zip(packed.split(lengths), ids.split(lengths), strict=True)
    )


def through_cache(model: Decoder, ids: Tensor, pieces: Sequence[int]) -> Tensor:
    """[T, V] logits of one sequence that goes through the engine's paged cache in pieces."""
    return logits_in_passes(model, [ids.tolist()], [list(pieces)])[0]


def deterministic_difference(model: Decoder, ids: Tensor) -> int:
    """Log-probabilities of `ids` whose bits are others when they are served in pieces among other sequences than in one
    forward pass of their own, both in deterministic mode."""
    expected = one_row_logprobs(model.logits(ids, deterministic=True)[:-1], ids[1:])
    company = [ids.tolist(), ids.flip(0)[: len(ids) // 2].tolist(), ids[1:6].tolist()]
    passes = [[*_pieces(len(ids)), *[1] * DECODED], [7, len(ids) // 2 - 7], [1] * 5]
    logits = logits_in_passes(model, company, passes, deterministic=True)[0]
    return int((one_row_logprobs(logits[:-1], ids[1:]) != expected).sum())


def _pieces(length: int) -> list[int]:
    """Uneven pieces of a prompt that leaves room for the decoded tokens."""
    prompt = length - DECODED
    return [prompt // 3, prompt // 2 - prompt // 3, prompt - prompt // 2]


def _distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max())


def _unequal(a: Sequence[int], b: Sequence[int]) -> int:
    """Places in which two lists differ."""
    return sum(x != y for x, y in zip(a, b, strict=False)) + abs(len(a) - len(b))


def _tokenizer(opened: OpenSource) -> Tokenizer | None:
    """The model's tokenizer; a folder may hold weights alone."""
    try:
        return opened.tokenizer()
    except CheckpointError:
        return None
