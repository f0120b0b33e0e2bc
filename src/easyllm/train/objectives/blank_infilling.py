"""GLM's objective: spans of a text are masked and generated (`examples/blank_infilling`)."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from easyllm.core.errors import ConfigError
from easyllm.examples.blank_infilling import BlankMixture, prepare_blanks
from easyllm.examples.prepare import PreparationStats
from easyllm.examples.sample import AnySample
from easyllm.nn.config import AttentionConfig, ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.position_config import BlockLearned, BlockRope
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import GeneratedConfig, RowsConfig, TextDataConfig
from easyllm.train.objectives.language_model import LanguageModel, LanguageModelConfig
from easyllm.train.objectives.objective import register_objective


class BlankInfillingConfig(LanguageModelConfig):
    """Autoregressive blank infilling (GLM: Du et al. 2021, arXiv 2103.10360, section 2)."""

    kind: Literal["blank_infilling"] = "blank_infilling"  # type: ignore[assignment]
    mask_ratio: float = Field(
        default=0.15, gt=0, lt=1, description="Share of the tokens in masked spans or sentences."
    )
    mean_span: PositiveFloat = Field(
        default=3.0, description="λ of the Poisson distribution of the lengths of spans, in tokens."
    )
    sentences: float = Field(
        default=0.0,
        ge=0,
        le=1,
        description="Share of the texts in which whole sentences are masked, with [sMASK].",
    )
    documents: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the texts of which one span is masked, the last 50% to 100%, with "
        "[gMASK].",
    )
    copies: PositiveInt = Field(
        default=1, description="Number of differently masked copies of each text."
    )
    mask_seed: int = Field(default=0, description="Seed of the choice of spans and their order.")

    @model_validator(mode="after")
    def _shares(self) -> "BlankInfillingConfig":
        if self.sentences + self.documents > 1:
            raise ValueError(
                f"sentences={self.sentences} and documents={self.documents} are shares of the "
                "texts; their sum must be at most 1"
            )
        return self


class BlankInfilling(LanguageModel):
    """Σ -log p(token of a span | corrupted text, earlier spans, earlier tokens of the span)."""

    config: BlankInfillingConfig

    def __init__(self, config: BlankInfillingConfig | None = None) -> None:
        super().__init__(config or BlankInfillingConfig())

    def prepare(
        self, data: RowsConfig | GeneratedConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> tuple[Sequence[AnySample], PreparationStats]:
        """Reads texts and masks spans of them; see `Objective.prepare`."""
        assert isinstance(data, TextDataConfig), "checked by the configuration"
        config = self.config
        mixture = BlankMixture(
            ratio=config.mask_ratio,
            mean_span=config.mean_span,
            sentences=config.sentences,
            documents=config.documents,
            copies=config.copies,
            seed=config.mask_seed,
        )
        return prepare_blanks(
            files, tokenizer, mixture, text_key=data.text_key, max_seq_len=data.max_seq_len
        )

    def prepare_model(self, model: Decoder, *, seed: int) -> Decoder:  # noqa: ARG002 - nothing new
        """Returns the model after checking that it has GLM's mask and positions.

        Raises:
            ConfigError: it has not.
        """
        check_blocks(model.config)
        return model


def check_blocks(config: ModelConfig) -> None:
    """Checks that a model can fill in blanks.

    Raises:
        ConfigError: its prompts are causal, or its positions do not tell a span's place.
    """
    if config.prompt_mask != "prefix_before_last":
        raise ConfigError(
            f"blank infilling needs prompt_mask=prefix_before_last, but the model has "
            f"{config.prompt_mask}; set prompt_mask, or train a model that has it (ChatGLM, GLM)"
        )
    mixers = [layer.mixer for layer in config.layers]
    rotates = all(
        isinstance(m, AttentionConfig) and m.position.kind == "block_rope" for m in mixers
    )
    if not rotates and not isinstance(config.embedding_position, BlockLearned):
        kinds = sorted({mixer.position.kind for mixer in mixers})
        raise ConfigError(
            f"blank infilling needs positions in text and block ({BlockRope().kind} in every layer "
            f"or {BlockLearned().kind} at the embedding), but the model has {', '.join(kinds)}"
        )


register_objective(BlankInfillingConfig, build=BlankInfilling, data=(TextDataConfig,))
