"""LoRA of experts and routers, on tiny Mixtral, Qwen2-MoE and Qwen3-MoE models."""

from pathlib import Path
from typing import Any

from exchange import MOE, Case, from_peft, to_peft
from figures import Figures

from easyllm.adapters import AdapterConfig, LoRAConfig, PiSSAConfig

BASES: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "qwen3_moe": MOE,
    "qwen2_moe": MOE | {"shared_expert_intermediate_size": 20},
}
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def fused(family: str, parameters: list[str], modules: list[str], **keys: Any) -> Case:
    adapter = {"target_parameters": parameters, "target_modules": modules, **keys}
    return Case(family=family, base=BASES[family], adapter=adapter)


FROM_PEFT = {
    f"{family}, {name}": fused(family, parameters, modules, **keys)
    for family in BASES
    for name, parameters, modules, keys in (
        ("both", BOTH, ["q_proj"], {}),
        ("only down_proj", BOTH[1:], ["q_proj"], {}),
        ("only gate_up_proj", BOTH[:1], ["q_proj"], {}),
        ("experts alone", BOTH, [], {}),
        ("router", [*BOTH, "gate.weight"], ["q_proj"], {}),
        (
            "patterns, rsLoRA",
            BOTH,
            ["q_proj"],
            {
                "use_rslora": True,
                "rank_pattern": {"experts.down_proj": 2, r"layers\\.1.*gate_up_proj": 6},
                "alpha_pattern": {"gate_up_proj": 5},
            },
        ),
    )
}
FROM_PEFT |= {
    "mixtral, names of transformers 4": fused("mixtral", [], ["w1", "w2", "w3", "q_proj"]),
    "qwen3_moe, names of transformers 4": fused(
        "qwen3_moe", [], ["gate_proj", "up_proj", "down_proj"]
    ),
    "qwen3_moe, a layer without experts": Case(
        family="qwen3_moe",
        base=MOE | {"mlp_only_layers": [0]},
        adapter={"target_parameters": BOTH, "target_modules": ["q_proj"]},
    ),
}

OURS: dict[str, Any] = {"rank": 4, "alpha": 9}
TO_PEFT: dict[str, tuple[AdapterConfig, Case]] = {
    f"{family}, {name}": (config, Case(family=family, base=BASES[family]))
    for family in BASES
    for name, config in (
        ("all-linear", LoRAConfig(**OURS)),
        ("experts", LoRAConfig(**OURS, targets=("*experts*",))),
        (
            "gate and up alone",
            LoRAConfig(**OURS, targets=("*experts*gate_proj", "*experts*up_proj")),
        ),
        ("gate alone", LoRAConfig(**OURS, targets=("*experts*gate_proj",))),
        ("down alone", LoRAConfig(**OURS, targets=("*experts*down_proj", "q_proj"))),
        ("one expert", LoRAConfig(**OURS, targets=("layers.1*experts.2.*",))),
        (
            "patterns, rsLoRA",
            LoRAConfig(
                **OURS,
                rslora=True,
                rank_pattern={"up_proj": 2, "layers.0*experts.1.down_proj": 3},
                alpha_pattern={"gate_proj": 5},
            ),
        ),
        ("PiSSA", PiSSAConfig(**OURS)),
        ("dropout", LoRAConfig(**OURS, dropout=0.2)),
    )
}
TO_PEFT |= {
    "qwen3_moe, a layer without experts": (
        LoRAConfig(**OURS),
        Case(family="qwen3_moe", base=MOE | {"mlp_only_layers": [0]}),
    ),
}


def compare(figures: Figures, work: Path) -> None:
    """Prints the figures of all adapters."""
    print("experts from peft to here: largest difference of logits")
    for name, case in FROM_PEFT.items():
        figures.run(name, lambda n=name, c=case: from_peft(figures, n, c, work / n))
    print("experts from here to peft: largest difference of logits")
    for name, (config, case) in TO_PEFT.items():
        to = work / f"ours {name}"
        figures.run(name, lambda n=name, o=config, c=case, t=to: to_peft(figures, n, o, c, t))
