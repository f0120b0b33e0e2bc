"""Parameter-efficient fine-tuning (PEFT): small trainable additions to a frozen model."""

from easyllm.adapters.adalora import AdaLoRA, AdaLoRAConfig
from easyllm.adapters.adapter import Adapter, AdapterConfig
from easyllm.adapters.adapter_set import AdapterSet, StepInfo
from easyllm.adapters.attach import adapter_of, adapter_parameters, attach, detach
from easyllm.adapters.bank import AdapterBank
from easyllm.adapters.bitfit import BitFitConfig
from easyllm.adapters.combining import Combined, combine
from easyllm.adapters.dora import DoRA, DoRAConfig
from easyllm.adapters.file_module import FileModule
from easyllm.adapters.ia3 import IA3, IA3Config
from easyllm.adapters.lokr import LoKr, LoKrConfig
from easyllm.adapters.lora import LoRA, LoRAConfig
from easyllm.adapters.lora_fa import LoRAFA, LoRAFAConfig
from easyllm.adapters.merging import check_mergeable, merge, unmerge
from easyllm.adapters.miss import MiSS, MiSSConfig
from easyllm.adapters.oft import OFT, OFTConfig
from easyllm.adapters.peft_format import AdapterFile, load_adapter, read_adapter, save_adapter
from easyllm.adapters.pissa import PiSSA, PiSSAConfig
from easyllm.adapters.prefix import PrefixTuningConfig
from easyllm.adapters.prompt import PromptTuningConfig
from easyllm.adapters.ptuning import PTuningConfig
from easyllm.adapters.registry import ADAPTERS, register_adapter, unregister_adapter
from easyllm.adapters.to_lora import Conversion, to_lora
from easyllm.adapters.vera import VeRA, VeRAConfig

__all__ = [
    "ADAPTERS",
    "IA3",
    "OFT",
    "AdaLoRA",
    "AdaLoRAConfig",
    "Adapter",
    "AdapterBank",
    "AdapterConfig",
    "AdapterFile",
    "AdapterSet",
    "BitFitConfig",
    "Combined",
    "Conversion",
    "DoRA",
    "DoRAConfig",
    "FileModule",
    "IA3Config",
    "LoKr",
    "LoKrConfig",
    "LoRA",
    "LoRAConfig",
    "LoRAFA",
    "LoRAFAConfig",
    "MiSS",
    "MiSSConfig",
    "OFTConfig",
    "PTuningConfig",
    "PiSSA",
    "PiSSAConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "StepInfo",
    "VeRA",
    "VeRAConfig",
    "adapter_of",
    "adapter_parameters",
    "attach",
    "check_mergeable",
    "combine",
    "detach",
    "load_adapter",
    "merge",
    "read_adapter",
    "register_adapter",
    "save_adapter",
    "to_lora",
    "unmerge",
    "unregister_adapter",
]
