"""Converting a trained model from MHA to GQA or MQA by mean-pooling its KV heads.

Method: Ainslie et al. 2023 (arXiv 2305.13245, section 2.1). The key and value projections of each
group of heads are replaced by their mean. The result needs further training, about 5% of the
pretraining steps in the paper; if the heads of every group were already equal, the converted model
computes the same function.
"""

import torch
from torch import Tensor, nn

from easyllm.core.errors import ConfigError
from easyllm.models.full_weights import require_full_weights
from easyllm.nn.attention import Attention
from easyllm.nn.config import AttentionConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Linear


def pool_kv_heads(model: Decoder, num_kv_heads: int) -> Decoder:
    """Merges the KV heads of every layer into `num_kv_heads` by mean pooling, in place.

    Returns:
        `model` itself.

    Raises:
        ConfigError: a layer uses linear attention, or its number of KV heads is not a multiple of
            `num_kv_heads`; or the model is quantized or has an adapter.
    """
    require_full_weights(model, "merging key-value heads")
    mixers = [_poolable(layer.mixer, num_kv_heads) for layer in model.config.layers]
    for layer, mixer in zip(model.layers, mixers, strict=True):
        attention = layer.mixer
        assert isinstance(attention, Attention)
        for projection in (attention.k_proj, attention.v_proj):
            _pool(projection, attention.config.num_kv_heads, num_kv_heads)
        attention.config = mixer
    layers = [
        layer.model_copy(update={"mixer": mixer})
        for layer, mixer in zip(model.config.layers, mixers, strict=True)
    ]
    model.config = model.config.model_copy(update={"layers": tuple(layers)})
    return model


def _poolable(mixer: object, num_kv_heads: int) -> AttentionConfig:
    if not isinstance(mixer, AttentionConfig):
        raise ConfigError(
            "linear and latent attention do not share key-value heads; only softmax attention can "
            "be converted to grouped-query attention"
        )
    have = mixer.num_kv_heads
    if num_kv_heads < 1 or have % num_kv_heads:
        fits = [str(n) for n in range(1, have + 1) if have % n == 0]
        raise ConfigError(
            f"the model's {have} key-value heads cannot be merged into {num_kv_heads}; "
            f"use {' or '.join(fits)}"
        )
    return mixer.model_copy(update={"num_kv_heads": num_kv_heads})


@torch.no_grad()
def _pool(projection: Linear, have: int, want: int) -> None:
    """Reduces `[have · d, ...]` rows to `[want · d, ...]` by averaging groups of adjacent heads."""

    def mean(rows: Tensor) -> nn.Parameter:
        heads = rows.view(want, have // want, -1, *rows.shape[1:])  # [want, group, d, ...]
        pooled = heads.to(torch.promote_types(rows.dtype, torch.float32)).mean(1).flatten(0, 1)
        return nn.Parameter(pooled.to(rows.dtype), requires_grad=rows.requires_grad)

    projection.weight = mean(projection.weight)
    if projection.bias is not None:
        projection.bias = mean(projection.bias)
    projection.out_features = len(projection.weight)
