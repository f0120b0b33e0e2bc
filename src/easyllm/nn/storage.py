"""How the weight of a linear or an embedding is kept: every layer holds exactly one `WeightStorage`.

A full weight is the parameter `weight` of its layer (`DenseWeight`); a quantized one is a `PackedStorage`, a module of its
own whose buffers move with the model. Whatever multiplies by a weight, looks rows up in it or saves it asks the storage, so
that a new format is one class here or in `quant/` and one call of `quant.register_storage`.
"""

from collections.abc import Callable, Mapping
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from easyllm.ops.deterministic import tiled_linear
from easyllm.ops.embedding import embedding
from easyllm.ops.kernels.build import DTYPE_CODES, Matrix
from easyllm.ops.product import linear


@runtime_checkable
class WeightStorage(Protocol):
    """A weight [N, K], in whatever form.

    Attributes:
        format: the name it is registered under; `dense` for a full weight.
        shape: (N, K), outputs and inputs.
        dtype: that of looked-up rows, and of the activations the layer is meant for.
        device: where it is.
        num_bytes: of memory it takes.
        batch_invariant: whether a row's bits are the same whatever the number of rows, by `linear` in deterministic mode.
    """

    format: str

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    @property
    def device(self) -> torch.device: ...

    @property
    def num_bytes(self) -> int: ...

    @property
    def batch_invariant(self) -> bool: ...

    def linear(
        self, x: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        """x Wᵀ + b: `x: [..., K]`, `bias: [N]` → [..., N] in the dtype of `x`; differentiable in `x`."""

    def rows(self, token_ids: Tensor) -> Tensor:
        """The weight's rows `token_ids: [T]` → [T, K] in `dtype`."""

    def dense(self) -> Tensor:
        """The whole weight [N, K] in `dtype`."""

    def tensors(self) -> Mapping[str, Tensor]:
        """What a file keeps of it, by the last part of the tensors' names (`weight`, `weight_scale` ...)."""

    def kernel_matrix(self, bias: Tensor | None) -> Matrix | None:
        """The weight as the C kernels read it, with an fp32 bias [N]; None where they have no such format."""

    @property
    def payload(self) -> Tensor:
        """The tensor that a product reads most of: what is moved when weights are gathered in memory."""

    @payload.setter
    def payload(self, value: Tensor) -> None: ...


class DenseWeight:
    """The full weight: the parameter `weight` of the layer that holds this storage.

    Args:
        parameters: the layer's own dictionary of parameters, so that whoever replaces the parameter is seen here.
    """

    format = "dense"
    batch_invariant = True

    def __init__(self, parameters: dict[str, nn.Parameter | None]) -> None:
        self._parameters = parameters

    @property
    def weight(self) -> nn.Parameter:
        weight = self._parameters["weight"]
        assert weight is not None, "a layer whose storage is dense has its weight"
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        outputs, inputs = self.weight.shape
        return outputs, inputs

    @property
    def dtype(self) -> torch.dtype:
        return self.weight.dtype

    @property
    def device(self) -> torch.device:
        return self.weight.device

    @property
    def num_bytes(self) -> int:
        return self.weight.nbytes

    def linear(
        self, x: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        return (tiled_linear if deterministic else linear)(x, self.weight, bias)

    def rows(self, token_ids: Tensor) -> Tensor:
        return embedding(token_ids, self.weight)

    def dense(self) -> Tensor:
        return self.weight

    def tensors(self) -> Mapping[str, Tensor]:
        return {"weight": self.weight}

    def kernel_matrix(self, bias: Tensor | None) -> Matrix | None:
        weight = self.weight
        if weight.dtype not in DTYPE_CODES or not weight.is_contiguous():
            return None
        address = None if bias is None else bias.data_ptr()
        return Matrix(weight.data_ptr(), None, address, *weight.shape, DTYPE_CODES[weight.dtype])

    @property
    def payload(self) -> Tensor:
        return self.weight.data

    @payload.setter
    def payload(self, value: Tensor) -> None:
        self.weight.data = value


class PackedStorage(nn.Module):
    """A storage of several tensors, all of them buffers: what a quantized format derives from.

    A class says its `format` and gives `dense` and `tensors`; the rest follows, more slowly than a format that knows its own
    products and rows, or that the kernels read.

    Args:
        shape: (N, K).
        dtype: of looked-up rows.
    """

    format: str
    batch_invariant = True  # of the products below; a class with its own says what they are

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype) -> None:
        super().__init__()
        self.shape = shape
        self.register_buffer("like", torch.empty(0, dtype=dtype), persistent=False)

    like: Tensor

    @property
    def dtype(self) -> torch.dtype:
        return self.like.dtype

    @property
    def device(self) -> torch.device:
        return self.like.device

    @property
    def num_bytes(self) -> int:
        return sum(buffer.nbytes for buffer in self.buffers())

    def linear(
        self, x: Tensor, bias: Tensor | None = None, *, deterministic: bool = False
    ) -> Tensor:
        if torch.is_grad_enabled() and x.requires_grad and not deterministic:
            y: Tensor = _Dequantized.apply(x, self, bias)
            return y
        return (tiled_linear if deterministic else nn.functional.linear)(
            x, self.dense().to(x.dtype), bias
        )

    def rows(self, token_ids: Tensor) -> Tensor:
        return self.dense()[token_ids].to(self.dtype)

    def dense(self) -> Tensor:
        raise NotImplementedError

    def tensors(self) -> Mapping[str, Tensor]:
        raise NotImplementedError

    def kernel_matrix(self, bias: Tensor | None) -> Matrix | None:  # noqa: ARG002 - for known formats
        return None

    @property
    def payload(self) -> Tensor:
        return self._buffers[self._largest()]  # type: ignore[return-value]

    @payload.setter
    def payload(self, value: Tensor) -> None:
        self._buffers[self._largest()] = value

    def _largest(self) -> str:
        return max(self._buffers, key=lambda name: self._buffers[name].nbytes)  # type: ignore[union-attr]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "PackedStorage":  # noqa: ARG002 - torch's signature
        """Moves everything to another device, and only `like` to another dtype: codes and scales are not rounded."""
        for name, buffer in self._buffers.items():
            if buffer is None or name == "like":
                continue
            as_bytes = fn(buffer.contiguous().reshape(-1).view(torch.uint8))
            self._buffers[name] = as_bytes.view(buffer.dtype).reshape(buffer.shape)
        self._buffers["like"] = fn(self.like)
        return self

    def extra_repr(self) -> str:
        return f"{self.shape[1]} -> {self.shape[0]}, {self.format}"


class _Dequantized(torch.autograd.Function):
    """x Wᵀ + b that keeps the packed weight alone for the backward pass, in which it is dequantized again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, storage: PackedStorage, bias: Tensor | None) -> Tensor:
        ctx.storage = storage
        return nn.functional.linear(x, storage.dense().to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor | None]:
        (grad,) = grads
        to_bias = grad.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return grad @ ctx.storage.dense().to(grad.dtype), None, to_bias


__all__ = ["DenseWeight", "PackedStorage", "WeightStorage"]
