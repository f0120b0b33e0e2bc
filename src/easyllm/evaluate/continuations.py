"""Log-probabilities of continuations after contexts, with every common prefix computed once.

Sequences are sorted, so that each has the longest prefix in common with the one before it: the
choices of a question share the question, and questions share their examples. A shared token is one
row of embeddings, norms, linears and feed-forward blocks (`nn.context.SharedRows`); only mixers see
complete sequences. Logits are computed for the continuations' tokens alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyllm.batches.packing import pack
from easyllm.core.errors import ConfigError
from easyllm.core.sequences import num_equal
from easyllm.examples.sample import Sample
from easyllm.nn.context import ForwardContext, SharedRows
from easyllm.nn.decoder import Decoder

BATCH_ROWS = 2048
"""Maximum number of rows of a forward pass; a longer sequence is computed alone."""
BATCH_TOKENS = 8 * BATCH_ROWS
"""Maximum number of tokens of its complete sequences."""
HEAD_BYTES = 64 * 2**20
"""Maximum size of the logits that exist at once."""

Ids = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Continuation:
    """The log-probability of a continuation.

    Attributes:
        logprob: summed log-probability of its tokens in nats.
        greedy: whether each of its tokens is the most likely one.
        tokens: number of its tokens.
    """

    logprob: float
    greedy: bool
    tokens: int


def score_continuations(
    model: Decoder, requests: Sequence[tuple[Ids, Ids]]
) -> Iterator[tuple[int, Continuation]]:
    """Yields the number and the log-probability of each request, in the order of computation.

    Args:
        model: the model.
        requests: token ids of contexts and continuations; both have at least one token. A context
            that is too long loses its first tokens.

    Raises:
        ConfigError: a context or continuation is empty, or a continuation is longer than the
            model's context.
    """
    longest = model.config.max_seq_len - model.num_virtual_tokens
    inputs = []
    for context, continuation in requests:
        if not context or not continuation:
            raise ConfigError(
                "a context and a continuation need at least one token each; start an empty context "
                "with the model's BOS or EOS token"
            )
        if len(continuation) > longest:
            raise ConfigError(
                f"a continuation has {len(continuation)} tokens, but the model's context has "
                f"{longest}; shorten it"
            )
        inputs.append((*context, *continuation[:-1])[-longest:])
    order = sorted(range(len(requests)), key=inputs.__getitem__)
    shares = can_share_prefixes(model)
    for batch in _batches(order, inputs, shares):
        found = _scored(model, [inputs[i] for i in batch], [requests[i][1] for i in batch], shares)
        yield from zip(batch, found, strict=True)


def can_share_prefixes(model: Decoder) -> bool:
    """Whether a token's hidden state depends on the tokens before it alone.

    It does not if a prompt is seen in both directions, if virtual tokens are part of each sequence,
    or if the capacity of experts depends on the rows of a forward pass.
    """
    config = model.config
    plain = config.is_length_invariant and not config.has_experts and config.prompt_mask != "prefix"
    return plain and model.num_virtual_tokens == 0


def _batches(order: Sequence[int], inputs: Sequence[Ids], shares: bool) -> Iterator[list[int]]:
    """Yields groups of requests whose new rows and complete tokens fit into a forward pass."""
    batch, rows, tokens = list[int](), 0, 0
    for number in order:
        ids = inputs[number]
        common = num_equal(inputs[batch[-1]], ids) if shares and batch else 0
        if batch and (rows + len(ids) - common > BATCH_ROWS or tokens + len(ids) > BATCH_TOKENS):
            yield batch
            batch, rows, tokens, common = [], 0, 0, 0
        batch.append(number)
        rows, tokens = rows + len(ids) - common, tokens + len(ids)
    if batch:
        yield batch


@torch.inference_mode()
def _scored(
    model: Decoder, inputs: Sequence[Ids], continuations: Sequence[Ids], shares: bool
) -> list[Continuation]:
    """Returns the log-probabilities of the last tokens of sorted sequences, and of the next one."""
    device = model.device
    if shares:
        token_ids, context, places = share_prefixes(inputs, device)
    else:
        packed = pack([Sample(ids, ids) for ids in inputs]).to(device)
        token_ids, context = packed.token_ids, packed.context()
        places = torch.arange(len(token_ids), device=device)
    hidden = model(token_ids, context)
    ends = torch.tensor([len(ids) for ids in inputs]).cumsum(0).tolist()
    picked = torch.cat(
        [torch.arange(end - len(c), end) for end, c in zip(ends, continuations, strict=True)]
    ).to(device)
    targets = torch.tensor([t for c in continuations for t in c], device=device)
    logprobs, greedy = _at(model, hidden.index_select(0, places[picked]), targets)
    lengths = [len(c) for c in continuations]
    return [
        Continuation(float(p.double().sum()), bool(g.all()), len(p))
        for p, g in zip(logprobs.split(lengths), greedy.split(lengths), strict=True)
    ]


def share_prefixes(
    sequences: Sequence[Ids], device: torch.device
) -> tuple[Tensor, ForwardContext, Tensor]:
    """Returns the rows of a forward pass over sorted sequences that computes each prefix once.

    Args:
        sequences: token ids; a prefix is shared with the sequence before.

    Returns:
        Token ids [T] of the rows, their context, and the row [T'] of each token of the sequences.
    """
    row_of, token_of, previous = list[int](), list[int](), list[int]()
    before: Ids = ()
    for ids in sequences:
        common, start = num_equal(before, ids), len(row_of)
        first = len(token_of)
        rows = [*previous[:common], *range(first, first + len(ids) - common)]
        token_of += range(start + common, start + len(ids))
        row_of += rows
        before, previous = ids, rows
    every = torch.tensor([t for ids in sequences for t in ids], device=device)
    rows_of, tokens = (torch.tensor(each, device=device) for each in (row_of, token_of))
    complete = ForwardContext.packed([len(ids) for ids in sequences], device=device)
    context = ForwardContext(
        positions=complete.positions[tokens],
        lengths=(len(token_of),),
        shared=SharedRows(row_of=rows_of, token_of=tokens, sequences=complete),
    )
    return every[tokens], context, rows_of


def _at(model: Decoder, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Returns the log-probability [N] of each target, and whether it is the most likely token."""
    count = max(1, HEAD_BYTES // (4 * model.config.vocab_size))
    logprobs, greedy = [], []
    for rows, wanted in zip(hidden.split(count), targets.split(count), strict=True):
        logits = model.head(rows)
        chosen = logits.gather(1, wanted[:, None]).squeeze(1)
        logprobs.append(chosen - logits.logsumexp(-1))
        greedy.append(logits.argmax(-1) == wanted)
    return torch.cat(logprobs), torch.cat(greedy)


__all__ = ["Continuation", "can_share_prefixes", "score_continuations", "share_prefixes"]
