"""Why the Triton kernels cannot be used, if they cannot."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

TRITON_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def triton_unsupported_reason(*tensors: Tensor) -> str | None:
    """Returns why the Triton kernels do not support these tensors; None if they do.

    While `torch.compile` traces they are not used, because the compiler fuses operations itself.
    """
    if torch.compiler.is_compiling():
        return "tracing by torch.compile"
    for x in tensors:
        reason = triton_dtype_unsupported_reason(x.device.type, x.dtype)
        if reason is not None:
            return reason
    return None


def triton_dtype_unsupported_reason(device_type: str, dtype: torch.dtype) -> str | None:
    """Returns why the Triton kernels do not support a dtype on a device; None if they do.

    Args:
        device_type: `"cpu"`, `"cuda"` ...
        dtype: dtype of a tensor.
    """
    if device_type != "cuda":
        return "a device other than a CUDA GPU"
    if dtype not in TRITON_DTYPES:
        return f"{dtype}, not fp32, bf16 or fp16"
    return None if _has_triton() else "missing Triton kernels (no Triton, or EASYLLM_KERNELS=0)"


@cache
def _has_triton() -> bool:
    """Returns whether Triton is installed and not disabled by `EASYLLM_KERNELS=0`."""
    return importlib.util.find_spec("triton") is not None and (
        os.environ.get("EASYLLM_KERNELS") != "0"
    )
