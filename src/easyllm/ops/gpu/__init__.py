"""Kernels for GPUs in Triton: the same operations as the C kernels of `ops/kernels`, compiled on first use and never
required.

A module here is imported by the operation that uses it, and only where `gpu_ready` says so: Triton comes with the CUDA
builds of PyTorch and is absent elsewhere.
"""

from easyllm.ops.gpu.ready import gpu_ready

__all__ = ["gpu_ready"]
