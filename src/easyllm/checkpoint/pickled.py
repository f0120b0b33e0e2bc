"""Pickled weights (`pytorch_model.bin`) to safetensors, in a process of its own.

A pickle can run code, so no other part of the project reads one. Here the tensors of a file are
read by torch's restricted unpickler (`weights_only`), which has had holes (CVE-2025-32434), and
therefore in a process without environment, with bounded memory and file size, whose audit hook
refuses sockets, other processes, and files other than the two it is given. Only tensors are
written.
"""

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from easyllm.checkpoint.store import INDEX
from easyllm.core.atomic import write_json
from easyllm.core.errors import CheckpointError
from easyllm.core.progress import track

BIN_INDEX = "pytorch_model.bin.index.json"
OTHERS = ("training_args.bin", "optimizer.bin", "scheduler.bin", "random_states.bin")
"""Pickle files of training runs that contain no weights."""
BASE_BYTES = 4 << 30
"""Memory of a process that has imported torch, with a margin."""
READER = """
import os, resource, sys
source, target, most = sys.argv[1], sys.argv[2], int(sys.argv[3])
import torch
from safetensors.torch import save_file
size = os.path.getsize(source)
for name, bound in (("DATA", most), ("FSIZE", size + (1 << 26)), ("CORE", 0)):
    resource.setrlimit(getattr(resource, f"RLIMIT_{name}"), (bound, bound))
allowed = {os.path.realpath(source), os.path.realpath(target)}
refused = ("socket.", "subprocess.", "os.exec", "os.fork", "os.posix_spawn", "os.spawn",
           "os.system", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "os.chmod", "os.kill",
           "os.putenv", "ctypes.dlopen", "shutil.")
prefixes = tuple(os.path.realpath(p) for p in (sys.prefix, sys.base_prefix))
torch.save({}, os.devnull)  # imports what saving and loading need
def guard(event, arguments):
    if event.startswith(refused):
        raise PermissionError(f"{event} is not allowed here")
    if event == "open" and isinstance(arguments[0], (str, bytes)):
        path = os.path.realpath(os.fsdecode(arguments[0]))
        writes = arguments[1] is not None and any(c in str(arguments[1]) for c in "wax+")
        if path not in allowed and (writes or not path.startswith(prefixes)):
            raise PermissionError(f"opening {path} is not allowed here")
sys.addaudithook(guard)
try:
    state = torch.load(source, map_location="cpu", weights_only=True)
except Exception as error:
    sys.exit(f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}")
if not isinstance(state, dict):
    sys.exit(f"it contains a {type(state).__name__}, not tensors by name")
bad = [str(k) for k, v in state.items() if type(v) is not torch.Tensor or not isinstance(k, str)]
if bad:
    sys.exit(f"{bad[0]!r} is not a tensor")
whole = torch.contiguous_format
save_file({k: v.detach().clone(memory_format=whole) for k, v in state.items()}, target)
"""


def pickled_files(folder: Path) -> list[Path]:
    """Returns the pickle files with the weights of a checkpoint folder.

    Raises:
        CheckpointError: there are none, or the index is damaged or names files elsewhere.
    """
    index = folder / BIN_INDEX
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text("utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError, TypeError):
            raise CheckpointError(
                f"{index} is not a shard index; copy the checkpoint again"
            ) from None
        if any(not isinstance(n, str) or Path(n).name != n for n in names):
            raise CheckpointError(
                f"{index} names a shard outside its folder, which is not allowed; download the "
                "checkpoint again"
            )
        found = [folder / name for name in names]
    else:
        found = sorted(file for file in folder.glob("*.bin") if file.name not in OTHERS)
    missing = [file.name for file in found if not file.is_file()]
    if missing or not found:
        what = f"lacks {missing[0]}" if missing else "contains no pytorch_model.bin"
        raise CheckpointError(f"folder {str(folder)!r} {what}; copy the checkpoint again")
    return found


def write_safetensors(files: Sequence[Path], target: Path) -> None:
    """Writes the tensors of pickle files as safetensors shards with an index.

    Args:
        files: the pickle files.
        target: the folder to write to, which exists.

    Raises:
        CheckpointError: a file contains something else than tensors, or is damaged.
    """
    places = dict[str, str]()
    for number, file in enumerate(track(files, "unpickling", total=len(files), unit="files"), 1):
        shard = f"model-{number:05d}-of-{len(files):05d}.safetensors"
        _convert(file, target / shard)
        for name in _names(target / shard):
            if name in places:
                raise CheckpointError(f"{file} and {places[name]} both contain {name!r}")
            places[name] = shard
    write_json(target / INDEX, {"metadata": {}, "weight_map": places})


def _convert(source: Path, target: Path) -> None:
    """Converts one file in a process of its own."""
    most = 4 * source.stat().st_size + BASE_BYTES
    words = [sys.executable, "-I", "-c", READER, str(source.resolve()), str(target), str(most)]
    done = subprocess.run(
        words,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
        env={"PATH": os.defpath, "OMP_NUM_THREADS": "1", "HOME": str(target.parent)},
        cwd=target.parent,
        start_new_session=True,
    )
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1][:300]
        raise CheckpointError(
            f"{source} cannot be read as tensors alone ({reason}); it was not converted: download "
            "the checkpoint's safetensors files if it has any"
        )


def _names(file: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(file, framework="pt") as handle:
        return list(handle.keys())


__all__ = ["pickled_files", "write_safetensors"]
