"""Parameter-efficient fine-tuning (PEFT): small trainable additions to a frozen model."""

from easyllm.adapters.adapter import Adapter, AdapterConfig, FileModule
from easyllm.adapters.adapter_set import AdapterSet, StepInfo
from easyllm.adapters.attach import adapter_of, adapter_parameters, attach, detach, merge
from easyllm.adapters.bank import AdapterBank
from easyllm.adapters.lora import LoRA, LoRAConfig
from easyllm.adapters.peft_format import AdapterFile, load_adapter, read_adapter, save_adapter
from easyllm.adapters.prefix import PrefixTuningConfig
from easyllm.adapters.prompt import PromptTuningConfig
from easyllm.adapters.ptuning import PTuningConfig
from easyllm.adapters.registry import ADAPTERS, register_adapter, unregister_adapter

__all__ = [
    "ADAPTERS",
    "Adapter",
    "AdapterBank",
    "AdapterConfig",
    "AdapterFile",
    "AdapterSet",
    "FileModule",
    "LoRA",
    "LoRAConfig",
    "PTuningConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "StepInfo",
    "adapter_of",
    "adapter_parameters",
    "attach",
    "detach",
    "load_adapter",
    "merge",
    "read_adapter",
    "register_adapter",
    "save_adapter",
    "unregister_adapter",
]
