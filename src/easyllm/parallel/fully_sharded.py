"""ZeRO-3 and FSDP: weights, gradients and optimizer state are sharded, by PyTorch's FSDP2.

The unit is a layer: its weights are gathered before its forward and backward passes and dropped
afterwards. Embedding, final norm and head form one more unit, because tied weights must be in the
same one. `fsdp` keeps that unit gathered from the forward to the backward pass; under `zero3` it is
dropped and gathered again as well, which costs one more all-gather of it.

Sent elements of a step with one micro-batch: 3 Ψ (W-1)/W (arXiv 1910.02054, section 7.2.2).
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
)
from torch.distributed.tensor import DTensor

from easyllm.nn.decoder import Decoder
from easyllm.parallel.mesh import Mesh
from easyllm.parallel.pieces import Piece
from easyllm.parallel.sharding import Sink


class ShardedWeights:
    """A decoder whose parameters are sharded by rows among the data-parallel ranks.

    Args:
        model: the decoder, changed in place.
        slices: which part of the full parameters the model's are (tensor parallel).
        mesh: the ranks.
        compute: dtype in which full weights are gathered; None keeps each parameter's own.
        offload: whether shards stay in host memory.
    """

    is_sharded = True

    def __init__(
        self,
        model: Decoder,
        slices: Mapping[str, Piece],
        mesh: Mesh,
        *,
        compute: torch.dtype | None,
        offload: bool,
    ) -> None:
        self._modules = shard_modules(model, mesh, compute=compute, offload=offload)
        self.parameters = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.local: dict[str, nn.Parameter] = {}
        self.pieces: dict[str, Piece] = {}
        self._sums: dict[str, Tensor] = {}
        for name, parameter in self.parameters.items():
            assert isinstance(parameter, DTensor), "FSDP2 has sharded every parameter"
            mine = parameter.to_local().detach()
            rows = -(-parameter.shape[0] // mesh.data.size)
            width = parameter.numel() // parameter.shape[0]
            start = min(parameter.shape[0], mesh.data.rank * rows) * width
            self.local[name] = nn.Parameter(mine)
            self.pieces[name] = slices[name].flat(start, start + mine.numel())

    def begin_micro_batch(self, *, last: bool) -> None:
        """Does nothing: FSDP2 reduces the gradients of every micro-batch."""

    def end_micro_batch(self) -> None:
        """Accumulates gradients of low-precision weights in fp32."""
        for name, parameter in self.parameters.items():
            if parameter.dtype in (torch.float32, torch.float64) or parameter.grad is None:
                continue
            gradient, parameter.grad = _local(parameter.grad).float(), None
            held = self._sums.get(name)
            self._sums[name] = gradient if held is None else held.add_(gradient)

    def reduce(self, sink: Sink) -> None:
        """Passes on the gradients' shards, which FSDP2 has summed over the ranks."""
        for name, parameter in self.parameters.items():
            gradient = self._sums.pop(name, None)
            if parameter.grad is not None:
                gradient, parameter.grad = _local(parameter.grad), None
            if gradient is not None:
                sink(name, gradient)

    def refresh(self) -> None:
        """Drops gathered weights, so that the next forward pass gathers the changed ones."""
        for module in self._modules:
            module.reshard()


def shard_modules(
    model: Decoder, mesh: Mesh, *, compute: torch.dtype | None, offload: bool
) -> list[FSDPModule]:
    """Applies FSDP2 to every layer and then to the rest of the model; returns these modules."""
    # inputs are not cast: the residual stream is fp32 whatever the dtype of the weights
    precision = MixedPrecisionPolicy(
        param_dtype=compute,
        reduce_dtype=None if compute is None else torch.float32,
        cast_forward_inputs=False,
    )
    policy = CPUOffloadPolicy() if offload else OffloadPolicy()
    found: list[FSDPModule] = []
    for module in (*model.layers, model):
        fully_shard(
            module,
            mesh=mesh.devices["data"],
            reshard_after_forward=module is not model,
            mp_policy=precision,
            offload_policy=policy,
        )
        assert isinstance(module, FSDPModule), "fully_shard changes the class"
        # sum instead of mean: the loss is divided by the tokens of all ranks
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)  # gloo has no scaled sum
        found.append(module)
    return found


def _local(gradient: Tensor) -> Tensor:
    return gradient.to_local() if isinstance(gradient, DTensor) else gradient


__all__ = ["ShardedWeights", "shard_modules"]
