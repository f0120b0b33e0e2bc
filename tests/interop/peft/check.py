"""Adapters exchanged with peft in both directions, on tiny random models."""

import json
import sys
import tempfile
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from figures import Figures
from peft import EvaConfig, LoraConfig, PeftModel, get_peft_model
from prompt_methods import compare as compare_prompt_methods
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification
from transformers.utils import logging

from easyllm.adapters import LoRAConfig, attach, save_adapter
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
PATTERNS = {
    "rank_pattern": {r"layers\.1\..*v_proj": 6, "q_proj": 3, r"layers\.0.*\.v_proj": 2},
    "alpha_pattern": {"q_proj": 64, r"model\.layers\.[01]\.mlp\.(up|gate).*": 5, "down_proj": 20},
}
"""Patterns of which no two match the same module: see findings/peft_pattern_order.sh."""
TIED = {"tie_word_embeddings": True}


@dataclass(frozen=True, kw_only=True)
class Case:
    """An adapter created by peft, and its base model."""

    adapter: dict[str, Any] = field(default_factory=dict)
    base: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    labels: int = 0
    adapter_dtype: torch.dtype = torch.float32
    base_dtype: torch.dtype = torch.float32


FROM_PEFT = {
    "plain": Case(),
    "rsLoRA": Case(adapter={"use_rslora": True}),
    "patterns": Case(adapter=PATTERNS | {"target_modules": "all-linear"}),
    "patterns, rsLoRA": Case(
        adapter=PATTERNS | {"target_modules": "all-linear", "use_rslora": True}
    ),
    "targets as a list": Case(adapter={"target_modules": ["k_proj", "up_proj"]}),
    "targets as a regular expression": Case(
        adapter={"target_modules": r".*\.1\.(self_attn|mlp)\.(q|o|gate)_proj"}
    ),
    "targets all-linear": Case(adapter={"target_modules": "all-linear"}),
    "targets in one layer": Case(
        adapter={"target_modules": ["q_proj", "down_proj"], "layers_to_transform": [1]}
    ),
    "targets but for some": Case(
        adapter={"target_modules": "all-linear", "exclude_modules": r".*layers\.0\.mlp.*"}
    ),
    "targets with lm_head": Case(adapter={"target_modules": ["q_proj", "lm_head"]}),
    "21 modules": Case(base={"num_hidden_layers": 3}, adapter={"target_modules": "all-linear"}),
    "adapter in bf16": Case(adapter_dtype=torch.bfloat16),
    "adapter in fp16": Case(adapter_dtype=torch.float16),
    "base in bf16, computed in fp32": Case(base_dtype=torch.bfloat16),
    "tied head": Case(base=TIED, adapter={"target_modules": "all-linear"}),
    "biases in the base": Case(base={"attention_bias": True, "mlp_bias": True}),
    "lora dropout": Case(adapter={"lora_dropout": 0.1}),
    "gaussian start": Case(adapter={"init_lora_weights": "gaussian"}),
    "score": Case(labels=3, adapter={"modules_to_save": ["score"]}),
    "score that peft adds": Case(labels=3, adapter={"task_type": "SEQ_CLS"}),
    "score of one label": Case(labels=1, adapter={"task_type": "SEQ_CLS"}),
    "modules_to_save norm": Case(adapter={"modules_to_save": ["norm"]}),
    "modules_to_save model.norm": Case(adapter={"modules_to_save": ["model.norm"]}),
    "modules_to_save post_attention_layernorm": Case(
        adapter={"modules_to_save": ["post_attention_layernorm"]}
    ),
    "modules_to_save a linear": Case(adapter={"modules_to_save": ["up_proj"]}),
    "modules_to_save embed_tokens, lm_head": Case(
        adapter={"modules_to_save": ["embed_tokens", "lm_head"]}
    ),
    "modules_to_save a whole block's linears": Case(
        adapter={"target_modules": "all-linear", "modules_to_save": ["mlp.down_proj", "o_proj"]}
    ),
    "tied, modules_to_save embed_tokens": Case(
        base=TIED, adapter={"modules_to_save": ["embed_tokens"]}
    ),
    "tied, modules_to_save lm_head": Case(base=TIED, adapter={"modules_to_save": ["lm_head"]}),
    "tied, modules_to_save both": Case(
        base=TIED, adapter={"modules_to_save": ["embed_tokens", "lm_head"]}
    ),
    "tied, ensure_weight_tying": Case(
        base=TIED, adapter={"modules_to_save": ["embed_tokens"], "ensure_weight_tying": True}
    ),
    "tied, targets with lm_head": Case(
        base=TIED, adapter={"target_modules": ["q_proj", "lm_head"]}
    ),
    "GPT-2": Case(family="gpt2", adapter={"target_modules": ["c_fc", "c_proj"]}),
    "GPT-2, modules_to_save attn.c_proj": Case(
        family="gpt2", adapter={"target_modules": ["c_fc"], "modules_to_save": ["attn.c_proj"]}
    ),
    "GPT-2, modules_to_save ln_f, wpe": Case(
        family="gpt2", adapter={"target_modules": ["c_fc"], "modules_to_save": ["ln_f", "wpe"]}
    ),
    "Gemma 2, modules_to_save norm": Case(
        family="gemma2",
        base=TIED | {"head_dim": 12, "query_pre_attn_scalar": 12},
        adapter={"modules_to_save": ["norm"]},
    ),
    "Qwen3, modules_to_save q_norm": Case(
        family="qwen3", base={"head_dim": 12}, adapter={"modules_to_save": ["q_norm"]}
    ),
    "Mixtral, attention": Case(
        family="mixtral",
        base={"num_local_experts": 4},
        adapter={"target_modules": ["q_proj", "o_proj"]},
    ),
    "EVA": Case(adapter={"init_lora_weights": "eva", "eva_config": EvaConfig(rho=1.0)}),
    "orthogonal start": Case(adapter={"init_lora_weights": "orthogonal"}),
}
"""Adapters that must give peft's logits when read here."""

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "DoRA": ({"use_dora": True}, "use_dora"),
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "target_parameters": (
        {"target_parameters": ["mlp.up_proj.weight"]},
        "target_parameters",
    ),
    "trainable_token_indices": (
        {"trainable_token_indices": [7, 9]},
        "trainable_token_indices",
    ),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights"),
    "bias": ({"bias": "all"}, "bias"),
    "layer_replication": ({"layer_replication": [[0, 2], [0, 2]]}, "layer_replication"),
    "aLoRA": ({"alora_invocation_tokens": [3, 4]}, "alora_invocation_tokens"),
}
"""Unsupported files created by peft itself, and the key by which each is refused."""

INVENTED: dict[str, tuple[dict[str, Any], str]] = {
    "an unknown key": ({"lora_temperature": 2.0}, "lora_temperature"),
    "an unknown key, nested": ({"spectral_config": {"rank": 2}}, "spectral_config"),
    "peft_type": ({"peft_type": "NEWTUNE"}, "NEWTUNE"),
}
"""Unsupported keys written into a plain file."""


def main() -> int:
    warnings.filterwarnings("ignore")
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    figures = Figures("torch", "peft", "transformers", "safetensors")
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder)
        print("from peft to here: largest difference of logits")
        for name, case in FROM_PEFT.items():
            figures.run(name, lambda n=name, c=case: from_peft(figures, n, c, work / n))
        print("from peft to here: refused by name")
        for name, (keys, word) in REFUSED.items():
            figures.run(name, lambda n=name, k=keys, w=word: refuse(figures, n, k, w, work / n))
        for name, (keys, word) in INVENTED.items():
            figures.run(name, lambda n=name, k=keys, w=word: invent(figures, n, k, w, work / n))
        print("from here to peft: largest difference of logits")
        for name, (config, case) in TO_PEFT.items():
            to = work / f"ours {name}"
            figures.run(name, lambda n=name, o=config, c=case, t=to: to_peft(figures, n, o, c, t))
        compare_prompt_methods(figures, work / "prompts")
    return figures.end()


# ---- from peft


def from_peft(figures: Figures, name: str, case: Case, folder: Path) -> None:
    """Compares peft's logits with those of its adapter read here, and the adapter's effect."""
    base, expected = make_with_peft(case, folder)
    got = logits(opener(folder)(), case)
    figures.at_most(name, float((got - expected).abs().max()), BOUND)
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
    options = {"r": 4, "lora_alpha": 9, "target_modules": ["q_proj", "v_proj", "down_proj"]}
    adapted = get_peft_model(model, LoraConfig(**options | case.adapter))
    with torch.no_grad():
        for parameter_name, parameter in adapted.named_parameters():
            if "lora_" in parameter_name or parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape) * 0.1)
                parameter.copy_(parameter.to(case.adapter_dtype).float())
    adapted.eval()
    adapted.save_pretrained(folder / "adapter")
    if case.adapter_dtype != torch.float32:
        path = folder / "adapter" / "adapter_model.safetensors"
        tensors = {n: t.to(case.adapter_dtype) for n, t in load_file(path).items()}
        save_file(tensors, path, {"format": "pt"})
    return before, reference_logits(adapted, case)


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

OURS: dict[str, Any] = {"rank": 4, "alpha": 9}
TO_PEFT = {
    "plain": (LoRAConfig(**OURS), Case()),
    "two targets": (LoRAConfig(**OURS, targets=("q_proj", "down_proj")), Case()),
    "one linear": (LoRAConfig(**OURS, targets=("layers.1.mixer.o_proj",)), Case()),
    "rsLoRA": (LoRAConfig(**OURS, rslora=True), Case()),
    "patterns": (
        LoRAConfig(
            **OURS,
            rank_pattern={"q_proj": 3, "layers.1.mixer.v_proj": 6},
            alpha_pattern={"q_proj": 64, "down_proj": 20},
        ),
        Case(),
    ),
    "21 modules": (LoRAConfig(**OURS), Case(base={"num_hidden_layers": 3})),
    "tied head": (LoRAConfig(**OURS), Case(base=TIED)),
    "base in bf16, computed in fp32": (LoRAConfig(**OURS), Case(base_dtype=torch.bfloat16)),
    "score": (LoRAConfig(**OURS, also_trained=("score",)), Case(labels=3)),
    "also_trained norm": (LoRAConfig(**OURS, also_trained=("norm",)), Case()),
    "also_trained embed, lm_head": (
        LoRAConfig(**OURS, also_trained=("embed_tokens", "lm_head")),
        Case(),
    ),
    "also_trained a linear": (
        LoRAConfig(**OURS, targets=("q_proj",), also_trained=("layers.1.mixer.o_proj",)),
        Case(),
    ),
    "also_trained a linear among the targets": (
        LoRAConfig(**OURS, also_trained=("layers.1.mixer.o_proj",)),
        Case(),
    ),
    "also_trained a block": (LoRAConfig(**OURS, also_trained=("layers.1.feed_forward",)), Case()),
    "tied, also_trained embed": (
        LoRAConfig(**OURS, also_trained=("embed_tokens",)),
        Case(base=TIED),
    ),
    "targets with lm_head": (LoRAConfig(**OURS, targets=("q_proj", "lm_head")), Case()),
    "score as the base has it": (LoRAConfig(**OURS), Case(labels=3)),
    "GPT-2, also_trained mixer.o_proj": (
        LoRAConfig(
            **OURS,
            targets=("up_proj", "down_proj"),
            also_trained=("layers.0.mixer.o_proj", "layers.1.mixer.o_proj", "norm"),
        ),
        Case(family="gpt2"),
    ),
    "Gemma 2, also_trained norm": (
        LoRAConfig(**OURS, also_trained=("norm", "layers.1.mixer_norm")),
        Case(family="gemma2", base=TIED | {"head_dim": 12, "query_pre_attn_scalar": 12}),
    ),
}


def to_peft(figures: Figures, name: str, config: LoRAConfig, case: Case, folder: Path) -> None:
    """Compares the logits of an adapter created here with peft's for the files written here."""
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
    got = logits(model, case)
    where = hf_module_name(model)
    save_adapter(model, folder / "adapter", module_name=where, base=str(folder / "base"))
    reference = PeftModel.from_pretrained(reopened(case, folder), folder / "adapter").eval()
    expected = reference_logits(reference, case)
    figures.at_most(name, float((got - expected).abs().max()), BOUND)
    if float((before - got).abs().max()) < 100 * BOUND:
        raise ValueError("the adapter changes nothing, so the figure says nothing")


# ---- both


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


if __name__ == "__main__":
    sys.exit(main())
