"""Bytes that a run's model and optimizer hold, to compare them with the plan."""

from collections.abc import Iterable
from typing import TYPE_CHECKING

from torch import Tensor

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
    found = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(found.values())


__all__ = ["measured_bytes"]
