"""Ceilings of serving: tokens/s from bandwidth and arithmetic, and the requests that fit.

A decoding step reads the weights once for all sequences, and the cache of each; it computes 2 FLOPs
per active weight and sequence. At few sequences reading takes longer, at many computing does; the
batch at which both take as long is where more sequences stop being free (Pope et al. 2022, arXiv
2211.05102, section 2).
"""

import math
from dataclasses import dataclass

from easyllm.core.json_types import JsonObject
from easyllm.nn.config import ModelConfig
from easyllm.plan.compute import decode_flops, forward_flops
from easyllm.plan.hardware import Hardware
from easyllm.plan.inference import InferenceEstimate, estimate_inference, loaded_weight_bytes
from easyllm.plan.kv_cache import cache_size, rolling_window

SHOWN_BATCHES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)


@dataclass(frozen=True, slots=True, kw_only=True)
class ServingCeiling:
    """What one copy of a model on one or more devices can serve at most.

    Attributes:
        weight_bytes: bytes of weights that a step reads.
        cache_bytes: bytes of cache that a step reads for each sequence, at full context.
        token_flops: FLOPs of one token.
        prompt_flops: FLOPs of a prompt of `context` tokens.
        flops_per_s, read_bytes_per_s: rates of all devices together.
        memory: memory with one sequence.
        memory_bytes: memory of all devices.
        request_bytes: memory that each further sequence takes, in whole pages.
        context: tokens per sequence.
    """

    weight_bytes: int
    cache_bytes: int
    token_flops: int
    prompt_flops: int
    flops_per_s: float
    read_bytes_per_s: float
    memory: InferenceEstimate
    memory_bytes: int
    request_bytes: int
    context: int

    def step_seconds(self, sequences: int) -> float:
        """Returns the time of a step that generates a token for each of `sequences`."""
        reading = (self.weight_bytes + sequences * self.cache_bytes) / self.read_bytes_per_s
        return max(reading, sequences * self.token_flops / self.flops_per_s)

    def tokens_per_s(self, sequences: int) -> float:
        """Returns the throughput of `sequences` sequences together."""
        return sequences / self.step_seconds(sequences)

    @property
    def crossover(self) -> int | None:
        """The batch at which computing takes as long as reading; None if it never does.

        It never does where a sequence's cache takes longer to read than its token to compute.
        """
        spare = self.token_flops / self.flops_per_s - self.cache_bytes / self.read_bytes_per_s
        if spare <= 0:
            return None
        return math.ceil(self.weight_bytes / self.read_bytes_per_s / spare)

    @property
    def most_requests(self) -> int:
        """Sequences of `context` tokens that fit into the memory at once."""
        left = self.memory_bytes - self.memory.weights - self.memory.workspace
        return max(0, left // self.request_bytes)

    @property
    def first_token_seconds(self) -> float:
        """Time to the first token of a prompt of `context` tokens, on idle devices."""
        return max(self.prompt_flops / self.flops_per_s, self.weight_bytes / self.read_bytes_per_s)

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        most = self.most_requests
        batches = [n for n in SHOWN_BATCHES if n <= max(1, most)]
        return {
            "tokens_per_s_by_batch": {str(n): round(self.tokens_per_s(n), 2) for n in batches},
            "tokens_per_s_one": round(self.tokens_per_s(1), 2),
            "tokens_per_s_full": round(self.tokens_per_s(most), 2) if most else None,
            "crossover_batch": self.crossover,
            "most_requests": most,
            "request_bytes": self.request_bytes,
            "first_token_seconds": float(f"{self.first_token_seconds:.4g}"),
        }


def serving_ceiling(
    config: ModelConfig,
    hardware: Hardware,
    *,
    gpus: int = 1,
    context: int,
    itemsize: int = 2,
    scheme: str | None = None,
    cache_itemsize: float = 2,
    page_size: int = 16,
    device_type: str | None = None,
) -> ServingCeiling:
    """Returns the ceilings of a model on `gpus` devices that share its weights and caches.

    Args:
        config: configuration of the model.
        hardware: one device.
        gpus: devices that hold one copy together (tensor parallel, without its traffic).
        context: tokens per sequence.
        itemsize: bytes per element of unquantized weights.
        scheme: quantization format of the weights; None for unquantized weights.
        cache_itemsize: bytes per element of the KV cache, scales included.
        page_size: tokens per page of the cache; a sequence takes whole pages.
        device_type: `cpu` adds what its allocators hold.
    """
    held = cache_size(config, context=context, itemsize=cache_itemsize)
    memory = estimate_inference(
        config,
        context=context,
        itemsize=itemsize,
        scheme=scheme,
        cache_itemsize=cache_itemsize,
        device_type=device_type,
    )
    return ServingCeiling(
        weight_bytes=loaded_weight_bytes(config, itemsize, scheme, read=True),
        cache_bytes=held.total,
        token_flops=decode_flops(config, context).total,
        prompt_flops=forward_flops(config, [context], head_rows=1).total,
        flops_per_s=gpus * hardware.flops_per_s,
        read_bytes_per_s=gpus * hardware.read_bytes_per_s,
        memory=memory,
        memory_bytes=gpus * hardware.usable_bytes,
        request_bytes=max(1, paged_bytes(config, context, cache_itemsize, page_size)),
        context=context,
    )


def paged_bytes(config: ModelConfig, context: int, itemsize: float, page_size: int) -> int:
    """Returns the bytes of one sequence's cache in whole pages, and of its recurrent states.

    A rolling window needs one page more, since its first token is rarely the first of a page.
    """
    one = cache_size(config, context=1, itemsize=itemsize)
    pages = -(-context // page_size)
    rolling = rolling_window(config)
    if rolling is not None and context > rolling.window + rolling.num_sinks:
        kept = -(-rolling.window // page_size) + 1 + -(-rolling.num_sinks // page_size)
        pages = min(pages, kept)
    return pages * page_size * one.bytes_per_token + one.state_bytes


__all__ = ["ServingCeiling", "paged_bytes", "serving_ceiling"]
