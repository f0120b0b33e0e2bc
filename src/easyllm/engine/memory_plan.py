"""Memory plan: sizes of the weights and the KV cache, decided before anything is allocated."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch

from easyllm.core.errors import ConfigError
from easyllm.engine.options import EngineConfig
from easyllm.nn.config import ModelConfig
from easyllm.plan.inference import estimate_inference
from easyllm.plan.kv_cache import cache_size, rolling_window

DEFAULT_SHARE = 0.25
"""Maximum share of the free memory for a cache whose size is not configured."""
GB = 1e9


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryPlan:
    """How memory is divided between weights and cache.

    Attributes:
        weight_bytes: size of the weights.
        page_bytes: size of a page: keys and values of all layers.
        page_size: tokens per page.
        num_pages: pages of the cache.
        state_bytes: size of the recurrent states of `max_running` sequences.
        free_bytes: free memory when the plan was computed.
        reason: what determined the number of pages.
        workspace_bytes: activations of the longest forward pass, and its logits.
        process_bytes: the interpreter, torch and what they load; 0 if it was not measured.
        on_demand: whether memory is taken page by page as tokens are stored, as on a CPU; a GPU
            allocates all pages before the first request.
    """

    weight_bytes: int
    page_bytes: int
    page_size: int
    num_pages: int
    state_bytes: int
    free_bytes: int
    reason: str
    on_demand: bool = True
    workspace_bytes: int = 0
    process_bytes: int = 0

    @property
    def cache_bytes(self) -> int:
        """Size of all pages and recurrent states."""
        return self.num_pages * self.page_bytes + self.state_bytes

    @property
    def num_tokens(self) -> int:
        """Number of tokens that fit into the cache."""
        return self.num_pages * self.page_size

    @property
    def predicted_peak_bytes(self) -> int:
        """Memory of the whole process once every page of the cache has been written."""
        return self.process_bytes + self.weight_bytes + self.cache_bytes + self.workspace_bytes

    def line(self) -> str:
        """Returns a human-readable summary of the plan in one line."""
        upper, filled = ("up to ", ", taken as it fills") if self.on_demand else ("", ", reserved")
        return (
            f"memory: weights {self.weight_bytes / GB:.2f} GB, KV cache {upper}"
            f"{self.cache_bytes / GB:.2f} GB ({self.num_tokens:,} tokens: {self.reason}){filled}; "
            f"at most {self.predicted_peak_bytes / GB:.2f} GB in all; "
            f"{self.free_bytes / GB:.1f} GB free"
        )


def plan_memory(
    config: ModelConfig,
    options: EngineConfig,
    *,
    weight_bytes: int,
    itemsize: float,
    free_bytes: int,
    dtype_bytes: int = 4,
    own_bytes: int = 0,
    on_demand: bool = True,
) -> MemoryPlan:
    """Computes the size of the cache from the options and the free memory.

    Args:
        config: model configuration.
        options: engine options.
        weight_bytes: size of the model's weights, which are already loaded.
        itemsize: bytes per element of keys and values.
        free_bytes: memory that is free after loading the weights.
        dtype_bytes: bytes per element of activations.
        own_bytes: memory of the process without the weights.
        on_demand: whether the device takes memory only as pages are written.

    Raises:
        ConfigError: the cache does not fit into the free memory.
    """
    size = options.page_size
    one = cache_size(config, context=1, itemsize=itemsize)
    page_bytes, state_bytes = one.bytes_per_token * size, one.state_bytes * options.max_running
    pages_of_one = -(-config.max_seq_len // size)
    if (rolling := rolling_window(config)) is not None:
        rolls = -(-(rolling.window - 1 + options.max_step_tokens) // size) + 1
        pages_of_one = min(pages_of_one, rolls + -(-rolling.num_sinks // size))
    available = free_bytes - state_bytes
    num_pages, reason = _wanted_pages(options, pages_of_one, page_bytes, available)
    if not page_bytes:  # only linear attention: pages only count tokens, they store nothing
        num_pages = min(num_pages, options.max_running * pages_of_one)
    needed = max(num_pages, 1) * page_bytes
    if needed > available or num_pages < 1:
        raise ConfigError(
            f"the cache needs {max(needed, page_bytes) / GB:.2f} GB, but only "
            f"{max(available, 0) / GB:.2f} GB are free next to the weights "
            f"({(needed - available) / GB:.2f} GB short); lower cache_gb, num_pages or "
            "max_running, or set cache_dtype to bfloat16"
            if needed > available
            else f"cache_gb={options.cache_gb} is less than one page of {size} tokens "
            f"({page_bytes / GB:.4f} GB); raise it"
        )
    return MemoryPlan(
        weight_bytes=weight_bytes,
        page_bytes=page_bytes,
        page_size=size,
        num_pages=num_pages,
        state_bytes=state_bytes,
        free_bytes=free_bytes,
        reason=reason,
        on_demand=on_demand,
        process_bytes=own_bytes,
        workspace_bytes=estimate_inference(
            config,
            context=1,
            sequences=options.max_running,
            prompt=min(options.max_step_tokens, config.max_seq_len * options.max_running),
            itemsize=dtype_bytes,
        ).workspace,
    )


def _wanted_pages(
    options: EngineConfig, pages_of_one: int, page_bytes: int, available: int
) -> tuple[int, str]:
    """Returns the number of pages that the options request, and what determined it.

    Args:
        options: engine options.
        pages_of_one: pages of one sequence of the model's context.
        page_bytes: size of a page; 0 if pages store nothing.
        available: memory in bytes that is free for the pages.
    """
    if options.num_pages is not None:
        return options.num_pages, f"num_pages={options.num_pages}"
    if options.cache_gb is not None:
        pages = int(options.cache_gb * GB) // max(page_bytes, 1)
        return pages, f"cache_gb={options.cache_gb:g}"
    wanted = options.max_running * pages_of_one
    reason = _sequences(options.max_running, pages_of_one * options.page_size)
    share = int(DEFAULT_SHARE * available) // page_bytes if page_bytes else wanted
    if share >= wanted:
        return wanted, reason
    gigabytes = wanted * page_bytes / GB
    return share, f"{DEFAULT_SHARE:.0%} of free memory; {reason} would need {gigabytes:.1f} GB"


def _sequences(count: int, tokens: int) -> str:
    """Returns a description of a number of sequences of a length in tokens."""
    return f"{count:,} {'sequence' if count == 1 else 'sequences'} of {tokens:,}"


def check_weights_fit(
    size: Callable[[torch.dtype, str | None], int],
    dtype: torch.dtype,
    free_bytes: int,
    *,
    quantize: str | None = None,
    schemes: Sequence[str] = (),
) -> None:
    """Refuses a model whose weights alone do not fit into the free memory.

    Args:
        size: (dtype, format or None) → size of the weights in bytes.
        dtype: dtype of the weights that are not quantized.
        free_bytes: free memory.
        quantize: weight format to load into; None for no quantization.
        schemes: formats that the weights could also be loaded into.

    Raises:
        ConfigError: the weights do not fit; the message contains how much memory is missing, and a
            format that would fit if there is one.
    """
    needed = size(dtype, quantize)
    if needed <= free_bytes:
        return
    asked = str(dtype).removeprefix("torch.") if quantize is None else quantize
    formats: dict[str, tuple[torch.dtype, str | None]] = {
        "set dtype to bfloat16": (torch.bfloat16, None),
        **{f"set quantize to {name}": (dtype, name) for name in schemes},
    }
    fitting = (what for what, how in formats.items() if size(*how) <= free_bytes)
    remedy = next(fitting, "use a smaller model or a machine with more memory")
    raise ConfigError(
        f"the weights need {needed / GB:.2f} GB as {asked}, but only {free_bytes / GB:.2f} GB are "
        f"free ({(needed - free_bytes) / GB:.2f} GB short); {remedy}"
    )


def tensor_bytes(tensors: Iterable[torch.Tensor]) -> int:
    """Returns the total size of the tensors in bytes."""
    return sum(tensor.nbytes for tensor in tensors)
