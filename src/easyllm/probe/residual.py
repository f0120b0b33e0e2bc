"""The residual stream as a sum: the embedding, and the output of each block.

    x_final = embedding + Σ_l attention_l + Σ_l feed_forward_l
    logit_v = Σ_terms (term ⊙ w) · u_v / r     (r: RMS of x_final, w: weight of the last norm)

The second line holds where the last norm is RMSNorm and the head has no soft cap: the contribution
of a term to a logit, direct logit attribution (Elhage et al. 2021, "A Mathematical Framework for
Transformer Circuits").
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from easyllm.core.errors import ConfigError
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder, DecoderLayer
from easyllm.nn.norm import RMSNorm

BLOCKS = ("mixer", "feed_forward")


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """A term of the residual stream.

    Attributes:
        name: `embedding`, `attention` or `feed_forward`.
        layer: number of the layer; None for the embedding.
        vector: the term at each token, [T, D] fp32.
        logit: its contribution to the logit of the token that the model predicts at the last
            position; None where the last norm or the head is not linear.
    """

    name: str
    layer: int | None
    vector: Tensor
    logit: float | None

    @property
    def norm(self) -> float:
        """Length of the term at the last token."""
        return float(self.vector[-1].norm())


@torch.no_grad()
def residual_contributions(model: Decoder, token_ids: Sequence[int]) -> list[Contribution]:
    """Returns the terms whose sum is the residual stream after the last layer.

    Args:
        model: a model with norms before its blocks (`pre`) or on both sides (`sandwich`).
        token_ids: the text.

    Raises:
        ConfigError: the norms of a layer follow the residual addition, so there is no such sum.
    """
    check_additive(model)
    with recorded(model) as terms:
        ids = torch.tensor(token_ids, device=model.device)
        hidden = model(ids, ForwardContext.packed([len(ids)], device=model.device))
        token = int(model.head(hidden[-1:]).argmax())
    total = torch.stack([vector for _, _, vector in terms]).sum(0)
    direction = _direction(model, total[-1], token)
    return [
        Contribution(
            name=name,
            layer=layer,
            vector=vector,
            logit=None if direction is None else float(vector[-1] @ direction),
        )
        for name, layer, vector in terms
    ]


def check_additive(model: Decoder) -> None:
    """Checks that blocks only add to the residual stream.

    Raises:
        ConfigError: they do not.
    """
    placements = {layer.norm_placement for layer in model.config.layers}
    if "post" in placements:
        raise ConfigError(
            "the norms of this model follow the addition to the residual stream, so that it is not "
            "a sum of the blocks' outputs; probe a model with norms before its blocks"
        )


def output_of(layer: nn.Module, block: str) -> nn.Module:
    """Returns the module whose output a block adds to the residual stream."""
    assert isinstance(layer, DecoderLayer), "a decoder has decoder layers"
    found = layer.mixer_post_norm if block == "mixer" else layer.feed_forward_post_norm
    return found


@contextmanager
def recorded(model: Decoder) -> Iterator[list[tuple[str, int | None, Tensor]]]:
    """Records the terms of the forward passes inside, in order: (name, layer, [T, D] fp32)."""
    terms: list[tuple[str, int | None, Tensor]] = []
    handles = []

    def record(module: nn.Module, name: str, layer: int | None) -> None:
        def keep(_module: nn.Module, _inputs: object, out: Tensor) -> None:
            terms.append((name, layer, out.detach().float()))

        handles.append(module.register_forward_hook(keep))

    record(model.embedding_norm, "embedding", None)
    for number, layer in enumerate(model.layers):
        record(output_of(layer, "mixer"), "attention", number)
        record(output_of(layer, "feed_forward"), "feed_forward", number)
    try:
        yield terms
    finally:
        for handle in handles:
            handle.remove()


def _direction(model: Decoder, last: Tensor, token: int) -> Tensor | None:
    """Returns the vector whose product with a term is its contribution to a token's logit."""
    if not isinstance(model.norm, RMSNorm) or model.config.logit_softcap or model.score is not None:
        return None
    weight = model.norm.weight.float() + (type(model.norm) is not RMSNorm)  # Gemma stores w - 1
    inverse = torch.rsqrt(last.square().mean() + model.norm.eps)
    return model.head_weight[token].float() * weight * inverse


__all__ = ["Contribution", "check_additive", "output_of", "recorded", "residual_contributions"]
