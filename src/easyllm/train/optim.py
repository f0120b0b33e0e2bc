"""The optimizer, with fp32 masters for parameters that compute in bf16."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from easyllm.train.config import AdamWConfig


class MasterOptimizer:
    """AdamW on fp32 values; a parameter of another dtype is a rounded copy of its master.

    Gradients are summed in fp32 as soon as each is there (a hook adds it to the master's and frees it), so
    many micro-batches lose nothing to bf16.

    Args:
        parameters: the trained parameters by name.
        masters: fp32 values to start from for parameters that are not fp32 themselves; by default their
            own values widened.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        config: AdamWConfig,
        masters: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.config = config
        self._copies: dict[str, nn.Parameter] = {}
        self.masters: dict[str, nn.Parameter] = {}
        for name, parameter in parameters.items():
            if parameter.dtype in (torch.float32, torch.float64):
                self.masters[name] = parameter
                continue
            start = parameter.detach().float() if masters is None else masters[name].detach()
            self.masters[name] = nn.Parameter(start)
            self._copies[name] = parameter
            parameter.register_post_accumulate_grad_hook(self._sum_into(self.masters[name]))
        matrices = [p for p in self.masters.values() if p.ndim >= 2]
        others = [p for p in self.masters.values() if p.ndim < 2]
        groups = [
            {"params": matrices, "weight_decay": config.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.adamw = torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=True,
        )

    @staticmethod
    def _sum_into(master: nn.Parameter) -> Callable[[Tensor], None]:
        def hook(parameter: Tensor) -> None:
            assert parameter.grad is not None
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad += parameter.grad
            parameter.grad = None

        return hook

    def step(self, factor: float, clip_norm: float | None) -> float:
        """Clips, steps at `factor` of the learning rate, clears gradients; returns the norm before clipping."""
        parameters = list(self.masters.values())
        norm = nn.utils.clip_grad_norm_(
            parameters, clip_norm if clip_norm is not None else float("inf"), foreach=True
        )
        for group in self.adamw.param_groups:
            group["lr"] = self.config.learning_rate * factor
        self.adamw.step()
        self.adamw.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, copy in self._copies.items():
                copy.copy_(self.masters[name])
        return float(norm)

    def tensors(self) -> dict[str, Tensor]:
        """Masters and moments by name, for a checkpoint."""
        found: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            found[f"master.{name}"] = master.detach()
            for key, value in self.adamw.state.get(master, {}).items():
                found[f"{key}.{name}"] = value
        return found

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Takes back what `tensors` gave."""
        with torch.no_grad():
            for name, master in self.masters.items():
                master.copy_(tensors[f"master.{name}"])
                if name in self._copies:
                    self._copies[name].copy_(master)
                state: dict[str, Any] = {}
                for key in ("step", "exp_avg", "exp_avg_sq"):
                    if f"{key}.{name}" in tensors:
                        state[key] = tensors[f"{key}.{name}"].to(master.device)
                if state:
                    self.adamw.state[master] = state

    def final_state(self) -> dict[str, Tensor]:
        """The fp32 values of the parameters that have a master of their own."""
        return {name: self.masters[name].detach() for name in self._copies}
