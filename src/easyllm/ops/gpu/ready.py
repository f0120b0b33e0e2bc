"""Whether Triton kernels can work here."""

import importlib.util
import os
from functools import cache

import torch
from torch import Tensor

DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def gpu_ready(*tensors: Tensor) -> bool:
    """Whether the kernels serve these tensors: on a GPU, of fp32, bf16 or fp16, and Triton is there; not while
    `torch.compile` traces, which fuses operations of its own."""
    if torch.compiler.is_compiling():
        return False
    return all(x.device.type == "cuda" and x.dtype in DTYPES for x in tensors) and has_triton()


@cache
def has_triton() -> bool:
    """Whether Triton is installed, and `EASYLLM_KERNELS=0` does not ask for plain PyTorch."""
    return importlib.util.find_spec("triton") is not None and (
        os.environ.get("EASYLLM_KERNELS") != "0"
    )
