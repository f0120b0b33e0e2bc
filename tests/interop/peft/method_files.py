"""Adapters other than plain LoRA: DoRA, PiSSA, AdaLoRA, IA3, embeddings, biases, token rows."""

from pathlib import Path
from typing import Any

from exchange import GPT2, TIED, Case, from_peft, to_peft
from figures import Figures
from peft import AdaLoraConfig, IA3Config, LoKrConfig, MissConfig, OFTConfig, VeraConfig

import easyllm.adapters as ours
from easyllm.adapters import AdaLoRAConfig, AdapterConfig, DoRAConfig, LoRAConfig, PiSSAConfig
from easyllm.adapters import IA3Config as OurIA3Config

BIASES = {"attention_bias": True, "mlp_bias": True}
UNTIED_GPT2 = {"tie_word_embeddings": False}
assert "tie_word_embeddings" not in GPT2  # GPT-2 is tied by default

GPT2_MODULES = {"target_modules": ["c_fc", "c_proj"]}
GPT2_IA3 = {"target_modules": ["c_fc", "mlp.c_proj"], "feedforward_modules": ["mlp.c_proj"]}


def dora(**keys: Any) -> dict[str, Any]:
    return {"use_dora": True, **keys}


def ada(*, pruned: bool = False, **keys: Any) -> Case:
    base, family = keys.pop("base", {}), keys.pop("family", "llama")
    return Case(method=AdaLoraConfig, adapter=keys, base=base, family=family, pruned=pruned)


def ia3(**keys: Any) -> Case:
    base, family = keys.pop("base", {}), keys.pop("family", "llama")
    return Case(method=IA3Config, adapter=keys, base=base, family=family)


def of(method: type, **keys: Any) -> Case:
    """A case of another method than LoRA."""
    base, family = keys.pop("base", {}), keys.pop("family", "llama")
    return Case(method=method, adapter=keys, base=base, family=family)


EMBEDDING = {"target_modules": ["embed_tokens", "q_proj"]}

FROM_PEFT = {
    "DoRA": Case(adapter=dora()),
    "DoRA, all-linear": Case(adapter=dora(target_modules="all-linear")),
    "DoRA, rsLoRA, ranks by pattern": Case(
        adapter=dora(use_rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3})
    ),
    "DoRA, dropout": Case(adapter=dora(lora_dropout=0.2)),
    "DoRA, biases": Case(adapter=dora(target_modules="all-linear"), base=BIASES),
    "DoRA, lm_head": Case(adapter=dora(target_modules=["lm_head", "q_proj"])),
    "DoRA, Qwen2": Case(adapter=dora(), family="qwen2"),
    "DoRA, GPT-2": Case(adapter=dora(**GPT2_MODULES), family="gpt2"),
    "IA3": ia3(),
    "IA3, biases": ia3(base=BIASES, target_modules=["k_proj", "v_proj", "up_proj", "down_proj"]),
    "IA3, no feed-forward modules": ia3(feedforward_modules=[], target_modules=["k_proj"]),
    "IA3, Qwen2": ia3(family="qwen2"),
    "IA3, GPT-2": ia3(family="gpt2", **GPT2_IA3),
    "AdaLoRA": ada(),
    "AdaLoRA, pruned": ada(pruned=True),
    "AdaLoRA, pruned, all-linear": ada(pruned=True, target_modules="all-linear"),
    "AdaLoRA, dropout": ada(lora_dropout=0.2),
    "AdaLoRA, pruned, Qwen2": ada(pruned=True, family="qwen2"),
    "AdaLoRA, pruned, GPT-2": ada(pruned=True, family="gpt2", **GPT2_MODULES),
    "embedding": Case(adapter=EMBEDDING),
    "embedding, tied": Case(adapter=EMBEDDING, base=TIED),
    "embedding, rank by pattern": Case(adapter=EMBEDDING | {"rank_pattern": {"embed_tokens": 2}}),
    "embedding, GPT-2": Case(adapter={"target_modules": ["wte", "c_fc"]}, family="gpt2"),
    "bias all": Case(adapter={"bias": "all"}, base=BIASES),
    "bias lora_only": Case(adapter={"bias": "lora_only"}, base=BIASES),
    "bias all, Qwen2": Case(adapter={"bias": "all"}, family="qwen2"),
    "bias lora_only, Qwen2": Case(adapter={"bias": "lora_only"}, family="qwen2"),
    "bias lora_only, GPT-2": Case(adapter={"bias": "lora_only", **GPT2_MODULES}, family="gpt2"),
    "token rows": Case(adapter={"trainable_token_indices": [7, 9]}),
    "token rows, not ascending": Case(adapter={"trainable_token_indices": [30, 7, 9]}),
    "token rows, tied": Case(adapter={"trainable_token_indices": [9, 7]}, base=TIED),
    "token rows, by name": Case(adapter={"trainable_token_indices": {"embed_tokens": [7, 40, 9]}}),
    "token rows, by name, tied": Case(
        adapter={"trainable_token_indices": {"embed_tokens": [7, 9]}}, base=TIED
    ),
    "token rows, DoRA": Case(adapter=dora(trainable_token_indices=[7, 9])),
    "token rows, GPT-2": Case(
        adapter={"trainable_token_indices": {"wte": [7, 9]}, **GPT2_MODULES}, family="gpt2"
    ),
    "VeRA": of(VeraConfig),
    "VeRA, all-linear, another seed": of(
        VeraConfig, target_modules="all-linear", projection_prng_key=7, d_initial=0.5
    ),
    "VeRA, projection not saved": of(VeraConfig, save_projection=False),
    "VeRA, Qwen2": of(VeraConfig, family="qwen2"),
    "OFT": of(OFTConfig, oft_block_size=8),
    "OFT, exact inverse": of(OFTConfig, oft_block_size=16, use_cayley_neumann=False),
    "OFT, seven terms": of(OFTConfig, oft_block_size=8, num_cayley_neumann_terms=7),
    "OFT, biases": of(OFTConfig, oft_block_size=8, base=BIASES, target_modules="all-linear"),
    "MiSS": of(MissConfig, r=8),
    "MiSS, rank that divides nothing": of(MissConfig, r=7, target_modules="all-linear"),
    "LoKr": of(LoKrConfig, r=3, alpha=5),
    "LoKr, both decomposed": of(LoKrConfig, r=2, decompose_both=True, decompose_factor=8),
    "LoKr, full matrices": of(LoKrConfig, r=64, target_modules="all-linear"),
    "a linear as a parameter": Case(adapter={"target_parameters": ["mlp.up_proj.weight"]}),
}

OURS: dict[str, Any] = {"rank": 4, "alpha": 9}
ADA: dict[str, Any] = {"init_rank": 6, "rank": 2, "alpha": 9}
GPT2_OURS: dict[str, Any] = {"targets": ("mixer.o_proj", "up_proj", "down_proj")}
TO_PEFT: dict[str, tuple[AdapterConfig, Case]] = {
    "DoRA": (DoRAConfig(**OURS), Case()),
    "DoRA, patterns": (
        DoRAConfig(**OURS, rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
        Case(),
    ),
    "DoRA, biases": (DoRAConfig(**OURS, bias="all"), Case(base=BIASES)),
    "DoRA, GPT-2": (DoRAConfig(**OURS, **GPT2_OURS), Case(family="gpt2")),
    "PiSSA": (PiSSAConfig(**OURS), Case()),
    "PiSSA, rsLoRA, patterns": (
        PiSSAConfig(**OURS, rslora=True, rank_pattern={"q_proj": 2}, alpha_pattern={"v_proj": 3}),
        Case(),
    ),
    "PiSSA, exact, Qwen2": (PiSSAConfig(**OURS, iterations=None), Case(family="qwen2")),
    "AdaLoRA": (AdaLoRAConfig(**ADA), Case()),
    "AdaLoRA, pruned": (AdaLoRAConfig(**ADA), Case(pruned=True)),
    "AdaLoRA, pruned, long schedule": (
        AdaLoRAConfig(**ADA, warmup_steps=30, final_steps=50),
        Case(pruned=True),
    ),
    "AdaLoRA, pruned, GPT-2": (AdaLoRAConfig(**ADA, **GPT2_OURS), Case(family="gpt2", pruned=True)),
    "IA3": (OurIA3Config(), Case()),
    "IA3, biases": (OurIA3Config(targets=("k_proj", "up_proj", "down_proj")), Case(base=BIASES)),
    "IA3, GPT-2": (OurIA3Config(**GPT2_OURS), Case(family="gpt2")),
    "VeRA": (ours.VeRAConfig(rank=8, start=0.5), of(VeraConfig)),
    "VeRA, projection not saved": (
        ours.VeRAConfig(rank=8, start=0.5, save_projection=False),
        of(VeraConfig),
    ),
    "OFT": (ours.OFTConfig(block_size=8), of(OFTConfig)),
    "OFT, exact inverse": (ours.OFTConfig(block_size=16, neumann_terms=None), of(OFTConfig)),
    "MiSS": (ours.MiSSConfig(rank=7), of(MissConfig)),
    "LoKr": (ours.LoKrConfig(rank=3, alpha=5), of(LoKrConfig)),
    "LoKr, both decomposed": (
        ours.LoKrConfig(rank=2, decompose_both=True, factor=8),
        of(LoKrConfig),
    ),
    "LoRA-FA": (ours.LoRAFAConfig(**OURS), Case()),
    "embedding": (LoRAConfig(**OURS, targets=("embed_tokens", "q_proj")), Case()),
    "embedding, tied": (LoRAConfig(**OURS, targets=("embed_tokens", "q_proj")), Case(base=TIED)),
    "embedding, rank by pattern": (
        LoRAConfig(**OURS, targets=("embed_tokens", "q_proj"), rank_pattern={"embed_tokens": 2}),
        Case(base=TIED),
    ),
    "bias all": (LoRAConfig(**OURS, bias="all"), Case(base=BIASES)),
    "bias all of linears that are not adapted": (
        LoRAConfig(**OURS, targets=("q_proj",), bias="all"),
        Case(base=BIASES),
    ),
    "bias adapted": (LoRAConfig(**OURS, targets=("q_proj",), bias="adapted"), Case(base=BIASES)),
    "bias adapted, Qwen2": (LoRAConfig(**OURS, bias="adapted"), Case(family="qwen2")),
    "token rows": (LoRAConfig(**OURS, trained_tokens=(30, 7, 9)), Case()),
    "token rows, tied": (LoRAConfig(**OURS, trained_tokens=(7, 9)), Case(base=TIED)),
    "token rows, PiSSA": (PiSSAConfig(**OURS, trained_tokens=(7, 9)), Case()),
    "token rows, GPT-2": (
        LoRAConfig(**OURS, **GPT2_OURS, trained_tokens=(7, 9)),
        Case(family="gpt2"),
    ),
}


def compare(figures: Figures, work: Path) -> None:
    """Prints the figures of all adapters."""
    print("other methods from peft to here: largest difference of logits")
    for name, case in FROM_PEFT.items():
        figures.run(name, lambda n=name, c=case: from_peft(figures, n, c, work / n))
    print("other methods from here to peft: largest difference of logits")
    for name, (config, case) in TO_PEFT.items():
        to = work / f"ours {name}"
        figures.run(name, lambda n=name, o=config, c=case, t=to: to_peft(figures, n, o, c, t))
