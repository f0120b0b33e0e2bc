"""Temporary buffers of a training step: the loss, the backward pass of a layer, the optimizer."""

from easyllm.adapters import AdapterConfig
from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import FP32, Work
from easyllm.nn.decoder import DecoderLayer
from easyllm.ops.cross_entropy import even_chunks, rows_of_chunk
from easyllm.plan.linears import model_linears
from easyllm.plan.parts import adapts_head, feed_forward_of, trains_head

MUON_WORKSPACE = 14
"""Workspace bytes per element of the matrix being updated: gradient, direction and normalised
direction in fp32, and one copy in bf16."""


def loss_bytes(
    config: ModelConfig, work: Work, adapter: AdapterConfig | None, device_type: str
) -> tuple[int, int, int]:
    """Returns the bytes of the chunked cross-entropy (`ops.cross_entropy`) at three points.

    The points are: while it runs, while its gradients are scaled, and from then on until the
    gradient of the embedding is computed.
    """
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
    changed = matrix * item * adapts_head(config, adapter)  # head weight with the adapter merged in
    if rows <= most:  # a single chunk, so that the head's gradient needs no accumulation
        adding = scaling = table * item
        scaling += table * item
    else:
        adding = table * (FP32 + item)
        scaling = 2 * table * FP32 + (table * item if item < FP32 else 0)
    if changed:  # in fp32: base, adapter delta and their sum; later the gradients of the last two
        logits = max(logits, 3 * matrix * FP32 - adding)
        scaling = max(scaling, matrix * (item + 2 * FP32))
    kept = selected + hidden + changed
    return kept + logits + adding, kept + hidden + scaling, kept + table * item


def after_backward_bytes(
    config: ModelConfig,
    work: Work,
    adapter: AdapterConfig | None,
    device_type: str,
    micro_batches: int,
) -> int:
    """Returns the bytes next to all gradients when the embedding's gradient has been computed.

    A tied embedding's gradient is added to the head's, and their sum to that of earlier
    micro-batches, so that they exist at the same time. On a CPU the unscaled gradient of the head
    and the logits are in buffers that the next step uses again (`ops.huge_memory`).
    """
    if config.num_labels is not None:
        return 0
    item = work.itemsize
    table = config.vocab_size * config.hidden_size * item
    added = table * work.trains_all * (config.tie_embeddings + (micro_batches > 1))
    if device_type != "cpu":
        return added
    most = rows_of_chunk(vocab_size=config.vocab_size, itemsize=item, device_type=device_type)
    rows = min(work.labelled, even_chunks(work.labelled, most))
    accumulated = FP32 if work.labelled > most else item  # several chunks are summed in fp32
    head = config.vocab_size * config.hidden_size * accumulated * trains_head(config, adapter)
    return added + rows * config.vocab_size * item + head


def layer_workspace_bytes(layer: DecoderLayer, config: ModelConfig, work: Work) -> int:
    """Returns the workspace bytes of a layer's backward pass.

    It consists of the gradient of the residual stream, twice in fp32, and of the gradients of the
    feed-forward's inner activations, which are its widest tensors.
    """
    widest = feed_forward_of(layer).inner_elements(work.tokens) * work.itemsize
    return 2 * work.tokens * config.hidden_size * FP32 + widest


def update_workspace_bytes(matrices: list[int], optimizer: str) -> int:
    """Returns the workspace bytes of the optimizer.

    AdamW and SGD update a weight in small pieces; Muon needs a complete matrix.
    """
    if optimizer != "muon":
        return 0
    return max(matrices, default=0) * MUON_WORKSPACE


def dequantized_bytes(config: ModelConfig, work: Work, scheme: str | None) -> int:
    """Returns the bytes of the largest weight inside the layers, which is dequantized for use."""
    if scheme is None:
        return 0
    sizes = (linear.in_features * linear.out_features for linear in model_linears(config))
    return max(sizes) * work.itemsize


__all__ = [
    "after_backward_bytes",
    "dequantized_bytes",
    "layer_workspace_bytes",
    "loss_bytes",
    "update_workspace_bytes",
]
