"""Optional Triton kernels for GPUs, compiled on first use: the operations of `ops/kernels`.

A module here is imported by the operation that uses it, and only if `triton_unsupported_reason`
returns None: Triton comes with the CUDA builds of PyTorch and is absent elsewhere.
"""

from easyllm.ops.gpu.support import triton_unsupported_reason

__all__ = ["triton_unsupported_reason"]
