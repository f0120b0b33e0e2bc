"""Cost report of a model: parameters, bytes, FLOPs, KV cache, and time if rates are known."""

from dataclasses import dataclass

import torch

from easyllm.adapters.lora import LoRAConfig
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.nn.config import ModelConfig
from easyllm.plan.compute import (
    USUAL_MFU,
    TrainingFlops,
    decode_flops,
    estimate_time,
    forward_flops,
    training_flops,
)
from easyllm.plan.inference import (
    InferenceEstimate,
    estimate_inference,
    loaded_weight_bytes,
)
from easyllm.plan.kv_cache import CacheSize, cache_size
from easyllm.plan.linears import largest_rank
from easyllm.plan.memory import MemoryEstimate, estimate_training
from easyllm.plan.parameters import ParameterCount, count_parameters
from easyllm.plan.parts import count_adapter_parameters
from easyllm.quant import schemes

ITEMSIZES = {"float32": 4, "bfloat16": 2}
"""Unquantized dtypes whose weight sizes are always listed, alongside the quantized formats."""
TRAINING_TOKENS = 2048
"""Default number of packed tokens in the planned training step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """Throughput and free memory of a machine.

    Attributes:
        flops_per_s: FLOP/s of matrix products (GEMM).
        read_bytes_per_s: memory read bandwidth in bytes/s.
        free_bytes: free memory in bytes.
    """

    flops_per_s: float
    read_bytes_per_s: float
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingPlan:
    """A training step with AdamW in bf16.

    Attributes:
        name: `full`, or the name of the adapter.
        tokens: packed tokens in the step.
        row_tokens: tokens per sequence.
        trained_parameters: number of all parameters, or of those of the adapters.
        flops: FLOPs of the step.
        memory: memory of the step.
    """

    name: str
    tokens: int
    row_tokens: int
    trained_parameters: int
    flops: TrainingFlops
    memory: MemoryEstimate

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return {
            "tokens": self.tokens,
            "row_tokens": self.row_tokens,
            "trained_parameters": self.trained_parameters,
            "flops": self.flops.total,
            "memory_bytes": self.memory.as_dict(),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelPlan:
    """The costs of a model.

    Attributes:
        parameters: parameter counts by component.
        context: tokens per sequence.
        sequences: number of concurrent sequences.
        weights: weight bytes by format.
        loaded: weight bytes in the requested format.
        read: weight bytes that decoding one token reads.
        cache: size of the KV cache.
        serving: memory of inference.
        prefill_flops: FLOPs of a forward pass over one sequence of `context` tokens, with logits
            of the last token only.
        token_flops: FLOPs of decoding one token, the last of `context`.
        forward_flops_per_token: FLOPs per token of a forward pass over `context` tokens, with
            logits of every token.
        training_flops_per_token: FLOPs per token of a forward and backward pass over `context`
            tokens.
        training: the requested training steps.
    """

    parameters: ParameterCount
    context: int
    sequences: int
    weights: dict[str, int]
    loaded: int
    read: int
    cache: CacheSize
    serving: InferenceEstimate
    prefill_flops: int
    token_flops: int
    forward_flops_per_token: int
    training_flops_per_token: int
    training: tuple[TrainingPlan, ...] = ()

    def prefill_seconds(self, rates: Rates) -> float:
        """Estimates the prefill time of one prompt of `context` tokens, if it is compute-bound."""
        return estimate_time(self.prefill_flops, rates.flops_per_s)

    def token_seconds(self, rates: Rates) -> float:
        """Estimates the time of a decoding step that generates one token for every sequence.

        It is the time to read the weights and the cache or the compute time, whichever is longer.
        """
        reading = (self.read + self.cache.total) / rates.read_bytes_per_s
        return max(reading, self.sequences * self.token_flops / rates.flops_per_s)

    def as_dict(self, rates: Rates | None = None) -> JsonObject:
        """Returns plain values for JSON; bytes, FLOPs and parameters are integers.

        Args:
            rates: throughput of the machine; adds estimates of time.
        """
        count = self.parameters
        parts = {name: getattr(count, name) for name in count.__dataclass_fields__}
        values: JsonObject = {
            "parameters_total": count.total,
            "parameters_active": count.active,
            "parameters": {"total": count.total, "active": count.active, **parts},
            "context": self.context,
            "sequences": self.sequences,
            "weight_bytes": self.loaded,
            "weight_bytes_by_format": self.weights,
            "cache_bytes_per_token": self.cache.bytes_per_token,
            "cache_state_bytes": self.cache.state_bytes,
            "cache_bytes": self.cache.total,
            "serving_bytes": self.serving.as_dict(),
            "flops": {
                "forward_per_token": self.forward_flops_per_token,
                "training_per_token": self.training_flops_per_token,
                "prefill": self.prefill_flops,
                "decode_token": self.token_flops,
            },
        }
        if self.training:
            values["training"] = {plan.name: plan.as_dict() for plan in self.training}
        if rates is not None:
            values["machine"] = {
                "flops_per_s": round(rates.flops_per_s),
                "read_bytes_per_s": round(rates.read_bytes_per_s),
                "free_bytes": rates.free_bytes,
            }
            values["seconds"] = self.seconds(rates)
        return values

    def seconds(self, rates: Rates) -> dict[str, float]:
        """Returns the estimated seconds of each operation that fits into the free memory."""
        found: dict[str, float] = {}
        if self.serving.fits(rates.free_bytes):
            found |= {
                "prefill": self.prefill_seconds(rates),
                "decode_token": self.token_seconds(rates),
            }
        for plan in self.training:
            if plan.memory.fits(rates.free_bytes):
                found[f"training_step_{plan.name}"] = estimate_time(
                    plan.flops.total, rates.flops_per_s, utilisation=USUAL_MFU
                )
        return {name: float(f"{value:.3g}") for name, value in found.items()}


def plan_model(
    config: ModelConfig,
    *,
    context: int | None = None,
    sequences: int = 1,
    itemsize: int = 2,
    scheme: str | None = None,
    cache_itemsize: float = 2,
    train: bool = False,
    device_type: str | None = None,
) -> ModelPlan:
    """Estimates the cost of serving, and optionally training, a model of this configuration.

    Args:
        context: tokens per sequence; defaults to the context length of the model (for training
            rows, at most `TRAINING_TOKENS`).
        sequences: number of concurrent sequences.
        itemsize: bytes per element of unquantized weights.
        scheme: quantization format of the weights; None for unquantized weights.
        cache_itemsize: bytes per element of the KV cache, including scales.
        train: also plan training steps, of all weights and of LoRA adapters of rank 16.
        device_type: `cpu` adds what its allocators hold when serving.

    Raises:
        ConfigError: `context` or `sequences` is below 1, or a training row is longer than the
            model's context.
    """
    row = min(config.max_seq_len, TRAINING_TOKENS) if context is None else context
    context = config.max_seq_len if context is None else context
    if context < 1 or sequences < 1:
        raise ConfigError(
            f"context={context} and sequences={sequences} must be at least 1; increase them"
        )
    forward = forward_flops(config, [context])
    return ModelPlan(
        parameters=count_parameters(config),
        context=context,
        sequences=sequences,
        weights={
            **{name: loaded_weight_bytes(config, size) for name, size in ITEMSIZES.items()},
            **{name: loaded_weight_bytes(config, itemsize, name) for name in schemes()},
        },
        loaded=loaded_weight_bytes(config, itemsize, scheme),
        read=loaded_weight_bytes(config, itemsize, scheme, read=True),
        cache=cache_size(config, context=context, sequences=sequences, itemsize=cache_itemsize),
        serving=estimate_inference(
            config,
            context=context,
            sequences=sequences,
            itemsize=itemsize,
            scheme=scheme,
            cache_itemsize=cache_itemsize,
            device_type=device_type,
        ),
        prefill_flops=forward_flops(config, [context], head_rows=1).total,
        token_flops=decode_flops(config, context).total,
        forward_flops_per_token=forward.total // context,
        training_flops_per_token=training_flops(config, (context,)).total // context,
        training=_trainings(config, row) if train else (),
    )


def _trainings(config: ModelConfig, row: int) -> tuple[TrainingPlan, ...]:
    """Plans steps of as many rows of `row` tokens as fit into `TRAINING_TOKENS`, at least one."""
    rows = max(1, TRAINING_TOKENS // row)
    lora = LoRAConfig(rank=min(LoRAConfig().rank, largest_rank(config)))
    found = []
    for name, adapter in (("full", None), (f"lora_r{lora.rank}", lora)):
        trained = (
            count_parameters(config).total
            if adapter is None
            else count_adapter_parameters(config, adapter)
        )
        memory = estimate_training(
            config,
            micro_batch_tokens=rows * row,
            row_tokens=row,
            dtype=torch.bfloat16,
            adapter=adapter,
        )
        found.append(
            TrainingPlan(
                name=name,
                tokens=rows * row,
                row_tokens=row,
                trained_parameters=trained,
                flops=training_flops(config, (row,) * rows, adapter=adapter),
                memory=memory,
            )
        )
    return tuple(found)
