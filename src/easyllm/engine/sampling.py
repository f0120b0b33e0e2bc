"""Sampling: chooses the next token ids from logits."""

import logging
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from easyllm.engine.masks import checked_words, compute_together
from easyllm.engine.params import SamplingParams
from easyllm.engine.processors import (
    add_bias,
    allow_packed,
    bar,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    keep_typical,
    penalise_output,
    penalise_repetition,
    repeated_ngrams,
    scale,
)
from easyllm.engine.request import Logprobs, TokenMask
from easyllm.ops.logsumexp import logsumexp

logger = logging.getLogger(__name__)

MIN_TEMPERATURE = 1e-6
"""Minimum temperature; lower ones are clamped to it. The most likely token has all the probability
at this temperature, and nothing overflows."""


def new_rng(seed: int | None, index: int) -> random.Random:
    """Returns the random number generator of one completion.

    Each completion has its own, so that its tokens are independent of the batch composition.
    """
    return random.Random() if seed is None else random.Random(f"{seed}/{index}")


@dataclass(slots=True, eq=False)
class SamplerState:
    """Sampling state of one completion.

    Attributes:
        params: sampling parameters of the request.
        source: random number generator; one number is drawn per token.
        token_ids: prompt and output.
        output_start: index in `token_ids` where the output begins.
        end_ids: token ids that end the completion.
        mask: restricts the allowed tokens step by step (guided decoding).
        failed: whether the processing of its logits (a mask, for example) has failed; the
            completion ends then.
        prompt_start: index in `token_ids` where the prompt begins, after any virtual tokens.
    """

    params: SamplingParams
    source: random.Random
    token_ids: list[int]
    output_start: int
    end_ids: frozenset[int] = frozenset()
    mask: TokenMask | None = None
    failed: bool = False
    prompt_start: int = 0
    _prompt: Tensor | None = field(default=None, repr=False)

    @property
    def num_output(self) -> int:
        """Number of tokens generated so far."""
        return len(self.token_ids) - self.output_start

    @property
    def changes_logits(self) -> bool:
        """Whether `process` changes the next token's logits."""
        p = self.params
        return bool(
            p.logit_bias
            or p.repetition_penalty != 1
            or p.presence_penalty
            or p.frequency_penalty
            or p.no_repeat_ngram_size
            or self.num_output < p.min_tokens
            or self.failed
        )

    def push(self, token_id: int) -> None:
        """Appends a new token, and advances the mask by it."""
        self.token_ids.append(token_id)
        if self.mask is not None and not self.failed:
            try:
                self.mask.advance(token_id)
            except Exception:
                logger.exception("a token mask failed to advance; its completion ends")
                self.failed = True

    def process(self, logits: Tensor) -> Tensor:
        """Applies bias, penalties, n-gram ban and minimum length to the logits [V].

        The order is that of Hugging Face's `generate`. If processing fails, all logits are -inf,
        which ends this completion only.
        """
        if self.failed:
            return torch.full_like(logits, float("-inf"))
        try:
            return self._processed(logits)
        except Exception:
            logger.exception("processing the logits of a completion failed; it ends")
            self.failed = True
            return torch.full_like(logits, float("-inf"))

    def _processed(self, logits: Tensor) -> Tensor:
        p = self.params
        if p.logit_bias:
            logits = add_bias(logits, p.logit_bias)
        output = self.token_ids[self.output_start :]
        if p.repetition_penalty != 1:
            if self._prompt is None:
                known = set(self.token_ids[self.prompt_start : self.output_start])
                self._prompt = torch.tensor(list(known), dtype=torch.int64, device=logits.device)
            seen = torch.cat(
                [self._prompt, torch.tensor(output, dtype=torch.int64).to(logits.device)]
            )
            logits = penalise_repetition(logits, seen, p.repetition_penalty)
        if (p.presence_penalty or p.frequency_penalty) and output:
            counts = Counter(output)
            ids, times = (
                torch.tensor(list(x)).to(logits.device) for x in (counts, counts.values())
            )
            logits = penalise_output(
                logits, ids, times, presence=p.presence_penalty, frequency=p.frequency_penalty
            )
        if p.no_repeat_ngram_size:
            own = self.token_ids[self.prompt_start :]
            logits = bar(logits, repeated_ngrams(own, p.no_repeat_ngram_size))
        if self.num_output < p.min_tokens:
            logits = bar(logits, self.end_ids)
        return logits

    def may_take(self, token_id: int) -> bool:
        """Whether the most likely token, without the mask, is certainly the one to choose."""
        allows = getattr(self.mask, "allows", None)
        if allows is None or self.params.temperature > 0 or self.params.logprobs is not None:
            return False
        try:
            return bool(allows(token_id))
        except Exception:
            logger.exception("a token mask failed to check a token; its whole mask is computed")
            return False

    def allowed(self, vocab_size: int) -> Tensor | None:
        """Returns the mask's bitmask [⌈V/32⌉] int32 on the CPU; None if all tokens are allowed.

        If the mask fails, it allows nothing, which ends this completion only.
        """
        if self.mask is None or self.failed:
            return None
        try:
            words = self.mask.mask()
            return None if words is None else checked_words(words, vocab_size)
        except Exception:
            logger.exception("a token mask failed; its completion ends")
            self.failed = True
            return torch.zeros(-(-vocab_size // 32), dtype=torch.int32)


@dataclass(frozen=True, slots=True, kw_only=True)
class Draft:
    """A draft token.

    Attributes:
        token_id: the token.
        probabilities: the distribution [V] from which it was sampled; None if it was not sampled.
    """

    token_id: int
    probabilities: Tensor | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class SampledToken:
    """The token chosen for one row.

    Attributes:
        token_id: the token; None if no token is allowed, which ends the completion.
        logprob: log-probability in nats under the raw distribution; meaningless without a token.
        logprobs: detailed log-probabilities, if requested.
    """

    token_id: int | None
    logprob: float
    logprobs: Logprobs | None = None


def sample_tokens(
    logits: Tensor,
    samplers: Sequence[SamplerState],
    drafts: Sequence[Draft | None] | None = None,
    *,
    row_by_row: bool = False,
) -> list[SampledToken]:
    """Chooses the next token of each row.

    Args:
        logits: raw logits [N, V].
        samplers: sampling state of each row.
        drafts: a draft token for each row, or None. A draft sampled from a distribution q is
            accepted with probability min(1, p / q), and otherwise replaced by a token sampled from
            max(0, p - q) normalized, which leaves the distribution of tokens unchanged (speculative
            sampling; Leviathan et al. 2022, arXiv 2211.17192, section 2.3).
        row_by_row: whether each row that draws a token is processed separately (deterministic
            mode): PyTorch's rounding of sums over the vocabulary depends on the number of rows.

    Returns:
        The choice for each row.
    """
    processed, ids = _process(logits, samplers)
    allowed = processed  # before the filters of sampling
    ended = set[int]()
    if processed is not logits:
        best = processed.gather(1, ids[:, None]).squeeze(1).tolist()
        ended = {row for row, value in enumerate(best) if value == float("-inf")}
        for row in ended:
            processed[row] = logits[row]
    drawn = [row for row, sampler in enumerate(samplers) if sampler.params.temperature > 0]
    if drawn:
        rows = torch.tensor(drawn, device=logits.device)
        whole = len(drawn) == len(samplers)
        chosen, own = processed if whole else processed[rows], [samplers[row] for row in drawn]
        guesses = [drafts[row] if drafts is not None else None for row in drawn]
        if row_by_row:
            each = zip(chosen.split(1), own, guesses, strict=True)
            found = [_draw(row, [sampler], [guess]) for row, sampler, guess in each]
            narrowed, tokens_drawn = (torch.cat(parts) for parts in zip(*found, strict=True))
        else:
            narrowed, tokens_drawn = _draw(chosen, own, guesses)
        processed = narrowed if whole else processed.index_copy(0, rows, narrowed)
        ids = ids.index_copy(0, rows, tokens_drawn)
    raw = (logits.gather(1, ids[:, None]).squeeze(1) - logsumexp(logits)).tolist()
    tokens = ids.tolist()
    details = _details(logits, allowed, processed, tokens, [c.params.logprobs for c in samplers])
    return [
        SampledToken(
            token_id=None if row in ended else token, logprob=raw[row], logprobs=details.get(row)
        )
        for row, token in enumerate(tokens)
    ]


def _draw(
    logits: Tensor, samplers: Sequence[SamplerState], drafts: Sequence[Draft | None]
) -> tuple[Tensor, Tensor]:
    """Returns the logits [N, V] that tokens are drawn from, and the tokens [N]."""
    narrowed = apply_sampling_filters(logits, [sampler.params for sampler in samplers])
    sources = [sampler.source for sampler in samplers]
    return narrowed, sample_multinomial(narrowed, sources, drafts)


def _process(logits: Tensor, samplers: Sequence[SamplerState]) -> tuple[Tensor, Tensor]:
    """Applies the processors and masks to logits [N, V].

    Returns:
        The logits, the same tensor if nothing changes, and the most likely token of each row, [N].
        A row keeps tokens that its mask does not allow if only its most likely token matters, and
        this one is allowed.
    """
    processed = logits
    changed = [row for row, sampler in enumerate(samplers) if sampler.changes_logits]
    if changed:
        processed = logits.clone()
        for row in changed:
            processed[row] = samplers[row].process(logits[row])
    masked = [row for row, s in enumerate(samplers) if s.mask is not None and not s.failed]
    if logits.device.type != "cpu":  # first of all, while the device computes the logits
        compute_together(mask for row in masked if (mask := samplers[row].mask) is not None)
    ids = processed.argmax(-1)
    if masked and logits.device.type == "cpu":
        best = ids.tolist()
        masked = [row for row in masked if not samplers[row].may_take(best[row])]
        compute_together(mask for row in masked if (mask := samplers[row].mask) is not None)
    words = {row: samplers[row].allowed(logits.shape[1]) for row in masked}
    packed = {row: each for row, each in words.items() if each is not None}
    if not packed:
        return processed, ids
    rows = torch.tensor(list(packed), device=logits.device)
    chosen = processed if len(rows) == len(logits) else processed[rows]
    limited = allow_packed(chosen, torch.stack(list(packed.values())))
    if len(rows) == len(logits):
        return limited, limited.argmax(-1)
    ids = ids.index_copy(0, rows, limited.argmax(-1))
    return processed.index_copy(0, rows, limited), ids


def apply_sampling_filters(logits: Tensor, params: Sequence[SamplingParams]) -> Tensor:
    """Applies temperature, top-k, top-p, min-p and typical-p to the logits [N, V].

    The order is that of Hugging Face's `generate`; logits of excluded tokens are -inf.
    """
    logits = _on_rows(logits, [max(p.temperature, MIN_TEMPERATURE) for p in params], 1.0, scale)
    logits = _on_rows(logits, [p.top_k for p in params], 0, keep_top_k)
    logits = _on_rows(logits, [p.top_p for p in params], 1.0, keep_top_p)
    logits = _on_rows(logits, [p.min_p for p in params], 0.0, keep_min_p)
    return _on_rows(logits, [p.typical_p for p in params], 1.0, keep_typical)


def prompt_logprobs(logits: Tensor, token_ids: Sequence[int], count: int) -> list[Logprobs]:
    """Returns log-probabilities of given tokens and of the `count` most likely at each position.

    Args:
        logits: raw logits [N, V], from which each token is predicted.
        token_ids: the N tokens.
        count: number of most likely tokens to report.
    """
    values, top = _top(logits, token_ids, count)
    places = zip(token_ids, values, top, strict=True)
    return [Logprobs(token_id=token, raw=value, top_raw=best) for token, value, best in places]


def sample_multinomial(
    logits: Tensor,
    sources: Sequence[random.Random],
    drafts: Sequence[Draft | None] | None = None,
) -> Tensor:
    """Samples a token id for each row from softmax(logits), by inverse transform sampling.

    A row draws one uniform number from its own source and takes the first token at which the
    cumulative probability, in fp64, exceeds it. A draft token with a distribution is accepted or
    replaced as in `sample_tokens`.

    Returns:
        [N] int64 token ids.
    """
    probabilities = logits.softmax(-1)
    forced: dict[int, int] = {}
    for row, draft in enumerate(drafts or ()):
        if draft is None or draft.probabilities is None:
            continue
        p, q = probabilities[row], draft.probabilities.to(probabilities.device)
        if sources[row].random() * float(q[draft.token_id]) < float(p[draft.token_id]):
            forced[row] = draft.token_id
            continue
        rest = (p - q).clamp(min=0)
        if bool(rest.any()):  # if p equals q up to rounding, the rest is empty and p is correct
            probabilities[row] = rest
    cumulated = probabilities.cumsum(-1, dtype=torch.float64)
    numbers = [0.0 if row in forced else source.random() for row, source in enumerate(sources)]
    total = cumulated[:, -1:]
    at = torch.tensor(numbers, dtype=torch.float64, device=logits.device)[:, None] * total
    at = torch.minimum(at, torch.nextafter(total, torch.zeros_like(total)))
    ids = torch.searchsorted(cumulated, at, right=True).squeeze(1)
    # the search fails for a row of NaN, which must not affect the other rows
    ids = ids.clamp(max=logits.shape[1] - 1)
    for row, token in forced.items():
        ids[row] = token
    return ids


def _details(
    raw: Tensor,
    allowed: Tensor,
    processed: Tensor,
    tokens: Sequence[int],
    counts: Sequence[int | None],
) -> dict[int, Logprobs]:
    """Returns the requested log-probabilities by row; a row's count is None if not requested.

    `allowed` are the logits before the filters of sampling: -inf for tokens that are not allowed.
    """
    rows = [row for row, count in enumerate(counts) if count is not None]
    if not rows:
        return {}
    most = max(count for count in counts if count is not None)
    chosen = [tokens[row] for row in rows]
    values, top = _top(raw[rows], chosen, most)
    changed = processed is not raw
    others, top_others = _top(processed[rows], chosen, most) if changed else (values, top)
    probabilities = raw[rows].softmax(-1)
    entropies = torch.special.entr(probabilities).sum(-1).tolist()
    masses, excluded = [0.0] * len(rows), None
    if allowed is not raw:
        excluded = allowed[rows].isneginf() & ~raw[rows].isneginf()
        masses = (probabilities * excluded).sum(-1).tolist()
    return {
        row: Logprobs(
            token_id=chosen[i],
            raw=values[i],
            top_raw=top[i][: counts[row]],
            processed=others[i],
            top_processed=top_others[i][: counts[row]],
            entropy=entropies[i],
            removed_mass=masses[i],
            removed=frozenset(
                token
                for token, _ in top[i][: counts[row]]
                if excluded is not None and bool(excluded[i, token])
            ),
        )
        for i, row in enumerate(rows)
    }


def _top(
    logits: Tensor, tokens: Sequence[int], count: int
) -> tuple[list[float], list[tuple[tuple[int, float], ...]]]:
    """Returns the log-probability of a token of each row [N, V], and the `count` largest with ids.

    Excluded tokens (-inf) are omitted.
    """
    total = logsumexp(logits)[:, None]
    ids = torch.tensor(tokens, device=logits.device)[:, None]
    values: list[float] = (logits.gather(1, ids) - total).squeeze(1).tolist()
    best = logits.topk(min(count, logits.shape[1]), dim=-1)
    pairs = zip(best.indices.tolist(), (best.values - total).tolist(), strict=True)
    top = [
        tuple((i, value) for i, value in zip(*row, strict=True) if value > float("-inf"))
        for row in pairs
    ]
    return values, top


def _on_rows(
    logits: Tensor,
    settings: Sequence[float],
    neutral: float,
    function: Callable[[Tensor, Tensor], Tensor],
) -> Tensor:
    """Applies `function` to the rows whose setting differs from `neutral`."""
    asked = [row for row, setting in enumerate(settings) if setting != neutral]
    if not asked:
        return logits
    values = [settings[row] for row in asked]
    kind = torch.int64 if isinstance(neutral, int) else torch.float64
    each = torch.tensor(values, dtype=kind, device=logits.device)
    if len(asked) == len(settings):
        return function(logits, each)
    rows = torch.tensor(asked, device=logits.device)
    return logits.index_copy(0, rows, function(logits[rows], each))
