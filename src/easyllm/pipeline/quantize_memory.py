"""Memory that quantizing a model to files needs, estimated before its weights are read."""

import torch

from easyllm.core.device import memory_free_bytes
from easyllm.core.errors import ConfigError
from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import FP32
from easyllm.pipeline.quantize_options import QuantizeOptions
from easyllm.plan.inference import loaded_weight_bytes
from easyllm.plan.linears import model_linears
from easyllm.plan.parts import feed_forward_of, layers_of
from easyllm.plan.process import process_bytes


def quantize_bytes(config: ModelConfig, options: QuantizeOptions) -> dict[str, int]:
    """Returns the bytes of each component of the peak.

    The model is in fp32. Calibration holds the hidden states of all samples before and after a
    layer, and the second moments of the inputs of its linears; the file is written from a copy in
    half precision.
    """
    found = {"process": process_bytes(), "weights": loaded_weight_bytes(config, FP32)}
    if options.needs_text:
        tokens = options.samples * min(options.length, config.max_seq_len)
        moments = max((x.in_features for x in model_linears(config)), default=0) ** 2
        widest = max(feed_forward_of(x).inner_elements(options.length) for x in layers_of(config))
        states = 2 * tokens * config.hidden_size
        found["calibration"] = (states + 2 * moments + widest) * FP32
    found["result"] = loaded_weight_bytes(config, 2)
    return found


def check_memory(config: ModelConfig, options: QuantizeOptions) -> int:
    """Returns the predicted peak of the process in bytes.

    Raises:
        ConfigError: more memory is needed than is free.
    """
    parts = quantize_bytes(config, options)
    own = parts.pop("process")
    needed, free = sum(parts.values()), memory_free_bytes(torch.device("cpu"))
    if needed > free:
        listed = ", ".join(f"{name} {size / 1e9:.2f} GB" for name, size in parts.items())
        raise ConfigError(
            f"quantizing needs {needed / 1e9:.2f} GB ({listed}), but only {free / 1e9:.2f} GB are "
            "free; lower --samples or --length, or use a machine with more memory"
        )
    return own + needed


__all__ = ["check_memory", "quantize_bytes"]
