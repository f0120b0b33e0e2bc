"""The closed forms of `plan.published`, evaluated for one model: `easyllm plan --formulas`."""

from dataclasses import dataclass

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.plan import published
from easyllm.plan.published import Policy, Shape, Stage

STAGES: tuple[Stage, ...] = (0, 1, 2, 3)
POLICIES: tuple[Policy, ...] = ("none", "tp", "tp+sp", "tp+selective", "tp+sp+selective", "full")


@dataclass(frozen=True, slots=True, kw_only=True)
class FormulaSetup:
    """The symbols of the closed forms that are not of the model's shape.

    Attributes:
        batch: b, sequences; B per step where a formula has steps.
        context: s, tokens per sequence.
        gpus: number of devices.
        tensor, pipeline, interleave: t, p, v.
        micro_batches: m, micro-batches per step of a pipeline.
        tokens: T, training tokens; None leaves out runs.
        peak_flops_per_s: peak of a device; None leaves out utilisation.
        step_seconds: measured time of a step.
        tokens_per_s: measured throughput of all devices.
    """

    batch: int = 1
    context: int = 2048
    gpus: int = 1
    tensor: int = 1
    pipeline: int = 1
    interleave: int = 1
    micro_batches: int = 1
    tokens: float | None = None
    peak_flops_per_s: float | None = None
    step_seconds: float | None = None
    tokens_per_s: float | None = None


def parse_shape(text: str) -> Shape:
    """Returns the shape in `layers=118,hidden=12288,heads=48,vocab=256000`; only layers and hidden
    are needed.

    Raises:
        ConfigError: a key is unknown or missing, or a value is not a positive integer.
    """
    values: dict[str, int] = {}
    for word in text.split(","):
        key, _, number = word.strip().partition("=")
        if key not in ("layers", "hidden", "heads", "vocab") or not number.isdigit():
            raise ConfigError(
                f"--shape has {word.strip()!r}; write it as layers=118,hidden=12288,heads=48,"
                "vocab=256000, with positive integers"
            )
        values[key] = int(number)
    missing = [key for key in ("layers", "hidden") if not values.get(key)]
    if missing:
        raise ConfigError(f"--shape lacks {' and '.join(missing)}; add them")
    return Shape(
        layers=values["layers"],
        hidden=values["hidden"],
        heads=values.get("heads", 1),
        vocab=values.get("vocab", 0),
    )


def state_formulas(parameters: int, gpus: int) -> JsonObject:
    """Returns training states and traffic of Ψ parameters under each ZeRO stage, on N devices."""
    per = {"mixed_precision": published.MIXED_PRECISION, "fp32_gradients": published.FP32_GRADIENTS}
    return {
        "inference_bytes": 2 * parameters,
        "training_bytes": {name: size * parameters for name, size in per.items()},
        "zero_bytes": {
            str(stage): published.state_bytes(parameters, stage, gpus) for stage in STAGES
        },
        "sent_elements": {
            str(stage): published.communication_elements(parameters, stage, gpus)
            for stage in STAGES
        },
        "optimal_tokens": published.TOKENS_PER_PARAMETER * parameters,
    }


def run_formulas(parameters: int, setup: FormulaSetup, shape: Shape | None = None) -> JsonObject:
    """Returns the FLOPs of a run, and the utilisation of a measured throughput.

    Args:
        parameters: N.
        setup: the other symbols.
        shape: adds attention to the utilisation (PaLM, appendix B).
    """
    found: JsonObject = {
        "flops_per_token": {
            "forward": 2 * parameters,
            "training": 6 * parameters,
            "recompute": 8 * parameters,
        }
    }
    if setup.tokens is not None:
        found["run_flops"] = {
            "training": 6 * parameters * setup.tokens,
            "recompute": 8 * parameters * setup.tokens,
        }
    if setup.tokens_per_s is not None and setup.peak_flops_per_s is not None:
        peak = setup.gpus * setup.peak_flops_per_s
        found["mfu_without_attention"] = setup.tokens_per_s * 6 * parameters / peak
        if shape is not None:
            each = published.palm_flops_per_token(parameters, shape, setup.context)
            found["mfu"] = setup.tokens_per_s * each / peak
    return found


def shape_formulas(shape: Shape, setup: FormulaSetup) -> JsonObject:
    """Returns parameters, FLOPs and memory of a GPT of this shape."""
    b, s, t = setup.batch, setup.context, setup.tensor
    parts = published.activation_parts(shape, b, s)
    layers = {
        policy: published.layer_activations(shape, b, s, tensor=t, policy=policy)
        for policy in POLICIES
    }
    stages = {
        policy: published.stage_activations(size, shape.layers, setup.pipeline, setup.interleave)
        for policy, size in layers.items()
    }
    found: JsonObject = {
        "parameters": {
            "12lh2": published.layer_parameters(shape),
            "article": published.article_parameters(shape),
            "megatron": published.megatron_parameters(shape, s),
        },
        "flops": {
            "forward": published.forward_flops(shape, b, s),
            "step": published.step_flops(shape, b, s),
            "step_recompute": published.step_flops(shape, b, s, recompute=True),
            "step_selective": published.selective_step_flops(shape, b, s),
        },
        "attention_share": published.attention_share(shape, s),
        "activation_bytes": {**parts, "total": sum(parts.values())},
        "layer_activation_bytes": layers,
        "stage_activation_bytes": stages,
        "selective_saving": published.selective_saving(shape, s),
        "kv_bytes_per_token": published.kv_cache_bytes(shape, 1, 1),
        "kv_cache_bytes": published.kv_cache_bytes(shape, b, s),
        "bubble": published.bubble(setup.pipeline, setup.micro_batches, setup.interleave),
    }
    if setup.step_seconds is not None and setup.peak_flops_per_s is not None:
        peak = setup.step_seconds * setup.gpus * setup.peak_flops_per_s
        for name, step in (("mfu", "step"), ("hfu_selective", "step_selective")):
            found[name] = found["flops"][step] / peak
        found["hfu_recompute"] = found["flops"]["step_recompute"] / peak
    return found


__all__ = ["FormulaSetup", "parse_shape", "run_formulas", "shape_formulas", "state_formulas"]
