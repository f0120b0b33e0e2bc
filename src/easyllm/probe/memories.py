"""Feed-forwards as memories: which keys a text matches, and which tokens their values promote.

A feed-forward is Σ_i m_i(x) v_i: neuron i has a key, by which it measures x, and a value, a column
of the down projection (Geva et al. 2020, arXiv 2012.14913, and 2022, arXiv 2203.14680).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from easyllm.core.errors import ConfigError
from easyllm.nn.decoder import Decoder
from easyllm.nn.feed_forward import MLP
from easyllm.nn.glu import GLU


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """A neuron of a feed-forward that is active at the last token of a text.

    Attributes:
        layer, neuron: where it is.
        weight: m_i(x), the factor of its value.
        size: length of what it adds, |m_i| ‖v_i‖.
        promotes: the tokens whose logits its addition raises most.
    """

    layer: int
    neuron: int
    weight: float
    size: float
    promotes: list[int]


@torch.no_grad()
def read_memories(
    model: Decoder, token_ids: Sequence[int], *, per_layer: int = 3, tokens: int = 5
) -> list[Memory]:
    """Returns the neurons that add most to the residual stream at the last token, by layer.

    Layers with a mixture of experts have no list of neurons and are passed over.

    Raises:
        ConfigError: no layer has a plain or gated feed-forward.
    """
    blocks = [
        (number, layer.feed_forward)
        for number, layer in enumerate(model.layers)
        if isinstance(layer.feed_forward, GLU | MLP)
    ]
    if not blocks:
        raise ConfigError(
            "no layer has a feed-forward of neurons (the layers are mixtures of experts)"
        )
    inner: dict[int, Tensor] = {}
    handles = []
    for number, block in blocks:

        def keep(_module: nn.Module, inputs: tuple[Tensor, ...], number: int = number) -> None:
            inner[number] = inputs[0][-1].float()

        handles.append(block.down_proj.register_forward_pre_hook(keep))
    try:
        model.logits(list(token_ids))
    finally:
        for handle in handles:
            handle.remove()
    head = model.head_weight.float()
    norm = getattr(model.norm, "weight", None)
    found = []
    for number, block in blocks:
        values = block.down_proj.storage.dense().float()  # [D, F]
        sizes = inner[number].abs() * values.norm(dim=0)
        best = sizes.topk(min(per_layer, len(sizes)))
        for size, neuron in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            weight = float(inner[number][neuron])
            added = values[:, neuron] * weight
            scores = head @ (added if norm is None else added * norm.float())
            top = scores.topk(min(tokens, len(scores))).indices.tolist()
            found.append(
                Memory(layer=number, neuron=neuron, weight=weight, size=size, promotes=top)
            )
    return found


__all__ = ["Memory", "read_memories"]
