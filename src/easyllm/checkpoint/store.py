"""Safetensors checkpoints in the Hugging Face layout, read lazily and written atomically.

A folder contains `model.safetensors`, or checkpoint shards `model-00001-of-0000N.safetensors` with
the index `model.safetensors.index.json`. Pickle files are never read.
"""

import json
import os
from collections.abc import Mapping
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType

from torch import Tensor

from easyllm.checkpoint.file_state import FileState
from easyllm.core.atomic import output_errors, write_json
from easyllm.core.errors import CheckpointError
from easyllm.core.finite import all_finite
from easyllm.core.json_types import Json, JsonObject

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
MAX_SHARD_BYTES = 4 * 10**9
MODEL_METADATA = {"format": "pt"}
"""Required by `transformers`."""


class TensorFolder:
    """The tensors of a checkpoint folder, opened lazily.

    Attributes:
        shapes: the shape of each tensor by its name.
        files: the files that contain the tensors, as they were before they were opened.

    Example:
        with TensorFolder(path) as tensors:
            w = tensors.load("model.norm.weight")

    Raises:
        CheckpointError: weights are missing, damaged or truncated.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._files = ExitStack()
        self._place: JsonObject = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.files: list[FileState] = []
        for file in self._weight_files():
            with suppress(OSError, ValueError):  # reported by the next line
                self.files.append(FileState.of(file))
            handle = self._files.enter_context(open_safetensors(file))
            for name in handle.keys():  # noqa: SIM118 - a handle is not a mapping
                self._place[name] = handle
                self.shapes[name] = tuple(handle.get_slice(name).get_shape())

    def __enter__(self) -> "TensorFolder":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._files.close()

    def reopened(self) -> "TensorFolder":
        """Opens the folder again, so that its tensors do not share memory with the ones here."""
        return TensorFolder(self.path)

    def load(self, name: str) -> Tensor:
        """Returns the tensor `name`.

        Raises:
            CheckpointError: the tensor cannot be read.
        """
        return read_tensor(self._place[name], name, self.path)

    def _weight_files(self) -> list[Path]:
        index = self.path / INDEX
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
            except (ValueError, KeyError, AttributeError, TypeError):
                raise CheckpointError(
                    f"{index} is not a shard index; copy the checkpoint again"
                ) from None
            if any(not isinstance(s, str) or Path(s).name != s for s in shards):
                raise CheckpointError(
                    f"{index} names a shard outside its folder, which is not allowed; "
                    "download the checkpoint again"
                )
            return [self.path / shard for shard in shards]
        single = self.path / WEIGHTS
        if single.is_file():
            return [single]
        hint = ""
        if list(self.path.glob("*.bin")) or list(self.path.glob("*.pt*")):
            hint = " (it has pickle files; run easyllm convert FOLDER OUT --from-bin)"
        raise CheckpointError(f"folder {str(self.path)!r} contains no {WEIGHTS}{hint}")


def read_object(path: Path, remedy: str) -> JsonObject:
    """Returns the JSON object in a file of a checkpoint folder.

    Args:
        path: the file.
        remedy: what the user should do if it is damaged, for the error.

    Raises:
        CheckpointError: the file is not JSON, or not an object.
    """
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not JSON ({error}); {remedy}") from None
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} does not contain a JSON object; {remedy}")
    return values


def open_safetensors(path: Path) -> Json:
    """Opens a safetensors file.

    Raises:
        CheckpointError: the file is missing, damaged or truncated.
    """
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise CheckpointError(
            f"weight file {str(path)!r} does not exist; copy the checkpoint again"
        )
    try:
        return safe_open(path, framework="pt")
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path} is damaged or truncated ({error}); copy or download it again"
        ) from None


def read_tensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Returns all tensors of a safetensors file, and its metadata.

    Raises:
        CheckpointError: the file is missing, damaged or truncated.
    """
    with open_safetensors(path) as file:
        tensors = {name: read_tensor(file, name, path) for name in file.keys()}  # noqa: SIM118
        return tensors, dict(file.metadata() or {})


def read_tensor(handle: Json, name: str, path: Path) -> Tensor:
    """Reads the tensor `name` from a file opened by `open_safetensors`.

    Raises:
        CheckpointError: the tensor cannot be read.
    """
    from safetensors import SafetensorError

    try:
        tensor: Tensor = handle.get_tensor(name)
    except (SafetensorError, TypeError, ValueError, RuntimeError) as error:  # or raised by torch
        reason = str(error).partition("\n")[0]
        raise CheckpointError(f"{path}: tensor {name!r} cannot be read ({reason})") from None
    return tensor


def check_values(tensor: Tensor, name: str, path: Path) -> None:
    """Refuses a tensor with values that no computation can use.

    Raises:
        CheckpointError: floating-point values are NaN or infinite.
    """
    if tensor.is_floating_point() and not all_finite(tensor):
        raise CheckpointError(
            f"{name} of {path} contains NaN or infinite values; copy the checkpoint again, or use "
            "one from before the training diverged"
        )


def write_tensors(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Writes a safetensors file, but not atomically: use `atomic_directory` around it.

    Raises:
        OutputError: the operating system does not allow writing there.
    """
    from safetensors.torch import save_file

    with output_errors(path):
        save_file(
            {name: t.detach().contiguous() for name, t in tensors.items()},
            path,
            metadata=dict(metadata or {}),
        )
        path.chmod(0o666 & ~_umask())  # safetensors makes it readable by its owner only


def write_model_weights(
    folder: Path, tensors: Mapping[str, Tensor], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Writes weights into `folder` as one file, or as checkpoint shards with an index."""
    files = model_files(tensors, max_shard_bytes)
    for file, names in files.items():
        write_tensors(folder / file, {name: tensors[name] for name in names}, MODEL_METADATA)
    write_index(folder, files, tensors)


def model_files(
    tensors: Mapping[str, Tensor], max_shard_bytes: int = MAX_SHARD_BYTES
) -> dict[str, list[str]]:
    """Returns the names of the weights in each file of a checkpoint folder, by file name."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += tensor.nbytes
    if len(shards) == 1:
        return {WEIGHTS: shards[0]}
    names = (f"model-{n:05d}-of-{len(shards):05d}.safetensors" for n in range(1, len(shards) + 1))
    return dict(zip(names, shards, strict=True))


def write_index(
    folder: Path, files: Mapping[str, list[str]], tensors: Mapping[str, Tensor]
) -> None:
    """Writes the index of a folder's weights, if they are in several files."""
    if len(files) == 1:
        return
    places = {name: file for file, names in files.items() for name in names}
    total = sum(tensor.nbytes for tensor in tensors.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _umask() -> int:
    """The process's umask; there is no way to read it without setting it."""
    mask = os.umask(0o022)
    os.umask(mask)
    return mask
