"""A decoder divided among ranks, as the training loop sees it."""

import math
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from easyllm.core.errors import ConfigError
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.position_config import T5Bias
from easyllm.parallel.config import FULLY_SHARDED, ParallelConfig
from easyllm.parallel.fully_sharded import ShardedWeights
from easyllm.parallel.mesh import Mesh
from easyllm.parallel.pieces import Piece
from easyllm.parallel.sharding import ReplicatedWeights, Sharding, Sink
from easyllm.parallel.tensor import TensorSharding

T = TypeVar("T")
STAGES = {"ddp": 0, "zero1": 1, "zero2": 2}


class Parallel:
    """A model divided among ranks: which parts of its parameters this rank updates.

    Args:
        mesh: the ranks.
        sharding: how data-parallel ranks divide gradients, optimizer state and weights.
        tensors: what tensor parallelism has made of the model; None without it.

    Attributes:
        partial: trainable parameters of whose gradient each tensor-parallel rank has one term
            (norms of sequence shards, the replicated factor of LoRA).
    """

    def __init__(
        self, mesh: Mesh, sharding: Sharding, tensors: TensorSharding | None = None
    ) -> None:
        self.mesh, self.sharding, self.tensors = mesh, sharding, tensors
        self.partial = frozenset[str]() if tensors is None else frozenset(tensors.partial)
        self.marks = 0

    @property
    def local(self) -> Mapping[str, nn.Parameter]:
        """The parts of the trainable parameters that this rank updates, by name."""
        return self.sharding.local

    @property
    def pieces(self) -> Mapping[str, Piece]:
        """Which part of each full parameter that is."""
        return self.sharding.pieces

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0."""
        return self.mesh.is_first

    def forward(self, work: Callable[[], T]) -> T:
        """Calls `work`, which reads the model's weights, and returns its result."""
        return work()

    def backward(self, loss: Tensor) -> None:
        """Accumulates the gradient of a term of the loss that all ranks sum (a scalar)."""
        loss.backward()

    def begin_micro_batch(self, *, last: bool) -> None:
        """Called before the backward pass of each micro-batch of a step."""
        self.mark()
        self.sharding.begin_micro_batch(last=last)

    def end_micro_batch(self) -> None:
        """Called after the backward pass of each micro-batch."""
        self.sharding.end_micro_batch()

    def reduce(self, sink: Sink) -> None:
        """Passes the gradients of the local parts, summed over all ranks, to `sink`."""

        def complete(name: str, gradient: Tensor) -> None:
            if name in self.partial:
                gradient = self.mesh.tensor.all_reduce(gradient.contiguous())
            sink(name, gradient)

        self.sharding.reduce(complete)

    def refresh(self) -> None:
        """Makes all ranks' weights current after the local parts have changed."""
        self.sharding.refresh()

    def sum(self, value: int) -> int:
        """Returns the sum of a number over the data-parallel ranks."""
        total = torch.tensor(value, dtype=torch.int64, device=self.mesh.device)
        return int(self.mesh.data.all_reduce(total))

    def any(self, value: bool) -> bool:
        """Returns whether a condition holds on any rank."""
        return self.any_of([value])[0]

    def any_of(self, values: Iterable[bool]) -> list[bool]:
        """Returns for each of several conditions whether it holds on any rank."""
        self.mark()  # a rank that does not arrive here is late
        found = torch.tensor([int(value) for value in values], device=self.mesh.device)
        return [bool(value) for value in self.mesh.world.all_reduce(found, largest=True).tolist()]

    def gather(self, value: object) -> list[Any]:
        """Returns a small value of every data-parallel rank, in the order of ranks."""
        self.mark()
        return self.mesh.data.gather_values(value)

    def barrier(self) -> None:
        """Waits for all ranks."""
        self.any(False)

    def grad_norm(self, norm_of: Callable[[Collection[str]], float]) -> float:
        """Returns the norm of the full gradient, every element of which counts once.

        Args:
            norm_of: returns the norm of the local gradients of some parameters.
        """
        sliced = {name for name, piece in self.pieces.items() if piece.axis >= 0}
        squares = torch.tensor(
            [norm_of(sliced) ** 2, norm_of(self.pieces.keys() - sliced) ** 2],
            dtype=torch.float64,
            device=self.mesh.device,
        )
        if self.sharding.is_sharded:
            self.mesh.data.all_reduce(squares)
        if self.mesh.tensor.size > 1:
            self.mesh.tensor.all_reduce(squares[:1])
        return math.sqrt(float(squares.sum()))

    def parts(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns this rank's parts of values that have the shapes of the model's parameters."""
        return {
            name: self.pieces[name].of_slice(value).view(self.local[name].shape)
            for name, value in values.items()
        }

    def parts_of_full(self, values: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Returns this rank's parts of full tensors."""
        return {
            name: self.pieces[name].cut(value).view(self.local[name].shape)
            for name, value in values.items()
        }

    def writes(self, name: str) -> bool:
        """Whether this rank's part is not a copy of another rank's."""
        first_of_copies = self.sharding.is_sharded or self.mesh.data.rank == 0
        return first_of_copies and (self.pieces[name].axis >= 0 or self.mesh.tensor.rank == 0)

    def full(self, name: str, values: Tensor) -> Tensor:
        """Returns the full tensor of which every rank gives its part, on every rank.

        Args:
            name: the parameter whose part has the same shape.
            values: this rank's part.
        """
        piece = self.pieces[name]
        full = values.new_zeros(piece.shape)
        if self.writes(name):
            piece.paste(full, values.detach())
        return self.mesh.world.all_reduce(full)

    def restore_full(self, model: Decoder, masters: Iterable[tuple[str, Tensor]]) -> None:
        """Replaces the sharded parameters by full ones, to save them; on rank 0 only.

        The other ranks take part and keep what they have. The model cannot be trained afterwards.

        Args:
            model: the divided model.
            masters: this rank's parts of the values to save, by name.
        """
        # a gathered FSDP module would put its shards back when its state is read
        self.refresh()
        frozen = {n: p for n, p in model.named_parameters() if isinstance(p, DTensor)}
        for name, values in masters:
            frozen.pop(name, None)
            full = self.full(name, values)
            if self.is_first:
                _replace(model, name, full)
        for name, parameter in frozen.items():
            full = parameter.full_tensor()
            if self.is_first:
                _replace(model, name, full)

    def mark(self) -> None:
        """Notes progress, so that a timeout can name the ranks that are late."""
        self.marks += 1
        store = dist.distributed_c10d._get_default_store()
        store.set(f"easyllm/marks/{self.mesh.world.rank}", f"{self.marks} {time.time():.3f}")

    def late_ranks(self) -> list[int]:
        """Returns the ranks that have made the least progress, if not all have made the same."""
        store = dist.distributed_c10d._get_default_store()
        marks = []
        for rank in range(self.mesh.world.size):
            key = f"easyllm/marks/{rank}"
            marks.append(int(store.get(key).split()[0]) if store.check([key]) else 0)
        return [rank for rank, mark in enumerate(marks) if mark == min(marks) < max(marks)]


def fully_sharded_reason(model: ModelConfig) -> str | None:
    """Returns what keeps a model's weights from being gathered by layer (ZeRO-3, FSDP), or None."""
    if model.has_experts:
        return "mixtures of experts, because an expert without tokens has no gradient to reduce"
    if model.encoder is not None:
        return "encoder–decoders, whose layers have one table of positions in common"
    positions = (getattr(layer.mixer, "position", None) for layer in model.layers)
    if any(isinstance(position, T5Bias) and position.shared for position in positions):
        return "layers that have one table of positions in common (position.shared)"
    return None


def parallelize(
    model: Decoder,
    mesh: Mesh,
    config: ParallelConfig,
    *,
    compute: torch.dtype | None = None,
    tensors: TensorSharding | None = None,
) -> Parallel:
    """Divides a model among ranks, in place.

    Args:
        model: a decoder whose trainable parameters require gradients; the same on all ranks.
        mesh: the ranks.
        config: the layout.
        compute: dtype in which FSDP gathers fp32 weights; None keeps their own.
        tensors: what tensor parallelism has made of the parameters; by default all are whole.

    Raises:
        ConfigError: the layout cannot train this model (the message names one that can).
    """
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    pieces = {} if tensors is None else dict(tensors.slices)
    for name, parameter in model.named_parameters():
        pieces.setdefault(name, Piece.whole(parameter.shape))
    if config.layout in FULLY_SHARDED:
        if reason := fully_sharded_reason(model.config):
            raise ConfigError(
                f"parallel.layout={config.layout} does not train {reason}; set parallel.layout to "
                "ddp, zero1 or zero2"
            )
        sharded = ShardedWeights(model, pieces, mesh, compute=compute, offload=config.offload)
        return Parallel(mesh, sharded, tensors)
    replicated = ReplicatedWeights(
        named,
        pieces,
        mesh.data,
        stage=STAGES[config.layout],
        bucket_bytes=int(config.bucket_mb * 2**20),
    )
    return Parallel(mesh, replicated, tensors)


def _replace(model: nn.Module, name: str, value: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    model.get_submodule(owner)._parameters[leaf] = nn.Parameter(value, requires_grad=False)


__all__ = ["Parallel", "fully_sharded_reason", "parallelize"]
