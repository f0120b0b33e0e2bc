"""Per-weight optimizer update rules: AdamW and SGD; the others are in `muon` and `adamw_int8`.

On a CPU, AdamW is a single pass in C. Other rules process a weight in pieces that stay in the CPU
cache from the conversion of the gradient to the rounding of the result, so that neither requires a
separate pass over all parameters.
"""

import ctypes
import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.structs import DTYPE_CODES, AdamWScalars, address
from easyllm.train.optim_config import AdamWConfig, SGDConfig

State = dict[str, Tensor]
"""The optimizer state of one weight; tensors only, so that a checkpoint can store it."""

PIECE = 2**18
"""Elements per piece and thread, 1 MiB of fp32; a multiple of the block size of int8 states."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightUpdate:
    """One weight and its gradient, as the input of an update rule.

    Attributes:
        master: the master weight, fp32 (or fp64).
        gradient: the gradient summed over micro-batches, in the master's dtype or the copy's; may
            be overwritten by the update.
        scale: factor still to be applied to the gradient.
        copy: the low-precision copy used in the forward pass; None if the weight has none.
        learning_rate, weight_decay: of this step.
    """

    master: Tensor
    gradient: Tensor
    scale: float
    copy: Tensor | None
    learning_rate: float
    weight_decay: float

    def pieces(self) -> Iterator[tuple[slice, Tensor, Tensor]]:
        """Yields flat pieces: the slice, the master's piece and the gradient's, in its dtype.

        When the caller has updated a master's piece in place and requests the next one, the
        corresponding piece of the copy is refreshed.
        """
        master, gradient = self.master.view(-1), self.gradient.reshape(-1)
        copy = None if self.copy is None else self.copy.view(-1)
        for part in piece_slices(master):
            yield part, master[part], self._widened(gradient[part])
            if copy is not None:
                copy[part].copy_(master[part])

    def part(self, part: slice) -> "WeightUpdate":
        """Returns the update of a part of the flat weight, which shares its memory."""
        return replace(
            self,
            master=self.master.view(-1)[part],
            gradient=self.gradient.reshape(-1)[part],
            copy=None if self.copy is None else self.copy.view(-1)[part],
        )

    def whole(self) -> Tensor:
        """Returns the complete gradient in the master's shape and dtype, with `scale` applied."""
        return self._widened(self.gradient)

    def round(self) -> None:
        """Refreshes the low-precision copy from the master weight, if there is one."""
        if self.copy is not None:
            self.copy.copy_(self.master)

    def _widened(self, gradient: Tensor) -> Tensor:
        wide = gradient.to(self.master.dtype)
        return wide.mul_(self.scale) if self.scale != 1 else wide


def piece_slices(flat: Tensor) -> Iterator[slice]:
    """Yields slices of a flat tensor to process one at a time.

    On a CPU, a slice fits into the caches; on other devices, a single slice covers the tensor.
    """
    count = flat.numel()
    size = PIECE * torch.get_num_threads() if flat.device.type == "cpu" else max(1, count)
    for start in range(0, count, size):
        yield slice(start, min(count, start + size))


class UpdateRule(Protocol):
    """An optimizer's update of a single weight."""

    def new_state(self, master: Tensor) -> State:
        """Returns the initial optimizer state of a weight."""

    def update(self, weight: WeightUpdate, state: State) -> None:
        """Updates the master weight, its copy and `state`, in place."""


class AdamW:
    """AdamW with moments in the master's dtype, bitwise equal to `torch.optim.AdamW(fused=True)`.

    θ ← θ − η λ θ;  m ← β₁ m + (1 − β₁) g;  v ← β₂ v + (1 − β₂) g²;
    θ ← θ − η (m / (1 − β₁ᵗ)) / (√(v / (1 − β₂ᵗ)) + ε)         (arXiv 1711.05101, algorithm 2)

    Args:
        config: AdamW's hyperparameters.
    """

    def __init__(self, config: AdamWConfig) -> None:
        self.config = config

    def new_state(self, master: Tensor) -> State:
        """Returns zero moments of the master's shape and dtype."""
        return {
            "step": torch.zeros((), dtype=torch.float32, device=master.device),
            "exp_avg": torch.zeros_like(master),
            "exp_avg_sq": torch.zeros_like(master),
        }

    def update(self, weight: WeightUpdate, state: State) -> None:
        """Applies one AdamW step to the master weight, its copy and the moments, in place."""
        state["step"] += 1
        self.apply(weight, state)

    def apply(self, weight: WeightUpdate, state: State) -> None:
        """Applies the step that `state["step"]` counts; the weight may be a part of another."""
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
        """Performs the complete update in C, reading and writing each element once."""
        gradient = weight.gradient.contiguous()
        numbers = self.numbers(weight, float(state["step"]))
        kernels.adamw(
            address(weight.master),
            address(state["exp_avg"]),
            address(state["exp_avg_sq"]),
            address(gradient),
            DTYPE_CODES[gradient.dtype],
            address(weight.copy),
            weight.master.numel(),
            numbers,
        )

    def numbers(self, weight: WeightUpdate, step: float) -> AdamWScalars:
        """Returns the scalars that the C kernels need for step `step`, counted from 1."""
        beta1, beta2 = self.config.betas
        return AdamWScalars(
            scale=weight.scale,
            rescale=1 - weight.learning_rate * weight.weight_decay,
            beta1_rest=1 - beta1,
            beta2=beta2,
            beta2_rest=1 - beta2,
            correction=math.sqrt(1 - beta2**step),
            eps=self.config.eps,
            step_size=weight.learning_rate / (1 - beta1**step),
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
        """Updates a piece of a weight and of its moments in place; `step` is counted from 1."""
        beta1, beta2 = self.config.betas
        # torch.optim.AdamW's kernel, called directly since the class takes only whole parameters
        torch._fused_adamw_(
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
    """SGD with momentum, bitwise equal to `torch.optim.SGD`.

    g ← g + λ θ;  b ← μ b + g;  θ ← θ − η b

    Nesterov momentum descends along g + μ b. Weight decay is part of the gradient (an L2 penalty),
    as usual for SGD.

    Args:
        config: SGD's hyperparameters.
    """

    def __init__(self, config: SGDConfig) -> None:
        self.config = config

    def new_state(self, master: Tensor) -> State:
        """Returns a zero momentum buffer of the master's shape and dtype, if momentum is used."""
        return {"momentum": torch.zeros_like(master)} if self.config.momentum else {}

    def update(self, weight: WeightUpdate, state: State) -> None:
        """Applies one SGD step to the master weight, its copy and the momentum, in place."""
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
