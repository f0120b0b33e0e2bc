"""T5's objective: the spans that are missing from a text are generated."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt

from easyllm.core.errors import ConfigError
from easyllm.examples.prepare import PreparationStats
from easyllm.examples.sample import AnySample
from easyllm.examples.span_corruption import SpanTokens, prepare_spans
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import GeneratedConfig, RowsConfig, TextDataConfig
from easyllm.train.objectives.language_model import LanguageModel, LanguageModelConfig
from easyllm.train.objectives.objective import RunSetup, register_objective


class SpanCorruptionConfig(LanguageModelConfig):
    """Span corruption (T5: Raffel et al. 2019, arXiv 1910.10683, section 3.1.4)."""

    kind: Literal["span_corruption"] = "span_corruption"  # type: ignore[assignment]
    mask_ratio: float = Field(
        default=0.15, gt=0, lt=1, description="Share of the tokens in spans that are replaced."
    )
    mean_span: PositiveFloat = Field(
        default=3.0, description="λ of the Poisson distribution of the lengths of spans, in tokens."
    )
    copies: PositiveInt = Field(
        default=1, description="Number of differently corrupted copies of each text."
    )
    mask_seed: int = Field(default=0, description="Seed of the choice of spans.")


class SpanCorruption(LanguageModel):
    """Σ -log p(token of the list of spans | corrupted text, the list so far).

    The corrupted text is the prompt: an encoder–decoder reads it with its encoder, a decoder with
    the mask of its `prompt_mask`.
    """

    config: SpanCorruptionConfig

    def __init__(self, config: SpanCorruptionConfig | None = None) -> None:
        super().__init__(config or SpanCorruptionConfig())

    def prepare(
        self, data: RowsConfig | GeneratedConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> tuple[Sequence[AnySample], PreparationStats]:
        """Reads texts and corrupts spans of them; see `Objective.prepare`."""
        assert isinstance(data, TextDataConfig), "checked by the configuration"
        config = self.config
        return prepare_spans(
            files,
            tokenizer,
            ratio=config.mask_ratio,
            mean_span=config.mean_span,
            copies=config.copies,
            seed=config.mask_seed,
            text_key=data.text_key,
            max_seq_len=data.max_seq_len,
        )

    def start(self, setup: RunSetup) -> None:
        """Checks that the decoder starts with the tokenizer's PAD token, as samples do.

        Raises:
            ConfigError: it starts with another one.
        """
        encoder, start = setup.model.config.encoder, SpanTokens.of(setup.tokenizer).start
        if encoder is not None and encoder.start_token_id != start:
            raise ConfigError(
                f"the decoder starts with token {encoder.start_token_id}, but samples start with "
                f"PAD ({start}); set decoder_start_token_id to {start}"
            )


register_objective(SpanCorruptionConfig, build=SpanCorruption, data=(TextDataConfig,))
