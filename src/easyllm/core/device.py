"""Devices, dtypes and the capabilities of this machine."""

import os
import platform
import re
import shutil
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

from easyllm.core.errors import ConfigError, suggest
from easyllm.core.json_types import JsonObject
from easyllm.core.paths import expanded

if TYPE_CHECKING:
    import torch

CPU_FEATURES = (
    "avx2",
    "avx512f",
    "avx512_bf16",
    "avx512_vnni",
    "amx_bf16",
    "amx_int8",
    "asimddp",
    "bf16",
    "i8mm",
)
BF16_FEATURES = frozenset({"avx512_bf16", "amx_bf16", "bf16"})
DTYPE_NAMES = {
    "float32": "float32",
    "fp32": "float32",
    "bfloat16": "bfloat16",
    "bf16": "bfloat16",
    "float16": "float16",
    "fp16": "float16",
    "float64": "float64",
    "fp64": "float64",
}


def parse_dtype(name: str) -> "torch.dtype":
    """Returns the torch dtype with a given name (`bf16`, `float32` ...).

    Raises:
        ConfigError: the name is unknown.
    """
    import torch

    if name not in DTYPE_NAMES:
        raise ConfigError(
            f"dtype {name!r} is not known{suggest(name, DTYPE_NAMES)}; "
            "use one of float32, bfloat16, float16, float64"
        )
    dtype = getattr(torch, DTYPE_NAMES[name])
    assert isinstance(dtype, torch.dtype)
    return dtype


def pick_device(name: str = "auto") -> "torch.device":
    """Returns the device with a given name; `auto` selects the accelerator if there is one.

    Raises:
        ConfigError: the device is unknown or not available.
    """
    import torch

    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("cpu")
    device = torch.device(check_device_name(name))
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            f"device {name!r} was requested, but torch sees no CUDA device; use 'cpu' or 'auto'"
        )
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ConfigError(
            f"device {name!r} was requested, but torch sees {torch.cuda.device_count()} CUDA "
            "device(s), numbered from 0; use a smaller number"
        )
    return device


def check_device_name(name: str) -> str:
    """Returns the name of a device unchanged if it is one of those that are supported.

    Raises:
        ConfigError: it is not; torch knows more devices (`meta`, `mps`) than are supported.
    """
    if re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", name) is None:
        raise ConfigError(f"device {name!r} is not supported; use auto, cpu, cuda or cuda:N")
    return name


def cache_folder() -> Path:
    """Returns the folder of downloaded models and compiled kernels.

    It is `EASYLLM_CACHE`, or else `easyllm` in the user's cache folder.
    """
    if os.environ.get("EASYLLM_CACHE"):
        return expanded(os.environ["EASYLLM_CACHE"])
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "easyllm"


@lru_cache(maxsize=1)
def cpu_features() -> frozenset[str]:
    """Returns the `CPU_FEATURES` that the processor reports (only on Linux; elsewhere none)."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return frozenset()
    flags: set[str] = set()
    for line in text.splitlines():
        if line.startswith(("flags", "Features")):
            flags.update(line.split(":", 1)[1].split())
            break
    return frozenset(flag for flag in CPU_FEATURES if flag in flags)


def bf16_is_fast(device: "torch.device") -> bool:
    """Whether the device has hardware support for bf16 matrix products (GEMM)."""
    import torch

    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    return bool(BF16_FEATURES & cpu_features())


def memory_total_bytes() -> int:
    """Returns the physical memory of the machine in bytes (0 if it cannot be determined)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return 0


def memory_free_bytes(device: "torch.device") -> int:
    """Returns the memory available without swapping on the accelerator or the machine, in bytes."""
    if device.type == "cuda":
        import torch

        return int(torch.cuda.mem_get_info(device)[0])
    try:
        for line in Path("/proc/meminfo").read_text(encoding="ascii").splitlines():
            if line.startswith("MemAvailable:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return memory_total_bytes() // 2  # no /proc/meminfo: assume half of the physical memory


def peak_rss_bytes() -> int:
    """Returns the peak resident set size of this process, in bytes."""
    import resource
    import sys

    # not `ru_maxrss` on Linux: it includes the memory of the process that started this one
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def rss_bytes() -> int:
    """Returns the current resident set size of this process in bytes; outside Linux, its peak."""
    with suppress(OSError), open("/proc/self/status", encoding="ascii") as status:
        for line in status:
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    return peak_rss_bytes()


def peak_memory_bytes(device: "torch.device") -> int:
    """Returns the peak memory of this process on the device, in bytes.

    This is the memory allocated to tensors on an accelerator and the resident set size on a CPU.
    """
    if device.type == "cuda":
        import torch

        return int(torch.cuda.max_memory_allocated(device))
    return peak_rss_bytes()


def describe_machine() -> JsonObject:
    """Returns what `easyllm doctor` prints: processor, memory, devices, compiler, torch."""
    import torch

    report: JsonObject = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "processor": _processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_features": sorted(cpu_features()),
        "memory_gb": round(memory_total_bytes() / 1e9, 1),
        "compiler": shutil.which("g++") or shutil.which("clang++") or None,
        "bf16_on_cpu": bf16_is_fast(torch.device("cpu")),
        "devices": ["cpu"],
    }
    if torch.cuda.is_available():
        report["devices"] += [
            f"cuda:{i} {torch.cuda.get_device_name(i)}" for i in range(torch.cuda.device_count())
        ]
    return report


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()
