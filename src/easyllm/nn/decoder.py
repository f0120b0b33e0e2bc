"""The decoder: one definition for training and serving.

Input is packed: T tokens of any number of sequences end to end. The head is applied apart, to the rows a
caller chooses (all of them in chunks for a loss, the last of each sequence in decoding).

The residual stream is fp32 whatever the dtype of the weights: norms read it in fp32 and hand on the dtype of
the weights, products run in that dtype, and their results are added in fp32.
"""

import math

import torch
from torch import Tensor, nn

from easyllm.nn.attention import Attention
from easyllm.nn.config import AttentionConfig, LayerConfig, LinearAttentionConfig, ModelConfig
from easyllm.nn.cost import Activation, CostTrace, LayerTrace
from easyllm.nn.feed_forward import build_feed_forward
from easyllm.nn.linear import Embedding, Linear
from easyllm.nn.linear_attention import LinearAttention
from easyllm.nn.norm import build_norm, sum_and_norm
from easyllm.nn.position import build_embedding_position
from easyllm.ops.attention import AttentionContext


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
        self, x: Tensor, context: AttentionContext, added: Tensor | None = None
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

    @property
    def device(self) -> torch.device:
        """Where the embedding lives, and so where token ids go."""
        return self.embed_tokens.weight.device

    @property
    def is_quantized(self) -> bool:
        """Whether `quant.quantize_weights` has been here: what needs full weights refuses such a model."""
        return self.embed_tokens.quantized is not None

    @property
    def head_weight(self) -> Tensor:
        """[V, D]: the output projection (the embedding itself when tied); dequantized, where it is quantized."""
        owner = self.embed_tokens if self.lm_head is None else self.lm_head
        if owner.quantized is not None:
            return owner.quantized.dequantize().to(owner.weight.dtype)
        return owner.weight

    def forward(self, token_ids: Tensor, context: AttentionContext) -> Tensor:
        """Final hidden states, normalised and ready for the head.

        Args:
            token_ids: [T] int64, sequences end to end as `context` says.
            context: positions, lengths, and where earlier keys and values live.

        Returns:
            [T, D] in the dtype of the weights.
        """
        x = widen(self.embed_tokens(token_ids)) * self.config.embedding_scale
        x, added = self.embedding_position(x, context.positions), None
        for layer in self.layers:
            x, added = layer(x, context, added)
        _, out = sum_and_norm(self.norm, x, added)
        return out.to(self.embed_tokens.weight.dtype)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits of chosen rows: `hidden: [N, D]` → [N, V] in fp32 (fp64 for an fp64 model); with a head of labels
        their scores, [N, num_labels]."""
        if self.score is not None:
            return widen(self.score(hidden))
        if self.lm_head is None:
            logits = widen(self.embed_tokens.project(hidden))
        else:
            logits = widen(self.lm_head(hidden))
        return soft_cap(logits, self.config.logit_softcap)

    @torch.no_grad()
    def logits(self, token_ids: Tensor | list[int]) -> Tensor:
        """Logits after each token of one sequence: [T] ids → [T, V] fp32."""
        ids = torch.as_tensor(token_ids, device=self.device)
        context = AttentionContext.packed([ids.numel()], device=self.device)
        return self.head(self(ids, context))

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
