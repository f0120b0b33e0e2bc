"""What the tables of `easyllm plan` share: numbers as text, a bar of memory, rates."""

import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from easyllm.plan.hardware import Hardware
    from easyllm.plan.report import Rates

WIDTH = 60
"""Characters of a bar."""
MARKS = "█▓▒░#=+-:."
PLAIN = "#=+-:.%*o~"


def gigabytes(num_bytes: float) -> str:
    """Returns a size as text, such as `1,234.50 GB`."""
    return f"{num_bytes / 1e9:,.2f} GB"


def flops_text(flops: float) -> str:
    """Returns a number of FLOPs as text, such as `13.5 GFLOP`."""
    from easyllm.core.progress import format_count

    text = format_count(flops)
    prefix = text[-1] if text[-1].isalpha() else ""
    return f"{text.removesuffix(prefix)} {prefix}FLOP"


def memory_bar(parts: Mapping[str, int], limit: int | None = None) -> str:
    """Returns one line that shows the shares of a memory, and one that names them.

    Args:
        parts: bytes by name.
        limit: the memory that there is; what is free is shown as a space.
    """
    shown = {name: size for name, size in parts.items() if size > 0}
    whole = max(sum(shown.values()), limit or 0)
    if not whole:
        return ""
    marks = MARKS
    try:
        MARKS.encode(sys.stdout.encoding or "utf-8")
    except UnicodeEncodeError:
        marks = PLAIN
    bar, edge, total = "", 0, 0
    for mark, size in zip(marks * len(shown), shown.values(), strict=False):
        total += size
        end = max(edge + 1, round(WIDTH * total / whole))
        bar, edge = bar + mark * (end - edge), end
    names = ", ".join(
        f"{mark} {name.replace('_', ' ')} {gigabytes(size)}"
        for mark, (name, size) in zip(marks * len(shown), shown.items(), strict=False)
    )
    return f"|{bar:<{WIDTH}}|\n{names}\n"


def rates_here() -> "Rates":
    """Returns this machine's rates: of `easyllm doctor --measure`, or measured in a second."""
    from easyllm.core.device import bf16_is_fast, memory_free_bytes, parse_dtype, pick_device
    from easyllm.plan.calibration import read_calibration
    from easyllm.plan.machine import matmul_rate, read_rate
    from easyllm.plan.report import Rates

    device, kept = pick_device(), read_calibration()
    name = "bfloat16" if bf16_is_fast(device) else "float32"
    known = (kept.flops_per_s or {}).get(name) if device.type == "cpu" else None
    reading = kept.read_bytes_per_s if device.type == "cpu" else None
    return Rates(
        flops_per_s=known or matmul_rate(parse_dtype(name), device, repeats=3),
        read_bytes_per_s=reading or read_rate(device, repeats=1),
        free_bytes=memory_free_bytes(device),
    )


def this_machine(rates: "Rates") -> "Hardware":
    """Returns this machine as a device: its free memory is what can be used."""
    from easyllm.plan.compute import USUAL_MFU
    from easyllm.plan.hardware import Hardware

    return Hardware(
        name="this machine",
        flops_per_s=rates.flops_per_s,
        memory_bytes=rates.free_bytes,
        read_bytes_per_s=rates.read_bytes_per_s,
        node_size=1,
        utilisation=USUAL_MFU,
        reserved_share=0.0,
    )


__all__ = ["flops_text", "gigabytes", "memory_bar", "rates_here", "this_machine"]
