"""Where two models, number formats or engines part ways, and by how much.

Both sides continue the same prompts greedily, each through its own engine. At the first token where they differ, how close
the two candidates were on either side says whether it was a near tie (rounding decides) or a real difference. Behind
that the texts differ, so figures over all tokens are taken with both sides reading the first one's text.
"""

import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from easyllm.core.config import validate
from easyllm.core.errors import ConfigError, suggest
from easyllm.engine import LLM, SamplingParams
from easyllm.models import load_model, load_tokenizer, save_model
from easyllm.quant import quantize_weights, schemes
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.verify.reference import Reference

DTYPES = ("float32", "bfloat16", "float16", "float64")
TRANSFORMERS = "transformers"
PROMPTS = (
    "The capital of France is",
    "def fibonacci(n):",
    "Once upon a time, in a village by the sea,",
    "The three laws of thermodynamics are",
    "Dear Sir or Madam,\n\nI am writing to",
    "1, 1, 2, 3, 5, 8,",
    "Photosynthesis is the process by which",
    "The main difference between a list and a tuple is",
)


class Side(Protocol):
    """One of the two: a model with an engine of its own."""

    tokenizer: Tokenizer

    def greedy(self, ids: list[int], params: SamplingParams) -> list[int]:
        """What it continues a prompt with."""

    def logits(self, ids: list[int]) -> Tensor:
        """[T, V] fp32 or wider, after each token."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Candidate:
    """A token at the place where the sides part, with its log-probability in nats and rank on either side."""

    token_id: int
    text: str
    logprob_a: float
    logprob_b: float
    rank_a: int
    rank_b: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """One prompt.

    Attributes:
        generated: tokens the first side generated.
        parts_at: number of equal tokens before the first different one; None where there is none.
        chosen_a, chosen_b: what each side chose there, seen from both.
        mean_kl_nats: KL(a ‖ b) a token over the first side's text; max_logprob_difference of its tokens.
        agreement: share of that text's places where both have the same most likely token.
    """

    prompt: str
    generated: int
    parts_at: int | None
    shared_text: str
    chosen_a: Candidate | None
    chosen_b: Candidate | None
    mean_kl_nats: float
    max_logprob_difference: float
    agreement: float

    @property
    def is_near_tie(self) -> bool:
        """Whether each side has the other's token second at worst: rounding, not another model."""
        if self.chosen_a is None or self.chosen_b is None:
            return True
        return self.chosen_a.rank_b <= 1 and self.chosen_b.rank_a <= 1

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"near_tie": self.is_near_tie}


def compare(
    a: str,
    b: str,
    prompts: Sequence[str] = PROMPTS,
    *,
    max_tokens: int = 64,
    repetition_penalty: float = 1.0,
) -> list[Comparison]:
    """Compares two sides on each prompt.

    Args:
        a, b: a model's source, with `@` a variant: a dtype, int8, int4, or `transformers` (`smollm2@bfloat16`).

    Raises:
        SourceError, CheckpointError: no such model. ConfigError: no such variant, or the vocabularies differ.
    """
    values = {
        "temperature": 0.0,
        "max_tokens": max_tokens,
        "repetition_penalty": repetition_penalty,
        "ignore_eos": True,
    }
    params = validate(SamplingParams, values, source="sampling options")
    sides = [open_side(spec) for spec in (a, b)]
    if sides[0].tokenizer.fingerprint != sides[1].tokenizer.fingerprint:
        raise ConfigError(
            f"{a!r} and {b!r} have different tokenizers, so their tokens cannot be compared; "
            "name two models of the same vocabulary"
        )
    return [_compare(sides[0], sides[1], prompt, params) for prompt in prompts]


def open_side(spec: str) -> Side:
    """The side `SOURCE[@VARIANT]` names.

    Raises:
        ConfigError: there is no such variant.
    """
    source, _, variant = spec.partition("@")
    variants = (*DTYPES, *schemes(), TRANSFORMERS)
    if variant and variant not in variants:
        raise ConfigError(
            f"variant {variant!r} of {spec!r} is not known{suggest(variant, variants)}; use one of {', '.join(variants)}"
        )
    if variant == TRANSFORMERS:
        return _TransformersSide(source)
    dtype = variant if variant in DTYPES else "float32"
    return _EngineSide(source, dtype, variant if variant in schemes() else None)


class _EngineSide:
    def __init__(self, source: str, dtype: str, scheme: str | None) -> None:
        model = load_model(source, dtype=dtype)
        if scheme is not None:
            quantize_weights(model, scheme)
        self.tokenizer = load_tokenizer(source)
        self._llm = LLM(model=model, tokenizer=self.tokenizer, max_running=1)

    def greedy(self, ids: list[int], params: SamplingParams) -> list[int]:
        (done,) = self._llm.generate([ids], params)
        return done.token_ids

    def logits(self, ids: list[int]) -> Tensor:
        return self._llm.model.logits(ids)


class _TransformersSide:
    def __init__(self, source: str) -> None:
        self.tokenizer = load_tokenizer(source)
        with tempfile.TemporaryDirectory() as work:
            folder = save_model(load_model(source, dtype="float32"), Path(work) / "model")
            self._reference = Reference(folder, dtype=torch.float32)

    def greedy(self, ids: list[int], params: SamplingParams) -> list[int]:
        assert params.max_tokens is not None, "set by compare()"
        return self._reference.greedy(
            ids, params.max_tokens, repetition_penalty=params.repetition_penalty
        )

    @torch.no_grad()
    def logits(self, ids: list[int]) -> Tensor:
        return self._reference.logits(torch.tensor(ids))


def _compare(a: Side, b: Side, prompt: str, params: SamplingParams) -> Comparison:
    ids = a.tokenizer.encode(prompt)
    mine, theirs = (side.greedy(ids, params) for side in (a, b))
    differ = [i for i, (x, y) in enumerate(zip(mine, theirs, strict=False)) if x != y]
    parts_at = differ[0] if differ else None
    if parts_at is None and len(mine) != len(theirs):
        parts_at = min(len(mine), len(theirs))
    whole = [*ids, *mine]
    rows = slice(len(ids) - 1, len(whole) - 1)
    log_a, log_b = (side.logits(whole)[rows].double().log_softmax(-1) for side in (a, b))
    kl = (log_a.exp() * (log_a - log_b)).sum(-1)
    chosen = torch.tensor(mine)[:, None]
    difference = (log_a.gather(1, chosen) - log_b.gather(1, chosen)).abs()
    candidates: list[Candidate | None] = [None, None]
    if parts_at is not None and differ:
        candidates = [
            _candidate(token, a.tokenizer, log_a[parts_at], log_b[parts_at])
            for token in (mine[parts_at], theirs[parts_at])
        ]
    return Comparison(
        prompt=prompt,
        generated=len(mine),
        parts_at=parts_at,
        shared_text=a.tokenizer.decode(mine[:parts_at]),
        chosen_a=candidates[0],
        chosen_b=candidates[1],
        mean_kl_nats=float(kl.mean()),
        max_logprob_difference=float(difference.max()),
        agreement=float((log_a.argmax(-1) == log_b.argmax(-1)).double().mean()),
    )


def _candidate(token: int, tokenizer: Tokenizer, log_a: Tensor, log_b: Tensor) -> Candidate:
    return Candidate(
        token_id=token,
        text=tokenizer.decode([token]),
        logprob_a=float(log_a[token]),
        logprob_b=float(log_b[token]),
        rank_a=int((log_a > log_a[token]).sum()),
        rank_b=int((log_b > log_b[token]).sum()),
    )
