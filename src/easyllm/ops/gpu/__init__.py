"""Optional Triton kernels for GPUs, compiled on first use: the operations of `ops/kernels`.

A module here is imported by the operation that uses it, and only if `gpu_ready` returns True:
Triton comes with the CUDA builds of PyTorch and is absent elsewhere.
"""

from easyllm.ops.gpu.ready import gpu_ready

__all__ = ["gpu_ready"]
