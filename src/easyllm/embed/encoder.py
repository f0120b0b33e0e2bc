"""A text encoder: the decoder's parts with bidirectional attention and post-norm layers (BERT).

    x = LayerNorm(token + position + type)
    x ← LayerNorm(x + attention(x)),  x ← LayerNorm(x + MLP(x))      in each layer
    v = pool(x) / |pool(x)|

Devlin et al. 2018 (arXiv 1810.04805, section 3); sentence vectors by pooling: Reimers and Gurevych
2019 (arXiv 1908.10084, section 3). The type embedding of the first segment, which is the only one
in use, is added to the table of positions when the weights are loaded.
"""

from dataclasses import dataclass

from easyllm.nn.config import AttentionConfig, LayerConfig, LayerNormConfig, MLPConfig, ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.position_config import Learned, NoPosition


@dataclass(frozen=True, slots=True, kw_only=True)
class EncoderShape:
    """The sizes of an encoder.

    Attributes:
        vocab_size, hidden_size, num_layers, num_heads, intermediate_size: as in `ModelConfig`.
        max_seq_len: number of positions, and thus of tokens in a window.
        norm_eps: ε of the LayerNorms.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    max_seq_len: int
    norm_eps: float

    def model_config(self) -> ModelConfig:
        """Returns the configuration of the layers."""
        mixer = AttentionConfig(
            num_heads=self.num_heads,
            num_kv_heads=self.num_heads,
            head_dim=self.hidden_size // self.num_heads,
            position=NoPosition(),
            qkv_bias=True,
            out_bias=True,
            causal=False,
        )
        mlp = MLPConfig(intermediate_size=self.intermediate_size, activation="gelu")
        layer = LayerConfig(mixer=mixer, feed_forward=mlp, norm_placement="post")
        return ModelConfig(
            family="bert",
            vocab_size=self.vocab_size,
            hidden_size=self.hidden_size,
            max_seq_len=self.max_seq_len,
            layers=(layer,) * self.num_layers,
            norm=LayerNormConfig(eps=self.norm_eps),
            embedding_position=Learned(),
            embedding_norm=True,
            final_norm=False,
            tie_embeddings=True,
        )


class TextEncoder(Decoder):
    """A bidirectional encoder, whose `forward` returns the hidden states of packed sequences.

    Args:
        shape: its sizes.
    """

    def __init__(self, shape: EncoderShape) -> None:
        super().__init__(shape.model_config())


__all__ = ["EncoderShape", "TextEncoder"]
