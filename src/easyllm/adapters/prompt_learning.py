"""What prompt tuning, P-Tuning and prefix tuning share (peft: "prompt learning").

Each trains a table [n, width] for n virtual tokens, which the decoder prepends to every sequence
(`nn/virtual_tokens`). The table is either the trained parameter itself or the output of an encoder
(reparametrisation). Files contain the table alone, as `prompt_embeddings`: an encoder is needed in
training only. A training checkpoint contains the encoder.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Self

import torch
from pydantic import Field, PositiveInt, model_validator
from torch import Generator, Tensor, nn

from easyllm.adapters.adapter import AdapterConfig
from easyllm.adapters.adapter_set import AdapterSet
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.config import AttentionConfig, ModelConfig
from easyllm.nn.cost import FP32, CostTrace
from easyllm.nn.virtual_tokens import KeysValues

TABLE = "prompt_embeddings"
"""The name of the table in peft's files."""
FIRST = "0"
"""The name of the first linear of an encoder without an LSTM, whose input is a parameter."""


class PromptLearningConfig(AdapterConfig):
    """Settings shared by the methods that prepend virtual tokens to every sequence."""

    num_virtual_tokens: PositiveInt = Field(
        default=20,
        description="Number of virtual tokens before every sequence; they count towards the "
        "model's context length.",
    )

    level = "model"

    @model_validator(mode="after")
    def _check_targets(self) -> Self:
        self.require_no_targets(
            f"an adapter of kind {self.kind}, which adapts no linear", advice=""
        )
        return self

    def check_context(self, model: ModelConfig) -> None:
        """Checks that the virtual tokens leave positions for real ones.

        Raises:
            ConfigError: there are as many as the model's context has positions, or more.
        """
        if self.num_virtual_tokens >= model.max_seq_len:
            raise ConfigError(
                f"num_virtual_tokens={self.num_virtual_tokens} leaves no position of the model's "
                f"context of {model.max_seq_len} for other tokens; lower it"
            )

    def merge_unsupported_reason(self) -> str | None:
        """Returns why virtual tokens cannot be merged."""
        return (
            "its virtual tokens are rows of the input, not changes of weights; use the adapter "
            "without merging"
        )

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:  # noqa: ARG002 - of the interface
        """Returns the number of virtual tokens."""
        return {"num_virtual_tokens": self.num_virtual_tokens, "num_transformer_submodules": 1}

    def base_to_peft(self, model: ModelConfig) -> JsonObject:
        """Returns the sizes of the base model that peft records."""
        heads = {m.num_heads for m in _attentions(model)}
        entries = {"token_dim": model.hidden_size, "num_layers": model.num_layers}
        # peft has one number for all layers, so there is none if they differ
        return entries | ({"num_attention_heads": heads.pop()} if len(heads) == 1 else {})

    def check_file(
        self, description: JsonMapping, tensors: Mapping[str, Tensor], model: ModelConfig
    ) -> None:
        """Checks the number of virtual tokens, and the sizes of the base model.

        Raises:
            CheckpointError: one of them differs.
        """
        table = tensors.get(TABLE)
        if table is not None and table.ndim > 0 and len(table) != self.num_virtual_tokens:
            raise CheckpointError(
                f"num_virtual_tokens is {self.num_virtual_tokens}, but {TABLE} has {len(table)} "
                "rows; copy the adapter again"
            )
        for key, expected in self.base_to_peft(model).items():
            if description.get(key) not in (None, expected):
                raise CheckpointError(
                    f"the adapter was made for a base model with {key}={description[key]}, but "
                    f"this one has {expected}; use the model it was trained on"
                )


READ_BY_ALL = ("num_virtual_tokens", "token_dim", "num_layers", "num_attention_heads")
NEUTRAL: JsonObject = {"num_transformer_submodules": (1, None)}  # 2 is for encoder-decoders
"""Keys of `adapter_config.json` that all methods read, and that all ignore at some value."""


class Table(nn.Module):
    """A trained table: `forward()` returns [rows, width] fp32.

    Args:
        rows: number of virtual tokens.
        width: length of a row.
        encoder: maps the embedding [rows, width in] to the table; None trains the table itself.
        embedding_width: width of the encoder's input.
    """

    def __init__(
        self,
        rows: int,
        width: int,
        encoder: nn.Module | None = None,
        embedding_width: int = 0,
    ) -> None:
        super().__init__()
        trained = torch.empty(rows, width if encoder is None else embedding_width)
        self.embedding = nn.Parameter(trained)
        self.encoder = encoder

    def forward(self) -> Tensor:
        """Returns the table, through the encoder if there is one."""
        if self.encoder is None:
            return self.embedding
        table: Tensor = self.encoder(self.embedding)
        return table

    def reset_parameters(self, generator: Generator) -> None:
        """Initialises the embedding from N(0, 1) and the encoder as PyTorch does, like peft."""
        nn.init.normal_(self.embedding, generator=generator)
        if self.encoder is not None:
            reset_encoder(self.encoder, generator)

    @torch.no_grad()
    def folded(self) -> Tensor:
        """Returns the table as files contain it: computed without dropout."""
        was_training = self.training
        table: Tensor = self.eval()()
        self.train(was_training)
        return table

    def cost(self, trace: CostTrace) -> None:
        """Records the encoder's matrix products and the activations that it saves."""
        rows = len(self.embedding)
        for name, module in () if self.encoder is None else self.encoder.named_modules():
            if isinstance(module, nn.Linear):
                linear_cost(trace, rows, module, name)
            elif isinstance(module, nn.LSTM):
                lstm_cost(trace, rows, module, name)


class VirtualVectors(nn.Module):
    """Virtual tokens that are inputs of the first layer; the table is [n, D]."""

    def __init__(self, table: Table) -> None:
        super().__init__()
        self.table, self.num_virtual = table, len(table.embedding)

    def vectors(self) -> Tensor:
        """Returns the input of the first layer, [n, D] fp32."""
        rows: Tensor = self.table()
        return rows

    def keys_values(self) -> Sequence[KeysValues]:
        """Returns none: every layer computes its own."""
        return ()

    def reset_parameters(self, generator: Generator) -> None:
        """Initialises the table."""
        self.table.reset_parameters(generator)


class VirtualKeysValues(nn.Module):
    """Virtual tokens that are keys and values of every layer; the table is [n, 2 · L · K · d].

    In a row, the keys of layer l have slot 2 l, its values slot 2 l + 1, each K · d long.
    """

    def __init__(self, table: Table, num_layers: int, num_kv_heads: int) -> None:
        super().__init__()
        self.table, self.num_virtual = table, len(table.embedding)
        self.num_layers, self.num_kv_heads = num_layers, num_kv_heads

    def vectors(self) -> None:
        """Returns None: the input of the first layer does not matter."""

    def keys_values(self) -> Sequence[KeysValues]:
        """Returns each layer's keys and values, [n, K, d] fp32."""
        heads = (self.num_virtual, 2 * self.num_layers, self.num_kv_heads, -1)
        slots = self.table().view(heads).unbind(1)
        return list(zip(slots[::2], slots[1::2], strict=True))

    def reset_parameters(self, generator: Generator) -> None:
        """Initialises the table."""
        self.table.reset_parameters(generator)


class PromptLearningSet(AdapterSet):
    """An attached prompt-learning adapter, whose file contains the folded table."""

    def own_tensors(self) -> dict[str, Tensor]:
        """Returns the table; the parameter itself if there is no encoder."""
        adapter = self.model_adapter
        assert isinstance(adapter, VirtualVectors | VirtualKeysValues), "one of the two is built"
        return {TABLE: adapter.table.folded()}


def kv_shape(model: ModelConfig) -> tuple[int, int]:
    """Returns the number of key-value heads and their dimension, which all layers must share.

    Raises:
        ConfigError: a layer has no keys and values, or the layers' shapes differ.
    """
    mixers = _attentions(model)
    if len(mixers) < model.num_layers:
        number = next(
            i for i, layer in enumerate(model.layers) if layer.mixer not in mixers
        )  # the first layer without attention
        raise ConfigError(
            f"prefix tuning needs keys and values in every layer, but layer {number} is "
            f"{model.layers[number].mixer.kind.replace('_', ' ')}, which has none; use "
            "adapter.kind=prompt or ptuning"
        )
    shapes = {(m.num_kv_heads, m.head_dim): None for m in mixers}
    if len(shapes) > 1:
        texts = ", ".join(f"{heads} x {dim}" for heads, dim in shapes)
        raise ConfigError(
            f"prefix tuning needs the same key-value heads in every layer, but this model's layers "
            f"have {texts} (heads x dimension); use adapter.kind=prompt or ptuning"
        )
    return next(iter(shapes))


def reset_encoder(encoder: nn.Module, generator: Generator) -> None:
    """Initialises linears and LSTMs as their constructors do: uniform in ±1/√in, ±1/√hidden."""
    for module in encoder.modules():
        if isinstance(module, nn.Linear):
            bound = 1 / math.sqrt(module.in_features)
        elif isinstance(module, nn.LSTM):
            bound = 1 / math.sqrt(module.hidden_size)
        else:
            continue
        for parameter in module.parameters():
            nn.init.uniform_(parameter, -bound, bound, generator=generator)


def linear_cost(trace: CostTrace, rows: int, linear: nn.Linear, name: str) -> None:
    """Records x Wᵀ with a gradient of both, and its input unless that is the embedding itself."""
    flops = 2 * rows * linear.in_features * linear.out_features
    trace.product("adapters", flops, 2 * flops)
    if name != FIRST:
        trace.keep(f"{name}.input", rows * linear.in_features * FP32)


def lstm_cost(trace: CostTrace, rows: int, lstm: nn.LSTM, name: str) -> None:
    """Records the four gates of every layer and direction.

    The saved bytes are those of oneDNN's workspace on a CPU, measured with PyTorch 2.13 for hidden
    sizes from 512 to 1024 (within 3%); a GPU saves less.
    """
    directions, hidden = 1 + lstm.bidirectional, lstm.hidden_size
    for layer in range(lstm.num_layers):
        inputs = hidden * directions if layer else lstm.input_size
        flops = 2 * rows * directions * 4 * hidden * (inputs + hidden)
        trace.product("adapters", flops, 2 * flops)
        elements = 10.5 * hidden + 6.3 * max(inputs, hidden)
        trace.keep(f"{name}.{layer}", round(rows * directions * elements) * FP32)


def _attentions(model: ModelConfig) -> list[AttentionConfig]:
    """Returns the mixers of the layers that have keys and values."""
    return [layer.mixer for layer in model.layers if isinstance(layer.mixer, AttentionConfig)]


__all__ = [
    "NEUTRAL",
    "READ_BY_ALL",
    "TABLE",
    "PromptLearningConfig",
    "PromptLearningSet",
    "Table",
    "VirtualKeysValues",
    "VirtualVectors",
    "kv_shape",
]
