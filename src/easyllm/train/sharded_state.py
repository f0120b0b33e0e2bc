"""Checkpoints of a run that is divided among ranks: each rank writes the parts that it holds.

checkpoints/step-000100/state-00000-of-00002.safetensors   parts, and the rank's random state
checkpoints/step-000100/state-00001-of-00002.safetensors
checkpoints/step-000100/state.json                         also says which part each file holds

A part is described by the full tensor's name and shape and its place in it (`parallel.Piece`), so
that another number of ranks, or another layout, reads the same checkpoint.
"""

import json
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor

from easyllm.checkpoint.stream import TensorFile, stream_tensors
from easyllm.core.atomic import atomic_directory, write_json
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.parallel.parallel import Parallel
from easyllm.parallel.pieces import Piece, assemble

TENSORS, STATE = "state.safetensors", "state.json"
OPTIMIZER = "optimizer."

Layout = dict[str, Piece]
"""The pieces of the stored tensors, by tensor name; other tensors are stored whole."""


@contextmanager
def shared_directory(folder: Path, parallel: Parallel) -> Iterator[Path]:
    """Yields a temporary folder of all ranks, published by rank 0 when all have left the block."""
    if parallel.is_first:
        with atomic_directory(folder, replace=True) as work:
            parallel.mesh.world.gather_values(str(work))
            yield work
            parallel.barrier()
    else:
        yield Path(parallel.mesh.world.gather_values("")[0])
        parallel.barrier()
    parallel.barrier()  # published


def own_parts(
    tensors: Mapping[str, Tensor], parallel: Parallel
) -> tuple[dict[str, Tensor], Layout]:
    """Returns the optimizer's tensors that this rank writes, and which pieces they are.

    A tensor is named `KIND.PARAMETER`. Those with as many elements as the rank's part of the
    parameter are parts like it; others (a step count) are the same on all ranks.
    """
    kept: dict[str, Tensor] = {}
    layout: Layout = {}
    for key, tensor in tensors.items():
        name = key.split(".", 1)[1]
        if not parallel.writes(name):
            continue
        if tensor.shape == parallel.local[name].shape:
            layout[OPTIMIZER + key] = parallel.pieces[name]
        kept[OPTIMIZER + key] = tensor
    return kept, layout


def write_parts(
    work: Path,
    tensors: Mapping[str, Tensor],
    layout: Layout,
    values: JsonObject,
    parallel: Parallel,
    release: Callable[[Tensor], None],
) -> None:
    """Writes this rank's file and, on rank 0, `state.json` with the layout of all ranks.

    Args:
        work: the folder.
        tensors: what this rank writes.
        layout: which pieces they are.
        values: the contents of `state.json` apart from the layout.
        parallel: the ranks.
        release: called with every piece of a tensor that has been written.
    """
    world = parallel.mesh.world
    stream_tensors(work / part_file(world.rank, world.size), tensors, release)
    ranks = gather_layouts(layout, parallel)
    if parallel.is_first:
        write_json(work / STATE, values | {"layout": ranks})


def gather_layouts(layout: Layout, parallel: Parallel) -> list[JsonObject]:
    """Returns the layouts of all ranks, as `state.json` holds them."""
    pieces = {name: piece.to_json() for name, piece in layout.items()}
    found: list[JsonObject] = parallel.mesh.world.gather_values(pieces)
    return found


def part_file(rank: int, size: int) -> str:
    """Returns the name of a rank's file."""
    return f"state-{rank:05d}-of-{size:05d}.safetensors"


class StoredParts(Mapping[str, Tensor]):
    """The tensors of a checkpoint, in the parts that this process holds.

    One full tensor is in memory at a time.

    Args:
        folder: the checkpoint.
        noted: its `state.json`.
        parallel: the ranks of this run; None for a single process, which holds all of it.

    Raises:
        CheckpointError: a file is missing or damaged.
        TypeError, ValueError: the layout cannot be read.
    """

    def __init__(self, folder: Path, noted: JsonMapping, parallel: Parallel | None) -> None:
        self._parallel = parallel
        layout = noted.get("layout")
        if layout is None:
            self._files = [TensorFile(folder / TENSORS)]
            self._pieces: list[Layout] = [{}]
        else:
            size = len(layout)
            self._files = [TensorFile(folder / part_file(rank, size)) for rank in range(size)]
            self._pieces = [
                {name: Piece.from_json(values) for name, values in rank.items()} for rank in layout
            ]
        # parts of the same place in the same number of ranks keep their random state
        rank, size = (0, 1) if parallel is None else (parallel.mesh.world.rank, self._size())
        self._own = self._files[rank] if size == len(self._files) else self._files[0]
        self._same_size = size == len(self._files)
        self._owners: dict[str, list[int]] = {}
        for number, file in enumerate(self._files):
            for name in file:
                self._owners.setdefault(name, []).append(number)

    def _size(self) -> int:
        assert self._parallel is not None, "a single process has one file"
        return self._parallel.mesh.world.size

    def __getitem__(self, name: str) -> Tensor:
        if name.startswith("random."):
            if not self._same_size:
                raise KeyError(name)
            return self._own[name]
        numbers = self._owners[name]
        parts = [(self._pieces[n].get(name), n) for n in numbers]
        if parts[0][0] is None:
            return self._cut(name, self._files[numbers[0]][name])
        wanted = self._wanted(name)
        for piece, number in parts:
            if piece == wanted:
                return self._shaped(name, self._files[number][name])
        held = [(piece, self._files[number][name]) for piece, number in parts if piece is not None]
        try:
            return self._cut(name, assemble(held, held[0][1].dtype))
        except ValueError as error:
            raise CheckpointError(f"{name}: {error}; the checkpoint is incomplete") from None

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    def _wanted(self, name: str) -> Piece | None:
        parameter = _parameter(name)
        if self._parallel is None or parameter not in self._parallel.pieces:
            return None
        return self._parallel.pieces[parameter]

    def _cut(self, name: str, full: Tensor) -> Tensor:
        """Returns this process's part of a full tensor; other tensors are returned as they are."""
        wanted = self._wanted(name)
        if wanted is None or full.numel() != math.prod(wanted.shape) or full.ndim == 0:
            return full
        return self._shaped(name, wanted.cut(full.view(wanted.shape)))

    def _shaped(self, name: str, part: Tensor) -> Tensor:
        if self._parallel is None:
            return part
        return part.reshape(self._parallel.local[_parameter(name)].shape)


def open_tensors(folder: Path) -> Mapping[str, Tensor]:
    """Returns the full tensors of a checkpoint, whatever the number of ranks that wrote it.

    Raises:
        CheckpointError: a file is missing or damaged.
        OSError: the checkpoint has been removed.
    """
    try:
        noted = json.loads((folder / STATE).read_text("utf-8"))
        return StoredParts(folder, noted, None)
    except (ValueError, TypeError, KeyError) as error:
        raise CheckpointError(f"{folder / STATE} is damaged ({error})") from None


def _parameter(name: str) -> str:
    """Returns the parameter of an optimizer's tensor, `optimizer.KIND.PARAMETER`."""
    parts = name.split(".", 2)
    return parts[2] if len(parts) == 3 else ""


__all__ = [
    "STATE",
    "TENSORS",
    "Layout",
    "StoredParts",
    "gather_layouts",
    "open_tensors",
    "own_parts",
    "part_file",
    "shared_directory",
    "write_parts",
]
