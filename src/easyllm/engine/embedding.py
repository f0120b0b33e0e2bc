"""Embeddings of texts: pooled hidden states of a decoder."""

from collections.abc import Iterator, Sequence
from typing import Literal, TypeVar

import torch
from torch import Tensor

from easyllm.core.errors import ContextLengthError
from easyllm.nn.context import AdapterRows, ForwardContext
from easyllm.nn.decoder import Decoder

_Ids = TypeVar("_Ids", bound=Sequence[int])
Pooling = Literal["mean", "last"]
"""Mean of the hidden states of all tokens, or the hidden state of the last token."""


@torch.inference_mode()
def embed(
    model: Decoder,
    prompts: Sequence[Sequence[int]],
    *,
    pooling: Pooling = "mean",
    adapter: str | None = None,
    num_virtual: int = 0,
    max_step_tokens: int = 2048,
    deterministic: bool = False,
) -> Tensor:
    """Returns a vector of unit length for each prompt, [B, D] fp32.

    The hidden states are those after the final norm, from which the head computes the logits.

    Args:
        model: the model.
        prompts: token ids of each prompt, virtual tokens included; none is empty.
        pooling: how the hidden states of a prompt become one vector.
        adapter: name of the adapter to use if several are attached.
        num_virtual: number of virtual tokens before each prompt, which the mean leaves out.
        max_step_tokens: maximum number of tokens of a forward pass; a longer prompt has its own.
        deterministic: as in `ForwardContext`.
    """
    found = []
    for group in groups(prompts, max_step_tokens):
        lengths = [len(each) for each in group]
        rows = None
        if adapter is not None:
            rows = AdapterRows.of_sequences([adapter] * len(group), lengths, device=model.device)
        context = ForwardContext.packed(
            lengths, device=model.device, deterministic=deterministic, adapters=rows
        )
        ids = torch.tensor([i for each in group for i in each], device=model.device)
        hidden = model(ids, context).float().split(lengths)
        if pooling == "last":
            found += [states[-1] for states in hidden]
        else:
            found += [states[num_virtual:].mean(0) for states in hidden]
    return torch.nn.functional.normalize(torch.stack(found), dim=-1)


def groups(prompts: Sequence[_Ids], max_step_tokens: int) -> Iterator[list[_Ids]]:
    """Yields the prompts in order, in groups of at most so many tokens, or of one prompt."""
    group, size = list[_Ids](), 0
    for prompt in prompts:
        if group and size + len(prompt) > max_step_tokens:
            yield group
            group, size = [], 0
        group.append(prompt)
        size += len(prompt)
    if group:
        yield group


def check_length(length: int, context: int) -> None:
    """Refuses a text of more tokens than the context has.

    Raises:
        ContextLengthError: it is too long.
    """
    if length > context:
        message = f"a text has {length} tokens, but the model's context is {context}"
        raise ContextLengthError(message, "shorten it")
