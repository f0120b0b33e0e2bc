"""Scheduler: continuous batching, chunked prefill and preemption by recomputation.

Requests are scheduled first come, first served. Each step first decodes all running sequences; the
remaining token budget is used to prefill prompts, in chunks if they are long (chunked prefill;
Agrawal et al. 2023, arXiv 2308.16369). If pages run out, the youngest sequence is preempted: it
releases all its pages and is recomputed later, with its generated tokens as part of its prompt
(Kwon et al. 2023, arXiv 2309.06180, section 4.5). This module does not use torch; it handles only
sequences, tokens and page numbers.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from easyllm.engine.page_table import Copies, PageTable
from easyllm.engine.pages import Namespace, PagePool
from easyllm.engine.step import ScheduledChunk, Step


@dataclass(slots=True, eq=False)
class Sequence:
    """A sequence of tokens, waiting or running.

    Attributes:
        id: id of the sequence, under which its recurrent states are stored.
        tokens: prompt and generated tokens.
        prompt_length: number of prompt tokens.
        namespace: scope in which its pages are shared.
        copies: number of sequences that will share the prompt (this one, and its forks once the
            prompt is computed).
        prompt_rows: whether the logits of all prompt tokens are needed, in which case no cached
            prefix is reused.
        drafts: draft tokens, computed together with the last token.
        computed: number of tokens whose keys and values are in the cache.
        table: its pages; None while it is waiting.
        cached: number of tokens found in the prefix cache when it first ran; None before.
    """

    id: int
    tokens: list[int]
    prompt_length: int
    namespace: Namespace = field(default_factory=Namespace)
    copies: int = 1
    prompt_rows: bool = False
    drafts: tuple[int, ...] = ()
    computed: int = 0
    table: PageTable | None = None
    cached: int | None = None

    @property
    def pending(self) -> int:
        """Number of tokens that are not computed yet."""
        return len(self.tokens) - self.computed


class Scheduler:
    """Plans the steps of the engine.

    Args:
        pool: the page pool.
        max_running: maximum number of sequences that run at once.
        max_step_tokens: token budget of a step.
        window: the widest sliding window of a model with a window in every layer; pages before the
            window are released. None for other models.
        num_sinks: number of first tokens (attention sinks) whose pages are retained nevertheless.
        unchunked_prefill: whether prompts are prefilled unchunked, even beyond the budget.
        prefix: whether attention among the prompt's tokens is bidirectional (prefix LM).
        prefix_excludes: number of last tokens of a prompt for which it is not.
    """

    def __init__(
        self,
        pool: PagePool,
        *,
        max_running: int = 64,
        max_step_tokens: int = 2048,
        window: int | None = None,
        num_sinks: int = 0,
        unchunked_prefill: bool = False,
        prefix: bool = False,
        prefix_excludes: int = 0,
    ) -> None:
        assert max_running <= max_step_tokens, "every running sequence decodes in every step"
        self.pool, self.window, self.num_sinks = pool, window, num_sinks
        self.max_running, self.max_step_tokens = max_running, max_step_tokens
        self.unchunked_prefill = unchunked_prefill
        self.prefix, self.prefix_excludes = prefix, prefix_excludes
        self.waiting: deque[Sequence] = deque()
        self.running: list[Sequence] = []  # oldest first
        self.num_preemptions = 0
        self._copies: Copies = {}
        self._forks: list[tuple[int, int]] = []
        self._dropped: list[int] = []

    @property
    def busy(self) -> bool:
        """Whether any sequence is unfinished."""
        return bool(self.waiting or self.running)

    def pages_needed(self, length: int) -> int:
        """Returns the maximum number of pages that a sequence of `length` tokens uses at once."""
        size = self.pool.page_size
        pages = -(-length // size)
        if self.window is None or self.unchunked_prefill:
            return pages
        # a chunk is written before the window moves on; both may start in the middle of a page
        rolling = -(-(self.window - 1 + self.max_step_tokens) // size) + 1
        return min(pages, rolling + -(-self.num_sinks // size))

    def add(self, sequence: Sequence) -> None:
        """Appends a sequence to the queue."""
        self.waiting.append(sequence)

    def plan(self) -> Step | None:
        """Plans the next step; returns None if there is nothing to compute."""
        self._copies = {}
        pieces = self._decodes()
        budget = self.max_step_tokens - sum(len(piece.token_ids) for piece in pieces)
        pieces += self._prefills(budget, bool(pieces))
        if not pieces:
            assert not self.busy, "at least one sequence can always make progress"
            return None
        step = Step(
            pieces=tuple(pieces),
            copies=self._copies,
            forks=tuple(self._forks),
            dropped=tuple(self._dropped),
        )
        self._forks, self._dropped = [], []
        return step

    def advance(self, sequence: Sequence, computed: int) -> None:
        """Records that the first `computed` tokens of a sequence are valid in the cache."""
        assert sequence.table is not None, "only a running sequence advances"
        sequence.computed, sequence.drafts = computed, ()
        sequence.table.commit(sequence.tokens, computed)
        self._roll(sequence)

    def fork(self, parent: Sequence, child_ids: Iterable[int]) -> list[Sequence]:
        """Forks a running sequence into children that share its tokens and pages.

        The children are placed directly after their parent in the order of running sequences.
        """
        assert parent.table is not None, "only a running sequence forks"
        children = [
            Sequence(
                id=child_id,
                tokens=list(parent.tokens),
                prompt_length=parent.prompt_length,
                namespace=parent.namespace,
                computed=parent.computed,
                table=parent.table.fork(),
                cached=parent.cached,
            )
            for child_id in child_ids
        ]
        parent.copies -= len(children)
        assert parent.copies == 1, "all copies are forked at once"
        place = self.running.index(parent) + 1
        self.running[place:place] = children
        self._forks.extend((parent.id, child.id) for child in children)
        return children

    def remove(self, sequence: Sequence) -> None:
        """Removes a sequence, finished or not, and releases its pages."""
        if sequence.table is not None:
            self.running.remove(sequence)
            self._release(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)

    def preempt(self, sequence: Sequence) -> None:
        """Preempts a running sequence: moves it to the head of the queue, to be recomputed."""
        self.num_preemptions += 1
        self.running.remove(sequence)
        self._release(sequence)
        self.waiting.appendleft(sequence)

    def preempt_all(self) -> None:
        """Preempts all running sequences, to be recomputed in the same order."""
        for sequence in reversed(self.running.copy()):
            self.preempt(sequence)

    def check(self) -> None:
        """Asserts that every page is accounted for."""
        self.pool.check([s.table.held for s in self.running if s.table is not None])

    def _decodes(self) -> list[ScheduledChunk]:
        """Plans one token, and any draft tokens, for each sequence whose prompt is computed.

        Pages are reserved for the oldest sequences first; the youngest ones are preempted if pages
        run out.
        """
        pieces: list[ScheduledChunk] = []
        left = self.max_step_tokens - sum(s.pending == 1 for s in self.running)
        place = 0
        while place < len(self.running):
            sequence = self.running[place]
            place += 1
            if sequence.pending != 1:
                continue
            sequence.drafts = sequence.drafts[: max(0, left)]
            if sequence.drafts and not self._reserve(sequence, 1 + len(sequence.drafts)):
                sequence.drafts = ()  # draft tokens do not justify a preemption
            while not self._reserve(sequence, 1 + len(sequence.drafts)):
                youngest = self.running[-1]
                self.preempt(youngest)
                if youngest is sequence:
                    break
            else:
                left -= len(sequence.drafts)
                pieces.append(self._piece(sequence, 1 + len(sequence.drafts)))
        return pieces

    def _prefills(self, budget: int, decoding: bool) -> list[ScheduledChunk]:
        """Plans prompt chunks within the budget: the running prompt first, then waiting ones."""
        pieces: list[ScheduledChunk] = []
        for sequence in tuple(self.running):
            if sequence.pending > 1:
                pieces += (piece := self._chunk(sequence, budget, not pieces))
                budget -= sum(len(p.token_ids) for p in piece)
                if not piece or sequence.pending > len(piece[0].token_ids):
                    return pieces  # no later request may overtake it
        while self.waiting and budget > 0:
            sequence = self.waiting[0]
            taken = sum(s.copies for s in self.running)
            if taken + sequence.copies > self.max_running:
                break
            self._open(sequence)
            idle = not (self.running or pieces or decoding)
            found = (
                []
                if not (idle or self._fits(sequence))
                else self._chunk(sequence, budget, not pieces)
            )
            if not found:
                self._release(sequence)
                break
            self.running.append(self.waiting.popleft())
            if sequence.cached is None:
                sequence.cached = sequence.computed
            pieces += found
            budget -= len(found[0].token_ids)
            if sequence.pending > len(found[0].token_ids):
                break
        return pieces

    def _open(self, sequence: Sequence) -> None:
        """Creates the page table of a waiting sequence and fills it with any cached prefix."""
        sequence.table = PageTable(self.pool, sequence.namespace, num_sinks=self.num_sinks)
        if self.pool.prefix_caching and not sequence.prompt_rows:
            sequence.computed = sequence.table.adopt(sequence.tokens)
            self._roll(sequence)

    def _fits(self, sequence: Sequence) -> bool:
        """Whether there are pages for an entire waiting sequence and one more token.

        Otherwise it would cause preemptions as soon as it runs.
        """
        assert sequence.table is not None, "it has been opened"
        needed = self.pages_needed(len(sequence.tokens) + 1) - len(sequence.table.held)
        return needed <= self.pool.available

    def _roll(self, sequence: Sequence) -> None:
        """Releases the pages that the sliding window has passed."""
        if self.window is not None and sequence.table is not None:
            sequence.table.roll(max(0, sequence.computed - self.window + 1))

    def _chunk(self, sequence: Sequence, budget: int, first: bool) -> list[ScheduledChunk]:
        """Plans as much of a prompt as budget and pages allow; returns one piece, or none."""
        assert sequence.table is not None, "only a running sequence is computed"
        size, count = self.pool.page_size, sequence.pending
        if self.unchunked_prefill:
            if count > budget and not first:
                return []
        else:
            count = min(count, budget)
            pages = len(sequence.table.pages) + self.pool.available
            count = min(count, pages * size - sequence.computed)
        if count <= 0 or not self._reserve(sequence, count):
            return []
        return [self._piece(sequence, count)]

    def _reserve(self, sequence: Sequence, count: int) -> bool:
        assert sequence.table is not None, "only a running sequence is computed"
        start = sequence.computed
        return sequence.table.reserve(start, start + count, self._copies)

    def _piece(self, sequence: Sequence, count: int) -> ScheduledChunk:
        assert sequence.table is not None, "only a running sequence is computed"
        start = sequence.computed
        known = sequence.tokens[start : start + count]
        ends = start + count >= len(sequence.tokens)
        rows = 1 + len(sequence.drafts) if ends else 0
        if sequence.prompt_rows and start < sequence.prompt_length:
            rows = count
        return ScheduledChunk(
            sequence_id=sequence.id,
            token_ids=(*known, *(sequence.drafts if ends else ())),
            start=start,
            pages=tuple(sequence.table.pages),
            num_logit_rows=rows,
            prefix=self.prefix_length(sequence.prompt_length),
            adapter=sequence.namespace.adapter,
        )

    def prefix_length(self, prompt_length: int) -> int:
        """Returns the number of first tokens of a prompt with bidirectional attention."""
        return prompt_length - self.prefix_excludes if self.prefix else 0

    def _release(self, sequence: Sequence) -> None:
        assert sequence.table is not None, "only a sequence with a page table has pages to release"
        sequence.table.release()
        sequence.table, sequence.computed, sequence.drafts = None, 0, ()
        self._dropped.append(sequence.id)
