"""Memory of the process itself: the interpreter, torch, and what they load during a run."""

from easyllm.core.device import rss_bytes
from easyllm.ops.huge_memory import return_freed_memory

LOADED_LATER = 30 * 10**6
"""Libraries, thread stacks and compiled kernels that a run loads after it was planned, measured
with bench/planner.py."""
PROCESS_BYTES = 330 * 2**20
"""The same with everything that is loaded before, where a plan is made in another process."""


def process_bytes() -> int:
    """Returns the memory of this process now, and of what a run in it loads later.

    Memory that was freed is returned to the system first, because a run would use it again.
    """
    return_freed_memory()
    return rss_bytes() + LOADED_LATER


__all__ = ["LOADED_LATER", "PROCESS_BYTES", "process_bytes"]
