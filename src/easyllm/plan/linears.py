"""The linears of a layer: what adapters attach to, quantization packs and products run through."""

from dataclasses import dataclass
from typing import Literal

from easyllm.adapters.attach import ALL_LINEAR
from easyllm.adapters.lora import LoRAConfig
from easyllm.core.errors import ConfigError, suggest
from easyllm.nn.config import (
    AttentionConfig,
    FeedForward,
    GLUConfig,
    LayerConfig,
    LinearAttentionConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
)

ROUTER = "router"


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearShape:
    """A linear of a layer, or one that all experts of the layer have alike.

    Attributes:
        name: as the module is called (`q_proj`).
        copies: how many of it the layer holds (its experts).
    """

    name: str
    part: Literal["attention", "feed_forward", "router"]
    in_features: int
    out_features: int
    copies: int = 1

    @property
    def weights(self) -> int:
        """Elements of all copies' matrices."""
        return self.copies * self.in_features * self.out_features

    @property
    def rank(self) -> int:
        """The largest the matrix can have."""
        return min(self.in_features, self.out_features)


def mixer_linears(
    mixer: AttentionConfig | LinearAttentionConfig, width: int
) -> dict[str, LinearShape]:
    """q_proj, k_proj, v_proj, o_proj."""
    heads = mixer.num_heads * mixer.head_dim
    kv_heads = heads
    if isinstance(mixer, AttentionConfig):
        kv_heads = mixer.num_kv_heads * mixer.head_dim
    shapes = {
        "q_proj": (width, heads),
        "k_proj": (width, kv_heads),
        "v_proj": (width, kv_heads),
        "o_proj": (heads, width),
    }
    return {
        name: LinearShape(name=name, part="attention", in_features=a, out_features=b)
        for name, (a, b) in shapes.items()
    }


def dense_linears(
    config: GLUConfig | MLPConfig, width: int, *, copies: int = 1
) -> dict[str, LinearShape]:
    """up_proj, down_proj and in a GLU gate_proj, in the order they run."""
    inner = config.intermediate_size
    shapes = {"gate_proj": (width, inner)} if isinstance(config, GLUConfig) else {}
    shapes |= {"up_proj": (width, inner), "down_proj": (inner, width)}
    return {
        name: LinearShape(
            name=name, part="feed_forward", in_features=a, out_features=b, copies=copies
        )
        for name, (a, b) in shapes.items()
    }


def router_linear(config: MoEConfig, width: int) -> LinearShape:
    """From a token to a logit for each expert."""
    return LinearShape(
        name=ROUTER, part="router", in_features=width, out_features=config.num_experts
    )


def shared_gate_linear(width: int) -> LinearShape:
    """From a token to the weight of the shared expert."""
    return LinearShape(name="shared_gate", part="router", in_features=width, out_features=1)


def feed_forward_linears(config: FeedForward, width: int) -> list[LinearShape]:
    """All linears of a feed-forward."""
    if not isinstance(config, MoEConfig):
        return list(dense_linears(config, width).values())
    found = [router_linear(config, width)]
    found += dense_linears(config.expert, width, copies=config.num_experts).values()
    if config.shared is not None:
        found += dense_linears(config.shared, width).values()
    if config.shared_gate:
        found.append(shared_gate_linear(width))
    return found


def layer_linears(layer: LayerConfig, width: int) -> list[LinearShape]:
    """All linears of a layer."""
    mixer = mixer_linears(layer.mixer, width).values()
    return [*mixer, *feed_forward_linears(layer.feed_forward, width)]


def linear_weights(config: ModelConfig) -> int:
    """Elements of the matrices inside the layers: what quantization packs and Muon steps."""
    width = config.hidden_size
    return sum(x.weights for layer in config.layers for x in layer_linears(layer, width))


def is_adapted(linear: LinearShape, lora: LoRAConfig | None) -> bool:
    """Whether an adapter runs beside this linear; a router's product runs without one."""
    if lora is None or linear.name == ROUTER:
        return False
    return ALL_LINEAR in lora.targets or linear.name in lora.targets


def count_adapter_parameters(config: ModelConfig, lora: LoRAConfig) -> int:
    """Trained parameters: rank · (in + out) for every linear that carries an adapter (arXiv 2106.09685, section 4.2).

    Raises:
        ConfigError: a target names no linear of the model, or the rank is more than a matrix has.
    """
    linears = [x for layer in config.layers for x in layer_linears(layer, config.hidden_size)]
    known = {linear.name for linear in linears} - {ROUTER}
    for target in lora.targets:
        if target != ALL_LINEAR and target not in known:
            raise ConfigError(
                f"adapter target {target!r} names no linear of this model{suggest(target, known)}; "
                f"use {ALL_LINEAR} or some of {', '.join(sorted(known))}"
            )
    found = [linear for linear in linears if is_adapted(linear, lora)]
    _check_rank(found, lora)
    return sum(
        linear.copies * lora.rank * (linear.in_features + linear.out_features) for linear in found
    )


def _check_rank(linears: list[LinearShape], lora: LoRAConfig) -> None:
    """Refuses a rank that a matrix cannot have; only a gate of one output, which `all-linear` brings with it, may be given
    more."""
    full = [linear for linear in linears if linear.part != "router"]
    least = min(full, key=lambda linear: linear.rank, default=None)
    if least is not None and lora.rank > least.rank:
        raise ConfigError(
            f"adapter.rank={lora.rank} is more than the rank of {least.name}, {least.out_features} x "
            f"{least.in_features}, which is at most {least.rank}; lower adapter.rank, or leave {least.name} out of "
            "adapter.targets"
        )


def largest_rank(config: ModelConfig) -> int:
    """The largest rank that adapters of all linears may have."""
    width = config.hidden_size
    linears = [x for layer in config.layers for x in layer_linears(layer, width)]
    return min(linear.rank for linear in linears if linear.part != "router")
