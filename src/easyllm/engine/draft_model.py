"""A smaller model that guesses for a larger one (Leviathan et al. 2022, arXiv 2211.17192)."""

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
from easyllm.engine.sampling import Chooser, Draft, draw, narrow
from easyllm.engine.speculative import refuse_states, refuse_turning_keys
from easyllm.engine.step import Piece, Step
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder


@dataclass(slots=True)
class _Follower:
    """What the draft model has computed of a sequence.

    Attributes:
        fed: the tokens; sure: how many of them are the sequence's own, the rest was guessed.
    """

    table: PageTable
    fed: list[int] = field(default_factory=list)
    sure: int = 0


class ModelDrafter:
    """Guesses by a model of its own, over a paged cache of its own.

    Greedy completions get its most likely tokens; drawn ones get tokens drawn from its distribution under the same
    temperature, top-k and so on, and that distribution with them.

    Args:
        model: of the same vocabulary, in inference mode.
        num_tokens: guesses at most.
        num_pages, page_size: of its cache; a sequence there is no room for gets no guesses.
    """

    def __init__(
        self, model: Decoder, num_tokens: int = 4, *, num_pages: int, page_size: int = 16
    ) -> None:
        self.model, self.num_tokens = model, num_tokens
        self.pool = PagePool(num_pages, page_size, prefix_caching=False)
        self._followers: dict[int, _Follower] = {}
        self._runner: DecoderRunner | None = None

    def check(self, target: ModelConfig) -> None:
        """Refuses a model of another vocabulary, states that cannot go back, and keys that depend on the length of a pass."""
        draft = self.model.config
        if draft.vocab_size != target.vocab_size:
            raise ConfigError(
                f"the draft model has {draft.vocab_size} token ids and the model {target.vocab_size}; take a draft with "
                "the same tokenizer"
            )
        refuse_states(target)
        refuse_states(draft)
        refuse_turning_keys(target)

    def propose(self, generations: Sequence[Generation]) -> dict[int, tuple[Draft, ...]]:
        """Guesses for each completion that there is room for."""
        alive = [g for g in generations if self._follow(g)]
        guesses: dict[int, list[Draft]] = {g.sequence.id: [] for g in alive}
        for turn in range(self.num_tokens):
            if not alive:
                break
            pieces = [self._piece(g, guesses[g.sequence.id]) for g in alive]
            try:
                logits = self._run(pieces)
            except BaseException:
                for generation in generations:  # what the pass has written is unknown
                    self.forget(generation.sequence.id)
                raise
            for generation, draft in zip(alive, self._guess(alive, logits), strict=True):
                guesses[generation.sequence.id].append(draft)
            room = self.model.config.max_seq_len - turn - 1
            alive = [g for g in alive if len(g.sequence.tokens) < room]
        return {sequence_id: tuple(found) for sequence_id, found in guesses.items() if found}

    def forget(self, sequence_id: int) -> None:
        """Frees a sequence's pages."""
        follower = self._followers.pop(sequence_id, None)
        if follower is not None:
            follower.table.release()

    def _follow(self, generation: Generation) -> bool:
        """Takes back what was guessed wrongly, and finds pages for what is to come."""
        sequence = generation.sequence
        if len(sequence.tokens) >= self.model.config.max_seq_len:
            self.forget(sequence.id)
            return False
        follower = self._followers.setdefault(
            sequence.id, _Follower(PageTable(self.pool, Namespace()))
        )
        end = min(len(follower.fed), len(sequence.tokens) - 1)  # the last token is asked again
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

    def _piece(self, generation: Generation, guesses: Sequence[Draft]) -> Piece:
        """What the draft model has not computed yet: the text up to here, or the last guess."""
        follower = self._followers[generation.sequence.id]
        start = len(follower.fed)
        tokens = [*generation.sequence.tokens, *(guess.token_id for guess in guesses)][start:]
        follower.fed += tokens
        follower.sure = max(follower.sure, min(len(follower.fed), len(generation.sequence.tokens)))
        return Piece(
            sequence_id=generation.sequence.id,
            token_ids=tuple(tokens),
            start=start,
            pages=tuple(follower.table.pages),
        )

    def _guess(self, generations: Sequence[Generation], logits: Tensor) -> list[Draft]:
        """A token for each row: the most likely, or drawn, then with its distribution."""
        ids = logits.argmax(-1).tolist()
        drafts = [Draft(token_id=token) for token in ids]
        drawn = [i for i, g in enumerate(generations) if g.chooser.params.temperature > 0]
        if drawn:
            choosers: list[Chooser] = [generations[i].chooser for i in drawn]
            narrowed = narrow(logits[drawn], [chooser.params for chooser in choosers])
            tokens = draw(narrowed, [chooser.source for chooser in choosers]).tolist()
            for i, token, row in zip(drawn, tokens, narrowed.softmax(-1), strict=True):
                drafts[i] = Draft(token_id=token, probabilities=row)
        return drafts

    def _run(self, pieces: list[Piece]) -> Tensor:
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
