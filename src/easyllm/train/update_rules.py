"""How an optimizer moves one weight: AdamW and SGD here, the others in `muon` and `adamw_int8`.

On a CPU AdamW is one pass in C; other rules move a weight in pieces that stay in the cache from the widening of their gradient
to the rounding of the result, so that no pass over all parameters is spent on either.
"""

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.build import DTYPE_CODES, AdamWNumbers
from easyllm.train.optim_config import AdamWConfig, SGDConfig

State = dict[str, Tensor]
"""What a rule remembers of a weight; tensors alone, so that a checkpoint can hold it."""

PIECE = 2**18
"""Elements a thread moves at once, 1 MiB of fp32; a multiple of the block of int8 states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """One weight that is about to be moved.

    Attributes:
        master: its value, fp32 (or fp64).
        gradient: the sum over micro-batches, in the master's dtype or the copy's; used up by the update.
        scale: what the gradient is still to be multiplied by.
        copy: the rounded copy that computes, where the weight has one.
        learning_rate, weight_decay: of this step.
    """

    master: Tensor
    gradient: Tensor
    scale: float
    copy: Tensor | None
    learning_rate: float
    weight_decay: float

    def pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """The weight in flat pieces: where, the master's, the gradient's (in the master's dtype).

        After each is moved in place, the copy's piece follows.
        """
        master, gradient = self.master.view(-1), self.gradient.reshape(-1)
        copy = None if self.copy is None else self.copy.view(-1)
        for part in piece_slices(master):
            yield part, master[part], self._widened(gradient[part])
            if copy is not None:
                copy[part].copy_(master[part])

    def whole(self) -> Tensor:
        """The gradient in the master's shape and dtype, for rules that need all of it."""
        return self._widened(self.gradient)

    def round(self) -> None:
        """Brings the whole copy up to date."""
        if self.copy is not None:
            self.copy.copy_(self.master)

    def _widened(self, gradient: Tensor) -> Tensor:
        wide = gradient.to(self.master.dtype)
        return wide.mul_(self.scale) if self.scale != 1 else wide


def piece_slices(flat: Tensor) -> Iterator[slice]:
    """Slices of a flat tensor that are worked on at once: what fits the caches of a CPU, all of it elsewhere."""
    count = flat.numel()
    size = PIECE * torch.get_num_threads() if flat.device.type == "cpu" else max(1, count)
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


class UpdateRule(Protocol):
    """An optimizer, a weight at a time."""

    def new_state(self, master: Tensor) -> State:
        """What it remembers of a weight before the first step."""

    def update(self, weight: WeightUpdate, state: State) -> None:
        """Moves the master and its copy; changes `state` in place."""


class AdamW:
    """AdamW with moments in the master's dtype, bit for bit `torch.optim.AdamW(fused=True)`.

    θ ← θ − η λ θ;  m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;
    θ ← θ − η (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)         (arXiv 1711.05101, algorithm 2)
    """

    def __init__(self, config: AdamWConfig) -> None:
        self.config = config

    def new_state(self, master: Tensor) -> State:
        return {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }

    def update(self, weight: WeightUpdate, state: State) -> None:
        state["step"] += 1
        copies = () if weight.copy is None else (weight.copy,)
        kernels = kernels_for(weight.master, weight.gradient, *copies)
        if kernels is not None:
            self._in_one_pass(kernels, weight, state)
            return
        exp_avg, exp_avg_sq = state["exp_avg"].view(-1), state["exp_avg_sq"].view(-1)
        for part, master, gradient in weight.pieces():
            moments = exp_avg[part], exp_avg_sq[part]
            self.move(master, gradient, *moments, step=state["step"], weight=weight)

    def _in_one_pass(self, kernels: ctypes.CDLL, weight: WeightUpdate, state: State) -> None:
        """Everything from the gradient as it came to the copy, each number read and written once."""
        gradient = weight.gradient.contiguous()
        numbers = self.numbers(weight, float(state["step"]))
        kernels.adamw(
            weight.master.data_ptr(),
            state["exp_avg"].data_ptr(),
            state["exp_avg_sq"].data_ptr(),
            gradient.data_ptr(),
            DTYPE_CODES[gradient.dtype],
            None if weight.copy is None else weight.copy.data_ptr(),
            weight.master.numel(),
            ctypes.byref(numbers),
        )

    def numbers(self, weight: WeightUpdate, step: float) -> AdamWNumbers:
        """What the C kernels need to know of a step; it counts from 1."""
        beta1, beta2 = self.config.betas
        return AdamWNumbers(
            weight.scale,
            1 - weight.learning_rate * weight.weight_decay,
            1 - beta1,
            beta2,
            1 - beta2,
            math.sqrt(1 - beta2**step),
            self.config.eps,
            weight.learning_rate / (1 - beta1**step),
        )

    def move(
        self,
        master: Tensor,
        gradient: Tensor,
        exp_avg: Tensor,
        exp_avg_sq: Tensor,
        *,
        step: Tensor,
        weight: WeightUpdate,
    ) -> None:
        """Moves a piece of a weight and its moments in place; `step` counts from 1."""
        beta1, beta2 = self.config.betas
        torch._fused_adamw_(  # the kernel of torch.optim.AdamW, which cannot be given a piece of a parameter
            [master],
            [gradient],
            [exp_avg],
            [exp_avg_sq],
            [],
            [step],
            lr=weight.learning_rate,
            beta1=beta1,
            beta2=beta2,
            weight_decay=weight.weight_decay,
            eps=self.config.eps,
            amsgrad=False,
            maximize=False,
        )


class SGD:
    """Gradient descent, bit for bit `torch.optim.SGD`: g ← g + λ θ;  b ← μ b + g;  θ ← θ − η b.

    Nesterov's variant descends along g + μ b. The decay is part of the gradient, as usual for SGD.
    """

    def __init__(self, config: SGDConfig) -> None:
        self.config = config

    def new_state(self, master: Tensor) -> State:
        return {"momentum": torch.zeros_like(master)} if self.config.momentum else {}

    def update(self, weight: WeightUpdate, state: State) -> None:
        momentum = self.config.momentum
        for part, master, gradient in weight.pieces():
            direction = gradient
            if weight.weight_decay:
                direction = gradient.add(master, alpha=weight.weight_decay)
            if momentum:
                velocity = state["momentum"].view(-1)[part].mul_(momentum).add_(direction)
                nesterov = self.config.nesterov
                direction = direction.add(velocity, alpha=momentum) if nesterov else velocity
            master.add_(direction, alpha=-weight.learning_rate)
