"""Closed forms of publications for a GPT of l layers, width h, a heads, vocabulary V.

They are what papers print, and serve to check our own counts (`plan.parameters`, `plan.compute`,
`plan.memory`), which follow the model as it is built. They assume multi-head attention and a
feed-forward of width 4h; s is the sequence length, b the number of sequences, t the tensor
parallel and p the pipeline parallel degree. A multiply-add counts as 2 FLOPs.

    article     zhuanlan.zhihu.com/p/624740065 (parameters, FLOPs, activations, KV cache)
    Megatron    Narayanan et al. 2021, arXiv 2104.04473, section 3 and appendix
    recompute   Korthikanti et al. 2022, arXiv 2205.05198, sections 4 and 6
    ZeRO        Rajbhandari et al. 2020, arXiv 1910.02054, section 5 and table 1
    PaLM        Chowdhery et al. 2022, arXiv 2204.02311, appendix B
    Chinchilla  Hoffmann et al. 2022, arXiv 2203.15556
"""

from dataclasses import dataclass
from fractions import Fraction
from typing import Literal

from easyllm.core.errors import ConfigError
from easyllm.nn.config import AttentionConfig, ModelConfig

Policy = Literal["none", "tp", "tp+sp", "tp+selective", "tp+sp+selective", "full"]
Stage = Literal[0, 1, 2, 3]
MIXED_PRECISION = 16
"""Bytes per parameter of a bf16 or fp16 model trained with Adam: weight 2, gradient 2, and K = 12
for fp32 master weight, momentum and variance (ZeRO, section 3.1)."""
FP32_GRADIENTS = 20
"""The same with an fp32 copy of the gradients next to the half-precision ones: (2 + 4) + (2 + 4)
+ 8 (article). Frameworks that accumulate gradients in fp32 have them."""
TOKENS_PER_PARAMETER = 20
"""Training tokens per parameter that minimise the loss for given FLOPs (Chinchilla, section 3)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """A GPT: the symbols of the closed forms.

    Attributes:
        layers: l.
        hidden: h.
        heads: a.
        vocab: V.
    """

    layers: int
    hidden: int
    heads: int
    vocab: int

    @classmethod
    def of(cls, config: ModelConfig) -> "Shape":
        """Returns the shape of a model; its first attention layer gives the number of heads.

        Raises:
            ConfigError: no layer has attention, of which the closed forms consist.
        """
        heads = [x.mixer.num_heads for x in config.layers if isinstance(x.mixer, AttentionConfig)]
        if not heads:
            raise ConfigError(
                "the published formulas describe softmax attention, but no layer of this model has "
                "it; leave out --formulas"
            )
        return cls(
            layers=config.num_layers,
            hidden=config.hidden_size,
            heads=heads[0],
            vocab=config.vocab_size,
        )

    @property
    def head_dim(self) -> int:
        """Width of a head, h/a."""
        return self.hidden // self.heads


# ---- parameters


def layer_parameters(shape: Shape) -> int:
    """Returns 12lh²: the matrices of the layers (article; exact for LLaMA's, whose ff is 8/3 h)."""
    return 12 * shape.layers * shape.hidden**2


def article_parameters(shape: Shape) -> int:
    """Returns l(12h² + 13h) + Vh: biases and norms of the layers, and the embedding (article)."""
    per_layer = 12 * shape.hidden**2 + 13 * shape.hidden
    return shape.layers * per_layer + shape.vocab * shape.hidden


def megatron_parameters(shape: Shape, context: int) -> int:
    """Returns 12lh²(1 + 13/12h + (V+s)/12lh): also s learned positions (Megatron, eq. 2)."""
    return article_parameters(shape) + context * shape.hidden


# ---- FLOPs and time


def forward_flops(shape: Shape, batch: int, context: int) -> int:
    """Returns l(24bsh² + 4bs²h) + 2bshV: all s² pairs count, and logits of all tokens (article)."""
    h, tokens = shape.hidden, batch * context
    return shape.layers * (24 * tokens * h**2 + 4 * tokens * context * h) + 2 * tokens * h * (
        shape.vocab
    )


def step_flops(shape: Shape, batch: int, context: int, *, recompute: bool = False) -> int:
    """Returns the FLOPs of a training step: 3 forward passes, or 4 with full recomputation.

    Without recomputation this is 72bslh²(1 + s/6h + V/12lh), the model FLOPs of "recompute" (eq.
    7). With it the layers count four times and the logits three times: Megatron's 96bslh²(1 + s/6h
    + V/16lh) (eq. 3).
    """
    model = 3 * forward_flops(shape, batch, context)
    if not recompute:
        return model
    return (
        model
        + forward_flops(shape, batch, context)
        - 2 * batch * context * shape.hidden * (shape.vocab)
    )


def selective_step_flops(shape: Shape, batch: int, context: int) -> int:
    """Returns 72bslh²(1 + s/3h + V/12lh): the scores are computed again ("recompute", eq. 8).

    The paper doubles the term of the scores, although a recomputed forward pass adds a third of it.
    """
    h, tokens = shape.hidden, batch * context
    return step_flops(shape, batch, context) + 12 * shape.layers * tokens * context * h


def attention_share(shape: Shape, context: int) -> float:
    """Returns s/(6h + s): the share of a layer's FLOPs that is quadratic in the length."""
    return context / (6 * shape.hidden + context)


def training_seconds(flops: float, gpus: int, flops_per_s: float) -> float:
    """Returns the time of a training run at an achieved rate per GPU (Megatron, eq. 4: 8TP/nX)."""
    return flops / (gpus * flops_per_s)


def palm_flops_per_token(parameters: float, shape: Shape, context: int) -> float:
    """Returns 6N + 12·L·H·Q·T model FLOPs per token (PaLM, appendix B).

    H heads of width Q; H·Q need not be the width of the model.
    """
    return 6 * parameters + 12 * shape.layers * shape.hidden * context


def bubble(pipeline: int, micro_batches: int, interleave: int = 1) -> float:
    """Returns (p − 1)/(v·m): idle time of 1F1B over its ideal time (Megatron, section 2.2)."""
    return (pipeline - 1) / (interleave * micro_batches)


def compute_optimal(flops: float) -> tuple[float, float]:
    """Returns the parameters and tokens that use `flops` = 6ND best, with D = 20N (Chinchilla)."""
    parameters = (flops / (6 * TOKENS_PER_PARAMETER)) ** 0.5
    return parameters, TOKENS_PER_PARAMETER * parameters


# ---- memory


def kv_cache_bytes(shape: Shape, batch: int, tokens: int) -> int:
    """Returns 4blh·tokens: keys and values of 2 bytes (article, with tokens = s + n)."""
    return 4 * batch * shape.layers * shape.hidden * tokens


def activation_parts(shape: Shape, batch: int, context: int) -> dict[str, int]:
    """Returns the saved activations of all layers by part, in bytes, at 2 bytes each (article).

    Attention 11bsh + 5bs²a, feed-forward 19bsh, the two norms 4bsh; dropout masks have one byte.
    """
    unit = shape.layers * batch * context * shape.hidden
    scores = 5 * shape.layers * batch * context**2 * shape.heads
    return {"attention": 11 * unit + scores, "feed_forward": 19 * unit, "norm": 4 * unit}


def layer_activations(
    shape: Shape, batch: int, context: int, *, tensor: int = 1, policy: Policy = "none"
) -> int:
    """Returns the saved activations of a layer on one GPU in bytes ("recompute", table 2).

    Args:
        tensor: tensor parallel degree t.
        policy: parallelism and recomputation; `none` is neither, `full` recomputes whole layers.
    """
    unit = batch * context * shape.hidden
    scores = Fraction(5 * shape.heads * context, shape.hidden)
    factors: dict[Policy, Fraction] = {
        "none": 34 + scores,
        "tp": 10 + (24 + scores) / tensor,
        "tp+sp": (34 + scores) / tensor,
        "tp+selective": 10 + Fraction(24, tensor),
        "tp+sp+selective": Fraction(34, tensor),
        "full": Fraction(2),
    }
    return int(unit * factors[policy])


def stage_activations(per_layer: int, layers: int, pipeline: int = 1, interleave: int = 1) -> int:
    """Returns the activations of the first pipeline stage, which holds p micro-batches.

    That is l layers' worth, and (1 + (p − 1)/pv) times as much if interleaved ("recompute", 4.2.3).
    """
    more = Fraction(pipeline - 1, pipeline * interleave) if interleave > 1 else Fraction(0)
    return int(per_layer * layers * (1 + more))


def selective_saving(shape: Shape, context: int) -> float:
    """Returns the share of activations that selective recomputation drops: x/(34 + x), x=5as/h."""
    scores = 5 * shape.heads * context / shape.hidden
    return scores / (34 + scores)


def state_bytes(
    parameters: int, stage: Stage = 0, gpus: int = 1, *, per_parameter: int = MIXED_PRECISION
) -> float:
    """Returns weights, gradients and optimizer states per GPU under a ZeRO stage (ZeRO, table 1).

    Ψ parameters on N GPUs: 16Ψ, 4Ψ + 12Ψ/N, 2Ψ + 14Ψ/N, 16Ψ/N. With 20 bytes per parameter the
    gradients have 6.
    """
    gradients = 2 + per_parameter - MIXED_PRECISION
    optimizer = MIXED_PRECISION - 4
    shared = {0: 0, 1: optimizer, 2: optimizer + gradients, 3: optimizer + gradients + 2}[stage]
    return parameters * (per_parameter - shared) + parameters * shared / gpus


def communication_elements(parameters: int, stage: Stage, gpus: int = 1) -> float:
    """Returns what each GPU sends per step, in elements: 2Ψ, 2Ψ, 2Ψ, 3Ψ, times (N − 1)/N.

    An all-reduce is a reduce-scatter and an all-gather of Ψ each; stage 3 gathers the weights in
    both passes and reduces the gradients once (ZeRO, section 7).
    """
    return (3 if stage == 3 else 2) * parameters * (gpus - 1) / gpus


__all__ = [
    "FP32_GRADIENTS",
    "MIXED_PRECISION",
    "TOKENS_PER_PARAMETER",
    "Policy",
    "Shape",
    "Stage",
    "activation_parts",
    "article_parameters",
    "attention_share",
    "bubble",
    "communication_elements",
    "compute_optimal",
    "forward_flops",
    "kv_cache_bytes",
    "layer_activations",
    "layer_parameters",
    "megatron_parameters",
    "palm_flops_per_token",
    "selective_saving",
    "selective_step_flops",
    "stage_activations",
    "state_bytes",
    "step_flops",
    "training_seconds",
]
