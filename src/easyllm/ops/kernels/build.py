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

logger = logging.getLogger(__name__)

SOURCES = (
    "training.c",
    "update.c",
    "attention.c",
    "attention_tiles.c",
    "paged_attention.c",
    "matrix.c",
    "dense.c",
    "tiles.c",
    "gemm.c",
    "decode_step.c",
)
HEADERS = ("cpu.h", "paged.h", "matrix.h", "tiles.h", "attention.h")
FLAGS = (
    "-O3",
    "-march=native",
    "-fno-math-errno",
    "-fno-trapping-math",
    "-fopenmp",
    "-fPIC",
    "-std=gnu11",
)
FLAGS_OF = {"update.c": ("-ffp-contract=off",)}
"""Additional flags of individual sources."""
DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1}
"""FP32 and BF16 of cpu.h."""
BIT_CODES = {8: 2, 4: 3}
"""INT8 and INT4 of cpu.h."""

_POINTER, _INT, _LONG, _FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
_SIGNATURES = {
    "rms_norm_forward": (
        *(_POINTER, _POINTER, _INT),
        *(_POINTER, _POINTER, _POINTER, _INT, _POINTER, _LONG, _LONG, _FLOAT),
    ),
    "rms_norm_backward": (
        *(_POINTER, _INT, _POINTER, _POINTER, _POINTER, _POINTER, _POINTER),
        *(_POINTER, _INT, _POINTER, _LONG, _LONG),
    ),
    "silu_gate_forward": (_POINTER,) * 3 + (_INT, _LONG, _LONG),
    "silu_gate_backward": (_POINTER,) * 5 + (_INT, _LONG, _LONG),
    "rotary": (_POINTER, _LONG, _POINTER, _INT, _POINTER, _POINTER, _FLOAT) + (_LONG,) * 3,
    "cross_entropy": (_POINTER, _LONG, _INT, _POINTER, _POINTER, _LONG, _LONG, _INT),
    "scaled": (_POINTER, _FLOAT, _POINTER, _INT, _LONG),
    "adamw": (_POINTER,) * 4 + (_INT, _POINTER, _LONG, _POINTER),
    "adamw_int8": (_POINTER,) * 7 + (_INT, _POINTER, _LONG, _POINTER),
    "sum_of_squares": (_POINTER, _INT, _LONG),
    "attention_forward": (_POINTER,) * 6 + (_LONG, _POINTER),
    "attention_backward": (_POINTER,) * 10 + (_LONG, _POINTER),
    "quantized_linear": (_POINTER, _POINTER, _INT, _LONG, _POINTER),
    "tiles_ready": (),
    "gemm_ready": (),
    "gemm_bytes": (_LONG,) * 3,
    "gemm": (
        *(_POINTER, _LONG, _INT) * 2,
        *(_POINTER, _POINTER, _INT, _INT),
        *(_LONG, _LONG, _LONG, _POINTER),
    ),
    "decode_step_bytes": (_POINTER, _POINTER),
    "decode_step": (_POINTER,) * 3,
    "paged_attention": (_POINTER,) * 4 + (_LONG, _POINTER, _POINTER, _LONG, _POINTER),
}
_RESULTS = {
    "decode_step_bytes": _LONG,
    "sum_of_squares": ctypes.c_double,
    "tiles_ready": _INT,
    "gemm_ready": _INT,
    "gemm_bytes": _LONG,
}


class AdamWScalars(ctypes.Structure):
    """ctypes mirror of `AdamW` in update.c."""

    _fields_ = [
        *((name, _FLOAT) for name in ("scale", "shrink", "beta1_rest", "beta2", "beta2_rest")),
        *((name, _FLOAT) for name in ("correction", "eps", "step_size")),
    ]


class AttentionShape(ctypes.Structure):
    """ctypes mirror of `Shape` in attention.h."""

    _fields_ = [
        ("heads", _LONG),
        ("kv_heads", _LONG),
        ("dim", _LONG),
        ("q_stride", _LONG),
        ("k_stride", _LONG),
        ("v_stride", _LONG),
        ("dtype", _INT),
        ("scale", _FLOAT),
        ("causal", _INT),
        ("window", _LONG),
    ]


class Block(ctypes.Structure):
    """ctypes mirror of `Block` in gemm.c."""

    _fields_ = [("data", _POINTER), ("stride", _LONG), ("size", _LONG)]


class Pages(ctypes.Structure):
    """ctypes mirror of `Pages` in paged.h."""

    _fields_ = [
        ("keys", _POINTER),
        ("values", _POINTER),
        ("key_scales", _POINTER),
        ("value_scales", _POINTER),
        ("kv_heads", _LONG),
        ("page_size", _LONG),
        ("dim", _LONG),
        ("format", _INT),
    ]


class Queries(ctypes.Structure):
    """ctypes mirror of `Queries` in paged_attention.c."""

    _fields_ = [
        ("heads", _LONG),
        ("q_stride", _LONG),
        ("dtype", _INT),
        ("scale", _FLOAT),
        ("window", _LONG),
    ]


class Matrix(ctypes.Structure):
    """ctypes mirror of `Matrix` in matrix.h."""

    _fields_ = [
        ("data", _POINTER),
        ("scales", _POINTER),
        ("bias", _POINTER),
        ("outputs", _LONG),
        ("inputs", _LONG),
        ("format", _INT),
    ]


class StepLayer(ctypes.Structure):
    """ctypes mirror of `Layer` in decode_step.c."""

    _fields_ = [
        *((name, Matrix) for name in ("q", "k", "v", "o", "gate", "up", "down")),
        *((name, _POINTER) for name in ("mixer_norm", "feed_forward_norm", "q_norm", "k_norm")),
        *((name, _POINTER) for name in ("cosine", "sine")),
        *((name, _LONG) for name in ("heads", "kv_heads", "dim", "pairs", "window")),
        *((name, _FLOAT) for name in ("scale", "eps", "head_eps")),
    ]


class StepModel(ctypes.Structure):
    """ctypes mirror of `Model` in decode_step.c."""

    _fields_ = [
        ("embedding", Matrix),
        ("head", Matrix),
        ("final_norm", _POINTER),
        ("layers", ctypes.POINTER(StepLayer)),
        ("num_layers", _LONG),
        ("hidden", _LONG),
        ("embedding_scale", _FLOAT),
        ("eps", _FLOAT),
    ]


class StepBatch(ctypes.Structure):
    """ctypes mirror of `Batch` in decode_step.c."""

    _fields_ = [
        ("rows", _LONG),
        *((name, _POINTER) for name in ("token_ids", "positions", "key_lengths", "table")),
        ("table_width", _LONG),
        ("pages", _POINTER),
        ("logits", _POINTER),
    ]


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
        library = ctypes.CDLL(str(_built(compiler)))
    except (OSError, subprocess.SubprocessError) as error:
        logger.info("CPU kernels are not available, falling back to plain PyTorch: %s", error)
        return None
    for name, signature in _SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = signature, _RESULTS.get(name)
    return library


def _built(compiler: str) -> Path:
    """Returns the path of the shared library, building it if it is not cached."""
    here = Path(__file__).parent
    version = subprocess.run([compiler, "--version"], capture_output=True, check=True).stdout
    digest = hashlib.sha256(
        version + repr((FLAGS, FLAGS_OF, sorted(cpu_features()), torch.__version__)).encode()
    )
    for name in (*SOURCES, *HEADERS):
        digest.update((here / name).read_bytes())
    folder = cache_folder() / "kernels"
    target = folder / f"easyllm-{digest.hexdigest()[:20]}.so"
    if target.is_file():
        return target
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    with tempfile.TemporaryDirectory(dir=folder) as work:
        objects = []
        for name in SOURCES:
            objects.append(str(Path(work) / f"{name}.o"))
            flags = (*FLAGS, *FLAGS_OF.get(name, ()))
            command = [compiler, *flags, "-c", str(here / name), "-o", objects[-1]]
            subprocess.run(command, capture_output=True, check=True, timeout=300)
        made = Path(work) / "library.so"
        link = [compiler, "-shared", *objects, "-o", str(made), *_openmp(), "-lm"]
        subprocess.run(link, capture_output=True, check=True, timeout=300)
        os.replace(made, target)
    return target


def _openmp() -> list[str]:
    """Returns link flags for torch's OpenMP runtime: two runtimes would oversubscribe the cores."""
    bundled = sorted((Path(torch.__file__).parent / "lib").glob("libgomp*.so*"))
    return [str(bundled[0])] if bundled else ["-fopenmp"]
