"""The logit lens: what the model would predict if it ended after each layer.

The residual stream after a layer goes through the last norm and the head (nostalgebraist 2020,
"interpreting GPT: the logit lens").
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from easyllm.nn.decoder import Decoder
from easyllm.probe.residual import check_additive, recorded


@dataclass(frozen=True, slots=True, kw_only=True)
class Lens:
    """The prediction after a layer, at the last token.

    Attributes:
        layer: number of the layer; -1 for the embedding.
        token_ids: the most likely tokens, best first.
        probabilities: their probabilities.
        final: probability of the token that the complete model predicts.
    """

    layer: int
    token_ids: list[int]
    probabilities: list[float]
    final: float


@torch.no_grad()
def logit_lens(model: Decoder, token_ids: Sequence[int], *, top: int = 3) -> list[Lens]:
    """Returns the prediction after the embedding and after each layer.

    Raises:
        ConfigError: the residual stream of the model is not a sum (`check_additive`).
    """
    check_additive(model)
    with recorded(model) as terms:
        model.logits(list(token_ids))
    stream = torch.zeros_like(terms[0][2][-1:])
    rows = []
    for name, _, vector in terms:
        stream = stream + vector[-1:]
        if name != "attention":
            rows.append(stream)
    hidden = model.norm(torch.cat(rows)).to(model.dtype)
    probabilities = model.head(hidden).softmax(-1)
    answer = int(probabilities[-1].argmax())
    best = probabilities.topk(min(top, probabilities.shape[1]), dim=-1)
    return [
        Lens(
            layer=number - 1,
            token_ids=best.indices[number].tolist(),
            probabilities=best.values[number].tolist(),
            final=float(probabilities[number, answer]),
        )
        for number in range(len(rows))
    ]


__all__ = ["Lens", "logit_lens"]
