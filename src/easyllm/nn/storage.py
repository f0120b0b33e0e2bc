"""Storage of the weight of a linear or an embedding: each layer has exactly one `WeightStorage`.

A full weight is the parameter `weight` of its layer (`DenseWeight`). A quantized weight is a
`PackedStorage`, a separate module whose buffers move with the model. All code that multiplies by a
weight, looks up its rows or saves it uses the storage, so a new format needs only one class here or
in `quant/` and one call of `quant.register_storage`.
"""

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from easyllm.ops.autograd import Context
from easyllm.ops.deterministic import fixed_order_linear
from easyllm.ops.embedding import embedding
from easyllm.ops.kernels.structs import DTYPE_CODES, Matrix, address
from easyllm.ops.matmul import linear


@runtime_checkable
class WeightStorage(Protocol):
    """A weight [N, K] in any format.

    Attributes:
        format: the name under which the format is registered; `dense` for a full weight.
    """

    format: str

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), outputs and inputs."""

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of looked-up rows and of the layer's intended activations."""

    @property
    def device(self) -> torch.device:
        """Device of the weight."""

    @property
    def num_bytes(self) -> int:
        """Memory in bytes."""

    @property
    def batch_invariant(self) -> bool:
        """Whether `linear` is batch-invariant in deterministic mode (bitwise, for each row)."""

    def linear(
        self, x: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """Returns x Wᵀ + b, [..., N] in the dtype of `x`, for `x: [..., K]` and `bias: [N]`.

        It is differentiable in `x`.
        """

    def rows(self, token_ids: Tensor) -> Tensor:
        """Returns the weight's rows `token_ids: [T]`, [T, K] in `dtype`."""

    def dense(self) -> Tensor:
        """Returns the full weight [N, K] in `dtype`."""

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns the tensors to save, by the last part of their names (such as `weight_scale`)."""

    def kernel_matrix(self, bias: Tensor | None) -> Matrix | None:
        """Returns the weight in the format of the C kernels, with an fp32 bias [N].

        Returns None if the kernels do not support the format.
        """

    @property
    def payload(self) -> Tensor:
        """The largest tensor of the weight, which is moved when weights are gathered in memory."""

    @payload.setter
    def payload(self, value: Tensor) -> None: ...


class DenseWeight:
    """A full weight: the parameter `weight` of the layer that has this storage.

    Args:
        parameters: the layer's own dictionary of parameters, so that a replaced parameter is used
            here, too.
    """

    format = "dense"
    batch_invariant = True

    def __init__(self, parameters: dict[str, nn.Parameter | None]) -> None:
        self._parameters = parameters

    @property
    def weight(self) -> nn.Parameter:
        """The parameter [N, K]."""
        weight = self._parameters["weight"]
        assert weight is not None, "a layer whose storage is dense has its weight"
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), outputs and inputs."""
        outputs, inputs = self.weight.shape
        return outputs, inputs

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of the weight."""
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.weight.device

    @property
    def num_bytes(self) -> int:
        """Memory in bytes."""
        return self.weight.nbytes

    def linear(
        self, x: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """Returns x Wᵀ + b, [..., N] for `x: [..., K]`, differentiable in all operands."""
        return (fixed_order_linear if deterministic else linear)(x, self.weight, bias)

    def rows(self, token_ids: Tensor) -> Tensor:
        """Returns the weight's rows `token_ids: [T]`, [T, K]."""
        return embedding(token_ids, self.weight)

    def dense(self) -> Tensor:
        """Returns the parameter itself."""
        return self.weight

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns the tensor to save, `weight`."""
        return {"weight": self.weight}

    def kernel_matrix(self, bias: Tensor | None) -> Matrix | None:
        """Returns the weight for the C kernels; None for other dtypes or strided weights."""
        weight = self.weight
        if weight.dtype not in DTYPE_CODES or not weight.is_contiguous():
            return None
        return Matrix(
            data=address(weight),
            bias=address(bias),
            outputs=weight.shape[0],
            inputs=weight.shape[1],
            format=DTYPE_CODES[weight.dtype],
        )

    @property
    def payload(self) -> Tensor:
        """The data of the parameter."""
        return self.weight.data

    @payload.setter
    def payload(self, value: Tensor) -> None:
        self.weight.data = value


class PackedStorage(nn.Module):
    """Base class of quantized formats: a storage of one or more buffers.

    A subclass defines `format`, `dense` and `tensors`. The other methods have default
    implementations, which are slower than specialised matrix products and row look-ups, or a format
    that the C kernels support.

    Args:
        shape: (N, K).
        dtype: dtype of looked-up rows.
    """

    format: str
    batch_invariant = True  # for `linear` below; a subclass that overrides it sets its own value
    rounds_rows = False
    """Whether the CPU's kernel for `linear` rounds the rows that it multiplies to int8."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    like: Tensor

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of looked-up rows and of the layer's intended activations."""
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        """Device of the weight."""
        return self.like.device

    @property
    def num_bytes(self) -> int:
        """Memory in bytes."""
        return sum(buffer.nbytes for buffer in self.buffers())

    def linear(
        self, x: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """Returns x Wᵀ + b, [..., N] in the dtype of `x: [..., K]`, with the dequantized weight."""
        if torch.is_grad_enabled() and x.requires_grad and not deterministic:
            y: Tensor = _Dequantized.apply(x, self, bias)
            return y
        return (fixed_order_linear if deterministic else nn.functional.linear)(
            x, self.dense().to(x.dtype), bias
        )

    def rows(self, token_ids: Tensor) -> Tensor:
        """Returns the weight's rows `token_ids: [T]`, [T, K] in `dtype`."""
        return self.dense()[token_ids].to(self.dtype)

    def dense(self) -> Tensor:
        """Returns the dequantized weight [N, K]; a subclass must define it."""
        raise NotImplementedError

    def tensors(self) -> Mapping[str, Tensor]:
        """Returns the tensors to save, by the last part of the name; a subclass must define it."""
        raise NotImplementedError

    def kernel_matrix(self, bias: Tensor | None) -> Matrix | None:  # noqa: ARG002 - interface
        """Returns None: by default the C kernels do not support the format."""
        return None

    @property
    def payload(self) -> Tensor:
        """The largest buffer."""
        return self._buffers[self._largest]  # type: ignore[return-value]

    @payload.setter
    def payload(self, value: Tensor) -> None:
        self._buffers[self._largest] = value

    @cached_property  # read for every layer in every decoding step
    def _largest(self) -> str:
        held = {name: buffer.nbytes for name, buffer in self._buffers.items() if buffer is not None}
        return max(held, key=held.__getitem__)

    def _apply(
        self,
        fn: Callable[[Tensor], Tensor],
        recurse: bool = True,  # noqa: ARG002 - torch's signature
    ) -> "PackedStorage":
        """Moves all buffers to another device, but casts only `like` to another dtype.

        The quantized data and scales are never rounded.
        """
        for name, buffer in self._buffers.items():
            if buffer is None or name == "like":
                continue
            as_bytes = fn(buffer.contiguous().reshape(-1).view(torch.uint8))
            self._buffers[name] = as_bytes.view(buffer.dtype).reshape(buffer.shape)
        self._buffers["like"] = fn(self.like)
        return self

    def extra_repr(self) -> str:
        """Returns the sizes and the format for `repr`."""
        return f"{self.shape[1]} -> {self.shape[0]}, {self.format}"


class _Dequantized(torch.autograd.Function):
    """x Wᵀ + b that saves only the quantized weight; the backward pass dequantizes it again."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, storage: PackedStorage, bias: Tensor | None) -> Tensor:
        ctx.storage = storage
        return nn.functional.linear(x, storage.dense().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Context, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (grad,) = grads
        to_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad @ ctx.storage.dense().to(grad.dtype), None, to_bias


__all__ = ["DenseWeight", "PackedStorage", "WeightStorage"]
