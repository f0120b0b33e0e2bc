"""A trained reward model as a reward: its score at the last token of prompt and answer."""

from collections.abc import Callable, Sequence

import torch

from easyllm.batches.packing import pack, split_by_tokens
from easyllm.core.errors import ConfigError
from easyllm.examples.sample import Sample
from easyllm.models import load_tokenizer, open_source
from easyllm.models.adapted import load_adapted, open_adapted
from easyllm.rl.config import RewardModelConfig
from easyllm.rl.rewards import Answer
from easyllm.tokenizer.tokenizer import Tokenizer

BATCH_TOKENS = 2048


def check_reward_model(config: RewardModelConfig, tokenizer: Tokenizer) -> None:
    """Checks a reward model's configuration and tokenizer, without loading its weights.

    Raises:
        SourceError, CheckpointError: there is no such model, or its files are damaged.
        ConfigError: its head has not one score, or it has another tokenizer.
    """
    base, adapter = open_adapted(config.model)
    heads = None if adapter is None else adapter.num_labels()
    heads = heads or open_source(base).config.num_labels
    if heads != 1:
        what = "no head" if heads is None else f"a head of {heads} scores"
        raise ConfigError(
            f"reward_model.model={config.model} has {what}, expected one score; train one with "
            "objective.kind=classifier, num_labels=1 or a reward objective"
        )
    if load_tokenizer(base).fingerprint != tokenizer.fingerprint:
        raise ConfigError(
            f"reward_model.model={config.model} has another tokenizer than the policy, so that it "
            "cannot read its tokens; choose one with the same tokenizer"
        )


def reward_model(
    config: RewardModelConfig, device: torch.device
) -> Callable[[Sequence[Answer]], list[float]]:
    """Loads a reward model, and returns the function that scores answers with it.

    Args:
        config: the model's source, which `check_reward_model` has checked.
        device: the device of the model.

    Raises:
        SourceError, CheckpointError: the model cannot be loaded.
    """
    model = load_adapted(config.model).to(device).requires_grad_(False).eval()

    @torch.no_grad()
    def scores(answers: Sequence[Answer]) -> list[float]:
        samples = []
        for answer in answers:
            ids = (*answer.prompt_ids, *answer.token_ids)[-model.config.max_seq_len :]
            samples.append(Sample(ids, (-100,) * len(ids)))
        found: list[float] = []
        for group in split_by_tokens(samples, BATCH_TOKENS):
            batch = pack(group).to(device)
            hidden = model(batch.token_ids, batch.context())
            ends = batch.cu_seqlens[1:].long() - 1
            found += model.head(hidden[ends]).squeeze(1).tolist()
        return found

    return scores


__all__ = ["check_reward_model", "reward_model"]
