"""Prompt-learning adapters on the tiny model, with values as after training."""

import torch

from easyllm.adapters import (
    PrefixTuningConfig,
    PromptTuningConfig,
    PTuningConfig,
    attach,
    load_adapter,
    save_adapter,
)
from easyllm.models import hf_module_name

CONFIGS = {
    "prompt": PromptTuningConfig(num_virtual_tokens=5),
    "ptuning mlp": PTuningConfig(num_virtual_tokens=5, encoder_hidden_size=24),
    "ptuning lstm": PTuningConfig(num_virtual_tokens=5, encoder="lstm", encoder_hidden_size=8),
    "prefix": PrefixTuningConfig(num_virtual_tokens=5),
    "prefix mlp": PrefixTuningConfig(num_virtual_tokens=5, projection=True, encoder_hidden_size=24),
}
"""One configuration of each method and encoder."""


def adapted(model, config, seed=3):
    """Attaches an adapter to a model and moves all of its parameters; returns the model."""
    adapters = attach(model, config, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapters.trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model


def save(model, folder):
    """Saves the adapter of a model; returns the folder."""
    return save_adapter(model, folder, module_name=hf_module_name(model), base="tiny")


def load(model, folder):
    """Attaches the adapter in a folder to a model; returns the model."""
    load_adapter(model, folder, module_name=hf_module_name(model))
    return model
