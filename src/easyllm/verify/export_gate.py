"""Compares an exported model with what it was made from, on the logits of a text.

An export is a list of variants: the reference, and every form of the result, each of which gives
logits for the same token ids. A later form (quantized files, another format) is one more variant.
Each variant is opened, measured and closed before the next one is opened, so that one model is in
memory at a time; only the reference's logits are kept.

The bound is on the largest difference of any logit, as a fraction of the range of the reference's
logits. A changed weight shows in it at once, while a share of equal most likely tokens stays at
100% for errors that matter, and falls at near ties for errors that do not.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from easyllm.core.errors import EasyllmError
from easyllm.core.json_types import JsonObject, finite_json
from easyllm.core.progress import Progress
from easyllm.engine import LLM, Request, SamplingParams
from easyllm.engine.engine import Engine
from easyllm.engine.runner import Runner
from easyllm.engine.step import Step
from easyllm.nn.decoder import Decoder
from easyllm.verify.gate_text import GateText

BOUNDS = {
    torch.float64: 1e-4,
    torch.float32: 1e-4,
    torch.float16: 6e-3,
    torch.bfloat16: 5e-2,
}
"""Largest drift of a model that computes in fp32, by the dtype of its weights.

fp32: a merged weight is rounded once, and sums are taken in another order; measured: 2e-6 on
SmolLM2-135M, 2e-5 on tiny random models. A wrong weight costs far more. fp16 and bf16 round every
weight to 11 and 8 significant bits; measured: 8e-4 and 7e-3 on SmolLM2-135M, 3e-3 and 3e-2 on tiny
random models, which amplify rounding most."""
COMPUTED_IN_BF16 = 1e-1
"""Largest drift of a model that also computes in bf16 (measured on SmolLM2-135M: 1.4e-2)."""
NEGLIGIBLE = 1e-8
"""KL in nats per token that fp32 rounding alone may cause."""
LogitsOf = Callable[[Sequence[Sequence[int]]], Iterable[Tensor]]
"""Returns the logits [T, V] of each sequence, in order."""


class GateError(EasyllmError):
    """An exported model differs from its reference by more than the bound.

    Attributes:
        gate: the measured figures.
    """

    exit_code = 1

    def __init__(self, message: str, gate: "Gate") -> None:
        super().__init__(message)
        self.gate = gate


@dataclass(frozen=True, slots=True, kw_only=True)
class Variant:
    """One form of a model.

    Attributes:
        name: what it is called in the table.
        open: loads it and returns what gives its logits, or the reason why it has none.
        bound: the largest drift allowed; None if it is measured for scale only.
    """

    name: str
    open: Callable[[], LogitsOf | str]
    bound: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """What was measured on one variant.

    Attributes:
        name: the variant.
        drift: max |Δlogits|, divided by the range (maximum - minimum) of the reference's logits.
        kl_nats: mean KL(reference ‖ variant) per token.
        agreement: share of positions where both have the same most likely token.
        bound: the largest drift allowed; None if any is.
        skipped: why it was not measured; empty if it was.
    """

    name: str
    drift: float = math.nan
    kl_nats: float = math.nan
    agreement: float = math.nan
    bound: float | None = None
    skipped: str = ""

    @property
    def holds(self) -> bool:
        """Whether the drift is within the bound; NaN is not."""
        return bool(self.skipped) or self.bound is None or self.drift <= self.bound

    def as_dict(self) -> JsonObject:
        """Returns the fields and `holds`, with null for what is not a finite number."""
        found: JsonObject = finite_json(asdict(self) | {"holds": self.holds})
        return found


@dataclass(frozen=True, slots=True)
class Gate:
    """The comparison of all variants with the reference.

    Attributes:
        text: what they were compared on.
        reference: the name of the reference.
        rows: one for each other variant.
    """

    text: GateText
    reference: str
    rows: tuple[Row, ...]

    @property
    def passed(self) -> bool:
        """Whether every drift is within its bound."""
        return all(row.holds for row in self.rows)

    @property
    def complaint(self) -> str:
        """What is wrong with the first variant that fails, as the first half of a sentence."""
        first = next(row for row in self.rows if not row.holds)
        return (
            f"{first.name} differs from {self.reference} by {first.drift:.1e} of the logits' range "
            f"(allowed {first.bound:.0e}, KL {first.kl_nats:.1e} nats/token)"
        )

    @property
    def notes(self) -> list[str]:
        """Remarks on rows that were not measured, or whose figures say little."""
        found = [f"{row.name}: not measured, {row.skipped}" for row in self.rows if row.skipped]
        scale = max((row.kl_nats for row in self.rows if row.bound is None), default=0.0)
        found += [
            f"{row.name}: rounding costs over half of what {self.reference} changes (KL "
            f"{row.kl_nats:.1e} of {scale:.1e} nats/token); save it in a finer dtype"
            for row in self.rows
            if row.bound is not None and row.holds and row.kl_nats > max(scale / 2, NEGLIGIBLE)
        ]
        return found

    def as_dict(self) -> JsonObject:
        """Returns all figures as a dict."""
        return {
            "passed": self.passed,
            "reference": self.reference,
            "text": self.text.source,
            "tokens": self.text.num_tokens,
            "rows": [row.as_dict() for row in self.rows],
            "notes": self.notes,
        }


@torch.no_grad()
def run_gate(
    reference: Variant,
    variants: Sequence[Variant],
    text: GateText,
    *,
    max_drift: float | None = None,
) -> Gate:
    """Measures how far each variant is from the reference.

    Args:
        reference: what the result was made from.
        variants: the forms of the result, opened in this order.
        text: the sequences to compare on.
        max_drift: replaces the bounds of all variants that have one.
    """
    rows = []
    total = text.num_tokens * (1 + len(variants))
    with Progress("comparing", total=total, unit="token") as progress:
        expected = list(_measured(reference, text, progress))
        lowest = min(float(logits.min()) for logits in expected)
        scale = max(float(logits.max()) for logits in expected) - lowest
        for variant in variants:
            bound = variant.bound
            if bound is not None and max_drift is not None:
                bound = max_drift
            found = variant.open()
            if isinstance(found, str):
                rows.append(Row(name=variant.name, skipped=found))
                continue
            sums = _Sums(scale)
            for one, other in zip(expected, found(text.sequences), strict=True):
                sums.add(one, other)
                progress.advance(len(one), model=variant.name)
            rows.append(sums.row(variant.name, bound))
            del found
    return Gate(text, reference.name, tuple(rows))


def direct(model: Decoder) -> LogitsOf:
    """Returns the logits of a model's own forward pass."""

    def logits(sequences: Sequence[Sequence[int]]) -> Iterator[Tensor]:
        for ids in sequences:
            yield model.logits(list(ids)).cpu()

    return logits


def served(llm: LLM) -> LogitsOf:
    """Returns the logits that an engine computes, on its paged KV cache and in its own batches."""

    def logits(sequences: Sequence[Sequence[int]]) -> list[Tensor]:
        recorder = _Recorder(llm.engine.runner)
        engine = Engine(llm.model, llm.tokenizer, llm.engine.options, runner=recorder)
        params = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        requests = [Request(prompt_ids=tuple(ids), params=params) for ids in sequences]
        for _ in engine.run(requests):
            pass
        return [torch.cat(recorder.rows[number]) for number in sorted(recorder.rows)]

    return logits


def _measured(reference: Variant, text: GateText, progress: Progress) -> Iterator[Tensor]:
    """Yields the reference's logits."""
    found = reference.open()
    assert not isinstance(found, str), "a reference can be measured"
    for logits in found(text.sequences):
        yield logits
        progress.advance(len(logits), model=reference.name)


class _Recorder:
    """A runner that records the rows of logits of each sequence."""

    def __init__(self, runner: Runner) -> None:
        self._runner = runner
        self.rows: dict[int, list[Tensor]] = {}

    def run(self, step: Step) -> Tensor:
        logits = self._runner.run(step)
        parts = logits.split([piece.num_logit_rows for piece in step.pieces])
        for piece, part in zip(step.pieces, parts, strict=True):
            self.rows.setdefault(piece.sequence_id, []).append(part.cpu().clone())
        return logits


class _Sums:
    """Running figures of one variant, from logits [T, V] of both sides.

    Args:
        scale: the range of the reference's logits.
    """

    def __init__(self, scale: float) -> None:
        self.scale = max(scale, torch.finfo(torch.float32).tiny)
        self.count, self.equal, self.kl, self.largest = 0, 0, 0.0, 0.0

    def add(self, expected: Tensor, found: Tensor) -> None:
        """Adds the logits of one sequence."""
        self.count += len(expected)
        if found.shape != expected.shape:
            self.largest, self.kl = math.inf, math.nan
            return
        largest = float((found.double() - expected.double()).abs().max())
        # max() would drop a NaN that comes second
        self.largest = largest if largest != largest else max(self.largest, largest)
        for one, other in zip(expected.split(64), found.split(64), strict=True):
            log_one, log_other = (part.double().log_softmax(-1) for part in (one, other))
            self.kl += float((log_one.exp() * (log_one - log_other)).sum())
            self.equal += int((one.argmax(-1) == other.argmax(-1)).sum())

    def row(self, name: str, bound: float | None) -> Row:
        """Returns the figures."""
        return Row(
            name=name,
            drift=self.largest / self.scale,
            kl_nats=self.kl / self.count,
            agreement=self.equal / self.count,
            bound=bound,
        )


__all__ = [
    "BOUNDS",
    "COMPUTED_IN_BF16",
    "Gate",
    "GateError",
    "LogitsOf",
    "Row",
    "Variant",
    "direct",
    "run_gate",
    "served",
]
