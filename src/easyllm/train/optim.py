"""The optimizer of a run: fp32 master weights for low-precision parameters, one rule per group."""

import math
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from easyllm.core.errors import CheckpointError
from easyllm.ops.kernels import kernels_for
from easyllm.ops.kernels.structs import DTYPE_CODES
from easyllm.train.adamw_int8 import AdamWInt8
from easyllm.train.muon import Muon
from easyllm.train.optim_config import (
    AdamWConfig,
    MuonConfig,
    Optimizer,
    ParameterGroup,
    SGDConfig,
)
from easyllm.train.paged_adamw import CHUNK, PagedAdamW, paged_bytes
from easyllm.train.paged_memory import PagedMemory
from easyllm.train.parameter_groups import build_groups
from easyllm.train.update_rules import SGD, AdamW, State, UpdateRule, WeightUpdate, piece_slices


class MasterOptimizer:
    """Mixed-precision optimizer that updates fp32 master weights.

    A parameter in a lower precision is a rounded copy of its master weight. A hook takes such a
    parameter's gradient as soon as it is complete. The gradient of a single micro-batch stays in
    the parameter's dtype until the step converts it, piece by piece. From the second micro-batch
    on, gradients are accumulated in fp32, so that gradient accumulation loses no precision to bf16.

    A step calls `grad_norm`, then `clip` and `step`, or `clear` to skip it. Parameters in a group
    with rate factor 0 are frozen: they need no gradient and are not part of the norm.

    Args:
        parameters: the trainable parameters, by name.
        config: the optimizer and its hyperparameters.
        groups: parameter groups with their own settings, matched by name pattern.
        masters: fp32 initial values for parameters that are not fp32; by default the parameters'
            own values, converted to fp32.
        rate_factors: factors on the learning rates of single parameters, by name (LoRA+).
        folder: an existing folder for the state of a paged optimizer; by default the system's for
            temporary files.
        local: the parts of the parameters that this process updates, by name, if a run is divided
            among processes; its gradients are set by `set_gradient`.

    Attributes:
        masters: the tensors being updated, by name: the fp32 (or fp64) parameters themselves, and
            the master weights of the others.

    Raises:
        ConfigError: a group's pattern matches nothing, or all parameters are frozen, or the state
            cannot be paged.
        OutputError: the disk is too full for the state of a paged optimizer.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: Optimizer,
        groups: Sequence[ParameterGroup] = (),
        masters: Mapping[str, Tensor] | None = None,
        rate_factors: Mapping[str, float] | None = None,
        folder: Path | None = None,
        local: Mapping[str, nn.Parameter] | None = None,
    ) -> None:
        self.config = config
        every = build_groups(parameters, config, groups, rate_factors or {})
        self._groups = [group for group in every if group.rate_factor > 0]
        self._memory: PagedMemory | None = None
        self._parameters: dict[str, nn.Parameter] = {}
        self._copies: dict[str, nn.Parameter] = {}
        self._frozen: dict[str, Tensor] = {}
        self._sums: dict[str, Tensor] = {}
        self._states: dict[str, State] = {}
        self._scale = 1.0
        self.masters: dict[str, Tensor] = {}
        for group in every:
            for name in group.names:
                parameter = parameters[name] if local is None else local[name]
                master = _master(parameter, None if masters is None else masters.get(name))
                if group.rate_factor == 0:
                    parameters[name].requires_grad_(False)
                    if master is not parameter:
                        self._frozen[name] = master
                    continue
                self.masters[name], self._parameters[name] = master, parameter
                if master is not parameter:
                    self._copies[name] = parameter
                    parameter.register_post_accumulate_grad_hook(_taker(self, name))
        self._rules: dict[AdamWConfig | MuonConfig | SGDConfig, UpdateRule] = {}
        self._build_states(folder or Path(tempfile.gettempdir()))

    def _build_states(self, folder: Path) -> None:
        """Builds the update rule of each group, and the state of each parameter."""
        self._rules = self._build_rules(folder)
        for group in self._groups:
            new_state = self._rules[group.rule].new_state
            self._states |= {name: new_state(self.masters[name]) for name in group.names}

    def _build_rules(self, folder: Path) -> dict[AdamWConfig | MuonConfig | SGDConfig, UpdateRule]:
        """Builds the update rule of each group, and the memory of a paged state."""
        paged = [
            self.masters[name]
            for group in self._groups
            if isinstance(group.rule, AdamWConfig) and group.rule.paged
            for name in group.names
        ]
        if paged and not paged[0].is_meta:
            self._memory = PagedMemory(folder, paged_bytes(paged))
        return {group.rule: build_rule(group.rule, self._memory) for group in self._groups}

    @property
    def device(self) -> torch.device:
        """The device of the parameters."""
        return next(iter(self.masters.values())).device

    @torch.no_grad()
    def is_finite(self) -> bool:
        """Returns whether all master weights are finite (no NaN or Inf)."""
        held = (master for master in self.masters.values() if master.numel())
        return all(bool(torch.stack(m.aminmax()).isfinite().all()) for m in held)

    def _take(self, name: str, parameter: Tensor) -> None:
        """Adds a micro-batch's gradient to the accumulated sum and frees it."""
        gradient, parameter.grad = parameter.grad, None
        assert gradient is not None
        held = self._sums.get(name)
        if held is None:
            self._sums[name] = gradient
        else:
            self._sums[name] = held.to(self.masters[name].dtype).add_(gradient)

    def set_gradient(self, name: str, gradient: Tensor) -> None:
        """Sets the complete gradient of a parameter, which has the shape of its master weight."""
        if name not in self.masters:
            return  # frozen by its group
        if name in self._copies:
            self._sums[name] = gradient
        else:
            self._parameters[name].grad = gradient

    def gradients(self) -> dict[str, Tensor]:
        """Returns the accumulated gradients as a step would apply them, in the masters' dtypes."""
        return {
            name: gradient.to(self.masters[name].dtype) * self._scale
            for name, gradient in self._held()
        }

    @torch.no_grad()
    def grad_norm(self, names: Collection[str] | None = None) -> float:
        """Returns the global L2 norm of all gradients, summed in fp32 or wider; 0 if none.

        Args:
            names: the parameters to include; all by default.
        """
        chosen = [(n, g) for n, g in self._held() if names is None or n in names]
        held = [gradient for _, gradient in chosen]
        kernels = kernels_for(*held)
        if kernels is not None:
            squares = 0.0
            for gradient in held:
                flat = gradient.contiguous()
                squares += kernels.sum_of_squares(
                    flat.data_ptr(), DTYPE_CODES[flat.dtype], flat.numel()
                )
            return math.sqrt(squares) * self._scale
        norms = [
            torch.linalg.vector_norm(flat[part].to(self.masters[name].dtype))
            for name, gradient in chosen
            for flat in [gradient.reshape(-1)]
            for part in piece_slices(flat)
        ]
        return float(torch.linalg.vector_norm(torch.stack(norms))) * self._scale if norms else 0.0

    def clip(self, norm: float, max_norm: float) -> None:
        """Clips the gradients, whose global norm is `norm`, to `max_norm`.

        Uses the formula of `torch.nn.utils.clip_grad_norm_`.
        """
        self.scale_gradients(min(1.0, max_norm / (norm + 1e-6)))

    def scale_gradients(self, value: float) -> None:
        """Multiplies all gradients by `value`; the factor is applied lazily, in the next step."""
        self._scale *= value

    @torch.no_grad()
    def step(self, factor: float) -> None:
        """Updates every parameter that has a gradient, then clears the gradients.

        Args:
            factor: the schedule's factor on the learning rates.
        """
        for group in self._groups:
            rule = self._rules[group.rule]
            for name in group.names:
                gradient = self._release(name)
                if gradient is None:
                    continue
                update = WeightUpdate(
                    master=self.masters[name].detach(),
                    gradient=gradient,
                    scale=self._scale,
                    copy=self._copies.get(name),
                    learning_rate=group.learning_rate * factor,
                    weight_decay=group.weight_decay,
                )
                rule.update(update, self._states[name])
        self._scale = 1.0

    def clear(self) -> None:
        """Discards the gradients, which skips the step."""
        for name in self.masters:
            self._release(name)
        self._scale = 1.0

    def rates(self, factor: float) -> dict[str, float]:
        """Returns the learning rates at `factor` of their peak.

        The keys are `learning_rate`, and `learning_rate/<pattern>` for groups with another rate.
        """
        found = {"learning_rate": self.config.learning_rate * factor}
        for group in self._groups:
            if group.label:
                found[f"learning_rate/{group.label}"] = group.learning_rate * factor
        return found

    def tensors(self) -> dict[str, Tensor]:
        """Returns the master weights and optimizer states by name, for a checkpoint."""
        found = {f"master.{name}": master.detach() for name, master in self.masters.items()}
        for name, state in self._states.items():
            found |= {f"{key}.{name}": value for key, value in state.items()}
        return found

    @torch.no_grad()
    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Restores what `tensors` returned, bitwise exactly.

        Raises:
            CheckpointError: the tensors belong to another optimizer or model; nothing is changed.
        """
        mine = self.tensors()
        _check_fit(mine, tensors)
        for key, tensor in mine.items():
            source = tensors[key].view(-1)
            for part, piece in zip(source.split(CHUNK), tensor.view(-1).split(CHUNK), strict=True):
                piece.copy_(part)
                self.release(piece)
        for name, copy in self._copies.items():
            copy.copy_(self.masters[name])

    def release(self, tensor: Tensor) -> None:
        """Takes a part of the state out of memory, if it is paged; its values stay."""
        if self._memory is not None:
            self._memory.release(tensor)

    def final_state(self) -> dict[str, Tensor]:
        """Returns the fp32 master weights of low-precision parameters, frozen ones included."""
        return {name: self.masters[name].detach() for name in self._copies} | self._frozen

    def final_parts(self) -> Iterable[tuple[str, Tensor]]:
        """Yields this process's parts of all weights in fp32, frozen ones included."""
        for name, master in (self.masters | self._frozen).items():
            yield name, master.detach()

    def _held(self) -> Iterable[tuple[str, Tensor]]:
        for name, parameter in self._parameters.items():
            gradient = self._sums.get(name) if name in self._copies else parameter.grad
            if gradient is not None:
                yield name, gradient

    def _release(self, name: str) -> Tensor | None:
        parameter = self._parameters[name]
        gradient, parameter.grad = parameter.grad, None
        return self._sums.pop(name, None) if name in self._copies else gradient


def build_rule(
    config: AdamWConfig | MuonConfig | SGDConfig, memory: PagedMemory | None = None
) -> UpdateRule:
    """Builds the update rule for a configuration; `memory` holds the state of a paged one."""
    match config:
        case MuonConfig():
            return Muon(config)
        case SGDConfig():
            return SGD(config)
        case AdamWConfig(state="int8"):
            return AdamWInt8(config)
        case AdamWConfig(paged=True):
            return PagedAdamW(config, memory)
    return AdamW(config)


def _taker(optimizer: MasterOptimizer, name: str) -> Callable[[Tensor], None]:
    """Returns a hook that passes a parameter's gradient to the optimizer.

    It holds a weak reference to the optimizer: Python's garbage collector does not see the
    references of such hooks, so a strong one would keep the parameter, the optimizer and all its
    state in memory until the process ends.
    """
    reference = weakref.ref(optimizer)

    def take(parameter: Tensor) -> None:
        alive = reference()
        if alive is not None:
            alive._take(name, parameter)

    return take


def _master(parameter: nn.Parameter, start: Tensor | None) -> Tensor:
    """Returns the parameter itself if it is fp32 or fp64, else an fp32 master weight."""
    parameter.data = parameter.data.contiguous()  # update rules view weights as flat tensors
    if parameter.dtype in (torch.float32, torch.float64):
        return parameter
    return (parameter.detach() if start is None else start.detach()).float().contiguous()


def _check_fit(mine: Mapping[str, Tensor], theirs: Mapping[str, Tensor]) -> None:
    for key in [*mine, *theirs]:
        here, there = (
            f"{tuple(t.shape)} {str(t.dtype).removeprefix('torch.')}" if t is not None else "absent"
            for t in (mine.get(key), theirs.get(key))
        )
        if here != there:
            raise CheckpointError(
                f"the checkpoint's optimizer state does not fit: {key} is {there} there and {here} "
                "here; resume with the recipe that created it, or start in another folder"
            )


__all__ = ["MasterOptimizer", "build_rule"]
