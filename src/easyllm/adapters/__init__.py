"""Small trained additions to a frozen model."""

from easyllm.adapters.attach import adapter_parameters, attach, detach, merge
from easyllm.adapters.lora import LoRA, LoRAConfig
from easyllm.adapters.peft_format import load_adapter, save_adapter

__all__ = [
    "LoRA",
    "LoRAConfig",
    "adapter_parameters",
    "attach",
    "detach",
    "load_adapter",
    "merge",
    "save_adapter",
]
