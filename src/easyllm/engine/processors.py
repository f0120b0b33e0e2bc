"""What changes logits before a token is chosen, as pure functions; each equals its namesake in Hugging Face's `generate`.

Shapes: N rows, V vocab. Settings are a number for all rows, or a tensor [N] with one for each.
"""

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

BARRED = float("-inf")
Setting = float | Tensor
SORTED_WHOLE, LIKELIEST = 4096, 256
"""Vocabularies up to the first are sorted whole for top-p; of larger ones, so many tokens are tried first."""


def add_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """[V] logits with `bias[id]` added to those of its ids (`SequenceBiasLogitsProcessor` of single tokens)."""
    ids = torch.tensor(list(bias), device=logits.device)
    values = torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
    return logits.index_add(0, ids, values)


def penalise_repetition(logits: Tensor, token_ids: Tensor, penalty: float) -> Tensor:
    """Logits of tokens seen before made less likely by a factor (`RepetitionPenaltyLogitsProcessor`; arXiv 1909.05858, 4.1).

    Args:
        logits: [V]; token_ids: [T], tokens of prompt and output, in any order, as often as they like.
    """
    seen = logits[token_ids]
    changed = torch.where(seen < 0, seen * penalty, seen / penalty)
    return logits.index_put((token_ids,), changed)


def penalise_output(
    logits: Tensor, token_ids: Tensor, counts: Tensor, *, presence: float, frequency: float
) -> Tensor:
    """logit - presence · [count > 0] - frequency · count, as OpenAI's API documents them.

    Args:
        logits: [V]; token_ids: [U], the different tokens of the output; counts: [U], how often each occurs in it.
    """
    return logits.index_add(0, token_ids, -(presence + frequency * counts.to(logits.dtype)))


def repeated_ngrams(token_ids: Sequence[int], size: int) -> set[int]:
    """Tokens that would complete an n-gram which `token_ids` holds already (`NoRepeatNGramLogitsProcessor`)."""
    if len(token_ids) < size:
        return set()
    ids = list(token_ids)
    last = ids[len(ids) - size + 1 :]
    return {ids[i + size - 1] for i in range(len(ids) - size + 1) if ids[i : i + size - 1] == last}


def bar(logits: Tensor, token_ids: Iterable[int]) -> Tensor:
    """[V] logits with those of `token_ids` at -inf."""
    barred = torch.tensor(list(token_ids), dtype=torch.int64, device=logits.device)
    return logits.index_fill(0, barred, BARRED)


def allow_packed(logits: Tensor, words: Tensor) -> Tensor:
    """[V] logits with all but those of a packed mask at -inf (`PrefixConstrainedLogitsProcessor`).

    Args:
        words: [⌈V/32⌉] int32, or fewer: bit t mod 32 of word t / 32 is set where token t is allowed.

    Raises:
        ValueError: the mask is of another form, or allows ids the model does not have.
    """
    if words.dtype != torch.int32 or words.ndim != 1:
        raise ValueError(f"a mask is {list(words.shape)} {words.dtype}, expected [words] int32")
    shifts = torch.arange(32, dtype=torch.int32, device=words.device)
    bits = ((words[:, None] >> shifts) & 1).flatten().to(logits.device, torch.bool)
    if bool(bits[len(logits) :].any()):
        raise ValueError(f"a mask allows ids beyond the model's {len(logits)}")
    allowed = torch.zeros(len(logits), dtype=torch.bool, device=logits.device)
    known = min(len(bits), len(logits))
    allowed[:known] = bits[:known]
    return logits.masked_fill(~allowed, BARRED)


def scale(logits: Tensor, temperature: Setting) -> Tensor:
    """[N, V] logits / temperature (`TemperatureLogitsWarper`)."""
    return logits / _column(temperature, logits)


def keep_top_k(logits: Tensor, k: int | Tensor) -> Tensor:
    """[N, V] logits with all but the k largest of a row, and those equal to the k-th, at -inf (`TopKLogitsWarper`)."""
    each = torch.as_tensor(k, device=logits.device).expand(len(logits)).clamp(max=logits.shape[1])
    largest = logits.topk(int(each.max()), dim=-1).values
    threshold = largest.gather(1, each[:, None] - 1)
    return logits.masked_fill(logits < threshold, BARRED)


def keep_top_p(logits: Tensor, p: Setting) -> Tensor:
    """[N, V] logits of the smallest set of tokens whose probability reaches p (`TopPLogitsWarper`; arXiv 1904.09751).

    Sorting a large vocabulary costs as much as a small model's step, so the likeliest tokens are tried first.
    """
    if logits.shape[1] > SORTED_WHOLE:
        best = logits.topk(LIKELIEST, dim=-1)
        share = (best.values - logits.logsumexp(-1, keepdim=True)).exp()
        before = share.cumsum(-1) - share
        reached = before >= _column(p, logits)
        reached[:, 0] = False  # the likeliest stays, even where p is 0 in the dtype of the logits
        if bool(reached[:, -1].all()):
            kept = best.values.masked_fill(reached, BARRED)
            return torch.full_like(logits, BARRED).scatter(1, best.indices, kept)
    ordered, order = logits.sort(dim=-1)
    removed = ordered.softmax(-1).cumsum(-1) <= _column(1 - p, logits)
    removed[:, -1] = False
    return logits.masked_fill(removed.scatter(1, order, removed), BARRED)


def keep_min_p(logits: Tensor, p: Setting) -> Tensor:
    """[N, V] logits of tokens at least p times as likely as the likeliest (`MinPLogitsWarper`; arXiv 2407.01082)."""
    probabilities = logits.softmax(-1)
    likeliest = probabilities.amax(-1, keepdim=True)
    removed = probabilities < _column(p, logits) * likeliest
    removed.scatter_(1, probabilities.argmax(-1, keepdim=True), False)
    return logits.masked_fill(removed, BARRED)


def keep_typical(logits: Tensor, mass: Setting) -> Tensor:
    """[N, V] logits of the tokens with the smallest |-log p - H|, until they reach `mass` (`TypicalLogitsWarper`; Meister et
    al. 2022, arXiv 2202.00666, section 4)."""
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
    strangeness, order = (-logprobs - entropy).abs().sort(dim=-1)
    reached = logits.gather(1, order).softmax(-1).cumsum(-1)
    last = (reached < _column(mass, logits)).sum(1, keepdim=True).clamp(max=logits.shape[1] - 1)
    removed = strangeness > strangeness.gather(1, last)
    removed[:, 0] = False
    return logits.masked_fill(removed.scatter(1, order, removed), BARRED)


def _column(setting: Setting, logits: Tensor) -> Tensor:
    """A setting as [N, 1] or a scalar, in the dtype of the logits."""
    value = torch.as_tensor(setting, dtype=logits.dtype, device=logits.device)
    return value[:, None] if value.ndim else value
