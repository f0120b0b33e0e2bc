"""Speculative decoding with a smaller draft model (Leviathan et al. 2022, arXiv 2211.17192)."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.engine.generation import Generation
from easyllm.engine.kv_cache import KVCache
from easyllm.engine.page_table import PageTable
from easyllm.engine.pages import Namespace, PagePool
from easyllm.engine.runner import DecoderRunner
from easyllm.engine.sampling import Draft, SamplerState, apply_sampling_filters, sample_multinomial
from easyllm.engine.speculative import refuse_length_dependent_keys, refuse_recurrent_states
from easyllm.engine.step import ScheduledChunk, Step
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder


@dataclass(slots=True)
class _DraftState:
    """What the draft model has computed for a sequence.

    Attributes:
        table: the sequence's pages in the draft model's cache.
        fed: the tokens that the draft model has processed.
        sure: number of leading tokens in `fed` that belong to the sequence; the rest are drafts.
    """

    table: PageTable
    fed: list[int] = field(default_factory=list)
    sure: int = 0


class ModelDrafter:
    """Proposes draft tokens from a separate model with its own paged KV cache.

    Greedy completions get the draft model's most likely tokens. Sampled completions get tokens
    drawn from its distribution under the same temperature, top-k and so on, together with that
    distribution.

    Args:
        model: the draft model, with the target's vocabulary, in inference mode.
        num_tokens: maximum number of draft tokens per step.
        num_pages, page_size: size of the draft model's cache; a sequence that does not fit gets no
            draft tokens.
    """

    def __init__(
        self, model: Decoder, num_tokens: int = 4, *, num_pages: int, page_size: int = 16
    ) -> None:
        self.model, self.num_tokens = model, num_tokens
        self.pool = PagePool(num_pages, page_size, prefix_caching=False)
        self._followers: dict[int, _DraftState] = {}
        self._runner: DecoderRunner | None = None

    def check(self, target: ModelConfig) -> None:
        """Refuses target models that this draft model cannot be used with.

        Raises:
            ConfigError: the vocabularies differ, a model has recurrent states, which cannot be
                rolled back, or the target's keys depend on the length of the pass (dynamic NTK).
        """
        draft = self.model.config
        if draft.vocab_size != target.vocab_size:
            raise ConfigError(
                f"the draft model has {draft.vocab_size} token ids and the model "
                f"{target.vocab_size}; use a draft model with the same tokenizer"
            )
        refuse_recurrent_states(target)
        refuse_recurrent_states(draft)
        refuse_length_dependent_keys(target)

    def propose(self, generations: Sequence[Generation]) -> dict[int, tuple[Draft, ...]]:
        """Returns draft tokens, by sequence id, for each completion that fits into the cache."""
        alive = [g for g in generations if self._follow(g)]
        guesses: dict[int, list[Draft]] = {g.sequence.id: [] for g in alive}
        for turn in range(self.num_tokens):
            if not alive:
                break
            pieces = [self._piece(g, guesses[g.sequence.id]) for g in alive]
            try:
                logits = self._run(pieces)
            except BaseException:
                for generation in generations:  # the failed pass left the cache in an unknown state
                    self.forget(generation.sequence.id)
                raise
            for generation, draft in zip(alive, self._guess(alive, logits), strict=True):
                guesses[generation.sequence.id].append(draft)
            limit = self.model.config.max_seq_len - turn - 1
            alive = [g for g in alive if len(g.sequence.tokens) < limit]
        return {sequence_id: tuple(found) for sequence_id, found in guesses.items() if found}

    def forget(self, sequence_id: int) -> None:
        """Frees the pages of a sequence."""
        follower = self._followers.pop(sequence_id, None)
        if follower is not None:
            follower.table.release()

    def _follow(self, generation: Generation) -> bool:
        """Rolls back rejected draft tokens and reserves pages for the next ones.

        Returns False if the sequence gets no draft tokens.
        """
        sequence = generation.sequence
        if len(sequence.tokens) >= self.model.config.max_seq_len:
            self.forget(sequence.id)
            return False
        follower = self._followers.setdefault(
            sequence.id, _DraftState(PageTable(self.pool, Namespace()))
        )
        # the last token is computed again, for its logits
        end = min(len(follower.fed), len(sequence.tokens) - 1)
        known = min(follower.sure, end)
        while known < end and follower.fed[known] == sequence.tokens[known]:
            known += 1
        del follower.fed[known:]
        follower.sure = known
        follower.table.commit(sequence.tokens, known)
        end = len(sequence.tokens) + self.num_tokens - 1
        if follower.table.reserve(known, end, {}):
            return True
        self.forget(sequence.id)
        return False

    def _piece(self, generation: Generation, guesses: Sequence[Draft]) -> ScheduledChunk:
        """Returns the tokens not computed yet: the text up to here, or the last draft token."""
        follower = self._followers[generation.sequence.id]
        start = len(follower.fed)
        tokens = [*generation.sequence.tokens, *(guess.token_id for guess in guesses)][start:]
        follower.fed += tokens
        follower.sure = max(follower.sure, min(len(follower.fed), len(generation.sequence.tokens)))
        return ScheduledChunk(
            sequence_id=generation.sequence.id,
            token_ids=tuple(tokens),
            start=start,
            pages=tuple(follower.table.pages),
        )

    def _guess(self, generations: Sequence[Generation], logits: Tensor) -> list[Draft]:
        """Returns a draft token for each row: greedy, or sampled and with its distribution."""
        ids = logits.argmax(-1).tolist()
        drafts = [Draft(token_id=token) for token in ids]
        drawn = [i for i, g in enumerate(generations) if g.sampler.params.temperature > 0]
        if drawn:
            samplers: list[SamplerState] = [generations[i].sampler for i in drawn]
            narrowed = apply_sampling_filters(
                logits[drawn], [sampler.params for sampler in samplers]
            )
            tokens = sample_multinomial(narrowed, [sampler.source for sampler in samplers]).tolist()
            for i, token, row in zip(drawn, tokens, narrowed.softmax(-1), strict=True):
                drafts[i] = Draft(token_id=token, probabilities=row)
        return drafts

    def _run(self, pieces: list[ScheduledChunk]) -> Tensor:
        if self._runner is None:
            model = self.model
            cache = KVCache(
                model.config,
                self.pool.num_pages,
                self.pool.page_size,
                model.dtype,
                model.device,
            )
            self._runner = DecoderRunner(model, cache)
        with torch.inference_mode():
            return self._runner.run(Step(pieces=tuple(pieces)))
