"""Memory of inference: weights at a number of bits, the cache, and what a prompt's forward pass works in."""

from dataclasses import asdict, dataclass

from easyllm.core.errors import ConfigError
from easyllm.nn.config import ModelConfig, MoEConfig
from easyllm.plan.kv_cache import cache_size
from easyllm.plan.linears import linear_weights
from easyllm.plan.parameters import count_parameters

FP32, HALF = 4, 2


@dataclass(frozen=True, slots=True, kw_only=True)
class InferenceEstimate:
    """Bytes of inference's parts.

    Attributes:
        workspace: of the widest layer over a prompt, and the logits of its last token.
    """

    weights: int
    kv_cache: int
    workspace: int

    @property
    def total(self) -> int:
        return self.weights + self.kv_cache + self.workspace

    def fits(self, device_bytes: int) -> bool:
        """Whether a device of so much free memory holds it."""
        return self.total <= device_bytes

    def as_dict(self) -> dict[str, int]:
        return asdict(self) | {"total": self.total}


def weight_bytes(
    config: ModelConfig, bits: float, *, group_size: int | None = None, scale_bits: int = 16
) -> int:
    """Bytes of the weights at `bits` each.

    Args:
        group_size: with it, only the linears inside the layers have `bits`, and every group of so many weights a scale of
            `scale_bits`; embeddings, head, norms and biases are 16-bit.

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


def estimate_inference(
    config: ModelConfig,
    *,
    context: int,
    sequences: int = 1,
    prompt: int | None = None,
    bits: float = 16,
    group_size: int | None = None,
    cache_itemsize: float = HALF,
) -> InferenceEstimate:
    """Memory of generating with `sequences` sequences of up to `context` tokens.

    Args:
        prompt: tokens that pass the model at once; by default all of a sequence.
    """
    tokens = context if prompt is None else prompt
    item = HALF if bits <= 16 else FP32
    widest = max(
        (f.experts_per_token * f.expert.intermediate_size)
        if isinstance(f := layer.feed_forward, MoEConfig)
        else f.intermediate_size
        for layer in config.layers
    )
    workspace = tokens * (2 * config.hidden_size * FP32 + 3 * widest * item)
    cache = cache_size(config, context=context, sequences=sequences, itemsize=cache_itemsize)
    return InferenceEstimate(
        weights=weight_bytes(config, bits, group_size=group_size),
        kv_cache=cache.total,
        workspace=workspace + sequences * config.vocab_size * FP32,
    )
