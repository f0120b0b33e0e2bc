"""P-Tuning: virtual tokens as in prompt tuning, computed by a small encoder while they are trained.

    p = encoder(e),   e: [n, D] trained, encoder trained
    (Liu et al. 2021, arXiv 2103.10385, eq. 3)

The encoder makes the virtual tokens depend on each other and speeds up their training. It is
trained along, but files contain only its output p, so that an adapter loaded from a file is
prompt tuning. Encoders as in peft (0.21.2): three linears with ReLU, or an LSTM over the tokens in
both directions followed by two linears, which is the paper's.
"""

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, PositiveInt, model_validator
from torch import Tensor, nn

from easyllm.adapters.file_module import FileModule
from easyllm.adapters.peft_keys import check_keys
from easyllm.adapters.prompt_learning import (
    NEUTRAL,
    READ_BY_ALL,
    PromptLearningConfig,
    PromptLearningSet,
    Table,
    VirtualVectors,
)
from easyllm.adapters.registry import register_adapter
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import CostTrace

_PEFT_KEYS = {
    "encoder_reparameterization_type": "encoder",
    "encoder_hidden_size": "encoder_hidden_size",
    "encoder_num_layers": "encoder_num_layers",
    "encoder_dropout": "encoder_dropout",
}
"""peft's names of our fields."""


class PTuningConfig(PromptLearningConfig):
    """Number of virtual tokens and the encoder that computes them in training."""

    kind: Literal["ptuning"] = "ptuning"
    encoder: Literal["mlp", "lstm"] = Field(
        default="mlp",
        description="Encoder of the virtual tokens in training: `mlp` (three linears), or `lstm` "
        "(a bidirectional LSTM and two linears). It is not saved in the adapter.",
    )
    encoder_hidden_size: PositiveInt | None = Field(
        default=None, description="Hidden size of the encoder; by default that of the model."
    )
    encoder_num_layers: PositiveInt = Field(
        default=2, description="Number of LSTM layers (encoder=lstm)."
    )
    encoder_dropout: float = Field(
        default=0.0,
        ge=0.0,
        lt=1.0,
        description="Dropout probability between the LSTM layers in training (encoder=lstm).",
    )

    @model_validator(mode="after")
    def _check_encoder(self) -> Self:
        if self.encoder == "mlp" and (self.encoder_num_layers != 2 or self.encoder_dropout):
            raise ValueError(
                f"encoder_num_layers={self.encoder_num_layers} and encoder_dropout="
                f"{self.encoder_dropout} have no effect with encoder=mlp; set encoder=lstm, or "
                "remove them"
            )
        return self

    def build_model_adapter(self, model: ModelConfig) -> VirtualVectors:
        """Builds the embedding [n, D] and its encoder.

        Raises:
            ConfigError: the model's context is too short.
        """
        self.check_context(model)
        width = model.hidden_size
        hidden = self.encoder_hidden_size or width
        encoder: nn.Module
        if self.encoder == "mlp":
            encoder = mlp_encoder(width, hidden)
        else:
            encoder = LSTMEncoder(width, hidden, self.encoder_num_layers, self.encoder_dropout)
        return VirtualVectors(Table(self.num_virtual_tokens, width, encoder, width))

    def build_for_file(self, model: ModelConfig) -> VirtualVectors:
        """Builds the vectors [n, D] that the encoder computed."""
        self.check_context(model)
        return VirtualVectors(Table(self.num_virtual_tokens, model.hidden_size))

    def model_cost(self, trace: CostTrace, model: ModelConfig) -> None:
        """Records the encoder."""
        self.build_model_adapter(model).table.cost(trace)

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:
        """Returns the settings of the encoder too, as a record."""
        values = {theirs: getattr(self, ours) for theirs, ours in _PEFT_KEYS.items()}
        values["encoder_reparameterization_type"] = self.encoder.upper()
        return super().to_peft(modules) | values

    @classmethod
    def from_peft(
        cls,
        description: JsonMapping,
        modules: Mapping[str, FileModule],  # noqa: ARG003 - of the interface
    ) -> Self:
        """Returns the configuration of a file."""
        check_keys(description, honoured=(*READ_BY_ALL, *_PEFT_KEYS), neutral=NEUTRAL)
        values = {
            ours: description[theirs]
            for theirs, ours in _PEFT_KEYS.items()
            if description.get(theirs) is not None
        }
        values["encoder"] = str(values.get("encoder", "mlp")).lower()
        if values["encoder"] == "mlp":  # peft ignores these two then
            values = {k: v for k, v in values.items() if k in ("encoder", "encoder_hidden_size")}
        return cls(num_virtual_tokens=description["num_virtual_tokens"], **values)


def mlp_encoder(width: int, hidden: int) -> nn.Sequential:
    """Returns three linears with ReLU between them, from [n, width] to [n, width]."""
    return nn.Sequential(
        nn.Linear(width, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, width),
    )


class LSTMEncoder(nn.Module):
    """A bidirectional LSTM over the virtual tokens, and two linears with ReLU between them."""

    def __init__(self, width: int, hidden: int, num_layers: int, dropout: float) -> None:
        super().__init__()
        self.lstm = nn.LSTM(
            width, hidden, num_layers, dropout=dropout, bidirectional=True, batch_first=True
        )
        self.mlp = nn.Sequential(
            nn.Linear(2 * hidden, 2 * hidden), nn.ReLU(), nn.Linear(2 * hidden, width)
        )

    def forward(self, embedding: Tensor) -> Tensor:
        """Returns [n, width] for `embedding: [n, width]`."""
        states, _ = self.lstm(embedding[None])
        table: Tensor = self.mlp(states[0])
        return table


register_adapter(PTuningConfig, peft_type="P_TUNING", adapter_set=PromptLearningSet)

__all__ = ["LSTMEncoder", "PTuningConfig", "mlp_encoder"]
