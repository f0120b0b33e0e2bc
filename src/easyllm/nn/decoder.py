"""The decoder: one definition for training and serving.

Input is packed: T tokens of any number of sequences end to end. The head is applied apart, to the rows a
caller chooses (all of them in chunks for a loss, the last of each sequence in decoding).

The residual stream is fp32 whatever the dtype of the weights: norms read it in fp32 and hand on the dtype of
the weights, products run in that dtype, and their results are added in fp32.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from easyllm.core.errors import ConfigError
from easyllm.nn.attention import Attention
from easyllm.nn.config import AttentionConfig, LayerConfig, LinearAttentionConfig, ModelConfig
from easyllm.nn.context import AdapterRows, ForwardContext
from easyllm.nn.cost import Activation, CostTrace, LayerTrace
from easyllm.nn.feed_forward import build_feed_forward
from easyllm.nn.linear import Embedding, Linear
from easyllm.nn.linear_attention import LinearAttention
from easyllm.nn.norm import build_norm, sum_and_norm
from easyllm.nn.position import build_embedding_position
from easyllm.nn.storage import DenseWeight
from easyllm.nn.virtual_tokens import ModelAdapter, VirtualTokens, in_front


def widen(x: Tensor) -> Tensor:
    """`x` in at least fp32 (fp64 stays fp64)."""
    return x if x.dtype == torch.float64 else x.float()


def build_mixer(
    config: AttentionConfig | LinearAttentionConfig, hidden_size: int, layer: int
) -> nn.Module:
    """The mixer of tokens a configuration names."""
    match config:
        case AttentionConfig():
            return Attention(config, hidden_size, layer)
        case LinearAttentionConfig():
            return LinearAttention(config, hidden_size, layer)


class DecoderLayer(nn.Module):
    """Two residual blocks, f = mixer, then f = feed_forward. Where a placement has no norm stands an identity, so one
    formula serves all:

        x ← after(x + post(f(norm(x))))      norm: pre and sandwich · post: sandwich · after: post

    The stream comes and goes as two terms, of which the second may be missing: whichever norm reads the stream next forms
    their sum, in the same pass over memory.
    """

    def __init__(self, config: LayerConfig, model: ModelConfig, number: int) -> None:
        super().__init__()

        def norm(*placements: str) -> nn.Module:
            wanted = config.norm_placement in placements
            return build_norm(model.norm, model.hidden_size) if wanted else nn.Identity()

        self.mixer_norm = norm("pre", "sandwich")
        self.mixer = build_mixer(config.mixer, model.hidden_size, number)
        self.mixer_post_norm = norm("sandwich")
        self.mixer_after_norm = norm("post")
        self.feed_forward_norm = norm("pre", "sandwich")
        self.feed_forward = build_feed_forward(config.feed_forward, model.hidden_size, number)
        self.feed_forward_post_norm = norm("sandwich")
        self.feed_forward_after_norm = norm("post")
        self.dropout = nn.Dropout(0.0)  # of both blocks' outputs; a training run may raise it

    def forward(
        self, x: Tensor, context: ForwardContext, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """`x + added`, [T, D] each → the same for the next layer."""
        x, start = sum_and_norm(self.mixer_norm, x, added)
        mixed = self.mixer_post_norm(self.dropout(self.mixer(start, context)))
        x, start = sum_and_norm(self.feed_forward_norm, *terms(self.mixer_after_norm, x, mixed))
        fed = self.feed_forward_post_norm(self.dropout(self.feed_forward(start, context)))
        return terms(self.feed_forward_after_norm, x, fed)

    def cost(self, trace: CostTrace, x: Activation) -> tuple[LayerTrace, Activation]:
        """The layer's events, which leave the trace, and the residual stream after it."""
        entered = x
        start = _norm_cost(trace, self.mixer_norm, x, "mixer_norm")
        mixed = trace.of(self.mixer, start)
        x = self._add_cost(trace, x, mixed, "mixed", self.mixer_post_norm, self.mixer_after_norm)
        start = _norm_cost(trace, self.feed_forward_norm, x, "feed_forward_norm")
        before, trace.events = trace.events, []
        out = trace.of(self.feed_forward, start)
        fed, trace.events = trace.events, []
        x = self._add_cost(
            trace, x, out, "fed", self.feed_forward_post_norm, self.feed_forward_after_norm
        )
        after, trace.events = trace.events, []
        found = LayerTrace(
            before=before, fed=fed, after=after, input=entered, feed_forward_input=start
        )
        return found, Activation("x", x.nbytes, x.grad)

    def _add_cost(
        self,
        trace: CostTrace,
        x: Activation,
        block: Activation,
        name: str,
        post: nn.Module,
        after: nn.Module,
    ) -> Activation:
        """The residual stream with a block's output added: fp32, or after a post-norm the dtype of the weights."""
        if trace.work.dropout and block.grad:
            trace.keep(f"{name}.noise", block.nbytes)
        if not isinstance(post, nn.Identity):
            block = Activation(f"{name}.out", block.nbytes, block.grad)
        block = _norm_cost(trace, post, block, f"{name}.post")
        total = Activation(f"x+{name}", x.nbytes, x.grad or block.grad)
        return _norm_cost(trace, after, total, f"{name}.after")


def _norm_cost(trace: CostTrace, norm: nn.Module, x: Activation, name: str) -> Activation:
    """A norm's output; the input itself where there is none."""
    return x if isinstance(norm, nn.Identity) else trace.of(norm, x, name)


def terms(after: nn.Module, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor | None]:
    """The two terms of after(x + added)."""
    return (x, added) if isinstance(after, nn.Identity) else (after(x + added), None)


class Decoder(nn.Module):
    """A decoder-only transformer built from a `ModelConfig`.

    Weights are uninitialised until they are loaded or `reset_parameters` is called.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.embedding_position = build_embedding_position(
            config.embedding_position, config.max_seq_len, config.hidden_size
        )
        self.layers = nn.ModuleList(
            DecoderLayer(layer, config, number) for number, layer in enumerate(config.layers)
        )
        self.norm = (
            build_norm(config.norm, config.hidden_size) if config.final_norm else nn.Identity()
        )
        projects = config.num_labels is None and not config.tie_embeddings
        self.lm_head = Linear(config.hidden_size, config.vocab_size) if projects else None
        self.score = Linear(config.hidden_size, config.num_labels) if config.num_labels else None
        self.model_adapter: ModelAdapter | None = None
        self.adapter_sets: dict[str, Any] = {}  # what is attached, by name (`adapters.AdapterSet`)
        self.adapter_changes = 0  # times an adapter was attached or removed: an engine looks

    @property
    def device(self) -> torch.device:
        """Where the embedding is, and so where token ids go."""
        return self.embed_tokens.storage.device

    @property
    def dtype(self) -> torch.dtype:
        """Of hidden states and products; quantized weights are meant for it."""
        return self.embed_tokens.storage.dtype

    def holders(self) -> Iterator[tuple[str, Linear | Embedding]]:
        """Every layer that keeps a weight in a storage, with its name."""
        for name, module in self.named_modules():
            if isinstance(module, Linear | Embedding):
                yield name, module

    def packed_formats(self) -> frozenset[str]:
        """Formats of the weights that are not full ones: what needs full weights refuses a model that has any."""
        formats = {holder.storage.format for _, holder in self.holders()}
        return frozenset(formats - {DenseWeight.format})

    @property
    def is_adapted(self) -> bool:
        """Whether a layer, or the model itself, has an adapter."""
        linears = (m for m in self.modules() if isinstance(m, Linear))
        return self.model_adapter is not None or any(m.adapter is not None for m in linears)

    @property
    def num_virtual_tokens(self) -> int:
        """Virtual tokens that a model-level adapter puts in front of every sequence."""
        return 0 if self.model_adapter is None else self.model_adapter.num_virtual

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the output projection without its adapter (the embedding itself when tied); dequantized, where it is
        quantized."""
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return head.storage.dense()

    def loss_product(self, hidden: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """[T, K] and [V, K] whose product is the head's output for `hidden: [T, D]` before the cap: for losses that never
        hold the logits at once. K is D, or more where an adapter adds to it.

        Args:
            weight: `head_weight`, for callers with several products.

        Raises:
            ConfigError: the head's adapter cannot be written so.
        """
        weight = self.head_weight if weight is None else weight
        if self.lm_head is None or self.lm_head.adapter is None:
            return hidden, weight
        return self.lm_head.adapter.loss_product(hidden, weight)

    def forward(self, token_ids: Tensor, context: ForwardContext) -> Tensor:
        """Final hidden states, normalised and ready for the head.

        Args:
            token_ids: [T] int64, sequences end to end as `context` says.
            context: positions, lengths, and where earlier keys and values live.

        Returns:
            [T, D] in the dtype of the weights.
        """
        real = None
        if self.model_adapter is not None and not context.base_only:
            token_ids, context, real = in_front(
                token_ids, context, self.model_adapter, self.config.vocab_size
            )
        x = widen(self.embed_tokens(token_ids))
        if isinstance(context.virtual, VirtualTokens):
            x = context.virtual.embed(x)
        x = x * self.config.embedding_scale
        x, added = self.embedding_position(x, context.positions), None
        for layer in self.layers:
            x, added = layer(x, context, added)
        _, out = sum_and_norm(self.norm, x, added)
        out = out.to(self.dtype)
        return out if real is None else out.index_select(0, real)

    def head(self, hidden: Tensor, context: ForwardContext | None = None) -> Tensor:
        """Logits of chosen rows: `hidden: [N, D]` → [N, V] in fp32 (fp64 for an fp64 model); with a head of labels
        their scores, [N, num_labels]. `context` is that of these rows."""
        if self.score is not None:
            return widen(self.score(hidden, context))
        if self.lm_head is None:
            logits = widen(self.embed_tokens.project(hidden, context))
        else:
            logits = widen(self.lm_head(hidden, context))
        return soft_cap(logits, self.config.logit_softcap)

    @torch.no_grad()
    def logits(
        self,
        token_ids: Tensor | list[int],
        *,
        deterministic: bool = False,
        adapter: str | None = None,
    ) -> Tensor:
        """Logits after each token of one sequence: [T] ids → [T, V] fp32.

        Args:
            deterministic: as in `ForwardContext`.
            adapter: of a model that holds several, the one to use by name; empty for the base alone.
        """
        ids = torch.as_tensor(token_ids, device=self.device)
        if adapter and adapter not in self.adapter_sets:
            held = ", ".join(repr(name) for name in self.adapter_sets if name) or "none"
            raise ConfigError(f"the model holds no adapter {adapter!r} (held by name: {held})")
        rows = None
        if adapter is not None:
            rows = AdapterRows.of_sequences([adapter], [ids.numel()], device=self.device)
        context = ForwardContext.packed(
            [ids.numel()],
            device=self.device,
            deterministic=deterministic,
            adapters=rows,
        )
        return self.head(self(ids, context), context)

    def reset_parameters(
        self, *, std: float = 0.02, generator: torch.Generator | None = None
    ) -> None:
        """Fresh weights: N(0, std²), and std / √(2L) for the projections back into the residual
        stream (GPT-2's rule, Radford et al. 2019, section 2.3), so that its variance does not grow with depth."""
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                back = name.endswith(("o_proj", "down_proj"))
                module.reset_parameters(residual_std if back else std, generator)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters()


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """cap · tanh(logits / cap); the logits themselves where there is no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
