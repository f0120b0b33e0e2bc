"""Estimates the memory of a training step from the configuration alone.

The requirement is the maximum allocated at any one time, not the sum of all parts. A step has four
peaks:

    loss       weights + optimizer state + gradients of earlier micro-batches + all activations
               + logits of a chunk
    backward   the same, with the head's gradient instead of the logits, + workspace of one layer's
               backward pass
    embedding  weights + optimizer state + all gradients + the embedding's gradient, before it is
               added to the head's, + on a CPU the buffers of the loss, cached for the next step
    update     weights + optimizer state + all gradients + workspace of the optimizer

Between the second and the third, activations are freed and gradients are allocated one layer at a
time, so the sum changes linearly from one peak to the other and has no further maximum.
"""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from easyllm.adapters import AdapterConfig, LoRAConfig
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import FP32, LayerTrace, SavedTensor, Work, saved_bytes
from easyllm.nn.recompute import Recompute
from easyllm.plan.inference import loaded_weight_bytes
from easyllm.plan.linears import model_linears
from easyllm.plan.parameters import count_parameters
from easyllm.plan.parts import (
    adapter_parameters,
    count_adapter_parameters,
    layers_of,
    trained_base_parameters,
)
from easyllm.plan.step_buffers import (
    after_backward_bytes,
    dequantized_bytes,
    layer_workspace_bytes,
    loss_bytes,
    update_workspace_bytes,
)
from easyllm.plan.trace import ModelTrace, trace_model

OptimizerKind = Literal["adamw", "muon", "sgd"]
ReferenceKind = Literal["initial", "other"]
INT8_BLOCK, INT8_SMALLEST = 256, 4096
"""Elements that share an fp32 scale, and minimum elements of a tensor whose moments are int8
(arXiv 2110.02861, section 2)."""
LAYER_BUFFERS = 5
"""Memory of temporary tensors on a CPU while a layer runs backward, and of what the C library's
heap then holds in other sizes than are needed next, relative to the layer's saved activations.
Fitted to the measurements of bench/planner.py; on a GPU see `plan.hardware.RESERVED`."""
PAGED_BYTES = 2 * 2**21 * 4
"""Moments of a paged optimizer that are in memory at a time: one chunk of 2^21 weights."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Memory of a training step in bytes: the maximum of each component, and the four peaks.

    Attributes:
        weights: weights used in the forward pass and their fp32 master copies; adapters together
            with the base model.
        gradients: gradients at the optimizer step.
        optimizer: optimizer state in memory.
        paged: optimizer state in a file, which the total does not include.
        activations: activations saved for the backward pass.
        loss: logits of a chunk, and the gradient of the head.
        workspace: temporary buffers of one layer's backward pass or of the optimizer.
        heap: further temporary tensors of a layer on a CPU, and freed memory that its allocator
            holds.
        copies: further models and caches that an objective holds all the time, by name, such as
            `reference`, `critic` and `rollout_cache`.
        peaks: total at each of the peaks `loss`, `backward`, `embedding` and `update`.
    """

    weights: int
    gradients: int
    optimizer: int
    paged: int
    activations: int
    loss: int
    workspace: int
    heap: int
    copies: dict[str, int]
    peaks: dict[str, int]

    @property
    def total(self) -> int:
        """The highest peak, which is less than the sum of components not allocated together."""
        return max(self.peaks.values())

    @property
    def peak(self) -> str:
        """Name of the highest peak."""
        return max(self.peaks, key=self.peaks.__getitem__)

    def fits(self, device_bytes: int) -> bool:
        """Returns whether the total fits into `device_bytes` of free memory."""
        return self.total <= device_bytes

    def components(self) -> dict[str, int]:
        """Returns the bytes of each component."""
        names = ("weights", "gradients", "optimizer", "activations", "loss", "workspace", "heap")
        return {name: getattr(self, name) for name in names} | self.copies

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return asdict(self) | {"total": self.total, "peak": self.peak}


@dataclass(frozen=True, slots=True)
class Change:
    """A change of a training setup, and the resulting memory.

    Attributes:
        what: description of the change.
        total: bytes with this change.
        fits: whether they fit into the memory of the device.
    """

    what: str
    total: int
    fits: bool


def estimate_training(
    config: ModelConfig,
    *,
    micro_batch_tokens: int,
    row_tokens: int | None = None,
    micro_batches: int = 1,
    labelled: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    optimizer: OptimizerKind = "adamw",
    int8_state: bool = False,
    paged: bool = False,
    momentum: bool = False,
    adapter: AdapterConfig | None = None,
    scheme: str | None = None,
    recompute: Recompute = "none",
    dropout: bool = False,
    reference: ReferenceKind | None = None,
    copies: Mapping[str, int] | None = None,
    device_type: str = "cpu",
) -> MemoryEstimate:
    """Estimates the memory of a step of `train` on a CPU or GPU, which save the same activations.

    Args:
        micro_batch_tokens: packed tokens in one forward pass.
        row_tokens: tokens per sequence; defaults to one sequence of `micro_batch_tokens`.
        micro_batches: forward passes per step (gradient accumulation); from the second one on,
            gradients are allocated at the same time as activations.
        labelled: number of tokens with a loss; defaults to all.
        dtype: dtype of the forward pass; weights in less than fp32 have fp32 master copies.
        optimizer: optimizer of the weights.
        int8_state: whether AdamW stores its moments in int8.
        paged: whether AdamW's moments are in a file, of which one chunk is in memory.
        momentum: whether SGD uses momentum.
        adapter: adapter that is trained instead of the model.
        scheme: storage format of the frozen model's weights; None if they are not quantized.
        recompute: activations that gradient checkpointing recomputes in the backward pass.
        dropout: whether dropout is active.
        reference: the model that the objective compares with: `initial`, of which there is a second
            copy unless only an adapter is trained, or `other`, not quantized and of the same size.
        copies: bytes of further models and caches by name, which are there in all peaks.
        device_type: `cpu` or `cuda`; the loss uses larger chunks on `cuda`.

    Raises:
        ConfigError: an adapter's target matches no linear of the model, or a row is longer than the
            model's context.
    """
    lengths = _rows(config, micro_batch_tokens, row_tokens)
    count = sum(lengths) if labelled is None else labelled
    work = _work(lengths, count, dtype, adapter, dropout=dropout)
    weights, trained = _weights(config, work, adapter, scheme)
    held = _copies(copies, _reference_bytes(config, work, adapter, scheme, reference))
    matrices = _trained_matrices(config, adapter)
    earlier, gradients = _gradients(work, trained, micro_batches)
    if int8_state and adapter is None:
        table = config.vocab_size * config.hidden_size
        matrices += [table] * (1 if _head_shares_weight(config) else 2)
    state = _optimizer_state(trained, matrices, optimizer, int8=int8_state, momentum=momentum)
    in_file = _bytes_in_file(trained, matrices, optimizer) if paged else 0
    trace = trace_model(config, work, adapter)
    activations = _activations(trace, recompute)
    in_loss, in_backward, left = loss_bytes(config, work, adapter, device_type)
    layer = max(layer_workspace_bytes(layer, config, work) for layer in layers_of(config))
    layer += dequantized_bytes(config, work, scheme)
    update = update_workspace_bytes(matrices, optimizer)
    state -= in_file
    steady = weights + state + sum(held.values())
    saved = max(saved_bytes(layer.events) for layer in trace.layers)
    heap = LAYER_BUFFERS * saved if device_type == "cpu" else 0
    after = after_backward_bytes(config, work, adapter, device_type, micro_batches)
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        paged=in_file,
        activations=activations,
        loss=max(in_loss, in_backward),
        workspace=max(layer, update, after),
        heap=heap,
        copies=held,
        peaks={
            "loss": steady + earlier + activations + heap + in_loss,
            "backward": steady + earlier + activations + heap + max(in_backward, left + layer),
            "embedding": steady + gradients + after,
            "update": steady + gradients + update,
        },
    )


def _work(
    lengths: tuple[int, ...],
    labelled: int,
    dtype: torch.dtype,
    adapter: AdapterConfig | None,
    *,
    dropout: bool,
) -> Work:
    return Work(
        lengths=lengths,
        labelled=labelled,
        itemsize=dtype.itemsize,
        trains_all=adapter is None,
        input_grad=adapter is None,
        dropout=dropout,
    )


def _copies(copies: Mapping[str, int] | None, reference: int) -> dict[str, int]:
    """Returns the further models and caches, with the reference if there is one."""
    return dict(copies or {}) | ({"reference": reference} if reference else {})


def memory_reductions(config: ModelConfig, device_bytes: int, **setup: Any) -> list[Change]:
    """Suggests changes that reduce the memory of a training setup that does not fit.

    Args:
        device_bytes: free memory of the device.
        setup: arguments of `estimate_training`.

    Returns:
        Each change on its own with the resulting memory, the mildest change first; changes that do
        not reduce memory are omitted.
    """
    before = estimate_training(config, **setup).total
    found = []
    for what, changed in _changes(setup):
        total = estimate_training(config, **changed).total
        if total < before:
            found.append(Change(what, total, total <= device_bytes))
    return found


def _changes(setup: JsonObject) -> Iterator[tuple[str, JsonObject]]:
    row = setup.get("row_tokens") or setup["micro_batch_tokens"]
    if setup["micro_batch_tokens"] > row:
        yield f"micro_batch_tokens={row}", setup | {"micro_batch_tokens": row}
    if row > 512:
        half = {"micro_batch_tokens": row // 2, "row_tokens": row // 2}
        yield f"sequences of {row // 2} tokens", setup | half
    order: tuple[Recompute, ...] = ("none", "selective", "full")
    for mode in order[order.index(setup.get("recompute", "none")) + 1 :]:
        yield f"checkpoint_activations={mode}", setup | {"recompute": mode}
    if setup.get("optimizer", "adamw") == "adamw" and not (
        setup.get("int8_state") or setup.get("paged")
    ):
        yield "optimizer.state=int8", setup | {"int8_state": True}
        if setup.get("device_type", "cpu") == "cpu":
            yield "optimizer.paged=true", setup | {"paged": True}
    if setup.get("adapter") is None:
        yield "adapter.rank=16 (LoRA)", setup | {"adapter": LoRAConfig()}
    elif setup.get("scheme") is None:
        yield "quantize=nf4 (QLoRA)", setup | {"scheme": "nf4"}


def _rows(config: ModelConfig, micro_batch_tokens: int, row_tokens: int | None) -> tuple[int, ...]:
    row = min(row_tokens or micro_batch_tokens, micro_batch_tokens)
    if row < 1:
        raise ConfigError(
            f"micro_batch_tokens={micro_batch_tokens} must be at least 1; increase it"
        )
    if row > config.max_seq_len:
        raise ConfigError(
            f"sequences of {row} tokens are longer than the model's context of "
            f"{config.max_seq_len}; shorten them"
        )
    rest = micro_batch_tokens % row
    return (row,) * (micro_batch_tokens // row) + ((rest,) if rest else ())


def _weights(
    config: ModelConfig, work: Work, adapter: AdapterConfig | None, scheme: str | None
) -> tuple[int, int]:
    """Returns the bytes of all weights, and the number of trained weights."""
    count = count_parameters(config).total
    if adapter is not None:
        trained = count_adapter_parameters(config, adapter)
        whole = sum(parameter.numel() for parameter in trained_base_parameters(config, adapter))
        copies = trained - whole * (work.itemsize >= FP32)  # an fp32 base needs no master copies
        return loaded_weight_bytes(config, work.itemsize, scheme) + copies * FP32, trained
    masters = FP32 if work.itemsize < FP32 else 0
    return count * (work.itemsize + masters), count


def _gradients(work: Work, trained: int, micro_batches: int) -> tuple[int, int]:
    """Returns the bytes of gradients before the last micro-batch, and at the optimizer step.

    The gradients of a single micro-batch stay in the dtype of the weights; accumulated gradients
    are fp32. Those of adapters are always fp32.
    """
    own = work.itemsize if work.trains_all else FP32
    before = {1: 0, 2: own}.get(micro_batches, FP32)
    return trained * before, trained * (own if micro_batches == 1 else FP32)


def _optimizer_state(
    trained: int,
    matrices: list[int],
    optimizer: OptimizerKind,
    *,
    int8: bool,
    momentum: bool,
) -> int:
    """Returns the bytes of the optimizer state.

    Per element these are 8 bytes for the two moments of AdamW (2 bytes plus two scales per block if
    they are int8), and 4 bytes for a momentum.
    """
    inside = sum(matrices)
    match optimizer:
        case "sgd":
            return trained * FP32 * momentum
        case "muon":
            return inside * FP32 + (trained - inside) * 2 * FP32
    if not int8:
        return trained * 2 * FP32
    packed = [size for size in matrices if size >= INT8_SMALLEST]
    saved = sum(6 * size - 8 * -(-size // INT8_BLOCK) for size in packed)
    return trained * 2 * FP32 - saved


def _bytes_in_file(trained: int, matrices: list[int], optimizer: OptimizerKind) -> int:
    """Returns the bytes of AdamW's paged moments that are not in memory."""
    moments = (trained - sum(matrices) * (optimizer == "muon")) * 2 * FP32
    return max(0, moments - PAGED_BYTES)


def _head_shares_weight(config: ModelConfig) -> bool:
    return config.tie_embeddings or config.num_labels is not None


def _reference_bytes(
    config: ModelConfig,
    work: Work,
    adapter: AdapterConfig | None,
    scheme: str | None,
    reference: ReferenceKind | None,
) -> int:
    """Returns the bytes of the reference model's weights; 0 if they are those of the model."""
    if reference == "other":
        return loaded_weight_bytes(config, work.itemsize)
    bypassed = adapter is not None and not trained_base_parameters(config, adapter)
    if reference is None or bypassed:
        return 0
    return loaded_weight_bytes(config, work.itemsize, scheme)


def _trained_matrices(config: ModelConfig, adapter: AdapterConfig | None) -> list[int]:
    """Returns the number of elements of each trained matrix inside the layers."""
    if adapter is not None:
        return [p.numel() for p in adapter_parameters(config, adapter) if p.ndim > 1]
    every = model_linears(config)
    return [x.in_features * x.out_features for x in every for _ in range(x.copies)]


def _activations(trace: ModelTrace, recompute: Recompute) -> int:
    """Returns the bytes of saved activations, plus those of one recomputed block."""
    kept = trace.shared_bytes + sum(_layer_kept(layer, recompute) for layer in trace.layers)
    match recompute:
        case "none":
            return kept
        case "selective":
            return kept + max(saved_bytes(layer.fed) for layer in trace.layers)
        case "full":
            return kept + max(saved_bytes(layer.events) for layer in trace.layers)


def _layer_kept(layer: LayerTrace, recompute: Recompute) -> int:
    if recompute == "full":
        return layer.input.nbytes * any(isinstance(event, SavedTensor) for event in layer.events)
    if recompute == "selective" and any(isinstance(event, SavedTensor) for event in layer.fed):
        entered = SavedTensor(layer.feed_forward_input.name, layer.feed_forward_input.nbytes)
        return saved_bytes([*layer.before, entered, *layer.after])
    return saved_bytes(layer.events)


__all__ = ["Change", "MemoryEstimate", "OptimizerKind", "estimate_training", "memory_reductions"]
