"""Next-token prediction: pretraining if all tokens are labelled, SFT if only responses are."""

from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, NonNegativeFloat
from torch import Tensor, nn

from easyllm.batches.packing import Batch, common_prefix
from easyllm.batches.shared_prompts import (
    LEAST_SAVED,
    has_common_prefix,
    share_prefix,
    shared_lengths,
    shares_prompts,
)
from easyllm.examples.conversations import read_conversations
from easyllm.examples.prepare import PreparationStats, prepare_conversations
from easyllm.examples.sample import AnySample
from easyllm.nn.decoder import Decoder
from easyllm.ops.cross_entropy import IGNORE_INDEX, linear_cross_entropy
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

    def num_shared_tokens(self, samples: Sequence[AnySample]) -> int:
        """Returns how many tokens of an epoch are computed for others; see `Objective`.

        At most as many: a prefix is computed once a micro-batch, here once an epoch.
        """
        parts = [part for sample in samples for part in sample.parts]
        saved = common_prefix(parts) * (len(parts) - 1)
        return saved if saved >= LEAST_SAVED * sum(part.num_tokens for part in parts) else 0

    def shared_lengths(self, model: Decoder, batches: Sequence[Batch]) -> tuple[int, ...]:
        """Returns the lengths of prefixes that are not computed again; see `Objective`."""
        if not _can_share(model):
            return ()
        return tuple(n for batch in batches for n in shared_lengths(batch))

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        """Returns the summed cross-entropy of the labelled tokens, and router losses for MoE."""
        config = model.config
        routing = routing_of(model)
        states, labels = token_states(model, batch, routing)
        hidden, weight = model.loss_factors(states)
        # tensor-parallel ranks hold a part of the vocabulary
        shard = model.vocabulary
        out = (linear_cross_entropy if shard is None else shard.cross_entropy)(
            hidden,
            weight,
            labels,
            softcap=config.logit_softcap,
            label_smoothing=self.config.label_smoothing if model.training else 0.0,
            z_loss=self.config.z_loss if model.training else 0.0,
            max_z_loss=self.config.max_z_loss if model.training else 0.0,
        )
        return with_router_losses(LossOutput(out.sum, out.num_tokens), routing)


def token_states(model: Decoder, batch: Batch, routing: list[Any] | None) -> tuple[Tensor, Tensor]:
    """Returns the final hidden states [N, D] of a batch, and their labels [N].

    Those without a label may be left out: a prefix that all sequences have in common, such as a
    system prompt, is computed once, with the same outputs and gradients up to rounding.
    """
    if not has_common_prefix(batch) or not _can_share(model):
        context = batch.context(mask=model.config, routing=routing)
        return model(batch.token_ids, context), batch.labels
    token_ids, context, rows = share_prefix(batch)
    labelled = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
    return model(token_ids, context).index_select(0, rows[labelled]), batch.labels[labelled]


def _can_share(model: Decoder) -> bool:
    """Returns whether a prefix can be computed once.

    Not with dropout, whose noise is each sequence's own, nor on tensor-parallel ranks.
    """
    if model.vocabulary is not None or not shares_prompts(model.config, model.num_virtual_tokens):
        return False
    modules = model.modules() if model.training else ()
    return not any(isinstance(module, nn.Dropout) and module.p > 0 for module in modules)


register_objective(LanguageModelConfig, build=LanguageModel, data=(DataConfig, CorpusDataConfig))
