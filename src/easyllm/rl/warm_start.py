"""Supervised training of a model before its first rollout.

Reinforcement learning amplifies what a model sometimes does right; a model from scratch does
nothing right. A short supervised training gives it something to amplify: it may be stopped early,
or contain more wrong answers than right ones, so that the model prefers the wrong ones at first. It
depends only on the recipe and the seed, so that a resumed run has the same start.
"""

from collections.abc import Sequence

import torch

from easyllm.batches.loader import Loader
from easyllm.core.errors import ConfigError, DataError
from easyllm.core.progress import Progress
from easyllm.examples.sample import AnySample, Sample
from easyllm.nn.decoder import Decoder
from easyllm.rl.config import WarmStartConfig
from easyllm.rl.prompts import PromptSample
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.objectives import LanguageModel
from easyllm.train.optim import MasterOptimizer
from easyllm.train.optim_config import AdamWConfig
from easyllm.train.text_samples import samples_of_file

WARM_UP = 0.1
"""Share of the steps in which the learning rate rises from 0; it then falls linearly to 0."""
MICRO_BATCH_TOKENS = 4096
REPLAY_TOKENS = 512
"""Tokens of a replayed conversation, at most."""


class WarmStart:
    """Trains a model on right answers.

    Args:
        config: number and size of the steps, and the learning rate.
    """

    def __init__(self, config: WarmStartConfig) -> None:
        self.config = config
        self._found: dict[str, torch.Tensor] | None = None

    def run(
        self, model: Decoder, prompts: Sequence[PromptSample], tokenizer: Tokenizer, *, seed: int
    ) -> Decoder:
        """Returns the model after the training; the second model of a run is not trained again.

        Args:
            model: the model, changed in place.
            prompts: the prompts, whose rows have the right answers.
            tokenizer: encodes the answers, which end with its EOS token.
            seed: seed of the order of the answers.

        Raises:
            ConfigError: the weights are quantized or not fp32.
            DataError: a row has no answer.
        """
        if self._found is not None:
            model.load_state_dict(self._found)
            return model
        if model.packed_formats() or model.dtype != torch.float32:
            raise ConfigError(
                "warm_start trains all weights, which must be fp32 for that; remove warm_start, or "
                "set precision=fp32 and quantize=null"
            )
        config = self.config
        keys = [config.answer_key]
        if config.wrong_key is not None:
            keys += [config.wrong_key] * config.wrong_copies
        samples: list[AnySample] = [
            _sample(prompt, key, tokenizer) for prompt in prompts for key in keys
        ]
        for file in config.replay:
            samples += samples_of_file(file, tokenizer, REPLAY_TOKENS, train_on="assistant")
        self._train(model, samples, seed)
        self._found = {name: value.detach().clone() for name, value in model.state_dict().items()}
        return model

    def forget(self) -> None:
        """Frees the copy of the weights that a reference is built from."""
        self._found = None

    def _train(self, model: Decoder, samples: Sequence[AnySample], seed: int) -> None:
        config, objective = self.config, LanguageModel()
        loader = Loader(
            samples,
            batch_size=config.batch_size,
            micro_batch_tokens=MICRO_BATCH_TOKENS,
            seed=seed,
        )
        model.requires_grad_(True).train()
        rule = AdamWConfig(learning_rate=config.learning_rate, betas=(0.9, 0.98))
        optimizer = MasterOptimizer(dict(model.named_parameters()), rule)
        rising = max(1, round(WARM_UP * config.steps))
        with Progress("warm start", total=config.steps, unit="step") as progress:
            for step in range(config.steps):
                batches = loader.next_step()
                terms = sum(batch.num_trained for batch in batches)
                total = 0.0
                for batch in batches:
                    found = objective.loss(model, batch.to(model.device))
                    (found.sum / terms).backward()
                    total += float(found.sum.detach()) / terms
                optimizer.clip(optimizer.grad_norm(), 1.0)
                falling = (config.steps - step) / max(1, config.steps - rising)
                optimizer.step(min((step + 1) / rising, falling))
                progress.advance(1, loss=total)
        model.requires_grad_(False).eval()


def _sample(prompt: PromptSample, key: str, tokenizer: Tokenizer) -> Sample:
    """Returns a prompt and its right answer as a sample; the answer and EOS are trained."""
    answer = prompt.row.get(key)
    if not isinstance(answer, str) or not answer:
        raise DataError(
            f"the row of prompt {prompt.text!r} has {answer!r} under {key!r}, expected the right "
            "answer as a text; set warm_start.answer_key or wrong_key"
        )
    ids = tokenizer.encode(answer)
    ends = [] if tokenizer.eos_id is None else [tokenizer.eos_id]
    mask = [False] * len(prompt.token_ids) + [True] * (len(ids) + len(ends))
    return Sample.from_mask([*prompt.token_ids, *ids, *ends], mask)


__all__ = ["WarmStart"]
