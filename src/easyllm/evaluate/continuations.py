"""Log-probabilities of continuations after contexts, with every common prefix computed once.

Sequences are sorted, so that each has the longest prefix in common with the one before it: the
choices of a question share the question, and questions share their examples. The sequences form a
trie, each of whose tokens is one row of the forward pass: the pass has a KV store (`PrefixTree`)
that lets each branch attend to the rows of its prefix. Logits are computed for the continuations'
tokens alone.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from easyllm.batches.packing import pack
from easyllm.core.errors import ConfigError
from easyllm.core.sequences import num_equal
from easyllm.examples.sample import Sample
from easyllm.nn.config import AttentionConfig, LatentAttentionConfig
from easyllm.nn.context import ForwardContext, RecurrentStep
from easyllm.nn.decoder import Decoder
from easyllm.ops.attention import attend_segment
from easyllm.ops.attention_rule import AttentionRule

BATCH_ROWS = 1024
"""Maximum number of rows of a forward pass; a longer sequence is computed alone."""
MIN_SHARED = 16
"""Shortest prefix that is shared: attention of a branch is slower than that of a sequence."""
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
    or if the capacity of experts depends on the rows of a forward pass. Recurrent states of linear
    attention are not shared either.
    """
    config = model.config
    kinds = AttentionConfig | LatentAttentionConfig
    attends = all(isinstance(layer.mixer, kinds) for layer in config.layers)
    plain = config.is_length_invariant and not config.has_experts and config.prompt_mask != "prefix"
    return attends and plain and model.num_virtual_tokens == 0


def _batches(order: Sequence[int], inputs: Sequence[Ids], shares: bool) -> Iterator[list[int]]:
    """Yields groups of requests whose new rows fit into a forward pass."""
    batch, rows = list[int](), 0
    for number in order:
        ids = inputs[number]
        common = num_shared(inputs[batch[-1]], ids) if shares and batch else 0
        if batch and rows + len(ids) - common > BATCH_ROWS:
            yield batch
            batch, rows, common = [], 0, 0
        batch.append(number)
        rows += len(ids) - common
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


class PrefixTree:
    """The keys and values of a forward pass over the branches of a trie; a `KeyValueStore`.

    Args:
        branches: for each branch, the rows [n + m] of its prefix and its own m rows, which are the
            last, and m; the own rows of all branches are in order.
    """

    def __init__(self, branches: Sequence[tuple[Tensor, int]]) -> None:
        self.branches = branches

    def attend(
        self,
        layer: int,  # noqa: ARG002 - keys are needed within a layer only
        q: Tensor,
        k: Tensor,
        v: Tensor | None,
        rule: AttentionRule,
        prefix_lengths: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Returns the output [T, H, d] for `q: [T, H, d]` and `k`, `v: [T, K, d]`."""
        assert prefix_lengths is None, "see `can_share_prefixes`"
        out, start = torch.empty_like(q), 0
        for rows, count in self.branches:
            own = slice(start, start + count)
            alone = len(rows) == count
            parts = (k, k if v is None else v)
            keys, values = (y[own] if alone else y.index_select(0, rows) for y in parts)
            out[own] = attend_segment(q[own], keys, values, rule)
            start += count
        return out

    def recur(self, layer: int, step: RecurrentStep, *inputs: Tensor) -> Tensor:
        """States are not shared: see `can_share_prefixes`."""
        raise NotImplementedError(f"layer {layer} has a recurrent state")


def share_prefixes(
    sequences: Sequence[Ids], device: torch.device
) -> tuple[Tensor, ForwardContext, Tensor]:
    """Returns the rows of a forward pass over sorted sequences that computes each prefix once.

    Args:
        sequences: token ids; a prefix of at least `MIN_SHARED` tokens is shared with the sequence
            before.

    Returns:
        Token ids [T] of the rows, their context, and the row [T'] of each token of the sequences.
    """
    row_of, token_ids, positions = list[int](), list[int](), list[int]()
    branches, previous = list[tuple[Tensor, int]](), list[int]()
    before: Ids = ()
    for ids in sequences:
        common = num_shared(before, ids)
        first, own = len(token_ids), len(ids) - common
        rows = [*previous[:common], *range(first, first + own)]
        token_ids += ids[common:]
        positions += range(common, len(ids))
        if own:
            branches.append((torch.tensor(rows, device=device), own))
        row_of += rows
        before, previous = ids, rows
    context = ForwardContext(
        positions=torch.tensor(positions, device=device),
        lengths=tuple(own for _, own in branches),
        store=PrefixTree(branches),
    )
    return torch.tensor(token_ids, device=device), context, torch.tensor(row_of, device=device)


def num_shared(first: Ids, second: Ids) -> int:
    """Returns how many tokens two sequences share: their common prefix, unless it is short."""
    common = num_equal(first, second)
    return common if common >= MIN_SHARED or common == len(second) else 0


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
