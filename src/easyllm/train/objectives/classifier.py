"""A head of labels on each text's last token: classes, or one number."""

import torch
from torch.nn import functional as F

from easyllm.data.packing import Batch
from easyllm.nn.decoder import Decoder
from easyllm.ops.cross_entropy import IGNORE_INDEX
from easyllm.train.objectives.language_model import LossOutput


class Classifier:
    """Σ -log p(label | text) over texts, or Σ (score - label)² with a single score.

    The batch's labels stand at each text's last token: a class, or where there is one score the bits of an fp32 number
    (`data.labelled.encode_number`).
    """

    def loss(self, model: Decoder, batch: Batch) -> LossOutput:
        hidden = model(batch.token_ids, batch.context())
        rows = (batch.labels != IGNORE_INDEX).nonzero().squeeze(1)
        scores = model.head(hidden.index_select(0, rows))  # [texts, labels]
        labels = batch.labels[rows]
        if scores.shape[1] == 1:
            wanted = labels.to(torch.int32).view(torch.float32)
            total = F.mse_loss(scores.squeeze(1), wanted.to(scores.dtype), reduction="sum")
            return LossOutput(total, len(rows))
        total = F.cross_entropy(scores, labels, reduction="sum")
        right = (scores.argmax(-1) == labels).float().mean()
        return LossOutput(total, len(rows), metrics={"accuracy": float(right)})
