"""What this machine can do, measured where nothing says it."""

import statistics
import time

import torch

ROWS, WIDTH = 2048, 1536
"""A product [ROWS, WIDTH] x [WIDTH, WIDTH], as large as those of a small model's step."""


def matmul_rate(
    dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu", *, repeats: int = 7
) -> float:
    """FLOP/s of a matrix product of 2048 x 1536 x 1536, the median of a few, on the threads torch has. (On a shared machine
    the best of a few is a moment that no run of minutes meets.)

    It stands for the peak in MFU where the processor's own is not published; on a GPU the product is too small to
    reach it, so that larger ones are measured there.
    """
    device = torch.device(device)
    scale = 4 if device.type == "cuda" else 1
    rows, width = ROWS * scale, WIDTH * scale
    a = torch.randn(rows, width, dtype=dtype, device=device)
    b = torch.randn(width, width, dtype=dtype, device=device)
    times = []
    for _ in range(repeats + 1):  # the first one warms up
        start = _now(device)
        a @ b.T
        times.append(_now(device) - start)
    return 2 * rows * width * width / statistics.median(times[1:])


def read_rate(device: torch.device | str = "cpu", *, repeats: int = 5) -> float:
    """Bytes a second at which memory is read: 256 MB (2 GB on a GPU) summed up, the best of a few, on all threads."""
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
