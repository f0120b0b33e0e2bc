"""Loading the model of an `LLM`: all files and options are checked before any weights are read."""

from pathlib import Path

from easyllm.core.device import memory_free_bytes, parse_dtype, pick_device
from easyllm.engine.admission import check_generates
from easyllm.engine.kv_cache import cache_format
from easyllm.engine.memory_plan import check_weights_fit
from easyllm.engine.options import NGRAM, LLMOptions
from easyllm.models.adapted import apply_adapter, open_adapted, split_adapter
from easyllm.models.context import ContextConfig
from easyllm.models.load import OpenSource, open_source
from easyllm.nn.decoder import Decoder
from easyllm.quant import schemes


def check_generator(source: str | Path) -> None:
    """Checks, before anything is loaded, that there is a model that generates text.

    Args:
        source: a model, or the folder of an adapter.

    Raises:
        SourceError, CheckpointError: there is no such model, or a file of it is damaged.
        ConfigError: the model generates no text.
    """
    check_generates(open_source(split_adapter(source)[0]).config)


def load_generator(
    source: str | Path,
    options: LLMOptions,
    *,
    adapter: str | Path | None = None,
    context: ContextConfig | None = None,
) -> tuple[Decoder, OpenSource]:
    """Loads a model that generates text, or an adapter with its base.

    Args:
        source: the model, or the folder of an adapter.
        options: dtype, device and quantization of the weights.
        adapter: the folder of an adapter to use with the model `source`.
        context: context extension beyond the length the model was trained on.

    Returns:
        The model, and its source or that of its base.

    Raises:
        SourceError, CheckpointError: as for `load_model`; or the draft model does not exist.
        ConfigError: an option is wrong, the model generates no text, or does not fit into memory.
    """
    on = pick_device(options.device or "auto")
    wanted = options.dtype or ("float32" if on.type == "cpu" else "bfloat16")
    weights = parse_dtype(wanted)
    cache_format(options.cache_dtype, weights)
    base, file = open_adapted(source, adapter)
    opened = open_source(base, context=context)
    check_generates(opened.config)
    if options.draft is not None and options.draft != NGRAM:
        check_generator(options.draft)
    check_weights_fit(
        opened.weight_bytes,
        weights,
        memory_free_bytes(on),
        quantize=options.quantize,
        schemes=schemes() if opened.packed is None else (),
    )
    model = opened.model(weights, on, quantize=options.quantize, weight_cache=options.weight_cache)
    if file is not None:
        check_generates(apply_adapter(model, file).config)
    return model, opened


__all__ = ["check_generator", "load_generator"]
