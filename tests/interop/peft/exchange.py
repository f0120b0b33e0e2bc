"""Adapters exchanged with peft in both directions, on tiny random models."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from figures import Figures
from peft import (
    AdaLoraConfig,
    IA3Config,
    LoKrConfig,
    LoraConfig,
    MissConfig,
    OFTConfig,
    PeftModel,
    VeraConfig,
    get_peft_model,
)
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from easyllm.adapters import AdaLoRA, AdapterConfig, AdapterSet, attach, save_adapter
from easyllm.models import hf_module_name, load_model, to_classifier

BOUND = 1e-5
IDS = torch.arange(5, 45)
BASE = {
    "vocab_size": 320,
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "initializer_range": 0.1,
    "tie_word_embeddings": False,
}
GPT2 = {"vocab_size": 320, "n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 128}
GPT2 |= {"pad_token_id": 0, "initializer_range": 0.1}
TIED = {"tie_word_embeddings": True}
MOE = {"moe_intermediate_size": 24, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 12}
"""Settings of a Qwen3-MoE."""


@dataclass(frozen=True, kw_only=True)
class Case:
    """An adapter created by peft, and its base model.

    Attributes:
        method: the configuration class of peft.
        adapter: its settings, in addition to `DEFAULTS`.
        pruned: whether AdaLoRA's triplets are pruned, those of the first module all of them.
    """

    method: type[Any] = LoraConfig
    adapter: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    labels: int = 0
    adapter_dtype: torch.dtype = torch.float32
    base_dtype: torch.dtype = torch.float32
    pruned: bool = False


TARGETS = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
DEFAULTS: dict[type[Any], dict[str, Any]] = {
    LoraConfig: {"r": 4, "lora_alpha": 9, **TARGETS},
    AdaLoraConfig: {"init_r": 6, "target_r": 2, "lora_alpha": 9, "total_step": 10, **TARGETS},
    IA3Config: {"feedforward_modules": ["down_proj"], **TARGETS},
    VeraConfig: {"r": 8, **TARGETS},
    OFTConfig: {"oft_block_size": 8, **TARGETS},
    MissConfig: {"r": 8, **TARGETS},
    LoKrConfig: {"r": 3, "alpha": 5, **TARGETS},
}


# ---- from peft


def from_peft(figures: Figures, name: str, case: Case, folder: Path) -> None:
    """Compares peft's logits with those of its adapter read here, and the adapter's effect."""
    base, expected = make_with_peft(case, folder)
    got = logits(opener(folder)(), case)
    figures.at_most(name, difference(got, expected), BOUND)
    if float((base - expected).abs().max()) < 100 * BOUND:
        raise ValueError("the adapter changes nothing, so the figure says nothing")


def make_with_peft(case: Case, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Returns logits without and with an adapter; writes its and the base's files to `folder`."""
    torch.manual_seed(0)
    model = base_model(case)
    randomise_norms(model)
    model.to(case.base_dtype).save_pretrained(folder / "base")
    model = reopened(case, folder)
    before = reference_logits(model, case)
    adapted = get_peft_model(model, case.method(**DEFAULTS[case.method] | case.adapter))
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name or parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
                parameter.copy_(parameter.to(case.adapter_dtype).float())
    if case.pruned:
        prune_with_peft(adapted)
    adapted.eval()
    adapted.save_pretrained(folder / "adapter")
    if case.adapter_dtype != torch.float32:
        path = folder / "adapter" / "adapter_model.safetensors"
        tensors = {n: t.to(case.adapter_dtype) for n, t in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return before, reference_logits(adapted, case)


@torch.no_grad()
def prune_with_peft(adapted: Any) -> None:
    """Prunes random triplets of an AdaLoRA as peft does, and all of the first module."""
    found: dict[str, list[bool]] = {}
    for name, parameter in adapted.base_model.model.named_parameters():
        if "lora_E" in name:
            kept = torch.rand(len(parameter)) < (0.5 if found else 0.0)
            parameter[~kept] = 0.0
            found[name] = kept.tolist()
    adapted.peft_config["default"].rank_pattern = found


def refuse(figures: Figures, name: str, keys: dict[str, Any], word: str, folder: Path) -> None:
    make_with_peft(Case(adapter=keys), folder)
    figures.refused(name, opener(folder), names=word)


def invent(figures: Figures, name: str, keys: dict[str, Any], word: str, folder: Path) -> None:
    make_with_peft(Case(), folder)
    path = folder / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | keys))
    figures.refused(name, opener(folder), names=word)


def opener(folder: Path) -> Any:
    """Returns a function that loads the base and the adapter in a folder."""
    return lambda: load_model(folder / "base", adapter=folder / "adapter", dtype="float32")


# ---- to peft


def to_peft(figures: Figures, name: str, config: AdapterConfig, case: Case, folder: Path) -> None:
    """Compares the logits of an adapter created here with peft's, and ours, for its files."""
    torch.manual_seed(0)
    made = base_model(case)
    randomise_norms(made)
    made.to(case.base_dtype).save_pretrained(folder / "base")
    model = load_model(folder / "base", dtype="float32")
    if case.labels and model.config.num_labels != case.labels:
        to_classifier(model, case.labels)
    before = logits(model, case)
    adapters = attach(model, config, seed=1)
    with torch.no_grad():
        for parameter in adapters.trained_parameters(model).values():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    if case.pruned:
        prune(adapters)
    got = logits(model, case)
    where = hf_module_name(model)
    save_adapter(model, folder / "adapter", module_name=where, base=str(folder / "base"))
    reference = PeftModel.from_pretrained(reopened(case, folder), folder / "adapter").eval()
    expected = reference_logits(reference, case)
    figures.at_most(name, difference(got, expected), BOUND)
    if float((before - got).abs().max()) < 100 * BOUND:
        raise ValueError("the adapter changes nothing, so the figure says nothing")
    again = logits(opener(folder)(), case)
    figures.at_most(f"{name}, read again here", difference(got, again), BOUND)


@torch.no_grad()
def prune(adapters: AdapterSet) -> None:
    """Prunes random triplets of an AdaLoRA, and all of the first linear."""
    for number, (_, adapter) in enumerate(adapters.linears.values()):
        assert isinstance(adapter, AdaLoRA)
        adapter.keeps.copy_(torch.rand(len(adapter.keeps)) < (0.5 if number else 0.0))
        adapter.lora_E[~adapter.keeps] = 0.0


# ---- both


def difference(got: torch.Tensor, expected: torch.Tensor) -> float:
    """Returns the largest difference, relative to the largest logit if that is more than 1."""
    return float((got - expected).abs().max()) / max(1.0, float(expected.abs().max()))


def base_model(case: Case) -> Any:
    values = (GPT2 if case.family == "gpt2" else BASE) | case.base
    if not case.labels:
        config = AutoConfig.for_model(case.family, **values)
        return AutoModelForCausalLM.from_config(config).eval()
    config = AutoConfig.for_model(case.family, **values, num_labels=case.labels)
    return AutoModelForSequenceClassification.from_config(config).eval()


def reopened(case: Case, folder: Path) -> Any:
    """Returns the base model in a folder, in fp32."""
    kind = AutoModelForSequenceClassification if case.labels else AutoModelForCausalLM
    return kind.from_pretrained(folder / "base", dtype=torch.float32).eval()


@torch.no_grad()
def randomise_norms(model: Any) -> None:
    """Randomises norm weights, so that exchanged norms are detected."""
    for name, parameter in model.named_parameters():
        if "norm" in name or name.endswith("bias"):
            parameter.uniform_(0.5, 1.5)


@torch.no_grad()
def reference_logits(model: Any, case: Case) -> torch.Tensor:
    """Returns logits [T, V], or [labels] of the last token."""
    out: torch.Tensor = model(input_ids=IDS[None]).logits[0]
    return out.float()


def logits(model: Any, case: Case) -> torch.Tensor:
    """Returns the same for a model of this project."""
    out: torch.Tensor = model.logits(IDS)
    return (out[-1] if case.labels else out).float()
