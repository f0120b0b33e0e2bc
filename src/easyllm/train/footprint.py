"""Bytes that a run's model and optimizer hold, to compare them with the plan."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from easyllm.nn.decoder import Decoder
    from easyllm.train.optim import MasterOptimizer

MASTER = "master."


def measured_bytes(model: "Decoder", optimizer: "MasterOptimizer") -> dict[str, int]:
    """Returns the bytes of the weights, with their master copies, and of the optimizer's state.

    Tensors that share memory, such as fp32 weights and their masters, count once.
    """
    state = optimizer.tensors()
    masters = [value for name, value in state.items() if name.startswith(MASTER)]
    moments = [value for name, value in state.items() if not name.startswith(MASTER)]
    return {
        "weights": _distinct_bytes([*model.parameters(), *model.buffers(), *masters]),
        "optimizer": _distinct_bytes(moments),
    }


def _distinct_bytes(tensors: Iterable[Tensor]) -> int:
    # of sharded weights, this rank's part
    local = (t.to_local() if isinstance(t, DTensor) else t for t in tensors)
    storages = (tensor.untyped_storage() for tensor in local)
    found = {storage.data_ptr(): storage.nbytes() for storage in storages}
    return sum(found.values())


__all__ = ["measured_bytes"]
