"""Rollouts: answers that the engine samples from the model in training, as tokens.

The engine runs the trained model itself: there is no second copy of the weights, and tokens are
never decoded and encoded again. Seeds depend on the run's seed, the number of the rollout and the
prompt, so that a run that was killed repeats its rollouts.
"""

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from easyllm.core.config import Config
from easyllm.engine import Engine, Request, SamplingParams
from easyllm.engine.completion import Completion
from easyllm.engine.options import EngineConfig
from easyllm.engine.params import MAX_COPIES
from easyllm.nn.decoder import Decoder
from easyllm.quant import quantize_weights
from easyllm.rl.prompts import PromptSample
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.evaluating import evaluating


class RolloutConfig(Config):
    """Number, length and distribution of the answers, and the updates on them."""

    group_size: PositiveInt = Field(default=8, le=MAX_COPIES, description="Answers per prompt.")
    max_tokens: PositiveInt = Field(default=64, description="Maximum length of an answer, tokens.")
    temperature: PositiveFloat = Field(
        default=1.0,
        le=100.0,
        description="Sampling temperature; log-probabilities in the loss have the same.",
    )
    top_k: int = Field(default=0, ge=0, description="As in SamplingParams; 0 disables it.")
    top_p: float = Field(default=1.0, gt=0.0, le=1.0, description="As in SamplingParams.")
    renormalise: bool = Field(
        default=True,
        description="Whether the loss renormalises over the tokens that top_k and top_p keep, as "
        "the sampler does; false makes a mismatch on purpose.",
    )
    stop: tuple[str, ...] = Field(
        default=(), description="Texts that end an answer, in addition to the EOS tokens."
    )
    epochs: PositiveInt = Field(
        default=1, description="Passes over the answers of a rollout before the next rollout."
    )
    minibatches: PositiveInt = Field(
        default=1, description="Optimizer steps per pass, each on a part of the prompts."
    )
    deterministic: bool = Field(
        default=False,
        description="Whether sampling and training are batch-invariant, so that both have the same "
        "log-probabilities bit for bit; slower.",
    )
    quantize: str | None = Field(
        default=None,
        description="Storage format in which a copy of the model is sampled from, such as int4: a "
        "mismatch on purpose. null samples from the model itself.",
    )
    max_running: PositiveInt = Field(
        default=64, description="Answers that are sampled at the same time."
    )

    @model_validator(mode="after")
    def _support_is_that_of_the_sampler(self) -> "RolloutConfig":
        if self.narrows and self.renormalise and self.num_updates > 1:
            raise ValueError(
                "top_k and top_p are renormalised over the tokens that the current policy keeps, "
                f"which {self.num_updates} updates per rollout would change; set epochs=1 and "
                "minibatches=1, or renormalise=false"
            )
        return self

    @property
    def num_updates(self) -> int:
        """Optimizer steps per rollout."""
        return self.epochs * self.minibatches

    @property
    def narrows(self) -> bool:
        """Whether some tokens cannot be sampled."""
        return self.top_k > 0 or self.top_p < 1.0

    @property
    def training_params(self) -> SamplingParams:
        """The distribution whose log-probabilities the loss computes."""
        if self.renormalise:
            return SamplingParams(temperature=self.temperature, top_k=self.top_k, top_p=self.top_p)
        return SamplingParams(temperature=self.temperature)


@dataclass(frozen=True, slots=True)
class RolledOut:
    """An answer that the engine has sampled.

    Attributes:
        token_ids: its tokens, the EOS token included if it was sampled.
        logprobs: log-probability of each under the sampled distribution, in nats.
        text: the answer as text.
        truncated: whether it was cut off at the maximum length.
    """

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    text: str
    truncated: bool


class Sampler:
    """Samples answers from a model in training.

    Args:
        model: the model; its weights may change between calls.
        tokenizer: its tokenizer.
        config: how to sample.
        longest: maximum length of prompt and answer, in tokens.
    """

    def __init__(
        self, model: Decoder, tokenizer: Tokenizer, config: RolloutConfig, *, longest: int
    ) -> None:
        self.model, self.tokenizer, self.config = model, tokenizer, config
        running = max(config.max_running, config.group_size)
        self._options = EngineConfig(
            page_size=16,
            num_pages=running * (-(-(longest + model.num_virtual_tokens) // 16) + 1),
            deterministic=config.deterministic,
            max_running=running,
            max_step_tokens=max(2048, running),
            cache_dtype=str(model.dtype).removeprefix("torch."),
        )
        self._engine: Engine | None = None

    def __call__(
        self,
        prompts: Sequence[PromptSample],
        seeds: Sequence[int],
        *,
        greedy: bool = False,
        group_size: int | None = None,
    ) -> list[list[RolledOut]]:
        """Returns the answers to each prompt.

        Args:
            prompts: the prompts.
            seeds: a seed for each prompt.
            greedy: whether to take the most likely tokens, to evaluate.
            group_size: answers per prompt, by default those of the configuration.
        """
        config = self.config
        copies = 1 if greedy else (group_size or config.group_size)
        params = SamplingParams(
            temperature=0.0 if greedy else config.temperature,
            top_k=config.top_k,
            top_p=config.top_p,
            max_tokens=config.max_tokens,
            stop=config.stop,
            logprobs=None if self._reports_raw else 0,
            n=copies,
        )
        requests = [
            Request(prompt_ids=prompt.token_ids, params=params.model_copy(update={"seed": seed}))
            for prompt, seed in zip(prompts, seeds, strict=True)
        ]
        with evaluating(self.model):
            found = self._run(self._current_engine(), requests)
        return [[self._answer(each) for each in (done, *done.others)] for done in found]

    @property
    def _reports_raw(self) -> bool:
        """Whether tokens are sampled from the model's own distribution, without changes."""
        return self.config.temperature == 1.0 and not self.config.narrows

    @property
    def fast_step(self) -> str | None:
        """The name of the single-call decoding step in use, for reports; None if there is none."""
        runner = None if self._engine is None else self._engine.runner
        step = getattr(runner, "fast_step", None)
        return None if step is None else type(step).__name__

    def _current_engine(self) -> Engine:
        """Returns the engine with the current weights."""
        if self.config.quantize is not None:
            # a copy on purpose: what is sampled from is not what is trained
            copied = quantize_weights(copy.deepcopy(self.model).eval(), self.config.quantize)
            self._engine = Engine(copied, self.tokenizer, self._options)
        elif self._engine is None:
            self._engine = Engine(self.model, self.tokenizer, self._options)
        else:
            self._engine.clear_prefix_cache()  # keys and values of the old weights
        return self._engine

    def _run(self, engine: Engine, requests: Sequence[Request]) -> list[Completion]:
        results = {request.id: Completion() for request in requests}
        for event in engine.run(requests):
            results[event.request_id].take(event)
        return [results[request.id] for request in requests]

    def _answer(self, done: Completion) -> RolledOut:
        logprobs = done.logprobs
        if not self._reports_raw:
            processed = (each.processed for each in done.details)
            logprobs = [math.nan if value is None else value for value in processed]
        return RolledOut(
            token_ids=tuple(done.token_ids),
            logprobs=tuple(logprobs),
            text=done.text,
            truncated=done.finish_reason == "length",
        )


def prompt_seed(run_seed: int, rollout: int, prompt: int) -> int:
    """Returns the seed of a prompt in a rollout of a run."""
    return ((run_seed * 1_000_003 + rollout) * 1_000_003 + prompt) % 2**63


__all__ = ["RolledOut", "RolloutConfig", "Sampler", "prompt_seed"]
