"""What casting a checkpoint to other number formats loses, tensor by tensor."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.core.progress import Progress
from easyllm.models.load import open_source
from easyllm.ops.number_formats import FloatFormat, Format, decode_array, encode_array

TORCH_DTYPES = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp8e4m3": torch.float8_e4m3fn,
    "fp8e5m2": torch.float8_e5m2,
}
"""Formats that torch casts to as `encode_array` does (a test compares them)."""
WORST = 5
"""Tensors that a report names."""


@dataclass(frozen=True, slots=True, kw_only=True)
class CastLoss:
    """What casting one tensor loses.

    Attributes:
        name: name of the tensor.
        count: number of values.
        changed: values that differ afterwards.
        overflow: finite values beyond the format's largest, which become infinite or the largest.
        underflow: values other than 0 that become 0.
        subnormal: values that become subnormal, with fewer digits.
        squared_error: sum of squared errors, of the values that stay finite.
        squared_sum: sum of squares of the values.
        max_error: largest absolute error of a value that stays finite.
        largest: largest absolute value.
    """

    name: str
    count: int
    changed: int
    overflow: int
    underflow: int
    subnormal: int
    squared_error: float
    squared_sum: float
    max_error: float
    largest: float

    @property
    def relative_error(self) -> float:
        """Root of the squared errors relative to that of the squares."""
        return math.sqrt(self.squared_error / self.squared_sum) if self.squared_sum else 0.0

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        kept = {k: v for k, v in asdict(self).items() if not k.startswith("squared")}
        return kept | {"relative_error": self.relative_error}


@dataclass(frozen=True, slots=True, kw_only=True)
class CastReport:
    """What casting all tensors of a checkpoint to one format loses.

    Attributes:
        format: name of the format.
        total: sums over all tensors, and the largest errors.
        worst: tensors with overflow first, then those with the largest relative error.
    """

    format: str
    total: CastLoss
    worst: tuple[CastLoss, ...]

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return self.total.as_dict() | {"worst": [each.as_dict() for each in self.worst]}


def cast_report(source: str | Path, formats: Sequence[Format]) -> dict[str, CastReport]:
    """Reads a checkpoint once, tensor by tensor, and returns what each format loses.

    Args:
        source: any source that `load_model` accepts.
        formats: floating-point formats of at most 32 bits.

    Raises:
        SourceError, CheckpointError: there is no such model, or a file is damaged.
        ConfigError: a format is one of integers, which need a scale.
    """
    floats = [each for each in formats if isinstance(each, FloatFormat) and each.bits <= 32]
    for each in formats:
        if each not in floats:
            raise ConfigError(
                f"a checkpoint cannot be cast to {each.name}: integers need scales, which "
                "`easyllm quantize` finds, and fp64 loses nothing; use fp32, tf32, bf16, fp16, "
                "fp8e4m3 or fp8e5m2"
            )
    found: dict[str, list[CastLoss]] = {each.name: [] for each in floats}
    for name, tensor in _tensors(source):
        for each in floats:
            found[each.name].append(cast_loss(name, tensor, each))
    return {name: _report(name, losses) for name, losses in found.items()}


def _tensors(source: str | Path) -> Iterator[tuple[str, Tensor]]:
    opened = open_source(source)
    names = sorted(opened.tensors.shapes)
    with Progress("casting", total=len(names), unit="tensor") as progress:
        for name in names:
            tensor = opened.tensors.load(name)
            if tensor.is_floating_point():
                yield name, tensor
            progress.advance(1)


@torch.no_grad()
def cast_loss(name: str, tensor: Tensor, format: FloatFormat) -> CastLoss:
    """Returns what casting a tensor to a format loses; rounds to the nearest number."""
    exact = tensor.double().reshape(-1)
    dtype = TORCH_DTYPES.get(format.name)
    if dtype is not None and tensor.dtype != torch.float64:
        after = tensor.to(dtype).double().reshape(-1)
    else:
        after = torch.from_numpy(decode_array(encode_array(exact.numpy(), format), format))
    finite = exact.isfinite()
    kept = finite & after.isfinite()
    top = format.max + format.epsilon * format.top_binade / 2
    beyond = finite & (~after.isfinite() | (exact.abs() > float(top)))
    error = torch.where(kept, (after - exact).abs(), torch.zeros_like(exact))
    size = after.abs()
    small = (size > 0) & (size < float(format.smallest_normal))
    held = torch.where(finite, exact, torch.zeros_like(exact))
    return CastLoss(
        name=name,
        count=exact.numel(),
        changed=int((error > 0).sum()),
        overflow=int(beyond.sum()),
        underflow=int(((exact != 0) & (after == 0)).sum()),
        subnormal=int(small.sum()),
        squared_error=float(error.square().sum()),
        squared_sum=float(held.square().sum()),
        max_error=float(error.max()) if len(error) else 0.0,
        largest=float(held.abs().max()) if len(held) else 0.0,
    )


def _report(name: str, losses: Sequence[CastLoss]) -> CastReport:
    sums = {
        key: sum(getattr(each, key) for each in losses)
        for key in ("count", "changed", "overflow", "underflow", "subnormal")
    }
    total = CastLoss(
        name="all",
        **sums,
        squared_error=sum(each.squared_error for each in losses),
        squared_sum=sum(each.squared_sum for each in losses),
        max_error=max((each.max_error for each in losses), default=0.0),
        largest=max((each.largest for each in losses), default=0.0),
    )
    worst = sorted(losses, key=lambda each: (each.overflow, each.relative_error), reverse=True)
    return CastReport(format=name, total=total, worst=tuple(worst[:WORST]))


__all__ = ["CastLoss", "CastReport", "cast_loss", "cast_report"]
