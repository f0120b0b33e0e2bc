"""Every adapter method with tiny settings, and a tiny model with one attached."""

import torch

from easyllm.adapters import ADAPTERS, attach
from tiny_models import build_tiny

SETTINGS = {
    "lora": {"kind": "lora", "rank": 2, "alpha": 4},
    "lora, rsLoRA, patterns": {
        "kind": "lora",
        "rank": 2,
        "rslora": True,
        "rate_ratio": 4,
        "rank_pattern": {"layers.[0]*.q_proj": 3},
        "alpha_pattern": {"down_proj": 5},
    },
    "lora, embedding": {"kind": "lora", "rank": 2, "targets": ["q_proj", "embed_tokens"]},
    "lora, token rows": {"kind": "lora", "rank": 2, "trained_tokens": [40, 5, 9]},
    "lora, all biases": {"kind": "lora", "rank": 2, "targets": ["q_proj"], "bias": "all"},
    "lora, adapted biases": {"kind": "lora", "rank": 2, "targets": ["q_proj"], "bias": "adapted"},
    "dora": {"kind": "dora", "rank": 2, "alpha": 4},
    "pissa": {"kind": "pissa", "rank": 2, "alpha": 4},
    "adalora": {"kind": "adalora", "init_rank": 4, "rank": 2, "alpha": 4},
    "ia3": {"kind": "ia3"},
    "vera": {"kind": "vera", "rank": 4, "start": 0.5},
    "oft": {"kind": "oft", "block_size": 8},
    "oft, exact": {"kind": "oft", "block_size": 16, "neumann_terms": None},
    "miss": {"kind": "miss", "rank": 7},
    "lokr": {"kind": "lokr", "rank": 2, "alpha": 4},
    "lokr, both, full": {"kind": "lokr", "rank": 1, "factor": 8, "decompose_both": True},
    "lora_fa": {"kind": "lora_fa", "rank": 2, "alpha": 4},
    "bitfit": {"kind": "bitfit", "parameters": ["*norm*", "*.bias"]},
}
BIASES = {"attention_bias": True, "mlp_bias": True}
"""The models have biases, so that no method can forget them."""


def config_of(kind):
    """Returns the configuration of one of the methods above."""
    return ADAPTERS.validate(SETTINGS[kind])


def model_with(config, *, trained=0.1, seed=0, **changes):
    """Returns a tiny model with biases and a new adapter, and the adapter.

    Args:
        config: the configuration, or the name of one.
        trained: standard deviation of what is added to the trained parameters.
    """
    model = build_tiny(**{**BIASES, **changes})
    adapters = attach(model, config_of(config) if isinstance(config, str) else config, seed=seed)
    shake(model, adapters, trained)
    return model, adapters


@torch.no_grad()
def shake(model, adapters, std, seed=3):
    """Adds random numbers to the trained parameters, as training would change them."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in adapters.trained_parameters(model).values():
        parameter.add_(torch.randn(parameter.shape, generator=generator) * std)
