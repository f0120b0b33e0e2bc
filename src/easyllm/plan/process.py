"""Memory of the process itself: the interpreter, torch, and what they load during a run."""

import sys

from easyllm.core.device import rss_bytes
from easyllm.ops.huge_memory import return_freed_memory

LOADED_LATER = 30 * 10**6
"""Libraries, thread stacks and compiled kernels that a run loads after it was planned, measured
with bench/planner.py."""
PROCESS_BYTES = 330 * 2**20
"""The same with everything that is loaded before, where a plan is made in another process."""


COMPILER_BYTES = 106 * 2**20
"""The compiler of PyTorch (TorchDynamo, SymPy, Triton), measured with torch 2.13 on Linux:
`torch.utils.checkpoint` imports it on its first call."""


def process_bytes(*, recomputes: bool = False) -> int:
    """Returns the memory of this process now, and of what a run in it loads later.

    Memory that was freed is returned to the system first, because a run would use it again.

    Args:
        recomputes: whether the run recomputes activations, for which PyTorch imports its compiler.
    """
    return_freed_memory()
    return rss_bytes() + later_bytes(recomputes=recomputes)


def later_bytes(*, recomputes: bool = False) -> int:
    """Returns the memory of what a run loads after its weights; the argument is as above."""
    compiler = COMPILER_BYTES if recomputes and "torch._dynamo" not in sys.modules else 0
    return LOADED_LATER + compiler


__all__ = ["COMPILER_BYTES", "LOADED_LATER", "PROCESS_BYTES", "later_bytes", "process_bytes"]
