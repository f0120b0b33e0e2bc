"""Sequence classification, or regression with one label, on each text's last token."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field, PositiveInt
from torch.nn import functional as F

from easyllm.batches.packing import Batch
from easyllm.examples.labels import TARGET, prepare_labelled_texts
from easyllm.examples.prepare import PreparationStats
from easyllm.examples.sample import AnySample
from easyllm.models import to_classifier
from easyllm.nn.decoder import Decoder
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.train.data_config import GeneratedConfig, LabelledDataConfig, RowsConfig
from easyllm.train.objectives.objective import (
    LossOutput,
    Objective,
    ObjectiveConfig,
    register_objective,
)
from easyllm.train.objectives.router import routing_of, with_router_losses


class ClassifierConfig(ObjectiveConfig):
    """Sequence classification with cross-entropy; regression with squared error for one label."""

    kind: Literal["classifier"] = "classifier"
    num_labels: PositiveInt = Field(default=2, description="Number of classes; 1 is regression.")


class Classifier(Objective):
    """Σ -log p(label | text) over texts, or Σ (score - target)² with a single score.

    A batch has its labels at each text's last token; regression targets are in its extra `target`.
    """

    generates = False
    also_trained = ("score",)

    def __init__(self, config: ClassifierConfig | None = None) -> None:
        self.config = config or ClassifierConfig()

    def prepare(
        self, data: RowsConfig | GeneratedConfig, files: Sequence[Path], tokenizer: Tokenizer
    ) -> tuple[Sequence[AnySample], PreparationStats]:
        """Reads labelled texts and tokenizes them into samples; see `Objective.prepare`."""
        assert isinstance(data, LabelledDataConfig), "checked by the configuration"
        return prepare_labelled_texts(
            files,
            tokenizer,
            text_key=data.text_key,
            label_key=data.label_key,
            num_labels=self.config.num_labels,
            max_seq_len=data.max_seq_len,
        )

    def prepare_model(self, model: Decoder, *, seed: int) -> Decoder:
        """Returns the model with a classification head, which is new unless it has the size."""
        if model.config.num_labels == self.config.num_labels:
            return model
        return to_classifier(model, self.config.num_labels, seed=seed)

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        """Returns the loss summed over texts, and for classification the accuracy."""
        routing = routing_of(model)
        hidden = model(batch.token_ids, batch.context(routing=routing))
        rows = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        scores = model.head(hidden.index_select(0, rows))  # [texts, labels]
        if scores.shape[1] == 1:
            wanted = batch.extras[TARGET][: len(rows)]  # a padding sequence comes last
            total = F.mse_loss(scores.squeeze(1), wanted.to(scores.dtype), reduction="sum")
            return with_router_losses(LossOutput(total, len(rows)), routing)
        labels = batch.labels[rows]
        total = F.cross_entropy(scores, labels, reduction="sum")
        right = (scores.argmax(-1) == labels).float().mean()
        output = LossOutput(total, len(rows), metrics={"accuracy": float(right)})
        return with_router_losses(output, routing)


register_objective(
    ClassifierConfig, build=Classifier, data=(LabelledDataConfig,), generates=Classifier.generates
)
