"""Parameters, gradients and configurations for optimizer tests."""

import torch
from torch import nn

from easyllm.train.optim_config import AdamWConfig

ADAMW = AdamWConfig(learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1)


INT8 = AdamWConfig(learning_rate=1e-2, betas=(0.9, 0.95), weight_decay=0.1, state="int8")


SHAPES = {
    "embed_tokens.weight": (100, 48),
    "layers.0.mixer.q_proj.weight": (48, 48),
    "layers.0.mixer.q_proj.bias": (48,),
    "layers.0.mixer.position.bias_table": (32, 4),
    "layers.0.feed_forward.up_proj.weight": (96, 48),
    "layers.0.feed_forward.down_proj.weight": (48, 96),
    "norm.weight": (48,),
    "lm_head.weight": (100, 48),
}


def make_parameters(dtype=torch.float32, shapes=None, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: nn.Parameter(torch.randn(shape, generator=generator).to(dtype))
        for name, shape in (shapes or SHAPES).items()
    }


def make_gradients(parameters, seed, size=1.0):
    """Returns gradients that are exact in bf16, so that every dtype sees the same values."""
    generator = torch.Generator().manual_seed(seed)
    return {
        name: (torch.randn(p.shape, generator=generator) * size).bfloat16().float()
        for name, p in parameters.items()
    }


def backward(parameters, gradients):
    """Sets each parameter's gradient the way a micro-batch does."""
    sum((p * gradients[name].to(p.dtype)).sum() for name, p in parameters.items()).backward()


def assert_same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert torch.equal(found[name], value), name
