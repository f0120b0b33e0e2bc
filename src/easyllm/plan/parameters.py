"""Parameters of a model by component, counted from its configuration.

attention  D·(H + 2K)·d + H·d·D   (+ biases)      GLU  3·D·F      MLP  2·D·F      experts  E of them, k active
"""

from dataclasses import dataclass

from easyllm.nn.config import (
    AttentionConfig,
    FeedForward,
    GLUConfig,
    LayerConfig,
    LayerNormConfig,
    Learned,
    LinearAttentionConfig,
    MLPConfig,
    ModelConfig,
    MoEConfig,
    Norm,
    Shaw,
    T5Bias,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ParameterCount:
    """Parameters of each component, all layers together.

    Attributes:
        embedding: token embedding, and learned positions where there are any.
        attention: mixers of all layers with what their positions learn.
        feed_forward: feed-forwards and experts of all layers; routers apart in `router`.
        head: the output projection (0 when tied).
        inactive: parameters of experts a token does not pass.
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
        """All parameters; a tied head counts once."""
        parts = (self.embedding, self.attention, self.feed_forward, self.router, self.norm)
        return sum(parts) + self.head

    @property
    def active(self) -> int:
        """Those a token passes."""
        return self.total - self.inactive


def count_parameters(config: ModelConfig) -> ParameterCount:
    """The parameters of a model of this configuration."""
    width = config.hidden_size
    embedding = config.vocab_size * width
    if isinstance(config.embedding_position, Learned):
        embedding += config.max_seq_len * width
    layers = config.layers
    norms = sum(_norms_of(layer) for layer in layers) + config.final_norm
    return ParameterCount(
        embedding=embedding,
        attention=sum(_mixer(layer, width) for layer in layers),
        feed_forward=sum(_feed_forward(layer.feed_forward, width) for layer in layers),
        router=sum(_router(layer.feed_forward, width) for layer in layers),
        norm=norms * norm_parameters(config.norm, width),
        head=_head(config),
        inactive=sum(_inactive(layer.feed_forward, width) for layer in layers),
    )


def _head(config: ModelConfig) -> int:
    if config.num_labels is not None:
        return config.num_labels * config.hidden_size
    return 0 if config.tie_embeddings else config.vocab_size * config.hidden_size


def norm_parameters(config: Norm, width: int) -> int:
    """One weight a dim, and a bias where a LayerNorm has one."""
    return width * (2 if isinstance(config, LayerNormConfig) and config.bias else 1)


def _norms_of(layer: LayerConfig) -> int:
    return 4 if layer.norm_placement == "sandwich" else 2


def _mixer(layer: LayerConfig, width: int) -> int:
    mixer = layer.mixer
    kv_heads = mixer.num_heads if isinstance(mixer, LinearAttentionConfig) else mixer.num_kv_heads
    rows = (mixer.num_heads + 2 * kv_heads) * mixer.head_dim
    back = mixer.num_heads * mixer.head_dim
    count = rows * width + back * width
    count += rows * mixer.qkv_bias + width * mixer.out_bias
    if isinstance(mixer, AttentionConfig):
        count += 2 * mixer.head_dim * (mixer.qk_norm is not None) + _position(mixer)
    return count


def _position(mixer: AttentionConfig) -> int:
    position = mixer.position
    if isinstance(position, T5Bias):
        return position.num_buckets * mixer.num_heads
    if isinstance(position, Shaw):
        return (2 * position.max_distance + 1) * mixer.head_dim * (1 + position.values)
    return 0


def _dense(config: GLUConfig | MLPConfig, width: int) -> int:
    inner = config.intermediate_size
    if isinstance(config, GLUConfig):
        return 3 * width * inner + (2 * inner + width) * config.bias
    return 2 * width * inner + (inner + width) * config.bias


def _feed_forward(config: FeedForward, width: int) -> int:
    if not isinstance(config, MoEConfig):
        return _dense(config, width)
    shared = _dense(config.shared, width) if config.shared else 0
    return config.num_experts * _dense(config.expert, width) + shared


def _router(config: FeedForward, width: int) -> int:
    if not isinstance(config, MoEConfig):
        return 0
    return config.num_experts * width + width * config.shared_gate


def _inactive(config: FeedForward, width: int) -> int:
    if not isinstance(config, MoEConfig):
        return 0
    return (config.num_experts - config.experts_per_token) * _dense(config.expert, width)
