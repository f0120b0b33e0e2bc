"""Generates sample completions of fixed prompts during a run."""

from collections.abc import Callable

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.config import SamplesConfig
from easyllm.train.evaluating import evaluating
from easyllm.train.training_run import Callback, Run, StepReport


class Samples(Callback):
    """Generates completions every `eval_every` steps and at the end, for inspection.

    Args:
        config: the prompts, and how to sample.
    """

    def __init__(self, config: SamplesConfig) -> None:
        self.config = config
        self._generate: Callable[[], list[dict[str, str]]] | None = None
        self._sampled_step = -1

    def on_start(self, run: Run) -> None:
        """Allocates the KV cache."""
        self._generate = build_sampler(self.config, run.model, run.source.tokenizer)

    def after_step(self, run: Run, report: StepReport) -> None:
        """Generates if it is due; samples of the last step are generated in `on_end`."""
        if run.is_due(run.config.eval_every) and report.step != run.total_steps:
            self._sample(run)

    def on_end(self, run: Run, results: JsonObject) -> None:  # noqa: ARG002 - of the interface
        """Generates samples of the last step."""
        self._sample(run)

    def _sample(self, run: Run) -> None:
        if run.progress.step == self._sampled_step:
            return
        assert self._generate is not None, "the run has started"
        self._sampled_step = run.progress.step
        samples = self._generate()
        for callback in run.callbacks:
            callback.on_samples(run, samples)


def check_samples(config: SamplesConfig | None, tokenizer: Tokenizer, *, context: int) -> None:
    """Checks the sample prompts before the first step.

    Raises:
        ConfigError: a prompt has no tokens, or leaves no space for a completion in the context.
    """
    for number, prompt in enumerate(config.prompts if config is not None else ()):
        length = len(tokenizer.encode(prompt))
        if not 0 < length < context:
            raise ConfigError(
                f"samples.prompts[{number}] has {length} tokens, expected 1 to {context - 1} (the "
                "model's context minus one); change it"
            )


def build_sampler(
    config: SamplesConfig, model: Decoder, tokenizer: Tokenizer
) -> Callable[[], list[dict[str, str]]]:
    """Returns a function that generates a completion for each prompt, with a separate RNG."""
    from easyllm.engine import LLM, SamplingParams

    longest = max(len(tokenizer.encode(prompt)) for prompt in config.prompts) + config.max_tokens
    longest += model.num_virtual_tokens
    llm = LLM(
        model=model,
        tokenizer=tokenizer,
        # leave the memory to training; cached prefixes would be stale once the weights change
        num_pages=len(config.prompts) * -(-longest // 16),
        page_size=16,
        prefix_caching=False,
        compiled_step=False,  # would move the weights, which the optimizer references
    )
    params = SamplingParams(max_tokens=config.max_tokens, temperature=config.temperature, seed=0)

    def show() -> list[dict[str, str]]:
        with evaluating(model):
            done = llm.generate(list(config.prompts), params)
        return [
            {"prompt": prompt, "text": each.text}
            for prompt, each in zip(config.prompts, done, strict=True)
        ]

    return show


__all__ = ["Samples", "build_sampler", "check_samples"]
