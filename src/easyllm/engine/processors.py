"""Logits processors: pure functions that change logits before a token is chosen.

Each is equivalent to the Hugging Face `generate` class that its docstring names.

Shapes: N rows, V vocabulary size. A setting is a number for all rows, or a tensor [N] with one
value per row.
"""

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from easyllm.ops.logsumexp import logsumexp

NEG_INF = float("-inf")
Setting = float | Tensor
FULL_SORT_MAX_VOCAB, TOP_P_FAST_TOKENS = 4096, 256
"""For top-p, vocabularies up to `FULL_SORT_MAX_VOCAB` tokens are fully sorted; for larger ones, the
`TOP_P_FAST_TOKENS` most likely tokens are tried first."""


_LIMITS = np.where(
    np.unpackbits(np.arange(256, dtype=np.uint8)[:, None], axis=1, bitorder="little"),
    np.float32(np.inf),
    np.float32(-np.inf),
)
"""[256, 8]: for each byte of a bitmask, the maximum of the logits of its eight tokens."""


def add_bias(logits: Tensor, bias: Mapping[int, float]) -> Tensor:
    """Returns logits [V] with `bias[id]` added for each id in `bias`.

    Equivalent to `SequenceBiasLogitsProcessor` with single tokens.
    """
    ids = torch.tensor(list(bias), device=logits.device)
    values = torch.tensor(list(bias.values()), dtype=logits.dtype, device=logits.device)
    return logits.index_add(0, ids, values)


def penalise_repetition(logits: Tensor, token_ids: Tensor, penalty: float) -> Tensor:
    """Applies a repetition penalty to tokens that occur in the prompt or output.

    Equivalent to `RepetitionPenaltyLogitsProcessor` (arXiv 1909.05858, section 4.1).

    Args:
        logits: [V].
        token_ids: [T], tokens of prompt and output, in any order, duplicates allowed.
        penalty: divides positive logits and multiplies negative ones.
    """
    seen = logits[token_ids]
    changed = torch.where(seen < 0, seen * penalty, seen / penalty)
    return logits.index_put((token_ids,), changed)


def penalise_output(
    logits: Tensor, token_ids: Tensor, counts: Tensor, *, presence: float, frequency: float
) -> Tensor:
    """Applies presence and frequency penalties as defined in OpenAI's API documentation.

    The result is logit - presence · [count > 0] - frequency · count.

    Args:
        logits: [V].
        token_ids: [U], the distinct tokens of the output.
        counts: [U], how often each occurs in the output.
        presence, frequency: the penalties.
    """
    return logits.index_add(0, token_ids, -(presence + frequency * counts.to(logits.dtype)))


def repeated_ngrams(token_ids: Sequence[int], size: int) -> set[int]:
    """Returns the tokens that would complete an n-gram already contained in `token_ids`.

    Equivalent to `NoRepeatNGramLogitsProcessor` with n = `size`.
    """
    if len(token_ids) < size:
        return set()
    ids = list(token_ids)
    last = ids[len(ids) - size + 1 :]
    return {ids[i + size - 1] for i in range(len(ids) - size + 1) if ids[i : i + size - 1] == last}


def bar(logits: Tensor, token_ids: Iterable[int]) -> Tensor:
    """Returns logits [V] with those of `token_ids` set to -inf."""
    barred = torch.tensor(list(token_ids), dtype=torch.int64, device=logits.device)
    return logits.index_fill(0, barred, NEG_INF)


def allow_packed(logits: Tensor, words: Tensor) -> Tensor:
    """Returns logits [N, V] with those of tokens that packed bitmasks do not allow set to -inf.

    Equivalent to `PrefixConstrainedLogitsProcessor`.

    Args:
        logits: [N, V].
        words: [N, ⌈V/32⌉] int32 on the CPU: bit t mod 32 of word t / 32 is set if token t is
            allowed.
    """
    if logits.device.type != "cpu":
        return _allow_on_device(logits, words.to(logits.device))
    # nine times faster than filling by a mask of booleans
    octets = words.numpy().astype("<i4", copy=False).view(np.uint8)
    limits = torch.from_numpy(_LIMITS.take(octets, axis=0)).flatten(1)[:, : logits.shape[1]]
    return torch.minimum(logits, limits.to(logits.dtype))


def _allow_on_device(logits: Tensor, words: Tensor) -> Tensor:
    shifts = torch.arange(32, dtype=torch.int32, device=logits.device)
    bits = ((words[:, :, None] >> shifts) & 1).flatten(1)[:, : logits.shape[1]]
    return logits.masked_fill(bits == 0, NEG_INF)


def scale(logits: Tensor, temperature: Setting) -> Tensor:
    """Returns logits [N, V] divided by the temperature (`TemperatureLogitsWarper`)."""
    return logits / _column(temperature, logits)


def keep_top_k(logits: Tensor, k: int | Tensor) -> Tensor:
    """Top-k: returns logits [N, V] with all but the k largest of each row set to -inf.

    Ties with the k-th largest are retained. Equivalent to `TopKLogitsWarper`.
    """
    each = torch.as_tensor(k, device=logits.device).expand(len(logits)).clamp(max=logits.shape[1])
    largest = logits.topk(int(each.max()), dim=-1).values
    threshold = largest.gather(1, each[:, None] - 1)
    return logits.masked_fill(logits < threshold, NEG_INF)


def keep_top_p(logits: Tensor, p: Setting) -> Tensor:
    """Top-p: returns logits [N, V] with all but the nucleus of each row set to -inf.

    The nucleus is the smallest set of most likely tokens whose cumulative probability reaches p.
    Equivalent to `TopPLogitsWarper` (arXiv 1904.09751). Sorting a large vocabulary costs as much as
    a decoding step of a small model, so the most likely tokens are tried first.
    """
    if logits.shape[1] > FULL_SORT_MAX_VOCAB:
        best = logits.topk(TOP_P_FAST_TOKENS, dim=-1)
        share = (best.values - logsumexp(logits)[:, None]).exp()
        before = share.cumsum(-1) - share
        reached = before >= _column(p, logits)
        # the most likely token is always retained, even if p rounds to 0 in the logits' dtype
        reached[:, 0] = False
        if bool(reached[:, -1].all()):
            kept = best.values.masked_fill(reached, NEG_INF)
            return torch.full_like(logits, NEG_INF).scatter(1, best.indices, kept)
    ordered, order = logits.sort(dim=-1)
    removed = ordered.softmax(-1).cumsum(-1) <= _column(1 - p, logits)
    removed[:, -1] = False
    return logits.masked_fill(removed.scatter(1, order, removed), NEG_INF)


def keep_min_p(logits: Tensor, p: Setting) -> Tensor:
    """Min-p: sets logits [N, V] of tokens less than p times as likely as the likeliest to -inf.

    Equivalent to `MinPLogitsWarper` (arXiv 2407.01082).
    """
    probabilities = logits.softmax(-1)
    likeliest = probabilities.amax(-1, keepdim=True)
    removed = probabilities < _column(p, logits) * likeliest
    removed.scatter_(1, probabilities.argmax(-1, keepdim=True), False)
    return logits.masked_fill(removed, NEG_INF)


def keep_typical(logits: Tensor, mass: Setting) -> Tensor:
    """Typical sampling: returns logits [N, V] with all but the typical tokens set to -inf.

    Retains the tokens with the smallest |-log p - H|, where H is the entropy of the row, until
    their cumulative probability reaches `mass`. Equivalent to `TypicalLogitsWarper` (Meister et al.
    2022, arXiv 2202.00666, section 4).
    """
    logprobs = logits.log_softmax(-1)
    entropy = -(logprobs * logprobs.exp()).nansum(-1, keepdim=True)
    strangeness, order = (-logprobs - entropy).abs().sort(dim=-1)
    reached = logits.gather(1, order).softmax(-1).cumsum(-1)
    last = (reached < _column(mass, logits)).sum(1, keepdim=True).clamp(max=logits.shape[1] - 1)
    removed = strangeness > strangeness.gather(1, last)
    removed[:, 0] = False
    return logits.masked_fill(removed.scatter(1, order, removed), NEG_INF)


def _column(setting: Setting, logits: Tensor) -> Tensor:
    """Returns a setting as [N, 1] or a scalar, in the dtype of the logits."""
    value = torch.as_tensor(setting, dtype=logits.dtype, device=logits.device)
    return value[:, None] if value.ndim else value
