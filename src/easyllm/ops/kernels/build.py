"""Builds and loads the C kernels.

The sources include no PyTorch headers, so that a build takes seconds; tensors are passed as
addresses. The shared library is stored in the user's cache folder under a hash of sources, flags,
compiler, processor features and PyTorch version. Without a compiler, or if the build fails, callers
fall back to plain PyTorch.
"""

import ctypes
import hashlib
import logging
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

import torch
from torch import Tensor

from easyllm.core.device import cache_folder, cpu_features
from easyllm.ops.kernels import step_structs, structs
from easyllm.ops.kernels.structs import DTYPE_CODES, FLOAT, INT, LONG, POINTER

logger = logging.getLogger(__name__)

SOURCES = (
    "training.c",
    "update.c",
    "attention.c",
    "attention_tiles.c",
    "paged_attention.c",
    "matrix.c",
    "grouped.c",
    "super.c",
    "blockwise4.c",
    "dense.c",
    "tiles.c",
    "gemm.c",
    "decode_step.c",
    "step_attention.c",
    "step_adapters.c",
    "low_rank.c",
    "rows.c",
)
HEADERS = (
    *("cpu.h", "rows.h", "paged.h", "matrix.h", "codes.h", "tiles.h", "attention.h"),
    *("low_rank.h", "step.h"),
)
FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-std=gnu11",
)
EXTRA_FLAGS = dict.fromkeys(
    ("update.c", "blockwise4.c", "rows.c", "low_rank.c"), ("-ffp-contract=off",)
)
"""Additional flags of individual sources."""
COMPILE_TIMEOUT_S = 300


def _pointers(*types: type[ctypes.Structure]) -> tuple[type, ...]:
    return tuple(ctypes.POINTER(each) for each in types)


_STEP = _pointers(step_structs.StepModel, step_structs.StepBatch)
_SCALARS, _SHAPE = _pointers(structs.AdamWScalars, structs.AttentionShape)
_PARAMETERS = {
    "rms_norm_forward": _pointers(structs.RmsNormForward),
    "rms_norm_backward": _pointers(structs.RmsNormBackward),
    "silu_gate_forward": (*(POINTER,) * 3, INT, LONG, LONG),
    "silu_gate_backward": (*(POINTER,) * 5, INT, LONG, LONG),
    "rotary": _pointers(structs.Rotary),
    "logsumexp": (POINTER, INT, LONG, LONG, POINTER),
    "cross_entropy": (POINTER, LONG, INT, POINTER, POINTER, LONG, LONG, INT),
    "scaled": (POINTER, FLOAT, POINTER, INT, LONG),
    "adamw": (*(POINTER,) * 4, INT, POINTER, LONG, _SCALARS),
    "adamw_int8": (*_pointers(structs.AdamWInt8Tensors), _SCALARS),
    "sum_of_squares": (POINTER, INT, LONG),
    "attention_forward": (*(POINTER,) * 6, LONG, _SHAPE),
    "attention_backward": (*_pointers(structs.AttentionBackward), _SHAPE),
    "matrix_linear": (POINTER, POINTER, INT, LONG, *_pointers(structs.Matrix)),
    "low_rank_updates": _pointers(structs.LowRankUpdates),
    "blockwise4_rows": (*_pointers(structs.Blockwise4), LONG, LONG, POINTER, INT),
    "blockwise4_linear": (*_pointers(structs.Blockwise4), *(POINTER,) * 3, INT, LONG),
    "tiles_ready": (),
    "gemm_ready": (),
    "gemm_bytes": (LONG, LONG, LONG),
    "gemm": _pointers(structs.Gemm),
    "decode_step_bytes": _STEP,
    "decode_step": (*_STEP, POINTER),
    "paged_attention": _pointers(structs.PagedBatch, structs.Pages, structs.Queries),
}
"""Parameter types of the exported functions."""
_RESULTS = {
    "decode_step_bytes": LONG,
    "sum_of_squares": ctypes.c_double,
    "tiles_ready": INT,
    "gemm_ready": INT,
    "gemm_bytes": LONG,
}
"""Result types of the functions that return a value."""


def kernels_unsupported_reason(device_type: str, *dtypes: torch.dtype) -> str | None:
    """Returns why the C kernels do not support tensors of these dtypes; None if they do.

    It is None exactly if `kernels_for` returns the kernels for such tensors.

    Args:
        device_type: `"cpu"`, `"cuda"` ...
        dtypes: dtypes of the tensors.
    """
    if device_type != "cpu":
        return "a device other than a CPU"
    for dtype in dtypes:
        if dtype not in DTYPE_CODES:
            return f"{dtype}, not fp32 or bf16"
    if torch.compiler.is_compiling():
        return "tracing by torch.compile"
    if _library() is None:
        return "missing C kernels (no C compiler, a failed build, or EASYLLM_KERNELS=0)"
    return None


def kernels_for(*tensors: Tensor) -> ctypes.CDLL | None:
    """Returns the C kernels if they are available and support these tensors, else None.

    They support fp32 and bf16 tensors on a CPU. While `torch.compile` traces, the result is None,
    because the compiler fuses operations itself.
    """
    if torch.compiler.is_compiling():
        return None
    for tensor in tensors:
        if tensor.device.type != "cpu" or tensor.dtype not in DTYPE_CODES:
            return None
    return _library()


@cache
def _library() -> ctypes.CDLL | None:
    compiler = shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")
    if compiler is None or os.environ.get("EASYLLM_KERNELS") == "0":
        return None
    try:
        library = ctypes.CDLL(str(_library_path(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("CPU kernels are not available, falling back to plain PyTorch: %s", error)
        return None
    for name, parameters in _PARAMETERS.items():
        function = getattr(library, name)
        function.argtypes, function.restype = parameters, _RESULTS.get(name)
    return library


def _library_path(compiler: str) -> Path:
    """Returns the path of the shared library, building it if it is not cached."""
    folder = cache_folder() / "kernels"
    library = folder / f"easyllm-{_fingerprint(compiler)}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as build_folder:
        os.replace(_build(compiler, Path(build_folder)), library)
    return library


def _fingerprint(compiler: str) -> str:
    """Returns a hash of everything that the compiled code depends on."""
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    settings = FLAGS, EXTRA_FLAGS, sorted(cpu_features()), torch.__version__
    digest = hashlib.sha256(version + repr(settings).encode())
    for name in (*SOURCES, *HEADERS):
        digest.update((Path(__file__).parent / name).read_bytes())
    return digest.hexdigest()[:20]


def _build(compiler: str, build_folder: Path) -> Path:
    """Compiles and links the sources in `build_folder`; returns the shared library's path."""
    objects = []
    for name in SOURCES:
        source, compiled = Path(__file__).parent / name, build_folder / f"{name}.o"
        flags = (*FLAGS, *EXTRA_FLAGS.get(name, ()))
        _run(compiler, *flags, "-c", str(source), "-o", str(compiled))
        objects.append(str(compiled))
    library = build_folder / "library.so"
    _run(compiler, "-shared", *objects, "-o", str(library), *_openmp_flags(), "-lm")
    return library


def _run(*command: str) -> None:
    subprocess.run(command, capture_output=True, check=True, timeout=COMPILE_TIMEOUT_S)


def _openmp_flags() -> list[str]:
    """Returns link flags for torch's OpenMP runtime: two runtimes would oversubscribe the cores."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(bundled[0])] if bundled else ["-fopenmp"]
