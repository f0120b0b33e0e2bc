"""Prefix tuning: n trained keys and values before those of every sequence, in every layer.

    K_l = [P^K_l; K_l(x)],  V_l = [P^V_l; V_l(x)],   P^K_l, P^V_l: [n, K, d]
    (Li and Liang 2021, arXiv 2101.00190, eq. 3; Liu et al. 2021, arXiv 2110.07602: P-Tuning v2)

The keys are used as they are, after norm and rotation of the layer's own keys, and the tokens of a
sequence have positions from n on, as in peft (0.21.2). With `projection` an MLP computes the prefix
in training (Li and Liang, section 4.3):

    P = W_2 tanh(W_1 e + b_1) + b_2,   e: [n, K·d] trained, P: [n, 2·L·K·d]

Files contain P, so that an adapter loaded from a file has no MLP.

Without an MLP the prefix starts from the keys and values of real tokens, with which the model
behaves as with these tokens in front of a text (Li and Liang, section 7.4: far better than random
values where there is little data). peft starts from N(0, 1).
"""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Generator, nn

from easyllm.adapters.file_module import FileModule
from easyllm.adapters.peft_keys import check_keys
from easyllm.adapters.prompt_learning import (
    NEUTRAL,
    READ_BY_ALL,
    PromptLearningSet,
    Table,
    VirtualKeysValues,
    kv_shape,
)
from easyllm.adapters.prompt_start import TokenStartConfig, keys_values_of
from easyllm.adapters.registry import register_adapter
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.config import ModelConfig
from easyllm.nn.cost import CostTrace
from easyllm.nn.decoder import Decoder


class PrefixTuningConfig(TokenStartConfig):
    """Number of virtual tokens, and the MLP that computes their keys and values in training."""

    kind: Literal["prefix"] = "prefix"
    projection: bool = Field(
        default=False,
        description="Whether an MLP computes the keys and values in training (Li and Liang 2021, "
        "section 4.3). It is not saved in the adapter.",
    )
    encoder_hidden_size: PositiveInt | None = Field(
        default=None,
        description="Hidden size of the MLP (projection=true); by default the width of a layer's "
        "keys.",
    )
    init: Literal["vocabulary", "text", "random", "zero"] | None = Field(
        default=None,
        description="Initial keys and values: those of randomly chosen tokens (`vocabulary`, the "
        "default without a projection) or of init_text (`text`); `random` from N(0, 1) or from the "
        "MLP (the default with one); or `zero`, whose tokens stay equal without a projection.",
    )

    trains_keys = True

    @model_validator(mode="after")
    def _check_projection(self) -> Self:
        if self.encoder_hidden_size is not None and not self.projection:
            raise ValueError(
                f"encoder_hidden_size={self.encoder_hidden_size} has no effect without a "
                "projection; set projection=true, or remove it"
            )
        if self.projection and self.init in ("vocabulary", "text"):
            raise ValueError(
                f"init={self.init} sets keys and values, which an MLP computes with "
                "projection=true; use init=random or zero, or remove projection"
            )
        self.check_text(self.start)
        return self

    @property
    def start(self) -> str:
        """The initial keys and values."""
        return self.init or ("random" if self.projection else "vocabulary")

    def build_model_adapter(self, model: ModelConfig) -> VirtualKeysValues:
        """Builds the prefix [n, 2·L·K·d], or the embedding [n, K·d] and its MLP.

        Raises:
            ConfigError: the model's context is too short, a layer has no keys and values, or the
                layers' shapes differ.
        """
        return self._built(model, projected=self.projection)

    def build_for_file(self, model: ModelConfig) -> VirtualKeysValues:
        """Builds the prefix [n, 2·L·K·d] without the MLP."""
        return self._built(model, projected=False)

    def _built(self, model: ModelConfig, *, projected: bool) -> VirtualKeysValues:
        self.check_context(model)
        heads, dim = kv_shape(model)
        width, total = heads * dim, 2 * model.num_layers * heads * dim
        encoder = None
        if projected:
            hidden = self.encoder_hidden_size or width
            encoder = nn.Sequential(nn.Linear(width, hidden), nn.Tanh(), nn.Linear(hidden, total))
        table = Table(self.num_virtual_tokens, total, encoder, width)
        return VirtualKeysValues(table, model.num_layers, heads)

    @torch.no_grad()
    def start_from_base(self, adapter: nn.Module, model: Decoder, generator: Generator) -> None:
        """Sets the prefix to the keys and values of tokens, or to zero.

        Raises:
            ConfigError: the text has no token ids, or they are not the model's.
        """
        assert isinstance(adapter, VirtualKeysValues), "it is built above"
        if self.start == "random" or model.device.type == "meta":
            return
        if self.start != "zero":
            ids = self.start_ids(self.start, model.config.vocab_size, generator)
            adapter.table.embedding.copy_(keys_values_of(model, ids))
            return
        encoder = adapter.table.encoder
        if encoder is None:
            adapter.table.embedding.zero_()
            return
        assert isinstance(encoder, nn.Sequential), "it is built above"
        for parameter in encoder[-1].parameters():
            parameter.zero_()

    def model_cost(self, trace: CostTrace, model: ModelConfig) -> None:
        """Records the MLP."""
        self.build_model_adapter(model).table.cost(trace)

    def base_to_peft(self, model: ModelConfig) -> JsonObject:
        """Returns the sizes of the base; peft's "attention heads" are those of the keys here."""
        heads, dim = kv_shape(model)
        return {
            "token_dim": heads * dim,
            "num_layers": model.num_layers,
            "num_attention_heads": heads,
        }

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:
        """Returns the settings of the MLP too, as a record."""
        values: JsonObject = {"prefix_projection": self.projection}
        if self.encoder_hidden_size is not None:
            values["encoder_hidden_size"] = self.encoder_hidden_size
        return super().to_peft(modules) | values

    @classmethod
    def from_peft(
        cls,
        description: JsonMapping,
        modules: Mapping[str, FileModule],  # noqa: ARG003 - of the interface
    ) -> Self:
        """Returns the configuration of a file."""
        projection = bool(description.get("prefix_projection"))
        check_keys(
            description,
            honoured=(*READ_BY_ALL, "prefix_projection", "encoder_hidden_size"),
            neutral=NEUTRAL | {"init_weights": (None, "zero")},
        )
        return cls(
            num_virtual_tokens=description["num_virtual_tokens"],
            projection=projection,
            encoder_hidden_size=description.get("encoder_hidden_size") if projection else None,
        )


register_adapter(PrefixTuningConfig, peft_type="PREFIX_TUNING", adapter_set=PromptLearningSet)

__all__ = ["PrefixTuningConfig"]
