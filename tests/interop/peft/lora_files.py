"""LoRA adapters, and configurations that must be refused by name."""

from pathlib import Path
from typing import Any

import torch
from exchange import TIED, Case, from_peft, invent, refuse, to_peft
from figures import Figures
from peft import EvaConfig

from easyllm.adapters import LoRAConfig

PATTERNS = {
    "rank_pattern": {r"layers\.1\..*v_proj": 6, "q_proj": 3, r"layers\.0.*\.v_proj": 2},
    "alpha_pattern": {"q_proj": 64, r"model\.layers\.[01]\.mlp\.(up|gate).*": 5, "down_proj": 20},
}
"""Patterns of which no two match the same module: see findings/peft_pattern_order.sh."""


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
    "lora_bias": ({"lora_bias": True}, "lora_bias"),
    "PiSSA": ({"init_lora_weights": "pissa"}, "init_lora_weights"),
    "OLoRA": ({"init_lora_weights": "olora"}, "init_lora_weights"),
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


def compare(figures: Figures, work: Path) -> None:
    """Prints the figures of all adapters."""
    print("LoRA from peft to here: largest difference of logits")
    for name, case in FROM_PEFT.items():
        figures.run(name, lambda n=name, c=case: from_peft(figures, n, c, work / n))
    print("LoRA from peft to here: refused by name")
    for name, (keys, word) in REFUSED.items():
        figures.run(name, lambda n=name, k=keys, w=word: refuse(figures, n, k, w, work / n))
    for name, (keys, word) in INVENTED.items():
        figures.run(name, lambda n=name, k=keys, w=word: invent(figures, n, k, w, work / n))
    print("LoRA from here to peft: largest difference of logits")
    for name, (config, case) in TO_PEFT.items():
        to = work / f"ours {name}"
        figures.run(name, lambda n=name, o=config, c=case, t=to: to_peft(figures, n, o, c, t))
