"""An encoder–decoder from the parts of the decoder: the encoder reads the prompt (T5).

A sequence is its prompt and what is generated after it, as in a prefix language model:

    token_ids   a b c </s> | start x y         prefix_lengths 4: the tokens of the encoder
    hidden      -  -  -  -  | h     h h         rows of the prompt are zero, they predict nothing

The encoder runs once over the prompt. In each layer of the decoder, a token attends to those after
the prompt, and to the encoder's output. With a KV cache, a token of the prompt stores its key and
value for that second attention and any other token those for the first: one pair each in a layer.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from easyllm.core.errors import ConfigError
from easyllm.nn.config import AttentionConfig, LayerConfig, ModelConfig
from easyllm.nn.context import ForwardContext, KeyValueStore
from easyllm.nn.cost import Activation, CostTrace, LayerTrace
from easyllm.nn.decoder import Decoder, DecoderLayer, share_tables, terms
from easyllm.nn.linear import Linear
from easyllm.nn.norm import build_norm, sum_and_norm
from easyllm.ops.attention import attend_segment
from easyllm.ops.attention_rule import AttentionRule

Cached = tuple[Tensor, Tensor, Tensor, Tensor]
"""State of a sequence in a layer: keys and values of the decoder, then of the encoder's output."""


def build_model(config: ModelConfig) -> Decoder:
    """Returns the model of a configuration: a decoder, or an encoder–decoder if it has an encoder.

    The weights are uninitialised.
    """
    return Decoder(config) if config.encoder is None else EncoderDecoder(config)


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """Which rows of a pass belong to the encoder, and which to the decoder.

    Attributes:
        encoder: [M] int64, rows of prompts.
        decoder: [N] int64, the other rows.
        encoder_lengths, decoder_lengths: number of each in every sequence.
    """

    encoder: Tensor
    decoder: Tensor
    encoder_lengths: tuple[int, ...]
    decoder_lengths: tuple[int, ...]

    @classmethod
    def of(cls, context: ForwardContext) -> "Rows":
        """Returns the rows of a pass, given the prefix of each sequence."""
        prefixes = context.prefix_lengths or (0,) * len(context.lengths)
        first, encoder, decoder = 0, list[int](), list[int]()
        for length, prefix in zip(context.lengths, prefixes, strict=True):
            encoder += range(first, first + prefix)
            decoder += range(first + prefix, first + length)
            first += length
        device = context.positions.device
        return cls(
            torch.tensor(encoder, dtype=torch.int64, device=device),
            torch.tensor(decoder, dtype=torch.int64, device=device),
            prefixes,
            tuple(n - p for n, p in zip(context.lengths, prefixes, strict=True)),
        )

    def joined(self, encoder: Tensor, decoder: Tensor) -> Tensor:
        """Returns rows [T, ...] of the pass, given [M, ...] and [N, ...]."""
        out = decoder.new_zeros(len(self.encoder) + len(self.decoder), *decoder.shape[1:])
        return out.index_copy(0, self.encoder, encoder).index_copy(0, self.decoder, decoder)


@dataclass(frozen=True, slots=True, eq=False)
class Memory:
    """The encoder's output as a layer of the decoder reads it.

    Attributes:
        hidden: [M, D], the encoder's output of the prompts in this pass.
        rows: the rows of this pass.
        store: the KV cache of the whole pass, or None.
    """

    hidden: Tensor
    rows: Rows
    store: KeyValueStore | None


class CrossAttention(nn.Module):
    """Attention from the decoder to the encoder's output, without positions or a mask.

    Args:
        config: heads and scale.
        hidden_size: D.
    """

    def __init__(self, config: AttentionConfig, hidden_size: int) -> None:
        super().__init__()
        self.config, self.scale = config, config.scale or config.head_dim**-0.5
        width, kv_width = (n * config.head_dim for n in (config.num_heads, config.num_kv_heads))
        self.q_proj = Linear(hidden_size, width, bias=config.qkv_bias)
        self.k_proj = Linear(hidden_size, kv_width, bias=config.qkv_bias)
        self.v_proj = Linear(hidden_size, kv_width, bias=config.qkv_bias)
        self.o_proj = Linear(width, hidden_size, bias=config.out_bias)

    def keys_values(self, memory: Memory) -> tuple[Tensor, Tensor]:
        """Returns keys and values of the encoder's output, both [M, K, d]."""
        shape = (len(memory.hidden), self.config.num_kv_heads, self.config.head_dim)
        return self.k_proj(memory.hidden).view(shape), self.v_proj(memory.hidden).view(shape)

    def forward(self, x: Tensor, attend: "LayerStore", context: ForwardContext) -> Tensor:
        """Returns the output [N, D] for `x: [N, D]`."""
        q = self.q_proj(x, context).view(len(x), self.config.num_heads, self.config.head_dim)
        return self.o_proj(attend.to_memory(q, self.scale).flatten(1), context)

    def cost(self, trace: CostTrace, x: Activation) -> Activation:
        """Records the projections and products; the rows of keys are those that `Work` says."""
        lengths, work = trace.work.lengths, trace.work
        read = lengths if work.prefixes is None else work.prefixes
        size = x.nbytes // max(1, work.tokens)
        memory = Activation("memory", size * sum(read), x.grad)
        q = trace.linear(self.q_proj, "cross.q", x, part="attention")
        k = trace.linear(self.k_proj, "cross.k", memory, part="attention", rows=sum(read))
        v = trace.linear(self.v_proj, "cross.v", memory, part="attention", rows=sum(read))
        width = self.config.num_heads * self.config.head_dim
        out = trace.made("crossed", width, grad=q.grad or k.grad or v.grad)
        flops = 2 * sum(n * m for n, m in zip(lengths, read, strict=True)) * width
        trace.product("scores", 2 * flops, 2 * flops * (q.grad + k.grad))
        if out.grad:
            trace.keep_all(q, k, v, out)
        return trace.linear(self.o_proj, "cross.o", out, part="attention")


class LayerStore:
    """Keys and values of one layer: what its self-attention and its cross-attention attend to.

    It is the `KeyValueStore` of the decoder's self-attention: of each sequence, only the tokens
    after the prompt are keys.

    Args:
        layer: the layer's number in the KV cache.
        memory: the encoder's output.
        k, v: [M, K, d], its keys and values for cross-attention.
    """

    def __init__(self, layer: int, memory: Memory, k: Tensor, v: Tensor) -> None:
        self.layer, self.memory, self._k, self._v = layer, memory, k, v

    def attend(
        self,
        layer: int,  # noqa: ARG002 - of the interface
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        rule: AttentionRule,
        prefix_lengths: tuple[int, ...] | None = None,  # noqa: ARG002
    ) -> Tensor:
        """Returns the output [N, H, d] of self-attention; see `KeyValueStore`."""
        memory, rows = self.memory, self.memory.rows
        assert memory.store is not None, "called with a KV cache"
        assert v is not None, "called by softmax attention"

        def step(*inputs: Tensor, state: Cached | None) -> tuple[Tensor, Cached]:
            q, k, v, prompt = inputs
            split = int(prompt.sum())
            if state is None:
                state = (k[:0], v[:0], k[:split], v[:split])
            keys, values = torch.cat([state[0], k[split:]]), torch.cat([state[1], v[split:]])
            out = torch.zeros_like(q)
            out[split:] = attend_segment(q[split:], keys, values, rule)
            return out, (keys, values, *state[2:])

        zeros = q.new_zeros(len(rows.encoder), *q.shape[1:])
        inputs = (rows.joined(zeros, q), rows.joined(self._k, k), rows.joined(self._v, v))
        return memory.store.recur(self.layer, step, *inputs, self._prompt(q))[rows.decoder]

    def to_memory(self, q: Tensor, scale: float) -> Tensor:
        """Returns the output [N, H, d] of cross-attention for `q: [N, H, d]`."""
        memory, rows = self.memory, self.memory.rows
        if memory.store is None:
            parts = zip(
                q.split(rows.decoder_lengths),
                self._k.split(rows.encoder_lengths),
                self._v.split(rows.encoder_lengths),
                strict=True,
            )
            return torch.cat([_visible_to_all(*part, scale) for part in parts])

        def step(*inputs: Tensor, state: Cached) -> tuple[Tensor, Cached]:
            q, prompt = inputs
            split = int(prompt.sum())
            out = torch.zeros_like(q)
            out[split:] = _visible_to_all(q[split:], state[2], state[3], scale)
            return out, state

        zeros = q.new_zeros(len(rows.encoder), *q.shape[1:])
        out = memory.store.recur(self.layer, step, rows.joined(zeros, q), self._prompt(q))
        return out[rows.decoder]

    def _prompt(self, q: Tensor) -> Tensor:
        """Which rows of the pass are those of prompts, [T] bool."""
        rows = self.memory.rows
        prompt = torch.zeros(len(rows.encoder) + len(rows.decoder), dtype=torch.bool)
        prompt[rows.encoder.cpu()] = True
        return prompt.to(q.device)

    def recur(self, *_: object, **__: object) -> Tensor:
        """Layers of an encoder–decoder have softmax attention alone."""
        raise AssertionError("checked by the configuration")


def _visible_to_all(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attention of `q: [N, H, d]` to all of `k`, `v: [M, K, d]`; zero if M is 0."""
    if not len(k):
        return torch.zeros_like(q)
    queries, keys, values = (x.transpose(0, 1)[None] for x in (q, k, v))
    grouped = q.shape[1] != k.shape[1]
    out = F.scaled_dot_product_attention(queries, keys, values, scale=scale, enable_gqa=grouped)
    return out[0].transpose(0, 1)


class CrossLayer(DecoderLayer):
    """A layer with a third residual block, cross-attention, between the other two."""

    def __init__(self, config: LayerConfig, model: ModelConfig, number: int) -> None:
        super().__init__(config, model, number)
        mixer = config.mixer
        assert isinstance(mixer, AttentionConfig), "checked by the configuration"
        self.number = number
        self.cross_norm = build_norm(model.norm, model.hidden_size)
        self.cross = CrossAttention(mixer, model.hidden_size)

    def read(
        self, x: Tensor, context: ForwardContext, added: Tensor | None, memory: Memory
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the two terms of the residual stream after the layer, both [N, D]."""
        store = LayerStore(self.number, memory, *self.cross.keys_values(memory))
        own = replace(context, store=None if memory.store is None else store)
        x, start = sum_and_norm(self.mixer_norm, x, added)
        mixed = self.dropout(self.mixer(start, own))
        x, start = sum_and_norm(self.cross_norm, x, mixed)
        crossed = self.dropout(self.cross(start, store, context))
        x, start = sum_and_norm(self.feed_forward_norm, x, crossed)
        return terms(
            self.feed_forward_after_norm, x, self.dropout(self.feed_forward(start, context))
        )

    def cost(self, trace: CostTrace, x: Activation) -> tuple[LayerTrace, Activation]:
        """Returns the events of the layer, with those of cross-attention in front."""
        start = trace.of(self.cross_norm, x, "cross_norm")
        trace.of(self.cross, start)
        return super().cost(trace, x)


class EncoderDecoder(Decoder):
    """An encoder–decoder transformer built from a `ModelConfig` with an `encoder`.

    The embedding is shared. `prefix_lengths` of the context are the lengths of the encoder's texts;
    in a pass over cached sequences, those that start in this pass.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__(config)
        assert config.encoder is not None, "see `build_model`"
        self.layers = nn.ModuleList(
            CrossLayer(layer, config, number) for number, layer in enumerate(config.layers)
        )
        share_tables(self.layers)
        self.encoder = nn.ModuleList(
            DecoderLayer(layer, config, number)
            for number, layer in enumerate(config.encoder.layers)
        )
        share_tables(self.encoder)
        self.encoder_norm = build_norm(config.norm, config.hidden_size)
        self.hidden_scale = config.encoder.hidden_scale

    def encode(self, token_ids: Tensor, context: ForwardContext) -> Tensor:
        """Returns the encoder's output [M, D] for the texts that `context` describes."""
        if not len(token_ids):  # all sequences of the pass decode
            return torch.empty(0, self.config.hidden_size, dtype=self.dtype, device=self.device)
        x, added = self.embed(token_ids, context), None
        for layer in self.encoder:
            x, added = layer(x, context, added)
        _, out = sum_and_norm(self.encoder_norm, x, added)
        return out.to(self.dtype)

    def forward(self, token_ids: Tensor, context: ForwardContext) -> Tensor:
        """Returns the decoder's final hidden states, ready for the head; zero in prompts.

        Args:
            token_ids: [T] int64.
            context: `prefix_lengths` says which tokens are the encoder's.

        Returns:
            [T, D] in the dtype of the weights.

        Raises:
            ConfigError: no token is the encoder's, or the mode is deterministic.
        """
        rows = Rows.of(context)
        if context.store is None and 0 in rows.encoder_lengths:
            raise ConfigError(
                "an encoder–decoder model reads its prompt with the encoder, but a sequence has no "
                "prompt; give prefix (the number of the prompt's tokens), or rows with a prompt"
            )
        if context.deterministic or context.adapters is not None:
            what = "deterministic mode" if context.deterministic else "several adapters"
            raise ConfigError(f"an encoder–decoder model has no {what}; leave it out")
        texts = ForwardContext.packed(
            [n for n in rows.encoder_lengths if n], device=token_ids.device
        )
        memory = Memory(self.encode(token_ids[rows.encoder], texts), rows, context.store)
        own = replace(
            context,
            positions=context.positions[rows.decoder],
            lengths=rows.decoder_lengths,
            prefix_lengths=None,
            position_rows=None,
            memo={},
        )
        x, added = self.embed(token_ids[rows.decoder], own), None
        for layer in self.layers:
            assert isinstance(layer, CrossLayer), "an encoder–decoder has no other layers"
            x, added = layer.read(x, own, added, memory)
        _, out = sum_and_norm(self.norm, x, added)
        out = (out * self.hidden_scale).to(self.dtype)
        return rows.joined(out.new_zeros(len(rows.encoder), out.shape[1]), out)


__all__ = ["CrossLayer", "EncoderDecoder", "build_model"]
