"""The methods that quantize weights to uniform grids: RTN, GPTQ, AWQ, SmoothQuant.

A method is a pure function `(weight, statistics, spec) -> QuantTensor`, with the statistics that it
needs and, where it has any, the factors that are moved between modules before. To add one, write it
in a file and add a `Method` here.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError, suggest
from easyllm.quant.awq import clipped, find_factors
from easyllm.quant.gptq import GPTQOptions, gptq
from easyllm.quant.quant_tensor import QuantTensor
from easyllm.quant.rtn import rtn
from easyllm.quant.scaling import ScaleGroup
from easyllm.quant.smoothquant import smoothing_factors
from easyllm.quant.spec import QuantSpec
from easyllm.quant.statistics import Statistics

Needs = Literal["nothing", "sums", "gram"]
"""What a method needs of the inputs: nothing, sums per input, or the Gram matrix as well."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Method:
    """A method.

    Attributes:
        name: its name on the command line.
        needs: the statistics that it needs.
        quantize: (weight [N, K], statistics of its inputs, spec) → quantized weight. Statistics of
            no rows belong to an expert that no token reached.
        factors: (group, statistics of each of its linears, spec) → factors [S] of its channels, or
            None for a method that moves nothing between modules.
    """

    name: str
    needs: Needs
    quantize: Callable[[Tensor, Statistics | None, QuantSpec], QuantTensor]
    factors: Callable[[ScaleGroup, Sequence[Statistics], QuantSpec], Tensor] | None = None


def _rtn(
    weight: Tensor,
    statistics: Statistics | None,  # noqa: ARG001 - of the interface
    spec: QuantSpec,
) -> QuantTensor:
    return rtn(weight, spec)


def _gptq(
    weight: Tensor, statistics: Statistics | None, spec: QuantSpec, *, options: GPTQOptions
) -> QuantTensor:
    if statistics is None or statistics.gram is None or not statistics.rows:
        return rtn(weight, spec)
    return gptq(weight, statistics.gram, spec, options)


def _awq(weight: Tensor, statistics: Statistics | None, spec: QuantSpec) -> QuantTensor:
    if statistics is None or statistics.gram is None or not statistics.rows:
        return rtn(weight, spec)
    return clipped(weight, statistics.gram, spec)


def _awq_factors(group: ScaleGroup, statistics: Sequence[Statistics], spec: QuantSpec) -> Tensor:
    return find_factors(group, statistics, spec).factors


def _smooth_factors(
    group: ScaleGroup,
    statistics: Sequence[Statistics],
    spec: QuantSpec,  # noqa: ARG001 - of the interface
    *,
    alpha: float,
) -> Tensor:
    if not any(its.rows for its in statistics):
        return torch.ones_like(group.gather(statistics[0].abs_max))
    return smoothing_factors(group, statistics, alpha)


def rtn_method() -> Method:
    """Returns round-to-nearest."""
    return Method(name="rtn", needs="nothing", quantize=_rtn)


def gptq_method(
    *,
    act_order: bool = True,
    static_groups: bool = True,
    damping: float = 0.01,
    search: bool = True,
) -> Method:
    """Returns GPTQ; the settings are those of `GPTQOptions`."""
    options = GPTQOptions(
        act_order=act_order, static_groups=static_groups, damping=damping, search=search
    )
    return Method(name="gptq", needs="gram", quantize=partial(_gptq, options=options))


def awq_method() -> Method:
    """Returns AWQ."""
    return Method(name="awq", needs="gram", quantize=_awq, factors=_awq_factors)


def smoothquant_method(*, alpha: float = 0.5) -> Method:
    """Returns SmoothQuant with the share α of the range that is moved into the weights."""
    factors = partial(_smooth_factors, alpha=alpha)
    return Method(name="smoothquant", needs="sums", quantize=_rtn, factors=factors)


METHODS: dict[str, Callable[..., Method]] = {
    "rtn": rtn_method,
    "gptq": gptq_method,
    "awq": awq_method,
    "smoothquant": smoothquant_method,
}
"""The methods by name, each as a function of its own settings."""


def find_method(name: str, **settings: float | bool) -> Method:
    """Returns a method.

    Raises:
        ConfigError: there is no such method.
    """
    if name not in METHODS:
        raise ConfigError(
            f"quantization method {name!r} is not known{suggest(name, METHODS)}; use "
            f"{' or '.join(METHODS)}"
        )
    return METHODS[name](**settings)


__all__ = ["METHODS", "Method", "Needs", "find_method"]
