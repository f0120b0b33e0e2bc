"""What a model and its cache take of the memory that is free, decided before anything is allocated."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from easyllm.core.errors import ConfigError
from easyllm.engine.options import EngineConfig
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.plan.kv_cache import cache_size, rolling_window
from easyllm.quant import schemes, weight_bytes

DEFAULT_SHARE = 0.25
"""Of the free memory, for a cache nobody has given a size."""
GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """Where memory goes.

    Attributes:
        weight_bytes: of the weights.
        page_bytes: of a page, keys and values of all layers; page_size: its tokens.
        num_pages: of the cache.
        state_bytes: recurrent states of all sequences that may run at once.
        free_bytes: what was free for all of this.
    """

    weight_bytes: int
    page_bytes: int
    page_size: int
    num_pages: int
    state_bytes: int
    free_bytes: int

    @property
    def cache_bytes(self) -> int:
        return self.num_pages * self.page_bytes + self.state_bytes

    @property
    def num_tokens(self) -> int:
        """Tokens the cache holds."""
        return self.num_pages * self.page_size

    def line(self) -> str:
        """The plan in one line, for people."""
        return (
            f"memory: weights {self.weight_bytes / GB:.2f} GB, cache {self.cache_bytes / GB:.2f} GB = {self.num_pages:,} "
            f"pages of {self.page_size} tokens ({self.num_tokens:,} tokens), {self.free_bytes / GB:.1f} GB were free"
        )


def plan_memory(
    config: ModelConfig,
    options: EngineConfig,
    *,
    weight_bytes: int,
    itemsize: float,
    free_bytes: int,
) -> MemoryPlan:
    """The cache's size, by what is asked for and what is free.

    Args:
        weight_bytes: of the model, which is loaded already: `free_bytes` is what is left beside it.
        itemsize: bytes of an element of keys and values.

    Raises:
        ConfigError: the cache does not fit beside the weights.
    """
    size = options.page_size
    one = cache_size(config, context=1, itemsize=itemsize)
    page_bytes, state_bytes = one.bytes_per_token * size, one.state_bytes * options.max_running
    pages_of_one = -(-config.max_seq_len // size)
    if (rolling := rolling_window(config)) is not None:
        rolls = -(-(rolling.window - 1 + options.max_step_tokens) // size) + 1
        pages_of_one = min(pages_of_one, rolls + -(-rolling.num_sinks // size))
    room = free_bytes - state_bytes
    if options.num_pages is not None:
        num_pages = options.num_pages
    elif options.cache_gb is not None:
        num_pages = int(options.cache_gb * GB) // max(page_bytes, 1)
    else:
        num_pages = options.max_running * pages_of_one
    if options.num_pages is None and options.cache_gb is None and page_bytes:
        num_pages = min(num_pages, int(DEFAULT_SHARE * room) // page_bytes)
    if not page_bytes:  # linear attention alone: pages count tokens and hold nothing
        num_pages = min(num_pages, options.max_running * pages_of_one)
    needed = max(num_pages, 1) * page_bytes
    if needed > room or num_pages < 1:
        raise ConfigError(
            f"the cache needs {max(needed, page_bytes) / GB:.2f} GB and {max(room, 0) / GB:.2f} GB are free beside the "
            f"weights ({(needed - room) / GB:.2f} GB short); lower cache_gb, num_pages or max_running, or set cache_dtype "
            "to bfloat16"
            if needed > room
            else f"cache_gb={options.cache_gb} is less than one page of {size} tokens ({page_bytes / GB:.4f} GB); raise it"
        )
    return MemoryPlan(
        weight_bytes=weight_bytes,
        page_bytes=page_bytes,
        page_size=size,
        num_pages=num_pages,
        state_bytes=state_bytes,
        free_bytes=free_bytes,
    )


def check_weights_fit(
    model: Decoder, dtype: torch.dtype, free_bytes: int, *, quantize: str | None = None
) -> None:
    """Refuses a model whose weights alone are more than what is free.

    Args:
        model: without weights (on the meta device).

    Raises:
        ConfigError: with how much is missing, and the format that would fit, if one would.
    """
    needed = weight_bytes(model, dtype, quantize)
    if needed <= free_bytes:
        return
    asked = str(dtype).removeprefix("torch.") if quantize is None else quantize
    formats: dict[str, tuple[torch.dtype, str | None]] = {
        "set dtype to bfloat16": (torch.bfloat16, None),
        **{f"set quantize to {name}": (dtype, name) for name in schemes()},
    }
    fitting = (what for what, how in formats.items() if weight_bytes(model, *how) <= free_bytes)
    remedy = next(fitting, "take a smaller model or a machine with more memory")
    raise ConfigError(
        f"the weights need {needed / GB:.2f} GB as {asked} and {free_bytes / GB:.2f} GB are "
        f"free ({(needed - free_bytes) / GB:.2f} GB short); {remedy}"
    )


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Bytes of some tensors together."""
    return sum(tensor.nbytes for tensor in tensors)
