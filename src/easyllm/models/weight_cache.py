"""The weight cache: quantized weights in the user's cache folder, mapped at the next start.

Quantizing a model takes seconds to minutes, and gives the same weights every time. They are
therefore written, in the layout in which they are used, to a file that later processes map into
memory (`checkpoint.mapped`).

    weights/KEY/weights.safetensors

KEY is a hash of everything that decides the weights: the files of the model, its configuration,
format, dtype and type of device, and the code that reads and quantizes. Files are identified by
path, inode, size, and the times of their last changes. A hash of their contents would take as long
as reading them, and the time of the last change of an inode (`ctime`), which programs cannot set,
gives away even a file that was replaced with the size and the date of the old one. Two changes
within one tick of the clock of a file system cannot be told apart: a model that was changed less
than `SETTLED_S` ago is not stored.

The cache never causes an error: without space or permission to write, models are quantized at each
start, and a damaged file is replaced.
"""

import hashlib
import json
import logging
import os
import shutil
import time
from collections.abc import Iterable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from easyllm.checkpoint.file_state import FileState
from easyllm.checkpoint.mapped import map_tensors, write_mapped
from easyllm.core.atomic import atomic_file
from easyllm.core.device import cache_folder
from easyllm.core.errors import EasyllmError
from easyllm.core.folder_lock import locked_folder
from easyllm.core.json_types import JsonMapping
from easyllm.nn.decoder import Decoder
from easyllm.nn.storage import PackedStorage
from easyllm.quant import PackedLayers

VERSION = 1
"""Version of the layout of entries."""
WEIGHTS_FILE = "weights.safetensors"
SIZE_VARIABLE = "EASYLLM_WEIGHT_CACHE_GB"
DEFAULT_GB = 20.0
MIN_BYTES = 1 << 22
"""Weights that are smaller are not stored: quantizing them takes no time."""
SETTLED_S = 2.0
"""Longest tick of the clocks of file systems (FAT's), in seconds."""
ABANDONED_S = 86400.0
"""Age of files of killed processes that are removed."""
CODE_FOLDERS = ("checkpoint", "models", "nn", "ops", "quant")
"""Folders of the code that reads and quantizes weights."""
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class CachedWeights:
    """The place of a model's quantized weights in the cache.

    Attributes:
        folder: the folder of the entry, whether it exists or not.
        files: the files of the model, as they were before it was opened.
        max_bytes: maximum size of all entries.
    """

    folder: Path
    files: tuple[FileState, ...]
    max_bytes: int

    @classmethod
    def of(cls, files: Iterable[FileState], facts: JsonMapping) -> "CachedWeights | None":
        """Returns the place of weights in the cache; None if the cache is turned off.

        Args:
            files: the files that contain the model, as they were before it was opened.
            facts: everything else that decides the weights, as JSON.
        """
        max_bytes = cache_limit_bytes()
        if max_bytes <= 0:
            return None
        states = tuple(files)
        try:
            code = _code_state()
        except OSError:  # a file is being edited
            return None
        key = {
            "version": VERSION,
            "torch": torch.__version__,
            "code": code,
            "files": [state.values() for state in states],
            **facts,
        }
        digest = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()
        return cls(weights_folder() / digest[:32], states, max_bytes)

    def load(self, model: Decoder, packed: PackedLayers, device: torch.device) -> bool:
        """Gives a model without weights those of the cache, mapped into memory.

        Args:
            model: the model on the meta device; if the result is False, it may be incomplete.
            packed: its quantized modules with their formats.
            device: the device of the weights; on a CPU they stay mapped.

        Returns:
            Whether the cache contains the weights.
        """
        path = self.folder / WEIGHTS_FILE
        try:
            _set_weights(model, packed, map_tensors(path))
        except OSError as error:
            logger.debug("no weights in the cache: %s", error)
            return False
        except (ValueError, LookupError, RuntimeError) as error:
            logger.warning(
                "the cached weights in %s are damaged (%s); the model is quantized again",
                path,
                error,
            )
            with suppress(OSError):
                path.unlink()
            return False
        with suppress(OSError):  # a folder that cannot be written
            os.utime(path)  # the entry has been used
        model.to(device)
        model.maps_weights = device.type == "cpu"
        return True

    def store(self, model: Decoder) -> bool:
        """Writes a model's weights to the cache, where that is possible.

        Returns:
            Whether the cache contains the weights now.
        """
        tensors = _weights_of(model)
        try:
            reason = self._refusal(sum(tensor.nbytes for tensor in tensors.values()))
            if reason is None:
                self._write(tensors)
                remove_oldest(self.max_bytes, keep=self.folder)
        except (EasyllmError, OSError) as error:
            reason = str(error)
        if reason is not None:
            logger.debug("the quantized weights are not stored: %s", reason)
        return reason is None

    def _refusal(self, size: int) -> str | None:
        """Returns why weights of `size` bytes are not stored; None if they are."""
        if size < MIN_BYTES:
            return "they are small"
        if size > self.max_bytes:
            return f"{size:,} bytes are more than {SIZE_VARIABLE} allows"
        if tuple(FileState.of(state.path) for state in self.files) != self.files:
            return "a file of the model was changed after it was opened"
        now = time.time_ns()
        if any(now - max(s.modified, s.changed) < SETTLED_S * 1e9 for s in self.files):
            return "a file of the model was changed just now"
        weights_folder().mkdir(mode=0o700, parents=True, exist_ok=True)
        if shutil.disk_usage(weights_folder()).free < 2 * size:
            return "too little space is left on the disk"
        return None

    def _write(self, tensors: dict[str, Tensor]) -> None:
        """Writes the file of the entry, unless another process has written it or is doing so."""
        self.folder.mkdir(mode=0o700, exist_ok=True)
        with locked_folder(self.folder, no_locks=logging.DEBUG):
            path = self.folder / WEIGHTS_FILE
            if path.exists():
                return
            with atomic_file(path, replace=True) as work:
                os.close(os.open(work, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
                write_mapped(work, tensors)


def weights_folder() -> Path:
    """Returns the folder of the weight cache."""
    return cache_folder() / "weights"


def cache_limit_bytes() -> int:
    """Returns the maximum size of the weight cache; 0 if it is turned off.

    It is `EASYLLM_WEIGHT_CACHE_GB`, or else 20 GB.
    """
    text = os.environ.get(SIZE_VARIABLE, "").strip()
    try:
        return int(float(text or DEFAULT_GB) * 1e9)
    except (ValueError, OverflowError):
        logger.warning(
            "%s=%r is not a number of gigabytes; the weight cache is off", SIZE_VARIABLE, text
        )
        return 0


def remove_oldest(max_bytes: int, keep: Path) -> None:
    """Removes the entries that were used longest ago until the others have at most `max_bytes`.

    Also removes what killed processes have left. On POSIX systems, a process that uses an entry
    keeps its weights.

    Args:
        max_bytes: the maximum size.
        keep: the folder of an entry that stays.
    """
    total, now = 0, time.time()
    for used, size, folder in sorted(_entries(), reverse=True):
        is_old = total + size > max_bytes if size else now - used > ABANDONED_S
        if is_old and folder != keep:
            shutil.rmtree(folder, ignore_errors=True)
        else:
            total += size


def _entries() -> Iterable[tuple[float, int, Path]]:
    """Yields the time of last use, the size in bytes and the folder of each entry."""
    for folder in weights_folder().iterdir():
        with suppress(OSError):  # removed by another process, or not a folder
            path = folder / WEIGHTS_FILE
            whole = path.exists()
            found = (path if whole else folder).stat()
            yield found.st_mtime, found.st_size if whole else 0, folder


def _weights_of(model: Decoder) -> dict[str, Tensor]:
    """Returns all tensors of a model; an empty one contains the dtype of each storage."""
    tensors = dict(model.state_dict())
    for name, module in model.named_modules():
        if isinstance(module, PackedStorage):
            tensors[f"{name}.like"] = module.like
    return tensors


def _set_weights(model: Decoder, packed: PackedLayers, tensors: dict[str, Tensor]) -> None:
    """Stores the tensors of `_weights_of` in a model without weights.

    Raises:
        LookupError, ValueError, RuntimeError: they are not those of the model.
    """
    state: dict[str, Tensor] = {}
    buffers: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        owner, storage, buffer = name.rpartition(".storage.")
        if storage:
            buffers.setdefault(f"{owner}.weight", {})[buffer] = tensor
        else:
            state[name] = tensor
    if buffers.keys() != packed.keys():
        raise ValueError("it contains other weights than the model")
    for name, (layer, format) in packed.items():
        assert format.from_buffers is not None, "checked before the entry was made"
        layer.store(format.from_buffers(buffers[name], layer.storage.shape))
    kept = {name for name in model.state_dict() if ".storage." not in name}
    if kept != state.keys():
        raise ValueError("it contains other weights than the model")
    model.load_state_dict(state, assign=True, strict=False)


@cache
def _code_state() -> str:
    """Returns a hash that changes with the code that reads and quantizes weights."""
    digest = hashlib.sha256()
    package = Path(__file__).parent.parent
    for folder in CODE_FOLDERS:
        for path in sorted((package / folder).rglob("*.py")):
            digest.update(repr(FileState.of(path).values()).encode())
    return digest.hexdigest()


__all__ = ["SIZE_VARIABLE", "CachedWeights", "cache_limit_bytes", "remove_oldest", "weights_folder"]
