"""Memory of inference: weights as stored, KV cache, and workspace of a prompt's forward pass."""

from dataclasses import asdict, dataclass

from easyllm.core.errors import ConfigError
from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import LinearShape
from easyllm.plan.kv_cache import cache_size, huge_page_bytes, prefill_tokens
from easyllm.plan.linears import layer_linears, linear_weights, model_linears
from easyllm.plan.parameters import count_parameters
from easyllm.plan.parts import feed_forward_of, inactive_experts, layers_of
from easyllm.quant import find_scheme

FP32, HALF = 4, 2
PREFILL_TOKENS = 2048
"""Default number of prompt tokens per forward pass (the engine's `max_step_tokens`)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceEstimate:
    """Memory of inference by component, in bytes.

    Attributes:
        weights: the model's weights.
        kv_cache: KV cache and recurrent states of all sequences.
        workspace: activations of the widest layer over a prompt, and the logits of each sequence's
            last token.
        heap: on a CPU, freed activations that the C library's allocator holds, and what the huge
            pages of the KV cache take in addition; 0 on a GPU.
    """

    weights: int
    kv_cache: int
    workspace: int
    heap: int = 0

    @property
    def total(self) -> int:
        """Sum of all components."""
        return self.weights + self.kv_cache + self.workspace + self.heap

    def fits(self, device_bytes: int) -> bool:
        """Returns whether the total fits into `device_bytes` of free memory."""
        return self.total <= device_bytes

    def as_dict(self) -> dict[str, int]:
        """Returns plain values for JSON."""
        return asdict(self) | {"total": self.total}


def weight_bytes(
    config: ModelConfig, bits: float, *, group_size: int | None = None, scale_bits: int = 16
) -> int:
    """Returns the bytes of the weights at `bits` bits each, independent of a particular format.

    Args:
        bits: bits per weight.
        group_size: quantization group size. If given, only the linears inside the layers have
            `bits` bits, with a scale of `scale_bits` bits per group; embeddings, head, norms and
            biases have 16 bits.
        scale_bits: bits of a scale.

    >>> from easyllm.models.families.llama import SIZES, read_config
    >>> weight_bytes(read_config(SIZES["llama2-7b"]), 16)
    13476831232
    """
    if bits <= 0 or (group_size is not None and group_size < 1):
        raise ConfigError(f"bits={bits:g} and group_size={group_size} must be above 0")
    total = count_parameters(config).total
    if group_size is None:
        return round(total * bits / 8)
    packed = linear_weights(config)
    return round(packed * (bits + scale_bits / group_size) / 8) + (total - packed) * HALF


def loaded_weight_bytes(
    config: ModelConfig, itemsize: int = HALF, scheme: str | None = None, *, read: bool = False
) -> int:
    """Returns the bytes of the weights of a loaded model.

    Args:
        itemsize: bytes per element of unquantized weights.
        scheme: quantization format of the weights; None for unquantized weights.
        read: count only what decoding one token reads: the experts that it is routed to, and
            nothing of an untied embedding.
    """
    linears, idle = model_linears(config), 0
    if read:
        for layer in layers_of(config):
            idle += inactive_experts(layer) * sum(
                _one(linear, itemsize, scheme)
                for linear in layer_linears(layer)
                if linear.copies > 1
            )
    count = count_parameters(config)
    table = config.vocab_size * config.hidden_size
    rest = count.total - sum(linear.weights for linear in linears) - table
    total = sum(linear.copies * _one(linear, itemsize, scheme) for linear in linears)
    tied = config.tie_embeddings and config.num_labels is None
    embedding = _table(config, itemsize, scheme)
    if config.num_labels is None and not config.tie_embeddings:
        rest -= table
        total += embedding  # the head has the same shape
    return total + rest * itemsize + (embedding if tied or not read else 0) - idle


def _one(linear: LinearShape, itemsize: int, scheme: str | None) -> int:
    """Returns the bytes of one copy of a linear's weight; routers and gates are never quantized."""
    if scheme is None or linear.part == "router":
        return linear.in_features * linear.out_features * itemsize
    return find_scheme(scheme).num_bytes((linear.out_features, linear.in_features))


def _table(config: ModelConfig, itemsize: int, scheme: str | None) -> int:
    """Returns the bytes of a matrix with one row per token of the vocabulary."""
    table = None if scheme is None else find_scheme(scheme).table
    if table is None:
        return config.vocab_size * config.hidden_size * itemsize
    return find_scheme(table).num_bytes((config.vocab_size, config.hidden_size))


def estimate_inference(
    config: ModelConfig,
    *,
    context: int,
    sequences: int = 1,
    prompt: int | None = None,
    itemsize: int = HALF,
    scheme: str | None = None,
    cache_itemsize: float = HALF,
    device_type: str | None = None,
) -> InferenceEstimate:
    """Estimates the memory of generating with `sequences` sequences of up to `context` tokens.

    Args:
        prompt: tokens per forward pass of the prefill; defaults to `context`, but at most
            `PREFILL_TOKENS`.
        itemsize: bytes per element of unquantized weights and of activations.
        scheme: quantization format of the weights; None for unquantized weights.
        cache_itemsize: bytes per element of the KV cache, including scales.
        device_type: `cpu` adds what its allocators hold.
    """
    tokens = min(context, PREFILL_TOKENS) if prompt is None else prompt
    widest = max(feed_forward_of(layer).inner_elements(tokens) for layer in layers_of(config))
    workspace = 2 * tokens * config.hidden_size * FP32 + widest * itemsize
    cache = cache_size(config, context=context, sequences=sequences, itemsize=cache_itemsize)
    heap = 0
    if device_type == "cpu":
        written = prefill_tokens(config, context=context, sequences=sequences, step=tokens)
        heap = workspace + huge_page_bytes(config, written, cache_itemsize) - cache.total
    return InferenceEstimate(
        weights=loaded_weight_bytes(config, itemsize, scheme),
        kv_cache=cache.total,
        workspace=workspace + sequences * config.vocab_size * FP32,
        heap=max(0, heap),
    )
