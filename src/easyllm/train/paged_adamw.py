"""AdamW whose moments are in a file: a paged optimizer that holds one chunk in memory at a time.

See Dettmers et al. 2023, arXiv 2305.14314, section 3. There, the driver of a GPU moves pages; here,
a step walks through the moments in order and releases each chunk after its update. The weights are
bitwise those of `AdamW`, because every element is updated on its own.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from easyllm.train.optim_config import AdamWConfig
from easyllm.train.paged_memory import PagedMemory, padded
from easyllm.train.update_rules import AdamW, State, WeightUpdate

CHUNK = 2**21
"""Elements updated before their moments are released: 8 MiB each in fp32. A multiple of the blocks
of the C kernel, of the pieces and cache lines of PyTorch's, and of the system's pages."""
MOMENTS = ("exp_avg", "exp_avg_sq")


class PagedAdamW:
    """AdamW update rule with its moments in `memory`.

    Args:
        config: AdamW's hyperparameters.
        memory: at least `paged_bytes` of the weights; None if these are on the meta device.
    """

    def __init__(self, config: AdamWConfig, memory: PagedMemory | None) -> None:
        self.adamw, self._memory = AdamW(config), memory

    def new_state(self, master: Tensor) -> State:
        """Returns zero moments of the master's shape and dtype."""
        if self._memory is None:
            return self.adamw.new_state(master)
        step = torch.zeros((), dtype=torch.float32)
        return {"step": step} | {name: self._memory.zeros_like(master) for name in MOMENTS}

    def update(self, weight: WeightUpdate, state: State) -> None:
        """Applies one AdamW step to the master weight, its copy and the moments, in place."""
        assert self._memory is not None, "weights on the meta device are not updated"
        state["step"] += 1
        count = weight.master.numel()
        for start in range(0, count, CHUNK):
            part = slice(start, min(count, start + CHUNK))
            moments = {name: state[name].view(-1)[part] for name in MOMENTS}
            self.adamw.apply(weight.part(part), {"step": state["step"], **moments})
            for moment in moments.values():
                self._memory.release(moment)


def paged_bytes(masters: Iterable[Tensor]) -> int:
    """Returns the size in bytes of the moments of weights, in complete pages."""
    return sum(len(MOMENTS) * padded(master.nbytes) for master in masters)


__all__ = ["CHUNK", "PagedAdamW", "paged_bytes"]
