"""Counts the parameters of a model by component, from its configuration.

attention  D·(H + 2K)·d + H·d·D   (+ biases)
GLU        3·D·F
MLP        2·D·F
experts    E of them, k active per token
"""

from collections import Counter
from dataclasses import dataclass

from torch import nn

from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import DecoderLayer
from easyllm.nn.moe import ROUTERS
from easyllm.nn.position import T5Position
from easyllm.plan.parts import inactive_experts, layers_of, mixer_of, outside_of

_TABLE = "mixer.position.bias_table"


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Number of parameters of each component, summed over all layers.

    Attributes:
        embedding: token embedding, and the learned position embedding if there is one.
        attention: mixers of all layers, including learned parameters of their positions.
        feed_forward: feed-forwards and experts of all layers, without routers.
        router: routers and gates of mixtures of experts.
        norm: norms of the layers, and the final norm.
        head: the output projection (0 with tied embeddings).
        inactive: parameters of experts that a token is not routed to.
    """

    embedding: int
    attention: int
    feed_forward: int
    router: int
    norm: int
    head: int
    inactive: int

    @property
    def total(self) -> int:
        """All parameters; tied embeddings count once."""
        parts = (self.embedding, self.attention, self.feed_forward, self.router, self.norm)
        return sum(parts) + self.head

    @property
    def active(self) -> int:
        """Parameters that are used for a token."""
        return self.total - self.inactive


def count_parameters(config: ModelConfig) -> ParameterCount:
    """Counts the parameters of a model of this configuration by component."""
    positions, first, last = outside_of(config)
    layers = Counter[str]()
    for layer, copies in Counter(layers_of(config)).items():
        for name, parameter in layer.named_parameters():
            times = 1 if name == _TABLE and _is_shared(layer) else copies
            layers[_component(name)] += times * parameter.numel()
            if name.startswith("feed_forward.experts.0."):
                layers["inactive"] += copies * inactive_experts(layer) * parameter.numel()
    return ParameterCount(
        embedding=config.vocab_size * config.hidden_size + _count(positions),
        attention=layers["attention"],
        feed_forward=layers["feed_forward"],
        router=layers["router"],
        norm=layers["norm"] + _count(first) + (1 + (config.encoder is not None)) * _count(last),
        head=_head(config),
        inactive=layers["inactive"],
    )


def _is_shared(layer: DecoderLayer) -> bool:
    """Whether the layers of a stack share the table of a layer's T5 bias."""
    position = mixer_of(layer).position
    return isinstance(position, T5Position) and position.config.shared


def _component(name: str) -> str:
    """Returns the component that a layer's parameter belongs to."""
    if name.startswith(("mixer.", "cross.")):
        return "attention"
    if name.startswith("feed_forward."):
        return "router" if name.split(".")[1] in ROUTERS else "feed_forward"
    return "norm"


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _head(config: ModelConfig) -> int:
    if config.num_labels is not None:
        return config.num_labels * config.hidden_size
    return 0 if config.tie_embeddings else config.vocab_size * config.hidden_size
