"""Checks whether the Triton kernels can be used."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def gpu_ready(*tensors: Tensor) -> bool:
    """Returns whether the Triton kernels are available and support these tensors.

    They support fp32, bf16 and fp16 on a GPU. While `torch.compile` traces, the result is False,
    because the compiler fuses operations itself.
    """
    if torch.compiler.is_compiling():
        return False
    return all(x.device.type == "cuda" and x.dtype in DTYPES for x in tensors) and has_triton()


@cache
def has_triton() -> bool:
    """Returns whether Triton is installed and not disabled by `EASYLLM_KERNELS=0`."""
    return importlib.util.find_spec("triton") is not None and (
        os.environ.get("EASYLLM_KERNELS") != "0"
    )
