"""Process groups: ranks in a grid of data-parallel rows and tensor-parallel columns.

    rank = data index · tensor degree + tensor index

Ranks that share layers are adjacent, so that on a cluster they are in one machine.
"""

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from easyllm.core.errors import ConfigError
from easyllm.parallel.config import ParallelConfig

# torch 2.13 renamed them, and warns about the old names
_IS_NEW = hasattr(dist, "reduce_scatter_single")
_REDUCE_SCATTER = dist.reduce_scatter_single if _IS_NEW else dist.reduce_scatter_tensor
_ALL_GATHER = dist.all_gather_single if _IS_NEW else dist.all_gather_into_tensor


def world_size() -> int:
    """Returns the number of processes that this one was launched with (`WORLD_SIZE`), or 1."""
    return int(os.environ.get("WORLD_SIZE", "1"))


@dataclass(slots=True)
class Traffic:
    """Collectives of a group and the elements that entered them, by operation.

    Attributes:
        calls: number of calls.
        elements: number of elements of the full tensors (before a scatter, after a gather).
    """

    calls: dict[str, int] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)

    def add(self, operation: str, elements: int) -> None:
        """Counts one call."""
        self.calls[operation] = self.calls.get(operation, 0) + 1
        self.elements[operation] = self.elements.get(operation, 0) + elements

    def sent_elements(self, size: int) -> float:
        """Returns the elements that each of `size` ranks sends with ring algorithms.

        An all-reduce of n elements sends 2 n (size - 1) / size, the others half of it.
        """
        share = (size - 1) / size
        factors = {"all_reduce": 2 * share}
        return sum(n * factors.get(op, share) for op, n in self.elements.items())


@dataclass(frozen=True, slots=True)
class Group:
    """A process group as seen by one of its ranks.

    Attributes:
        handle: the process group; None for a group of this rank alone.
        rank, size: this rank's number in the group, and the number of ranks.
        traffic: the collectives so far.
    """

    handle: dist.ProcessGroup | None
    rank: int
    size: int
    traffic: Traffic = field(default_factory=Traffic)

    def all_reduce(self, x: Tensor, *, largest: bool = False) -> Tensor:
        """Sums `x` over the ranks in place (or takes the maximum), and returns it."""
        if self.handle is not None:
            self.traffic.add("all_reduce", x.numel())
            op = dist.ReduceOp.MAX if largest else dist.ReduceOp.SUM
            dist.all_reduce(x, op=op, group=self.handle)
        return x

    def start_all_reduce(self, x: Tensor) -> dist.Work | None:
        """Begins to sum `x` over the ranks in place."""
        if self.handle is None:
            return None
        self.traffic.add("all_reduce", x.numel())
        work: dist.Work = dist.all_reduce(x, group=self.handle, async_op=True)
        return work

    def start_reduce_scatter(self, x: Tensor, out: Tensor) -> dist.Work | None:
        """Begins to sum `x: [size · n, ...]` over the ranks; rank r gets the r-th [n, ...]."""
        if self.handle is None:
            out.copy_(x)
            return None
        self.traffic.add("reduce_scatter", x.numel())
        work: dist.Work = _REDUCE_SCATTER(out, x, group=self.handle, async_op=True)
        return work

    def reduce_scatter(self, x: Tensor) -> Tensor:
        """Returns the r-th of `size` equal parts of the sum of `x` over the ranks (axis 0)."""
        out = x.new_empty(x.shape[0] // self.size, *x.shape[1:])
        work = self.start_reduce_scatter(x.contiguous(), out)
        if work is not None:
            work.wait()
        return out

    def all_gather(self, x: Tensor) -> Tensor:
        """Returns the ranks' `x: [n, ...]`, concatenated along axis 0."""
        if self.handle is None:
            return x
        out = x.new_empty(x.shape[0] * self.size, *x.shape[1:])
        self.traffic.add("all_gather", out.numel())
        _ALL_GATHER(out, x.contiguous(), group=self.handle)
        return out

    def gather_values(self, value: object) -> list[Any]:
        """Returns a small picklable value of every rank, in the order of ranks."""
        found: list[Any] = [value] * self.size
        if self.handle is not None:
            dist.all_gather_object(found, value, group=self.handle)
        return found


@dataclass(frozen=True, slots=True, kw_only=True)
class Mesh:
    """The ranks of a run.

    Attributes:
        world: all ranks.
        data: ranks with the same part of the model and other data.
        tensor: ranks with the same data that share each layer.
        devices: the two axes as PyTorch's mesh, for FSDP2.
        device: the device of this rank.
    """

    world: Group
    data: Group
    tensor: Group
    devices: DeviceMesh
    device: torch.device

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which prints, logs and writes results."""
        return self.world.rank == 0


def check_degrees(config: ParallelConfig, size: int) -> None:
    """Checks that the ranks can be divided as configured.

    Raises:
        ConfigError: the number of ranks is not a multiple of the tensor-parallel degree.
    """
    if size % config.tensor:
        raise ConfigError(
            f"parallel.tensor={config.tensor} does not divide the {size} processes of the run; "
            f"launch a multiple of {config.tensor} (--nproc {config.tensor}), or set "
            "parallel.tensor to a divisor"
        )


def join(config: ParallelConfig, device_type: str = "cpu") -> Mesh:
    """Joins the process group of the launcher (`torchrun`, or `easyllm train --nproc`).

    Args:
        config: the degrees and the timeout of collectives.
        device_type: `cpu` (backend gloo) or `cuda` (backend NCCL).

    Raises:
        ConfigError: as for `check_degrees`.
    """
    check_degrees(config, world_size())
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if device_type == "cuda":
        torch.cuda.set_device(local)
    timeout = timedelta(seconds=config.timeout_s)
    if not dist.is_initialized():
        backend = "cpu:gloo,cuda:nccl" if device_type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timeout)
    size, rank = dist.get_world_size(), dist.get_rank()
    shape = (size // config.tensor, config.tensor)
    devices = init_device_mesh(device_type, shape, mesh_dim_names=("data", "tensor"))
    for axis in ("data", "tensor"):  # new groups have PyTorch's own timeout, half an hour for gloo
        dist.distributed_c10d._set_pg_timeout(timeout, devices.get_group(axis))
    return Mesh(
        world=Group(dist.group.WORLD, rank, size),
        data=_axis(devices, "data"),
        tensor=_axis(devices, "tensor"),
        devices=devices,
        device=torch.device("cuda", local) if device_type == "cuda" else torch.device("cpu"),
    )


def leave() -> None:
    """Leaves the process group, if this process is in one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _axis(devices: DeviceMesh, name: str) -> Group:
    size, rank = devices[name].size(), devices.get_local_rank(name)
    return Group(devices.get_group(name) if size > 1 else None, rank, size)


__all__ = ["Group", "Mesh", "Traffic", "check_degrees", "join", "leave", "world_size"]
