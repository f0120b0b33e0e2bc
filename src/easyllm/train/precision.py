"""The numerics of a training step: compute dtype, autocast, loss scaling and padding."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from easyllm.core.device import bf16_is_fast
from easyllm.nn.config import ModelConfig
from easyllm.ops.cross_entropy import ROW_MULTIPLE
from easyllm.train.config import TrainConfig
from easyllm.train.loss_scaler import LossScaler


@dataclass(slots=True)
class PrecisionPolicy:
    """The numerics of a step.

    Attributes:
        autocast: context manager for the forward pass.
        scaler: the loss scaler, for fp16.
        token_multiple: micro-batches are padded to a multiple of this many tokens; padding tokens
            are excluded from the loss.
    """

    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    scaler: LossScaler | None = None
    token_multiple: int = 1

    @property
    def scale(self) -> float:
        """The current loss scale; 1 without a scaler."""
        return 1.0 if self.scaler is None else self.scaler.scale


def compute_dtype(config: TrainConfig, device: torch.device) -> torch.dtype:
    """Returns the dtype of the weights in the forward and backward passes."""
    match config.precision:
        case "bf16":
            return torch.bfloat16
        case "fp16":
            return torch.float16
        case "auto":
            return torch.bfloat16 if bf16_is_fast(device) else torch.float32
    return torch.float32


def build_precision_policy(
    config: TrainConfig, model: ModelConfig, device: torch.device
) -> PrecisionPolicy:
    """Returns autocast, loss scaling and padding for the configured precision.

    For bf16 on a CPU, micro-batches are padded to a multiple of `ROW_MULTIPLE` tokens, because its
    GEMM kernels are compiled for each number of rows. MoE models are not padded, since their
    routers would count the padding tokens.
    """
    bf16 = config.precision == "bf16_autocast" or compute_dtype(config, device) == torch.bfloat16
    steady = device.type == "cpu" and bf16 and not model.has_experts
    autocast: Callable[[], AbstractContextManager[Any]] = nullcontext
    if config.precision == "bf16_autocast":
        autocast = partial(torch.autocast, device.type, torch.bfloat16)
    scaler, scale = None, config.loss_scale
    if config.precision == "fp16":
        scaler = LossScaler(
            initial_scale=2.0**scale.initial_power,
            window=scale.window,
            hysteresis=scale.hysteresis,
            min_scale=scale.minimum,
        )
    return PrecisionPolicy(autocast, scaler, ROW_MULTIPLE if steady else 1)
