"""Memory of a training step, from the configuration alone.

What is there at once decides, not the sum of all parts. A step passes three peaks:

    loss       weights + optimizer + gradients of earlier micro-batches + all activations + logits of a chunk
    backward   the same with the head's gradient instead of logits, and what one layer's backward pass works in
    update     weights + optimizer + all gradients + what the optimizer works in

Between the last two, activations go and gradients come a layer at a time, so the sum runs straight from one to the other.
"""

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch

from easyllm.adapters import AdapterConfig, LoRAConfig
from easyllm.core.errors import ConfigError
from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import FP32, Kept, LayerTrace, Work, kept_bytes
from easyllm.nn.decoder import DecoderLayer
from easyllm.nn.recompute import Recompute
from easyllm.ops.cross_entropy import even_chunks, rows_of_chunk
from easyllm.plan.linears import model_linears
from easyllm.plan.parameters import count_parameters
from easyllm.plan.parts import (
    adapter_parameters,
    adapts_head,
    count_adapter_parameters,
    feed_forward_of,
    layers_of,
    trains_head,
    whole_parameters,
)
from easyllm.plan.trace import ModelTrace, trace_model

OptimizerKind = Literal["adamw", "muon", "sgd"]
INT8_BLOCK, INT8_SMALLEST = 256, 4096
"""Elements that share an fp32 scale, and of the smallest tensor whose moments are int8 (arXiv 2110.02861, section 2)."""
MUON_WORKSPACE = 14
"""Bytes an element of the matrix in work: gradient, direction and normalised direction in fp32, one in bf16."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """Bytes of a training step's parts, each at its largest, and of the three peaks they make together.

    Attributes:
        weights: that compute, and their fp32 masters; adapters with the base.
        gradients: as they are when the optimizer steps.
        optimizer: what it remembers.
        activations: kept for the backward pass.
        loss: logits of a chunk, the head's gradient.
        workspace: what one layer's backward pass, or the optimizer, holds for the moment.
        peaks: total of each.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int
    loss: int
    workspace: int
    peaks: dict[str, int]

    @property
    def total(self) -> int:
        """The highest of the peaks; less than the sum of the parts, which are not all there at once."""
        return max(self.peaks.values())

    @property
    def peak(self) -> str:
        """Which that is."""
        return max(self.peaks, key=self.peaks.__getitem__)

    def fits(self, device_bytes: int) -> bool:
        """Whether a device of so much free memory holds it."""
        return self.total <= device_bytes

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"total": self.total, "peak": self.peak}


@dataclass(frozen=True, slots=True)
class Change:
    """One change of a training's setup, and the memory it takes then."""

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
    momentum: bool = False,
    adapter: AdapterConfig | None = None,
    recompute: Recompute = "none",
    dropout: bool = False,
    reference: bool = False,
    device_type: str = "cpu",
) -> MemoryEstimate:
    """Memory of a step as `train` runs it, with the kernels of a CPU or a GPU, which keep the same activations.

    Args:
        micro_batch_tokens: packed tokens in one forward pass.
        row_tokens: of each sequence in it; by default it is one sequence.
        micro_batches: forward passes a step; from the second on, gradients are held next to activations.
        labelled: tokens with a loss; by default all.
        dtype: that products run in; weights of a narrower one than fp32 have fp32 masters.
        int8_state: whether AdamW keeps its moments in a byte each.
        momentum: whether SGD has it.
        adapter: trained instead of the model.
        recompute: activations computed again in the backward pass.
        reference: whether the objective compares with the model the run starts from, of which there is a second copy
            unless an adapter alone is trained.
        device_type: `cpu` or `cuda`, whose loss works on larger chunks.

    Raises:
        ConfigError: an adapter's target names no linear of the model, or a row is longer than the model's context.
    """
    lengths = _rows(config, micro_batch_tokens, row_tokens)
    work = Work(
        lengths=lengths,
        labelled=sum(lengths) if labelled is None else labelled,
        itemsize=dtype.itemsize,
        trains_all=adapter is None,
        input_grad=adapter is None,
        dropout=dropout,
    )
    weights, trained = _weights(config, work, adapter)
    if reference and (adapter is None or adapter.also_trained):
        weights += count_parameters(config).total * work.itemsize
    matrices = _trained_matrices(config, adapter)
    earlier, gradients = _gradients(work, trained, micro_batches)
    if int8_state and adapter is None:
        table = config.vocab_size * config.hidden_size
        matrices += [table] * (1 if _head_shares_weight(config) else 2)
    state = _optimizer_state(trained, matrices, optimizer, int8=int8_state, momentum=momentum)
    activations = _activations(trace_model(config, work, adapter), recompute)
    in_loss, in_backward, left = _loss(config, work, adapter, device_type)
    layer = max(_layer_workspace(layer, config, work) for layer in layers_of(config))
    update = _update_workspace(matrices, optimizer)
    steady = weights + state
    return MemoryEstimate(
        weights=weights,
        gradients=gradients,
        optimizer=state,
        activations=activations,
        loss=max(in_loss, in_backward),
        workspace=max(layer, update),
        peaks={
            "loss": steady + earlier + activations + in_loss,
            "backward": steady + earlier + activations + max(in_backward, left + layer),
            "update": steady + gradients + update,
        },
    )


def ways_to_fit(config: ModelConfig, device_bytes: int, **setup: Any) -> list[Change]:
    """What one may lower when a setup of `estimate_training` does not fit: each change alone, the mildest first, and
    with each the memory it leaves; only changes that help."""
    before = estimate_training(config, **setup).total
    found = []
    for what, changed in _changes(setup):
        total = estimate_training(config, **changed).total
        if total < before:
            found.append(Change(what, total, total <= device_bytes))
    return found


def _changes(setup: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    row = setup.get("row_tokens") or setup["micro_batch_tokens"]
    if setup["micro_batch_tokens"] > row:
        yield f"micro_batch_tokens={row}", setup | {"micro_batch_tokens": row}
    if row > 512:
        half = {"micro_batch_tokens": row // 2, "row_tokens": row // 2}
        yield f"sequences of {row // 2} tokens", setup | half
    order: tuple[Recompute, ...] = ("none", "selective", "full")
    for mode in order[order.index(setup.get("recompute", "none")) + 1 :]:
        yield f"checkpoint_activations={mode}", setup | {"recompute": mode}
    if setup.get("optimizer", "adamw") == "adamw" and not setup.get("int8_state"):
        yield "optimizer.state=int8", setup | {"int8_state": True}
    if setup.get("adapter") is None:
        yield "adapter.rank=16 (LoRA)", setup | {"adapter": LoRAConfig()}


def _rows(config: ModelConfig, micro_batch_tokens: int, row_tokens: int | None) -> tuple[int, ...]:
    row = min(row_tokens or micro_batch_tokens, micro_batch_tokens)
    if row < 1:
        raise ConfigError(
            f"micro_batch_tokens={micro_batch_tokens} leaves no token; set at least 1"
        )
    if row > config.max_seq_len:
        raise ConfigError(
            f"sequences of {row} tokens are longer than the model's context of {config.max_seq_len}; shorten them"
        )
    rest = micro_batch_tokens % row
    return (row,) * (micro_batch_tokens // row) + ((rest,) if rest else ())


def _weights(config: ModelConfig, work: Work, adapter: AdapterConfig | None) -> tuple[int, int]:
    """Bytes of all weights, and the number of those that are trained."""
    count = count_parameters(config).total
    if adapter is not None:
        trained = count_adapter_parameters(config, adapter)
        whole = sum(parameter.numel() for parameter in whole_parameters(config, adapter))
        copies = trained - whole * (work.itemsize >= FP32)  # fp32 modules of the base are there
        return count * work.itemsize + copies * FP32, trained
    masters = FP32 if work.itemsize < FP32 else 0
    return count * (work.itemsize + masters), count


def _gradients(work: Work, trained: int, micro_batches: int) -> tuple[int, int]:
    """Bytes before the last micro-batch, and at the step. A single micro-batch's stay in the dtype of the weights, sums
    are fp32; adapters are fp32 themselves."""
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
    """Bytes an element: 8 for AdamW's two moments, 2 and two scales a block where they are int8, 4 for a momentum."""
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


def _head_shares_weight(config: ModelConfig) -> bool:
    return config.tie_embeddings or config.num_labels is not None


def _trained_matrices(config: ModelConfig, adapter: AdapterConfig | None) -> list[int]:
    """Elements of each matrix that is trained inside the layers."""
    if adapter is not None:
        return [p.numel() for p in adapter_parameters(config, adapter) if p.ndim > 1]
    every = model_linears(config)
    return [x.in_features * x.out_features for x in every for _ in range(x.copies)]


def _activations(trace: ModelTrace, recompute: Recompute) -> int:
    """Bytes kept at the end of the forward pass, and those of one block that is computed again."""
    kept = trace.shared_bytes + sum(_layer_kept(layer, recompute) for layer in trace.layers)
    match recompute:
        case "none":
            return kept
        case "selective":
            return kept + max(kept_bytes(layer.fed) for layer in trace.layers)
        case "full":
            return kept + max(kept_bytes(layer.events) for layer in trace.layers)


def _layer_kept(layer: LayerTrace, recompute: Recompute) -> int:
    if recompute == "full":
        return layer.input.nbytes * any(isinstance(event, Kept) for event in layer.events)
    if recompute == "selective" and any(isinstance(event, Kept) for event in layer.fed):
        entered = Kept(layer.feed_forward_input.name, layer.feed_forward_input.nbytes)
        return kept_bytes([*layer.before, entered, *layer.after])
    return kept_bytes(layer.events)


def _loss(
    config: ModelConfig, work: Work, adapter: AdapterConfig | None, device_type: str
) -> tuple[int, int, int]:
    """Bytes of the chunked cross-entropy: while it runs, while its gradients are scaled, and what is left after that
    until the embedding's own gradient arrives (`ops.cross_entropy`)."""
    if config.num_labels is not None:
        return 0, 0, 0
    rows, vocab, item = work.labelled, config.vocab_size, work.itemsize
    most = rows_of_chunk(vocab_size=vocab, itemsize=item, device_type=device_type)
    chunk = min(rows, even_chunks(rows, most))
    capped = 4 * FP32 if config.logit_softcap is not None and device_type == "cpu" else 0
    logits = chunk * vocab * (item + capped)
    hidden = rows * config.hidden_size * item
    selected = hidden * (rows < work.tokens)
    matrix = vocab * config.hidden_size
    table = matrix * trains_head(config, adapter)
    changed = matrix * item * adapts_head(config, adapter)  # the copy that the adapter has changed
    if rows <= most:  # one chunk, whose gradient of the head is there at once
        adding = scaling = table * item
        scaling += table * item
    else:
        adding = table * (FP32 + item)
        scaling = 2 * table * FP32 + (table * item if item < FP32 else 0)
    if changed:  # in fp32: the base, what is added, their sum; then the gradients of the last two
        logits = max(logits, 3 * matrix * FP32 - adding)
        scaling = max(scaling, matrix * (item + 2 * FP32))
    kept = selected + hidden + changed
    return kept + logits + adding, kept + hidden + scaling, kept + table * item


def _layer_workspace(layer: DecoderLayer, config: ModelConfig, work: Work) -> int:
    """Of a layer's backward pass: the residual stream's gradient twice in fp32, and the gradients of the feed-forward's
    inner widths, its widest tensors."""
    widest = feed_forward_of(layer).inner_elements(work.tokens) * work.itemsize
    return 2 * work.tokens * config.hidden_size * FP32 + widest


def _update_workspace(matrices: list[int], optimizer: OptimizerKind) -> int:
    """AdamW and SGD move a weight in small pieces; Muon needs a matrix whole."""
    if optimizer != "muon":
        return 0
    return max(matrices, default=0) * MUON_WORKSPACE


__all__ = ["Change", "MemoryEstimate", "OptimizerKind", "estimate_training", "ways_to_fit"]
