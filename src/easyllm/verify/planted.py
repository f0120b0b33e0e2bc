"""Faults of distributed training, planted on purpose to see that the comparison finds them."""

from typing import Literal, get_args

from torch import Tensor
from torch.distributed.fsdp import FSDPModule

from easyllm.nn.decoder import Decoder
from easyllm.parallel.mesh import Group
from easyllm.parallel.parallel import Parallel
from easyllm.parallel.sharding import ReplicatedWeights, Sink

Fault = Literal["mean", "no-reduce", "local-adapter"]
FAULTS: tuple[Fault, ...] = get_args(Fault)


def plant(fault: Fault, model: Decoder, parallel: Parallel) -> None:
    """Plants a fault in a divided model.

    Args:
        fault: `mean` averages gradients over the ranks instead of summing them; `no-reduce` leaves
            out a collective of the gradients; `local-adapter` leaves the gradients of adapters out
            of it, as one rank computes them (FSDP: averages them).
        model: the model.
        parallel: its ranks.
    """
    if fault == "mean":
        _average(parallel)
    elif fault == "no-reduce":
        _skip_reduction(model, parallel)
    else:
        _keep_adapters_local(parallel)


def _average(parallel: Parallel) -> None:
    plain, size = parallel.sharding.reduce, parallel.mesh.world.size

    def reduce(sink: Sink) -> None:
        plain(lambda name, gradient: sink(name, gradient / size))

    parallel.sharding.reduce = reduce  # type: ignore[method-assign]


class _Silent(Group):
    """A group whose reductions do nothing: each rank keeps its own term."""

    def start_all_reduce(self, x: Tensor) -> None:  # noqa: ARG002 - of the interface
        return None

    def start_reduce_scatter(self, x: Tensor, out: Tensor) -> None:
        out.copy_(x.view(self.size, -1)[self.rank].view(out.shape))


def _skip_reduction(model: Decoder, parallel: Parallel) -> None:
    sharding, group = parallel.sharding, parallel.mesh.data
    if parallel.tensors is not None:
        parallel.tensors.leave = lambda x: x  # type: ignore[method-assign]
    elif isinstance(sharding, ReplicatedWeights):
        sharding.group = _Silent(group.handle, group.rank, group.size)
    else:
        for module in model.modules():
            if isinstance(module, FSDPModule):
                module.set_requires_gradient_sync(False)


def _keep_adapters_local(parallel: Parallel) -> None:
    parallel.partial = frozenset()
    sharding = parallel.sharding
    if isinstance(sharding, ReplicatedWeights):
        plain = sharding.take

        def take(name: str, parameter: Tensor) -> None:
            if "adapter" in name and parallel.mesh.data.rank > 0 and parameter.grad is not None:
                parameter.grad.zero_()  # rank 0 trains the adapter on its own data alone
            plain(name, parameter)

        sharding.take = take  # type: ignore[method-assign]
        return
    plain_reduce, size = sharding.reduce, parallel.mesh.data.size

    def reduce(sink: Sink) -> None:
        plain_reduce(
            lambda name, gradient: sink(name, gradient / size if "adapter" in name else gradient)
        )

    sharding.reduce = reduce  # type: ignore[method-assign]


__all__ = ["FAULTS", "Fault", "plant"]
