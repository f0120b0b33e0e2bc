"""Measures the compute throughput and memory bandwidth of this machine."""

import statistics
import time

import torch

ROWS, WIDTH = 2048, 1536
"""Shape of the measured GEMM, [ROWS, WIDTH] x [WIDTH, WIDTH], typical of a small model's step."""


def matmul_rate(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, repeats: int = 7
) -> float:
    """Measures the FLOP/s of a matrix product (GEMM) of 2048 x 1536 x 1536 on torch's threads.

    The result is the median of several repeats, because on a shared machine the best of them is a
    peak that no run of minutes sustains. It is used as the peak in MFU if the processor's own peak
    is not published. On a GPU each dimension is 4 times as large, because a smaller GEMM does not
    reach the peak.
    """
    device = torch.device(device)
    scale = 4 if device.type == "cuda" else 1
    rows, width = ROWS * scale, WIDTH * scale
    a = torch.randn(rows, width, dtype=dtype, device=device)
    b = torch.randn(width, width, dtype=dtype, device=device)
    times = []
    for _ in range(repeats + 1):  # the first repeat is a warm-up
        start = _now(device)
        a @ b.T
        times.append(_now(device) - start)
    return 2 * rows * width * width / statistics.median(times[1:])


def read_rate(device: torch.device | str = "cpu", *, repeats: int = 5) -> float:
    """Measures the memory read bandwidth in bytes/s, using all threads.

    The result is the best of several sums over 256 MB (2 GB on a GPU).
    """
    device = torch.device(device)
    values = torch.ones(2**29 if device.type == "cuda" else 2**26, device=device)
    best = float("inf")
    for _ in range(repeats + 1):
        start = _now(device)
        values.sum()
        best = min(best, _now(device) - start)
    return values.nbytes / best


def _now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()
