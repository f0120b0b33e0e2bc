"""Log-probabilities and entropies of tokens under a model, in chunks of the vocabulary's logits.

log p_t = l_y / T - logsumexp_v(l_v / T),     l = head(hidden_t)
"""

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from easyllm.batches.packing import Batch
from easyllm.batches.shared_prompts import ANSWERS, share_prompts, shares_prompts
from easyllm.engine.params import SamplingParams
from easyllm.engine.sampling import apply_sampling_filters
from easyllm.nn.context import ForwardContext
from easyllm.nn.decoder import Decoder
from easyllm.nn.deterministic import rowwise_logprobs
from easyllm.ops.cross_entropy import even_chunks, rows_of_chunk
from easyllm.ops.token_logprobs import linear_logprobs


def token_logprobs(
    model: Decoder,
    hidden: Tensor,
    labels: Tensor,
    sampling: SamplingParams,
    context: ForwardContext,
) -> Tensor:
    """Returns the log-probability of each label under the distribution that is sampled from.

    Args:
        model: the model.
        hidden: [N, D] final hidden states of the tokens before the labels; differentiable.
        labels: [N] int64.
        sampling: temperature, top-k, top-p, min-p and typical-p: the distribution is renormalised
            over the tokens that they keep. A label that they exclude is kept as well.
        context: the context of these rows; in deterministic mode the results are bitwise those of
            the engine.

    Returns:
        [N] nats, fp32 (fp64 for an fp64 model).
    """
    if not len(labels):
        return hidden.sum(-1).float()  # empty, but connected to the graph
    plain = model.config.logit_softcap is None and not context.deterministic
    if plain and not narrows(sampling) and not context.base_only:
        scaled, weight = model.loss_factors(hidden)
        if sampling.temperature != 1.0:
            scaled = scaled / sampling.temperature
        return linear_logprobs(scaled, weight, labels)
    rows = rows_of_chunk(
        vocab_size=model.config.vocab_size, itemsize=4, device_type=hidden.device.type
    )
    size = even_chunks(len(labels), rows)
    compute = partial(_of_chunk, model, sampling, context)
    parts = []
    for start in range(0, len(labels), size):
        chosen = torch.arange(start, min(start + size, len(labels)), device=labels.device)
        arguments = (hidden[chosen], labels[chosen], chosen)
        parts.append(
            checkpoint(compute, *arguments, use_reentrant=False)
            if torch.is_grad_enabled() and hidden.requires_grad
            else compute(*arguments)
        )
    return torch.cat(parts)


def answer_hidden(
    model: Decoder,
    batch: Batch,
    rows: Tensor,
    *,
    deterministic: bool = False,
    routing: list[Any] | None = None,
) -> Tensor:
    """Returns the final hidden states [N, D] of some tokens of a batch, with one forward pass.

    A prompt is computed once for its answers, where the batch says which ones share it and the
    model allows it (in deterministic mode, each sequence is computed by itself).

    Args:
        model: the model.
        batch: packed answers, each after its prompt.
        rows: [N] int64, numbers of tokens of the batch.
        deterministic: whether to compute batch-invariant results.
        routing: a list that collects the decisions of MoE routers.
    """
    shares = shares_prompts(model.config, model.num_virtual_tokens)
    if shares and ANSWERS in batch.extras and not deterministic:
        token_ids, context, row_of = share_prompts(batch)
        shared: Tensor = model(token_ids, context)
        return shared.index_select(0, row_of[rows])
    context = batch.context(deterministic=deterministic, routing=routing)
    hidden: Tensor = model(batch.token_ids, context)
    return hidden.index_select(0, rows)


@torch.no_grad()
def entropies(model: Decoder, hidden: Tensor, temperature: float = 1.0) -> Tensor:
    """Returns the entropy of the next-token distribution of each row of `hidden`, [N] nats."""
    rows = rows_of_chunk(
        vocab_size=model.config.vocab_size, itemsize=4, device_type=hidden.device.type
    )
    found = []
    for part in hidden.split(max(1, rows // 4)):
        logprobs = (model.head(part) / temperature).log_softmax(-1)
        found.append(-(logprobs.exp() * logprobs).sum(-1))
    return torch.cat(found) if found else hidden.new_zeros(0)


def narrows(sampling: SamplingParams) -> bool:
    """Returns whether some tokens cannot be sampled."""
    return bool(
        sampling.top_k or sampling.top_p < 1 or sampling.min_p > 0 or sampling.typical_p < 1
    )


def _of_chunk(
    model: Decoder,
    sampling: SamplingParams,
    context: ForwardContext,
    hidden: Tensor,
    labels: Tensor,
    chosen: Tensor,
) -> Tensor:
    logits = model.head(hidden, context.of_rows(chosen))
    if not narrows(sampling):
        return rowwise_logprobs(_filtered(logits, sampling), labels)
    with torch.no_grad():
        kept = _filtered(logits, sampling).isfinite()
        kept.scatter_(1, labels[:, None], True)
    logits = _filtered(logits, SamplingParams(temperature=sampling.temperature))
    return rowwise_logprobs(logits.masked_fill(~kept, float("-inf")), labels)


def _filtered(logits: Tensor, sampling: SamplingParams) -> Tensor:
    """Returns the logits as the engine's sampler filters them."""
    if sampling.temperature == 1.0 and not narrows(sampling):
        return logits
    return apply_sampling_filters(logits, [sampling] * len(logits))


def answer_lengths(labelled: Tensor, lengths: Sequence[int]) -> list[int]:
    """Returns the number of labelled tokens of each packed sequence.

    Args:
        labelled: [T] bool.
        lengths: number of tokens of each sequence.
    """
    return [int(part.sum()) for part in labelled.split(list(lengths))]


__all__ = ["answer_hidden", "answer_lengths", "entropies", "narrows", "token_logprobs"]
