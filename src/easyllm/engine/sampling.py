"""From logits to token ids."""

from collections.abc import Sequence

import torch
from torch import Tensor

from easyllm.engine.request import SamplingParams


def choose(
    logits: Tensor, params: Sequence[SamplingParams], generators: Sequence[torch.Generator | None]
) -> tuple[list[int], list[float]]:
    """The next token of each row.

    Args:
        logits: [N, V] fp32.
        params: how each row is sampled.
        generators: each row's own source of randomness (None for greedy rows).

    Returns:
        N ids, and their log-probabilities in nats before any change by `params`.
    """
    greedy = logits.argmax(-1).tolist()
    ids = [
        greedy[row] if p.temperature == 0 else sample_row(narrow(logits[row], p), generators[row])
        for row, p in enumerate(params)
    ]
    chosen = logits.gather(1, torch.tensor(ids, device=logits.device)[:, None]).squeeze(1)
    logprobs: list[float] = (chosen - logits.logsumexp(-1)).tolist()
    return ids, logprobs


def narrow(logits: Tensor, params: SamplingParams) -> Tensor:
    """[V] logits after temperature, top-k and top-p, in that order (as in HF); barred tokens are -inf."""
    logits = logits / params.temperature
    if 0 < params.top_k < logits.numel():
        threshold = logits.topk(params.top_k).values[-1]
        logits = logits.masked_fill(logits < threshold, float("-inf"))
    if params.top_p < 1.0:
        ordered, order = logits.sort(descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        # a token stays as long as those more likely than it do not reach p; the first always stays
        logits = logits.index_fill(0, order[before >= params.top_p], float("-inf"))
    return logits


def sample_row(logits: Tensor, generator: torch.Generator | None) -> int:
    """One draw from softmax(logits) by the Gumbel-max rule, in fp64, from a generator of the row's own."""
    noise = torch.rand(logits.shape, dtype=torch.float64, generator=generator)
    gumbel = -torch.log(-torch.log(noise.clamp_(min=1e-300)))
    return int((logits.double().cpu() + gumbel).argmax())
