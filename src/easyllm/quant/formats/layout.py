"""What the layouts of weights on uniform grids share: one `UniformLayout` for each file format."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.storage import WeightStorage
from easyllm.quant.formats.config_keys import check_config
from easyllm.quant.quant_tensor import QuantTensor
from easyllm.quant.registry import FileLayout, StorageFormat, register_layout
from easyllm.quant.spec import QuantSpec
from easyllm.quant.uniform_weight import UniformWeight, uniform_weight

DTYPES = {
    **dict.fromkeys(
        ("qweight", "qzeros", "g_idx", "weight_packed", "weight_zero_point"), torch.int32
    ),
    "weight": torch.int8,
    "weight_shape": torch.int64,
}
"""Dtypes of the files' tensors, but for scales."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UniformLayout:
    """A file format of weights on uniform grids.

    Attributes:
        name: its `quant_method`.
        tensors: the last parts of the names of the tensors of a weight on a grid.
        unsupported_reason: (spec, N, K) → why the layout cannot hold such a weight; None if it can.
        to_tensors: returns the file's tensors of a weight.
        from_tensors: (tensors, (N, K), `quantization_config`) → weight.
        spec_of: returns the grid that a `quantization_config` describes; where it describes
            several, the first.
        describe: (the grids of all weights by file name of their linears, names of the linears that
            are not quantized, whether inputs were moved between groups) → `quantization_config`.
        check: raises `CheckpointError` for values of a `quantization_config` beyond its keys.
        holds_order: whether inputs can be moved between groups (activation order).
        holds_several: whether linears can have different grids.
        honoured, neutral: keys of `quantization_config`, as for `check_config`.
    """

    name: str
    tensors: Callable[[QuantSpec], tuple[str, ...]]
    unsupported_reason: Callable[[QuantSpec, int, int], str | None]
    to_tensors: Callable[[QuantTensor], Mapping[str, Tensor]]
    from_tensors: Callable[[Mapping[str, Tensor], tuple[int, int], JsonMapping], QuantTensor]
    spec_of: Callable[[JsonMapping], QuantSpec]
    describe: Callable[[Mapping[str, QuantSpec], Sequence[str], bool], JsonObject]
    check: Callable[[JsonMapping], None]
    holds_order: bool = False
    holds_several: bool = False
    honoured: Sequence[str]
    neutral: Sequence[str]

    def storage(self, weight: QuantTensor, dtype: torch.dtype) -> UniformWeight:
        """Returns the weight as it is kept in memory.

        Raises:
            ConfigError: the layout has no place for the order of its inputs.
        """
        if weight.group_of is not None and not self.holds_order:
            raise ConfigError(
                f"the format {self.name} cannot hold activation order, which moves inputs between "
                "groups; use gptq, or quantize without it"
            )
        return uniform_weight(weight, dtype, self.name, self.to_tensors)

    def register(self) -> "UniformLayout":
        """Registers the layout for loading and saving; returns it."""
        register_layout(
            FileLayout(name=self.name, format_of=self._format_of, config_of=self._config_of)
        )
        return self

    def _format_of(self, config: JsonMapping) -> StorageFormat:
        check_config(config, honoured=self.honoured, neutral=self.neutral)
        self.check(config)
        spec = self.spec_of(config)
        return StorageFormat(
            name=self.name,
            num_bytes=lambda shape: round(shape[0] * shape[1] * spec.bits_per_weight(shape[1]) / 8),
            file_tensors=self.tensors(spec),
            from_file=partial(self._from_file, config),
            unsupported_reason=lambda shape: self.unsupported_reason(spec, *shape),
        )

    def _from_file(
        self,
        config: JsonMapping,
        tensors: Mapping[str, Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> UniformWeight:
        return self.storage(self.from_tensors(tensors, shape, config), dtype)

    def _config_of(self, packed: Mapping[str, WeightStorage], skipped: Sequence[str]) -> JsonObject:
        weights = {name: its for name, its in packed.items() if isinstance(its, UniformWeight)}
        specs = {name: its.spec for name, its in weights.items()}
        if len(set(specs.values())) > 1 and not self.holds_several:
            raise CheckpointError(
                f"a {self.name} file has one grid for all linears, got {len(set(specs.values()))}; "
                "quantize all linears alike, or use another format"
            )
        return self.describe(specs, skipped, any(its.is_moved for its in weights.values()))


def grids(specs: Mapping[str, QuantSpec]) -> dict[QuantSpec, list[str]]:
    """Returns the names of each grid, the commonest grid first."""
    found: dict[QuantSpec, list[str]] = {}
    for name, spec in specs.items():
        found.setdefault(spec, []).append(name)
    return dict(sorted(found.items(), key=lambda item: -len(item[1])))


def check_shapes(
    tensors: Mapping[str, Tensor],
    expected: Mapping[str, tuple[int, ...]],
    spec: QuantSpec,
    inputs: int,
) -> None:
    """Checks dtypes and shapes of the tensors of a weight with K inputs; a missing one is left out.

    Raises:
        CheckpointError: one has another dtype or shape.
    """
    for name, dtype in DTYPES.items():
        if name in tensors and tensors[name].dtype != dtype:
            raise CheckpointError(f"{name} has dtype {tensors[name].dtype}, expected {dtype}")
    for name in ("scales", "weight_scale"):
        if name in tensors and not tensors[name].is_floating_point():
            raise CheckpointError(f"{name} has dtype {tensors[name].dtype}, expected a float")
    for name, shape in expected.items():
        if name in tensors and tuple(tensors[name].shape) != shape:
            raise CheckpointError(
                f"{name} has shape {list(tensors[name].shape)}, expected {list(shape)} for "
                f"{spec.bits} bits in groups of {spec.group(inputs)}"
            )


__all__ = ["UniformLayout", "check_shapes", "grids"]
