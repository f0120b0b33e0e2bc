"""Kernels for the CPU in C, built once on first use where a compiler is at hand, and never required."""

from easyllm.ops.kernels.build import kernels_for

__all__ = ["kernels_for"]
