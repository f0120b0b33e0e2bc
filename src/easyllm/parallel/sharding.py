"""The interface of a data-parallel layout, and DDP, ZeRO-1 and ZeRO-2.

    DDP      gradients: all-reduce                                       2 Ψ (W-1)/W sent
    ZeRO-1   gradients: reduce-scatter, then weights: all-gather         2 Ψ (W-1)/W
    ZeRO-2   the same, but after every micro-batch, so that only a shard of the sum is kept
                                                                         (m+1) Ψ (W-1)/W

(Rajbhandari et al. 2019, arXiv 1910.02054, sections 5 and 7; m micro-batches per step)

Gradients are summed, never averaged: the loss is divided by the number of labelled tokens of all
ranks before the backward pass. They are reduced in the dtype of the master weights. Buckets are
launched while the backward pass runs, always in the same order, so that ranks whose graphs differ
(experts without tokens) still meet in the same collectives.
"""

from collections.abc import Callable, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from easyllm.parallel.mesh import Group
from easyllm.parallel.pieces import Piece

Sink = Callable[[str, Tensor], None]
"""Receives the reduced gradient of a local parameter, by name."""


class Sharding(Protocol):
    """How data-parallel ranks divide gradients, optimizer state and weights.

    Attributes:
        is_sharded: whether the ranks' parts differ.
    """

    is_sharded: bool

    @property
    def parameters(self) -> Mapping[str, nn.Parameter]:
        """The trainable parameters of the model, by name."""

    @property
    def local(self) -> Mapping[str, nn.Parameter]:
        """The part of each that this rank updates; shares the parameter's memory."""

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """Which part that is."""

    def begin_micro_batch(self, *, last: bool) -> None:
        """Called before the backward pass of each micro-batch of a step."""

    def end_micro_batch(self) -> None:
        """Called after it."""

    def reduce(self, sink: Sink) -> None:
        """Passes the summed gradients of the local parts to `sink`, and forgets them."""

    def refresh(self) -> None:
        """Makes all ranks' weights current after the local parts have changed."""


class Bucket:
    """Gradients of some parameters that are reduced in one collective.

    Layout of the buffer: [W, S], row r holding rank r's shard of every parameter (DDP: [1, S]).

    Args:
        parameters: the parameters, by name.
        shards: W for sharded gradients, 1 for DDP.
        dtype: dtype in which gradients are summed.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], shards: int, dtype: torch.dtype
    ) -> None:
        self.parameters, self.shards, self.dtype = parameters, shards, dtype
        self.offsets: dict[str, tuple[int, int]] = {}
        end = 0
        for name, parameter in parameters.items():
            width = -(-parameter.numel() // shards)
            self.offsets[name] = (end, end + width)
            end += width
        self.width = end
        self.ready: set[str] = set()
        self.buffer: Tensor | None = None
        self.out: Tensor | None = None
        self.work: dist.Work | None = None

    def put(self, name: str, gradient: Tensor) -> None:
        """Copies a gradient into the buffer."""
        if self.buffer is None:
            self.buffer = gradient.new_zeros((self.shards, self.width), dtype=self.dtype)
        spread_into(self.buffer, self.offsets[name], gradient)
        self.ready.add(name)

    def start(self, group: Group, device: torch.device) -> None:
        """Begins the collective; parameters without a gradient count as zero."""
        if self.buffer is None:
            shape = (self.shards, self.width)
            self.buffer = torch.zeros(shape, dtype=self.dtype, device=device)
        if self.shards == 1:
            self.out = self.buffer.view(-1)
            self.work = group.start_all_reduce(self.out)
            return
        self.out = self.buffer.new_empty(self.width)
        self.work = group.start_reduce_scatter(self.buffer.view(-1), self.out)

    def finish(self) -> Tensor:
        """Waits for the collective, and returns this rank's sums [S]."""
        if self.work is not None:
            self.work.wait()
        assert self.out is not None, "the collective has begun"
        out = self.out
        self.buffer = self.out = self.work = None
        self.ready = set()
        return out


def spread_into(buffer: Tensor, columns: tuple[int, int], values: Tensor) -> None:
    """Writes a flattened tensor into the columns of `buffer: [W, S]`, one shard in each row."""
    width = columns[1] - columns[0]
    flat = values.detach().reshape(-1)
    for row in range(buffer.shape[0]):
        part = flat[row * width : (row + 1) * width]
        buffer[row, columns[0] : columns[0] + part.numel()] = part


class ReplicatedWeights:
    """DDP, ZeRO-1 and ZeRO-2: every rank holds all weights.

    Args:
        parameters: the trainable parameters, by name.
        slices: which part of the full parameters these are (tensor parallel).
        group: the data-parallel ranks.
        stage: 0 for DDP, 1 or 2.
        bucket_bytes: size of a bucket.
    """

    def __init__(
        self,
        parameters: Mapping[str, nn.Parameter],
        slices: Mapping[str, Piece],
        group: Group,
        *,
        stage: int,
        bucket_bytes: int,
    ) -> None:
        self.parameters, self.group, self.stage = parameters, group, stage
        self.is_sharded = stage > 0 and group.size > 1
        self.local: dict[str, nn.Parameter] = {}
        self.pieces: dict[str, Piece] = {}
        self._sums: dict[str, Tensor] = {}
        self._missing: set[str] = set(parameters)
        self._last, self._next = True, 0
        for name, parameter in parameters.items():
            self._take_part(name, parameter, slices[name])
            parameter.register_post_accumulate_grad_hook(_hook(self, name))
        self._buckets = self._make_buckets(bucket_bytes)
        self._bucket_of = {name: each for each in self._buckets for name in each.parameters}

    def _take_part(self, name: str, parameter: nn.Parameter, whole: Piece) -> None:
        wide = parameter.dtype in (torch.float32, torch.float64)
        if not self.is_sharded and wide:
            # hooks of adapters read the gradient of the parameter itself
            self.local[name], self.pieces[name] = parameter, whole
            return
        parameter.data = parameter.data.contiguous()
        flat, width = parameter.detach().view(-1), -(-parameter.numel() // self._shards)
        start = min(flat.numel(), self.group.rank * width if self.is_sharded else 0)
        stop = min(flat.numel(), start + width)
        part = flat[start:stop] if self.is_sharded else parameter.detach()
        self.local[name], self.pieces[name] = nn.Parameter(part), whole.flat(start, stop)

    @property
    def _shards(self) -> int:
        return self.group.size if self.is_sharded else 1

    def _make_buckets(self, bucket_bytes: int) -> list[Bucket]:
        """Groups parameters of one dtype in the order in which their gradients become complete."""
        buckets: list[Bucket] = []
        held: dict[str, nn.Parameter] = {}

        def close() -> None:
            if held:
                dtype = torch.promote_types(next(iter(held.values())).dtype, torch.float32)
                buckets.append(Bucket(dict(held), self._shards, dtype))
                held.clear()

        for name, parameter in reversed(list(self.parameters.items())):
            size = sum(p.numel() for p in held.values()) * 4
            other = held and next(iter(held.values())).dtype != parameter.dtype
            if other or size >= bucket_bytes:
                close()
            held[name] = parameter
        close()
        return buckets

    def begin_micro_batch(self, *, last: bool) -> None:
        """Reduces the gradients of this micro-batch, or only accumulates them."""
        self._last = last

    def end_micro_batch(self) -> None:
        """Finishes the reductions that ZeRO-2 makes for each micro-batch."""
        if self.stage == 2 and not self._last:
            self._flush(self._add_shard)

    def reduce(self, sink: Sink) -> None:
        """Passes the summed gradients of the local parts to `sink`."""
        if self.stage < 2:
            self._put_early_gradients()
        absent = self._absent_everywhere()
        found: dict[str, Tensor] = {}
        self._flush(found.__setitem__)
        for name, shard in found.items():
            if name in absent:
                continue
            held = self._sums.pop(name, None)
            total = shard if held is None else held.add_(shard)
            sink(name, total.view(self.local[name].shape))
        self._sums.clear()
        self._missing = set(self.parameters)

    def _put_early_gradients(self) -> None:
        """Adds gradients of earlier micro-batches whose parameters the last one did not use."""
        for name, parameter in self.parameters.items():
            if name not in self._missing:
                continue
            gradient, parameter.grad = self._sums.pop(name, parameter.grad), None
            if gradient is not None:
                self._missing.discard(name)
                self._put(name, gradient)

    def refresh(self) -> None:
        """All-gathers the weights, of which each rank has updated its shard."""
        if not self.is_sharded:
            return
        for bucket in self._buckets:
            dtype = next(iter(bucket.parameters.values())).dtype
            first = self.local[next(iter(bucket.parameters))]
            mine = torch.zeros((1, bucket.width), dtype=dtype, device=first.device)
            for name, columns in bucket.offsets.items():
                flat = self.local[name].detach()
                mine[0, columns[0] : columns[0] + flat.numel()] = flat
            full = self.group.all_gather(mine)
            for name, (start, stop) in bucket.offsets.items():
                target = self.parameters[name].detach().view(-1)
                target.copy_(full[:, start:stop].reshape(-1)[: target.numel()])

    def take(self, name: str, parameter: Tensor) -> None:
        """Receives the gradient of one micro-batch, as soon as it is complete."""
        gradient = parameter.grad
        assert gradient is not None, "the hook runs after accumulation"
        if self.stage == 2 or self._last:
            parameter.grad = None
            self._missing.discard(name)
            if self.stage < 2:
                held = self._sums.pop(name, None)
                gradient = gradient if held is None else held.add_(gradient)
            self._put(name, gradient)
            return
        if parameter.dtype in (torch.float32, torch.float64):
            return  # autograd adds the next one to it
        parameter.grad = None  # a sum in bf16 would lose the small terms
        held = self._sums.get(name)
        self._sums[name] = gradient.float() if held is None else held.add_(gradient)

    def _put(self, name: str, gradient: Tensor) -> None:
        parameter = self.parameters[name]
        self._bucket_of[name].put(name, gradient)
        while self._next < len(self._buckets):
            bucket = self._buckets[self._next]
            if len(bucket.ready) < len(bucket.parameters):
                break
            bucket.start(self.group, parameter.device)
            self._next += 1

    def _flush(self, sink: Sink) -> None:
        """Launches the remaining buckets, and passes on the sums of all."""
        for bucket in self._buckets[self._next :]:
            bucket.start(self.group, next(iter(bucket.parameters.values())).device)
        self._next = 0
        for bucket in self._buckets:
            out = bucket.finish()
            for name, (start, _) in bucket.offsets.items():
                sink(name, out[start : start + self.local[name].numel()])

    def _add_shard(self, name: str, shard: Tensor) -> None:
        held = self._sums.get(name)
        self._sums[name] = shard.clone() if held is None else held.add_(shard)

    def _absent_everywhere(self) -> set[str]:
        """Returns the parameters without a gradient on any rank, whose update is skipped."""
        names = list(self.parameters)
        if not names:
            return set()
        device = self.parameters[names[0]].device
        found = torch.tensor([name not in self._missing for name in names], device=device)
        mask = self.group.all_reduce(found.to(torch.int32), largest=True).tolist()
        return {name for name, has in zip(names, mask, strict=True) if not has}


def _hook(owner: ReplicatedWeights, name: str) -> Callable[[Tensor], None]:
    return lambda parameter: owner.take(name, parameter)


__all__ = ["ReplicatedWeights", "Sharding", "Sink"]
