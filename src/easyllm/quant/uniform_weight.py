"""Storage of a weight on a uniform grid: GPTQ, AWQ and compressed-tensors in memory.

A weight is kept in the layout of the CPU kernels where they support its grid, and otherwise as
words of codes with scales and zero points. Either takes the bytes of the file, within a few per
cent, and holds the same values.
"""

from collections.abc import Callable, Mapping
from typing import TypeAlias

import torch
from torch import Tensor

from easyllm.nn.storage import PackedStorage
from easyllm.ops.grouped_linear import (
    NONE,
    OUTPUTS,
    ZEROS,
    Grid,
    GroupedMatrix,
    pack,
    unsupported_reason,
)
from easyllm.ops.kernels.structs import Matrix
from easyllm.ops.packed_linear import packed_linear
from easyllm.quant.formats.bits import pack_bits, unpack_bits
from easyllm.quant.quant_tensor import QuantTensor
from easyllm.quant.spec import QuantSpec

FileTensors: TypeAlias = Callable[[QuantTensor], Mapping[str, Tensor]]


class UniformWeight(PackedStorage):
    """A weight [N, K] with scales and zero points by group; a subclass holds the codes.

    Args:
        weight: the weight.
        dtype: dtype of looked-up rows and of the dequantized weight.
        format: the name of the file format.
        to_file: returns the file's tensors of the weight.
    """

    is_moved: bool
    """Whether inputs were moved between groups (activation order)."""

    def __init__(
        self, weight: QuantTensor, dtype: torch.dtype, format: str, to_file: FileTensors
    ) -> None:
        super().__init__(weight.shape, dtype)
        self.format, self.spec, self.to_file = format, weight.spec, to_file
        self.is_moved = weight.group_of is not None
        self.hold(weight)

    def hold(self, weight: QuantTensor) -> None:
        """Registers the buffers of a weight."""
        raise NotImplementedError

    def quant_tensor(self, ids: Tensor | None = None) -> QuantTensor:
        """Returns the weight, or its rows `ids: [T]`, with one byte a code."""
        raise NotImplementedError

    def dense(self) -> Tensor:
        """Returns the dequantized weight [N, K]."""
        return self.quant_tensor().dequantize().to(self.dtype)

    def rows(self, token_ids: Tensor) -> Tensor:
        """Returns the dequantized rows [T, K] of `token_ids: [T]`."""
        return self.quant_tensor(token_ids).dequantize().to(self.dtype)

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns the file's tensors, by the last part of their names."""
        return self.to_file(self.quant_tensor())


class WordWeight(UniformWeight):
    """Codes packed into words, on any grid; the weight is dequantized for a product."""

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    group_of: Tensor | None

    def hold(self, weight: QuantTensor) -> None:
        """Registers words, scales, zero points and the groups of inputs that were moved."""
        group_of = weight.group_of
        self.register_buffer("words", pack_bits(weight.codes, weight.spec.bits))
        self.register_buffer("scales", weight.scales.to(weight.spec.torch_scale_dtype))
        self.register_buffer("zeros", None if weight.spec.symmetric else weight.zeros)
        self.register_buffer("group_of", None if group_of is None else group_of.to(torch.int32))

    def quant_tensor(self, ids: Tensor | None = None) -> QuantTensor:
        """Returns the weight, or its rows `ids: [T]`, with one byte a code."""
        words, scales, zeros = self.words, self.scales, self.zeros
        if ids is not None:
            words, scales = words[ids], scales[ids]
            zeros = None if zeros is None else zeros[ids]
        if zeros is None:
            zeros = torch.full_like(scales, self.spec.middle, dtype=torch.uint8)
        return QuantTensor(
            codes=unpack_bits(words, self.spec.bits, self.shape[1]),
            scales=scales.float(),
            zeros=zeros,
            spec=self.spec,
            group_of=None if self.group_of is None else self.group_of.long(),
        )


class KernelWeight(UniformWeight):
    """Codes in the layout of the CPU kernels, inputs in the order of their groups."""

    rounds_rows = True
    data: Tensor
    order: Tensor | None

    def hold(self, weight: QuantTensor) -> None:
        """Registers the packed data and, where inputs were moved, their order."""
        order = None if weight.group_of is None else weight.group_of.argsort(stable=True)
        codes = weight.codes if order is None else weight.codes[:, order]
        self.grid = kernel_grid(weight.spec, self.shape[1])
        zeros = None if weight.spec.symmetric else weight.zeros
        self.register_buffer("data", pack(codes, weight.scales, zeros, self.grid).data)
        self.register_buffer("order", None if order is None else order.to(torch.int32))

    @property
    def matrix(self) -> GroupedMatrix:
        """The weight, inputs in the order of their groups."""
        return GroupedMatrix(self.data, self.grid, *self.shape)

    def linear(
        self, x: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """Returns x Wᵀ + b, [..., N] in the dtype of `x: [..., K]`; always batch-invariant."""
        x = x if self.order is None else x.index_select(-1, self.order)
        return packed_linear(x, self.matrix, bias, deterministic=deterministic)

    def quant_tensor(self, ids: Tensor | None = None) -> QuantTensor:
        """Returns the weight, or its rows `ids: [T]`, with one byte a code."""
        codes, scales, zeros = self._rows(ids)
        group_of = None
        if self.order is not None:
            order, moved = self.order.long(), codes
            codes, group_of = torch.empty_like(moved), torch.empty_like(order)
            codes[:, order] = moved
            # every group has the same size, see `uniform_weight`
            group_of[order] = torch.arange(len(order), device=order.device) // self.grid.group_size
        return QuantTensor(
            codes=codes,
            scales=scales,
            zeros=zeros.to(torch.uint8),
            spec=self.spec,
            group_of=group_of,
        )

    def _rows(self, ids: Tensor | None) -> tuple[Tensor, ...]:
        if ids is None:
            return self.matrix.unpack()
        blocks = self.data[ids // OUTPUTS]  # each row with the seven others of its block
        whole = GroupedMatrix(blocks, self.grid, len(ids) * OUTPUTS, self.shape[1]).unpack()
        place = torch.arange(len(ids), device=ids.device) * OUTPUTS + ids % OUTPUTS
        codes, scales, shifts = whole
        return codes[place], scales[place], shifts[place]

    def kernel_matrix(self, bias: Tensor | None) -> Matrix | None:
        """Returns the weight in the format of the C kernels; None in activation order."""
        return None if self.order is not None else self.matrix.struct(bias)


def kernel_grid(spec: QuantSpec, inputs: int) -> Grid:
    """Returns the grid as the kernels describe it."""
    return Grid(
        bits=spec.bits,
        scale_dtype=spec.torch_scale_dtype,
        shift=NONE if spec.symmetric else ZEROS,
        group_size=spec.group(inputs),
    )


def uniform_weight(
    weight: QuantTensor, dtype: torch.dtype, format: str, to_file: FileTensors
) -> UniformWeight:
    """Returns the storage of a weight; the arguments are those of `UniformWeight`."""
    inputs = weight.shape[1]
    kind: type[UniformWeight] = KernelWeight
    if unsupported_reason(kernel_grid(weight.spec, inputs), inputs) is not None:
        kind = WordWeight
    if weight.group_of is not None:
        counts = weight.group_of.bincount()
        if bool((counts != weight.spec.group(inputs)).any()):
            kind = WordWeight  # groups of different sizes
    return kind(weight, dtype, format, to_file)


__all__ = ["KernelWeight", "UniformWeight", "WordWeight", "uniform_weight"]
