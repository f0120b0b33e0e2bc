"""Adapters of the token embedding: low-rank updates, and rows that are trained in full.

    LoRA:           e(t) = E[t] + s B A[:, t],   A: [r, V] zero,  B: [D, r] normal
    trained rows:   e(t) = δ[t] for the chosen tokens, else E[t]

As in peft, a tied head keeps the base's weight under LoRA, and follows trained rows.
"""

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from easyllm.adapters.adapter import EmbeddingAdapter
from easyllm.nn.linear import Embedding
from easyllm.ops.deterministic import fixed_order_linear

TOKEN_ROWS = "token_adapter.trainable_tokens_delta"


class LoRAEmbedding(EmbeddingAdapter):
    """The LoRA adapter of an embedding.

    Args:
        rank, scale: r and s.
        num_tokens, width: shape [V, D] of the embedding.
    """

    def __init__(self, rank: int, scale: float, num_tokens: int, width: int) -> None:
        super().__init__()
        self.scale = scale
        self.lora_embedding_A = nn.Parameter(torch.empty(rank, num_tokens))
        self.lora_embedding_B = nn.Parameter(torch.empty(width, rank))

    def reset_parameters(self, generator: torch.Generator) -> None:
        """Initialises A to zero and B from N(0, 1), as peft does."""
        nn.init.zeros_(self.lora_embedding_A)
        nn.init.normal_(self.lora_embedding_B, generator=generator)

    def forward(
        self, token_ids: Tensor, base: Callable[[Tensor], Tensor], *, deterministic: bool = False
    ) -> Tensor:
        """Returns E[t] + s B A[:, t] [T, D] for `token_ids: [T]`."""
        rows = base(token_ids)
        inner = nn.functional.embedding(token_ids, self.lora_embedding_A.T)  # [T, r]
        product = fixed_order_linear if deterministic else nn.functional.linear
        return rows + (self.scale * product(inner, self.lora_embedding_B)).to(rows.dtype)

    def merged(self, weight: Tensor, bias: None = None) -> tuple[Tensor, None]:  # noqa: ARG002
        """Returns E + s (B A)ᵀ [V, D] in fp32."""
        update = self.lora_embedding_A.float().T @ self.lora_embedding_B.float().T
        return weight + self.scale * update.to(weight.device), None

    def update_factors(self) -> tuple[Tensor, Tensor] | None:
        """Returns Bᵀ [r, D] and s Aᵀ [V, r] in fp32."""
        return self.lora_embedding_B.float().T, self.scale * self.lora_embedding_A.float().T

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """Returns A and B, keyed by their suffixes in peft's file."""
        return {
            "lora_embedding_A": self.lora_embedding_A,
            "lora_embedding_B": self.lora_embedding_B,
        }


class TrainedTokens(EmbeddingAdapter):
    """Rows of the embedding that are trained in full; a tied head has the same rows.

    Args:
        token_ids: the tokens, in the order of their rows; each once.
        width: D.
    """

    token_ids: Tensor
    ascending: Tensor
    order: Tensor

    def __init__(self, token_ids: Sequence[int], width: int) -> None:
        super().__init__()
        order = sorted(range(len(token_ids)), key=lambda row: token_ids[row])
        ascending = [token_ids[row] for row in order]
        for name, values in (("token_ids", token_ids), ("ascending", ascending), ("order", order)):
            self.register_buffer(name, torch.tensor(list(values)), persistent=False)
        self.delta = nn.Parameter(torch.empty(len(token_ids), width))

    def reset_parameters(self, generator: torch.Generator) -> None:  # noqa: ARG002
        """Leaves the rows to `start`, which copies the embedding's own."""
        nn.init.zeros_(self.delta)

    @torch.no_grad()
    def start(self, layer: Embedding, generator: torch.Generator) -> None:  # noqa: ARG002
        """Copies the rows of the embedding."""
        self.delta.copy_(layer.storage.rows(self.token_ids.to(layer.storage.device)))

    def forward(
        self,
        token_ids: Tensor,
        base: Callable[[Tensor], Tensor],
        *,
        deterministic: bool = False,  # noqa: ARG002 - no product
    ) -> Tensor:
        """Returns δ[t] for the chosen tokens and E[t] for the others, [T, D]."""
        rows = base(token_ids)
        place = torch.searchsorted(self.ascending, token_ids).clamp(max=len(self.ascending) - 1)
        chosen = self.ascending[place] == token_ids
        return torch.where(chosen[:, None], self.delta[self.order[place]].to(rows.dtype), rows)

    def project(
        self, hidden: Tensor, base: Callable[[Tensor], Tensor], *, deterministic: bool = False
    ) -> Tensor:
        """Returns the logits [N, V], those of the chosen tokens from their trained rows."""
        logits = base(hidden)
        product = fixed_order_linear if deterministic else nn.functional.linear
        own = product(hidden.to(logits.dtype), self.delta.to(logits.dtype))
        return logits.index_copy(1, self.token_ids, own)

    def merged(self, weight: Tensor, bias: None = None) -> tuple[Tensor, None]:  # noqa: ARG002
        """Returns E with the trained rows, [V, D] in fp32."""
        return weight.index_copy(0, self.token_ids, self.delta.to(weight)), None

    def loss_factors(self, x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Returns `x` and the tied head's weight with the trained rows."""
        return x, weight.index_copy(0, self.token_ids, self.delta.to(weight.dtype))

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """Returns the rows, keyed by their suffix in peft's file."""
        return {TOKEN_ROWS: self.delta}

    @property
    def moves_head(self) -> bool:
        """Whether a tied head follows the adapter: it does."""
        return True


__all__ = ["TOKEN_ROWS", "LoRAEmbedding", "TrainedTokens"]
