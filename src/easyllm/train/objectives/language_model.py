"""Next-token prediction: pretraining if all tokens are labelled, SFT if only responses are."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Literal

from pydantic import Field, NonNegativeFloat

from easyllm.batches.packing import Batch
from easyllm.examples.conversations import read_conversations
from easyllm.examples.prepare import PreparationStats, prepare_conversations
from easyllm.examples.sample import AnySample
from easyllm.nn.decoder import Decoder
from easyllm.ops.cross_entropy import linear_cross_entropy
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import CorpusDataConfig, DataConfig, GeneratedConfig, RowsConfig
from easyllm.train.objectives.objective import (
    LossOutput,
    Objective,
    ObjectiveConfig,
    register_objective,
)
from easyllm.train.objectives.router import routing_of, with_router_losses


class LanguageModelConfig(ObjectiveConfig):
    """Next-token prediction."""

    kind: Literal["language_model"] = "language_model"
    label_smoothing: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Fraction of the target probability that is spread over the vocabulary "
        "(Szegedy et al. 2015, arXiv 1512.00567).",
    )
    z_loss: NonNegativeFloat = Field(
        default=0.0,
        description="Coefficient of the log²Z term, which keeps the softmax normaliser Z near 1 "
        "(Chowdhery et al. 2022, arXiv 2204.02311).",
    )
    max_z_loss: NonNegativeFloat = Field(
        default=0.0,
        description="Coefficient of the square of the largest logit, which keeps logits small "
        "(Baichuan 2 uses 2e-4: Yang et al. 2023, arXiv 2309.10305, section 2.6).",
    )


class LanguageModel(Objective):
    """Σ -log p(label | preceding tokens) over labelled tokens, plus router losses for MoE models.

    Args:
        config: `label_smoothing`, `z_loss` and `max_z_loss`, as in `linear_cross_entropy`.
    """

    def __init__(self, config: LanguageModelConfig | None = None) -> None:
        self.config = config or LanguageModelConfig()

    def prepare(
        self, data: RowsConfig | GeneratedConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> tuple[Sequence[AnySample], PreparationStats]:
        """Reads conversations and tokenizes them into samples; see `Objective.prepare`."""
        assert isinstance(data, DataConfig), "checked by the configuration; a corpus has no rows"
        return prepare_conversations(
            chain.from_iterable(read_conversations(file) for file in files),
            tokenizer,
            max_seq_len=data.max_seq_len,
            overlong=data.overlong,
            train_on=data.train_on,
            split_turns=data.split_turns,
        )

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        """Returns the summed cross-entropy of the labelled tokens, and router losses for MoE."""
        config = model.config
        routing = routing_of(model)
        context = batch.context(mask=config, routing=routing)
        hidden, weight = model.loss_factors(model(batch.token_ids, context))
        # tensor-parallel ranks hold a part of the vocabulary
        shard = model.vocabulary
        out = (linear_cross_entropy if shard is None else shard.cross_entropy)(
            hidden,
            weight,
            batch.labels,
            softcap=config.logit_softcap,
            label_smoothing=self.config.label_smoothing if model.training else 0.0,
            z_loss=self.config.z_loss if model.training else 0.0,
            max_z_loss=self.config.max_z_loss if model.training else 0.0,
        )
        return with_router_losses(LossOutput(out.sum, out.num_tokens), routing)


register_objective(LanguageModelConfig, build=LanguageModel, data=(DataConfig, CorpusDataConfig))
