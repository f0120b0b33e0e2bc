"""Optional C kernels for the CPU, built once on first use if a compiler is available."""

from easyllm.ops.kernels.build import kernels_for

__all__ = ["kernels_for"]
