"""The decoder: one definition for training and serving.

The input is packed: T tokens of any number of concatenated sequences. The head is applied
separately, to rows that the caller selects (all rows in chunks for a loss, the last row of each
sequence in decoding).

The residual stream is fp32 regardless of the dtype of the weights: norms read it in fp32 and return
the dtype of the weights, matrix products run in that dtype, and their results are added in fp32.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from easyllm.core.errors import ConfigError
from easyllm.nn.attention import Attention
from easyllm.nn.config import (
    AttentionConfig,
    LatentAttentionConfig,
    LayerConfig,
    LinearAttentionConfig,
    Mixer,
    ModelConfig,
)
from easyllm.nn.context import AdapterRows, ForwardContext, block_position_rows
from easyllm.nn.cost import Activation, CostTrace, LayerTrace
from easyllm.nn.embedding_position import build_embedding_position
from easyllm.nn.feed_forward import build_feed_forward
from easyllm.nn.gradient_scale import GradientScale
from easyllm.nn.latent_attention import LatentAttention
from easyllm.nn.linear import Embedding, Linear
from easyllm.nn.linear_attention import LinearAttention
from easyllm.nn.norm import Scale, build_norm, sum_and_norm
from easyllm.nn.norm_head import NormHead
from easyllm.nn.position import T5Position
from easyllm.nn.storage import DenseWeight
from easyllm.nn.virtual_tokens import ModelAdapter, VirtualTokens, prepend_virtual_tokens


def to_at_least_fp32(x: Tensor) -> Tensor:
    """Returns `x` in at least fp32 (fp64 stays fp64)."""
    return x if x.dtype == torch.float64 else x.float()


def build_mixer(config: Mixer, hidden_size: int, layer: int) -> nn.Module:
    """Returns the token mixer for a configuration."""
    match config:
        case AttentionConfig():
            return Attention(config, hidden_size, layer)
        case LatentAttentionConfig():
            return LatentAttention(config, hidden_size, layer)
        case LinearAttentionConfig():
            return LinearAttention(config, hidden_size, layer)


class DecoderLayer(nn.Module):
    """Two residual blocks: f = mixer, then f = feed_forward.

    A norm that a placement does not have is an identity, so one formula covers all placements:

        x ← after(x + post(f(norm(x))))      norm: pre and sandwich · post: sandwich · after: post

    The residual stream is passed between layers as two terms, of which the second may be None: the
    next norm that reads the stream adds them in the same pass over memory.
    """

    def __init__(self, config: LayerConfig, model: ModelConfig, number: int) -> None:
        super().__init__()

        alpha, kind = config.residual_scale, model.norm
        if alpha != 1:  # see `Scale`
            kind = kind.model_copy(update={"eps": kind.eps / alpha**2})

        def norm(*placements: str) -> nn.Module:
            wanted = config.norm_placement in placements
            return build_norm(kind, model.hidden_size) if wanted else nn.Identity()

        def post_norm() -> nn.Module:
            return norm("sandwich") if alpha == 1 else Scale(1 / alpha)

        self.mixer_norm = norm("pre", "sandwich")
        self.mixer = build_mixer(config.mixer, model.hidden_size, number)
        self.mixer_post_norm = post_norm()
        self.mixer_after_norm = norm("post")
        self.feed_forward_norm = norm("pre", "sandwich")
        self.feed_forward = build_feed_forward(config.feed_forward, model.hidden_size, number)
        self.feed_forward_post_norm = post_norm()
        self.feed_forward_after_norm = norm("post")
        self.dropout = nn.Dropout(0.0)  # on the outputs of both blocks; training may raise it

    def forward(
        self, x: Tensor, context: ForwardContext, added: Tensor | None = None
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the two terms of the residual stream after the layer, given `x` and `added`.

        All terms are [T, D]; the second one may be None.
        """
        x, start = sum_and_norm(self.mixer_norm, x, added)
        mixed = self.mixer_post_norm(self.dropout(self.mixer(start, context)))
        x, start = sum_and_norm(self.feed_forward_norm, *terms(self.mixer_after_norm, x, mixed))
        fed = self.feed_forward_post_norm(self.dropout(self.feed_forward(start, context)))
        return terms(self.feed_forward_after_norm, x, fed)

    def cost(self, trace: CostTrace, x: Activation) -> tuple[LayerTrace, Activation]:
        """Returns the layer's events, removed from the trace, and the residual stream after it."""
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
        """Adds a block's output to the residual stream.

        The result is fp32, or after a post-norm in the dtype of the weights.
        """
        if trace.work.dropout and block.grad:
            trace.keep(f"{name}.noise", block.nbytes)
        if not isinstance(post, nn.Identity):
            block = Activation(f"{name}.out", block.nbytes, block.grad)
        block = _norm_cost(trace, post, block, f"{name}.post")
        total = Activation(f"x+{name}", x.nbytes, x.grad or block.grad)
        return _norm_cost(trace, after, total, f"{name}.after")


def _norm_cost(trace: CostTrace, norm: nn.Module, x: Activation, name: str) -> Activation:
    """The output of a norm, or the input itself if there is no norm."""
    return x if isinstance(norm, nn.Identity) else trace.of(norm, x, name)


def terms(after: nn.Module, x: Tensor, added: Tensor) -> tuple[Tensor, Tensor | None]:
    """Returns after(x + added) as two terms, of which the second may be None."""
    return (x, added) if isinstance(after, nn.Identity) else (after(x + added), None)


def share_tables(layers: nn.ModuleList) -> None:
    """Makes layers whose T5 bias is shared use the table of the first one."""
    positions = [getattr(layer.mixer, "position", None) for layer in layers]
    shared = [p for p in positions if isinstance(p, T5Position) and p.config.shared]
    for position in shared[1:]:
        position.share(shared[0])


class Decoder(nn.Module):
    """A decoder-only transformer built from a `ModelConfig`.

    The weights are uninitialised until they are loaded or `reset_parameters` is called.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.embedding_gradient = GradientScale()  # training may shrink it
        self.embedding_position = build_embedding_position(
            config.embedding_position, config.max_seq_len, config.hidden_size
        )
        self.embedding_norm = (
            build_norm(config.norm, config.hidden_size) if config.embedding_norm else nn.Identity()
        )
        self.layers = nn.ModuleList(
            DecoderLayer(layer, config, number) for number, layer in enumerate(config.layers)
        )
        share_tables(self.layers)
        self.norm = (
            build_norm(config.norm, config.hidden_size) if config.final_norm else nn.Identity()
        )
        projects = config.num_labels is None and not config.tie_embeddings
        head = NormHead if config.normalise_head else Linear
        self.lm_head = head(config.hidden_size, config.vocab_size) if projects else None
        self.score = Linear(config.hidden_size, config.num_labels) if config.num_labels else None
        self.model_adapter: ModelAdapter | None = None
        self.vocabulary: Any = None  # tensor-parallel rows of the head (`parallel.vocabulary`)
        self.adapter_sets: dict[str, Any] = {}  # attached adapters by name (`adapters.AdapterSet`)
        self.merges: list[Any] = []  # merges that can be undone (`adapters.merging.Merge`)
        self.adapter_changes = 0  # count of attached or removed adapters, checked by engines
        self.maps_weights = False  # whether the weights are pages of a file that other models share

    @property
    def device(self) -> torch.device:
        """Device of the embedding, on which token ids are expected."""
        return self.embed_tokens.storage.device

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of hidden states and matrix products; quantized weights are used with it, too."""
        return self.embed_tokens.storage.dtype

    def weight_modules(self) -> Iterator[tuple[str, Linear | Embedding]]:
        """Yields the name and module of each layer that has a weight storage."""
        for name, module in self.named_modules():
            if isinstance(module, Linear | Embedding):
                yield name, module

    def packed_formats(self) -> frozenset[str]:
        """Returns the formats of quantized weights; code that needs full weights rejects any."""
        formats = {holder.storage.format for _, holder in self.weight_modules()}
        return frozenset(formats - {DenseWeight.format})

    @property
    def is_adapted(self) -> bool:
        """Whether a layer, or the model itself, has an adapter."""
        layers = (layer for _, layer in self.weight_modules())
        return self.model_adapter is not None or any(m.adapter is not None for m in layers)

    @property
    def num_virtual_tokens(self) -> int:
        """Number of virtual tokens that a model-level adapter prepends to every sequence."""
        return 0 if self.model_adapter is None else self.model_adapter.num_virtual

    @property
    def head_weight(self) -> Tensor:
        """The output projection without its adapter, [V, D], dequantized if it is quantized.

        With tied embeddings this is the embedding matrix.
        """
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        return head.storage.dense()

    def untie_head(self) -> None:
        """Replaces a tied output head with a separate copy of the embedding.

        A model whose head is already separate is unchanged.
        """
        if self.lm_head is not None or self.score is not None:
            return
        head = Linear(self.config.hidden_size, self.config.vocab_size)
        storage = self.embed_tokens.storage
        if storage.format == "dense":
            head.weight = nn.Parameter(storage.dense().detach().clone(), requires_grad=False)
        else:
            head.store(storage)  # packed weights are read-only, so both can share one copy
        self.lm_head = head.train(self.training)
        self.config = self.config.changed(tie_embeddings=False)

    def loss_factors(self, hidden: Tensor, weight: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns the head's output as two factors x' and W', for losses computed in chunks.

        x' W'ᵀ equals the logits for `hidden: [T, D]` before the soft cap, so the logits never need
        to be in memory at once.

        Args:
            weight: `head_weight`, for callers that need it several times.

        Returns:
            [T, K] and [V, K]; K is D, or larger if an adapter adds columns.

        Raises:
            ConfigError: the head's adapter cannot be represented in this form.
        """
        weight = self.head_weight if weight is None else weight
        head = self.embed_tokens if self.lm_head is None else self.lm_head
        if head.adapter is None:
            return hidden, weight
        return head.adapter.loss_factors(hidden, weight)

    def embed(self, token_ids: Tensor, context: ForwardContext) -> Tensor:
        """Returns the residual stream in front of the first layer, [T, D] in at least fp32."""
        x = to_at_least_fp32(self.embed_tokens(token_ids, context)) * self.config.embedding_scale
        x = self.embedding_gradient(x)
        if isinstance(context.virtual, VirtualTokens):
            x = context.virtual.embed(x)
        placed = self.embedding_position(x, context.positions, context.position_rows)
        return to_at_least_fp32(self.embedding_norm(placed))

    def forward(self, token_ids: Tensor, context: ForwardContext) -> Tensor:
        """Returns the final hidden states, normalised and ready for the head.

        Args:
            token_ids: [T] int64, the packed sequences that `context` describes.
            context: positions, lengths, and the KV cache with earlier keys and values.

        Returns:
            [T, D] in the dtype of the weights.
        """
        real = None
        if self.model_adapter is not None and not context.base_only:
            token_ids, context, real = prepend_virtual_tokens(
                token_ids, context, self.model_adapter, self.config.vocab_size
            )
        x, added = self.embed(token_ids, context), None
        for layer in self.layers:
            x, added = layer(x, context, added)
        _, out = sum_and_norm(self.norm, x, added)
        out = out.to(self.dtype)
        return out if real is None else out.index_select(0, real)

    def head(self, hidden: Tensor, context: ForwardContext | None = None) -> Tensor:
        """Returns the logits, or the scores of a score head, of selected rows.

        Args:
            hidden: [N, D].
            context: the context of these rows.

        Returns:
            [N, V], or [N, num_labels] for a score head, in fp32 (fp64 for an fp64 model).
        """
        if self.score is not None:
            return to_at_least_fp32(self.score(hidden, context))
        if self.lm_head is None:
            logits = to_at_least_fp32(self.embed_tokens.project(hidden, context))
        else:
            logits = to_at_least_fp32(self.lm_head(hidden, context))
        return soft_cap(logits, self.config.logit_softcap)

    @torch.no_grad()
    def logits(
        self,
        token_ids: Tensor | list[int],
        *,
        prefix: int = 0,
        deterministic: bool = False,
        adapter: str | None = None,
    ) -> Tensor:
        """Returns the logits after each token of one sequence, [T, V] fp32.

        Args:
            token_ids: [T].
            prefix: number of first tokens that see each other in both directions, in a model with
                such prompts (`ModelConfig.prompt_mask`); in GLM the block starts after them.
            deterministic: as in `ForwardContext`.
            adapter: the name of the adapter to use if several are attached; `""` is the base model.

        Raises:
            ConfigError: the model has no adapter of this name.
        """
        ids = torch.as_tensor(token_ids, device=self.device)
        if adapter and adapter not in self.adapter_sets:
            held = ", ".join(repr(name) for name in self.adapter_sets if name) or "none"
            raise ConfigError(f"the model has no adapter {adapter!r} (attached adapters: {held})")
        rows = None
        if adapter is not None:
            rows = AdapterRows.of_sequences([adapter], [ids.numel()], device=self.device)
        prefixes = (prefix,) if prefix else None
        positions = torch.arange(ids.numel(), device=self.device)
        context = ForwardContext.packed(
            [ids.numel()],
            device=self.device,
            prefix_lengths=prefixes,
            position_rows=block_position_rows(positions, (ids.numel(),), (prefix,))
            if prefix
            else None,
            deterministic=deterministic,
            adapters=rows,
        )
        return self.head(self(ids, context), context)

    def reset_parameters(
        self, *, std: float = 0.02, generator: torch.Generator | None = None
    ) -> None:
        """Initialises the weights from N(0, std²).

        The projections into the residual stream use std / √(2L), so that its variance does not grow
        with depth (GPT-2, Radford et al. 2019, section 2.3).
        """
        residual_std = std / math.sqrt(2 * self.config.num_layers)
        for name, module in self.named_modules():
            if isinstance(module, Linear):
                back = name.endswith(("o_proj", "down_proj"))
                module.reset_parameters(residual_std if back else std, generator)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=std, generator=generator)
            elif module is not self and hasattr(module, "reset_parameters"):
                module.reset_parameters(generator)


def soft_cap(logits: Tensor, cap: float | None) -> Tensor:
    """Returns cap · tanh(logits / cap), or the logits unchanged if there is no cap."""
    return logits if cap is None else cap * torch.tanh(logits / cap)
