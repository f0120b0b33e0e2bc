"""Adapters of every method with random values, as after training."""

from adapter_kinds import shake
from easyllm.adapters import (
    AdaLoRAConfig,
    DoRAConfig,
    IA3Config,
    LoKrConfig,
    LoRAConfig,
    MiSSConfig,
    OFTConfig,
    PiSSAConfig,
    VeRAConfig,
    adapter_of,
    attach,
)

METHODS = {
    "lora": LoRAConfig(rank=4, alpha=6),
    "rslora": LoRAConfig(rank=3, alpha=5, rslora=True, rank_pattern={"q_proj": 2}),
    "pissa": PiSSAConfig(rank=2),
    "adalora": AdaLoRAConfig(init_rank=4, rank=2),
    "dora": DoRAConfig(rank=3),
    "ia3": IA3Config(),
    "vera": VeRAConfig(rank=4, start=0.5),
    "miss": MiSSConfig(rank=7),
    "oft": OFTConfig(block_size=8),
    "lokr": LoKrConfig(rank=2),
}
ADDITIVE = ("lora", "rslora", "pissa", "adalora", "vera", "miss", "lokr")
"""Those that add an update to any weight."""


def train(adapters, model, seed=0, std=0.1):
    """Changes every trained parameter of an adapter a little, as training would."""
    shake(model, adapters, std, seed=seed)
    return adapters


def attached(model, config, seed=0, **options):
    """Attaches an adapter to a model and returns the model."""
    train(attach(model, config, seed=seed, **options), model, seed=seed)
    return model.requires_grad_(False)


def as_named(model, folder, config, name, seed=0):
    """Attaches an adapter by name, through a file as an engine does."""
    from easyllm.adapters import detach, save_adapter
    from easyllm.models import add_adapter, hf_module_name
    from tiny_models import build_tiny

    other = attached(build_tiny(), config, seed=seed)
    save_adapter(other, folder, module_name=hf_module_name(other), base="tiny")
    detach(other)
    add_adapter(model, folder, name=name)
    return adapter_of(model, name)
