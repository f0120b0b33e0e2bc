"""Beam search on the paged KV cache.

Hypotheses share the pages of their common prefix; a page is copied (copy-on-write) when two
hypotheses diverge inside it.

In each step, every running hypothesis is extended by every token of the vocabulary. The best
(1 + number of EOS tokens) · B continuations are considered: those among the first B that end with
EOS are finished, and the best B that do not end continue. A finished hypothesis of n tokens with
summed log-probability Σ log p has the score

    Σ log p / n^α                  (power)
    Σ log p / ((5 + n) / 6)^α      (gnmt: Wu et al. 2016, arXiv 1609.08144, eq. 14)

The selection of finished hypotheses and the stopping rule are those of Hugging Face's `generate`.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.engine.engine import Engine
from easyllm.engine.page_table import Copies, PageTable
from easyllm.engine.pages import Namespace
from easyllm.engine.params import BeamParams
from easyllm.engine.step import ScheduledChunk, Step


@dataclass(frozen=True, slots=True, kw_only=True)
class Hypothesis:
    """A finished continuation of the prompt.

    Attributes:
        token_ids: generated tokens without the prompt, including the EOS token if there is one.
        logprobs: log-probability of each token in nats.
        score: length-normalized score by which hypotheses are ranked.
        ended: True if the hypothesis ended with EOS, False if it reached the token limit.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    score: float
    ended: bool


@dataclass(slots=True, eq=False)
class _Beam:
    """A running hypothesis; the keys and values of its last token are not in the cache yet."""

    sequence_id: int
    table: PageTable
    tokens: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    total: float = 0.0


@dataclass(frozen=True, slots=True)
class _Candidate:
    parent: _Beam
    token: int
    logprob: float
    total: float


def beam_search(
    engine: Engine, prompt_ids: tuple[int, ...], params: BeamParams
) -> list[Hypothesis]:
    """Returns the `params.n` best finished hypotheses, best first.

    Args:
        engine: an idle engine; its cache pages are used and freed again afterwards.
        prompt_ids: token ids of the prompt.
        params: beam search parameters.

    Raises:
        ConfigError: the engine is busy, or the prompt and its hypotheses are too long for the
            context or the cache.
    """
    return _Search(engine, prompt_ids, params).run()


class _Search:
    """State of one search: its limits, its running beams and the finished hypotheses."""

    def __init__(self, engine: Engine, prompt_ids: tuple[int, ...], params: BeamParams) -> None:
        if engine.busy:
            raise ConfigError(
                "beam search needs an engine without running requests; wait until they finish"
            )
        self.engine, self.params = engine, params
        self.prompt = engine.prepend_virtual_tokens(prompt_ids)
        self.limit = engine.check_prompt(prompt_ids, params.max_tokens)
        self.ends = frozenset(engine.model.config.eos_token_ids)
        self.finished: list[Hypothesis] = []
        self.forks: tuple[tuple[int, int], ...] = ()  # recurrent states to copy in the next pass
        self.dropped: list[int] = []
        self._refuse_short_cache()

    @torch.inference_mode()
    def run(self) -> list[Hypothesis]:
        beams: list[_Beam] = []
        try:
            first, logits = self._prefill()
            beams = [first]
            for length in range(1, self.limit + 1):
                candidates = self._candidates(beams, logits)
                continuing = self._finish(candidates, length)
                if not continuing or self._is_done(continuing, length):
                    break
                beams = self._continue(beams, continuing)
                logits = self._step(beams, length)
        finally:
            for beam in beams:
                beam.table.release()
        return self.finished[: self.params.n]

    def score(self, total: float, length: int) -> float:
        """Returns the score of a hypothesis of `length` tokens with log-probability `total`."""
        alpha = self.params.length_penalty
        base = (5 + length) / 6 if self.params.normalization == "gnmt" else length
        return float(total / base**alpha)

    def _refuse_short_cache(self) -> None:
        pool = self.engine.pool
        shared, rest = divmod(len(self.prompt), pool.page_size)
        own = -(-(rest + self.limit) // pool.page_size)
        # one extra page: a shared page is copied before its reference is released
        needed = shared + self.params.num_beams * own + 1
        if needed > pool.num_pages:
            raise ConfigError(
                f"{self.params.num_beams} beams of {self.limit} tokens after a prompt of "
                f"{len(self.prompt)} tokens need up to {needed} pages, but the cache has "
                f"{pool.num_pages}; lower num_beams or max_tokens, or raise cache_gb"
            )

    def _prefill(self) -> tuple[_Beam, Tensor]:
        """Prefills the prompt; returns its beam and the logits [1, V] after its last token."""
        table = PageTable(self.engine.pool, Namespace())
        beam = _Beam(self.engine.next_sequence_id(), table)
        try:
            start = table.adopt(self.prompt) if self.engine.pool.prefix_caching else 0
            whole = self.engine.scheduler.unchunked_prefill
            chunk = len(self.prompt) if whole else self.engine.scheduler.max_step_tokens
            while start < len(self.prompt):
                tokens = self.prompt[start : start + chunk]
                last = start + len(tokens) == len(self.prompt)
                logits = self._run([(beam, tokens, start)], rows=int(last))
                start += len(tokens)
                table.commit(self.prompt, start)
        except BaseException:
            table.release()
            raise
        return beam, logits

    def _candidates(self, beams: list[_Beam], logits: Tensor) -> list[_Candidate]:
        """Returns the best continuations over all beams, best first."""
        logprobs = logits.log_softmax(-1)  # [N, V]
        before = torch.tensor([b.total for b in beams], dtype=logprobs.dtype, device=logits.device)
        totals = (logprobs + before[:, None]).flatten()
        count = max(2, 1 + len(self.ends)) * self.params.num_beams
        best = totals.topk(min(count, len(totals)))
        vocab_size = logits.shape[1]
        each = logprobs.flatten()[best.indices].tolist()
        return [
            _Candidate(beams[place // vocab_size], place % vocab_size, logprob, total)
            for place, logprob, total in zip(
                best.indices.tolist(), each, best.values.tolist(), strict=True
            )
        ]

    def _finish(self, candidates: list[_Candidate], length: int) -> list[_Candidate]:
        """Stores the candidates among the first B that finish; returns the best B that continue."""
        size = self.params.num_beams
        for candidate in candidates[:size]:
            ended = candidate.token in self.ends
            if ended or length == self.limit:
                parent = candidate.parent
                self.finished.append(
                    Hypothesis(
                        token_ids=(*parent.tokens, candidate.token),
                        logprobs=(*parent.logprobs, candidate.logprob),
                        score=self.score(candidate.total, length),
                        ended=ended,
                    )
                )
        self.finished = sorted(self.finished, key=lambda h: h.score, reverse=True)[:size]
        if length == self.limit:
            return []
        return [c for c in candidates if c.token not in self.ends][:size]

    def _is_done(self, continuing: list[_Candidate], length: int) -> bool:
        """Whether B hypotheses have finished and no running one is expected to beat the worst."""
        if len(self.finished) < self.params.num_beams:
            return False
        stopping = self.params.early_stopping
        if stopping is True:
            return True
        longest = stopping == "never" and self.params.length_penalty > 0
        best_possible_score = self.score(continuing[0].total, self.limit if longest else length)
        return best_possible_score <= self.finished[-1].score

    def _continue(self, beams: list[_Beam], continuing: list[_Candidate]) -> list[_Beam]:
        """Forks the new beams from their parents' pages; releases the parents' page references."""
        new = [
            _Beam(
                sequence_id=self.engine.next_sequence_id(),
                table=c.parent.table.fork(),
                tokens=(*c.parent.tokens, c.token),
                logprobs=(*c.parent.logprobs, c.logprob),
                total=c.total,
            )
            for c in continuing
        ]
        self.forks = tuple(
            (c.parent.sequence_id, beam.sequence_id)
            for c, beam in zip(continuing, new, strict=True)
        )
        for beam in beams:
            beam.table.release()
            self.dropped.append(beam.sequence_id)
        return new

    def _step(self, beams: list[_Beam], length: int) -> Tensor:
        """Decodes the last token of each beam; returns the logits [N, V] after it."""
        start = len(self.prompt) + length - 1
        return self._run([(beam, beam.tokens[-1:], start) for beam in beams], rows=1)

    def _run(self, parts: list[tuple[_Beam, tuple[int, ...], int]], rows: int) -> Tensor:
        copies: Copies = {}
        pieces = []
        prefix = self.engine.scheduler.prefix_length(len(self.prompt))
        for beam, tokens, start in parts:
            found = beam.table.reserve(start, start + len(tokens), copies)
            assert found, "the page count was checked when the search started"
        for beam, tokens, start in parts:
            pieces.append(
                ScheduledChunk(
                    sequence_id=beam.sequence_id,
                    token_ids=tokens,
                    start=start,
                    pages=tuple(beam.table.pages),
                    num_logit_rows=rows,
                    prefix=prefix,
                )
            )
        forks, self.forks = self.forks, ()
        dropped, self.dropped = tuple(self.dropped), []
        step = Step(pieces=tuple(pieces), copies=copies, forks=forks, dropped=dropped)
        return self.engine.runner.run(step)
