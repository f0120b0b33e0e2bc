"""Profiles of accelerators: peak rates, memory, links. Figures of the makers' data sheets.

Rates are of dense bf16 matrix products (fp16 where a GPU has no bf16); sparse rates, which some
data sheets print first, are twice as high and no training reaches them.
"""

import difflib
import json
import re
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from pydantic import Field, PositiveFloat, PositiveInt

from easyllm.core.config import Config, validate
from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.core.paths import expanded

GIB = 2**30
MAX_GPUS = 9_999_999
RESERVED = 0.06
"""Share of a GPU's memory that weights and activations cannot use: the CUDA context, cuBLAS and
NCCL buffers, and what the allocator loses to fragmentation."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """One device, and how several of them are connected.

    Attributes:
        name: name of the device.
        flops_per_s: peak FLOP/s of dense half-precision matrix products.
        memory_bytes: memory.
        read_bytes_per_s: memory bandwidth in bytes/s.
        link_bytes_per_s: what a device sends to the others of its node, in one direction, bytes/s.
        node_size: devices in a node.
        network_bytes_per_s: what a device sends to other nodes, in one direction, bytes/s.
        utilisation: share of the peak that training is assumed to reach while it computes.
        price_per_hour: price of one device-hour; None if it is not known.
        reserved_share: share of the memory that no tensor can use.
    """

    name: str
    flops_per_s: float
    memory_bytes: int
    read_bytes_per_s: float
    link_bytes_per_s: float = 32e9
    node_size: int = 8
    network_bytes_per_s: float = 50e9
    utilisation: float = 0.5
    price_per_hour: float | None = None
    reserved_share: float = RESERVED

    @property
    def usable_bytes(self) -> int:
        """Memory for weights, states, activations and caches."""
        return int(self.memory_bytes * (1 - self.reserved_share))

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return asdict(self) | {"usable_bytes": self.usable_bytes}


class ProfileConfig(Config):
    """The file of `--profile`: a device that the table lacks."""

    name: str = Field(default="profile", description="Name of the device.")
    flops_per_s: PositiveFloat = Field(
        description="Peak FLOP/s of dense half-precision matrix products."
    )
    memory_gb: PositiveFloat = Field(description="Memory of one device, in units of 2^30 bytes.")
    read_bytes_per_s: PositiveFloat = Field(description="Memory bandwidth, bytes/s.")
    link_bytes_per_s: PositiveFloat = Field(
        default=32e9, description="What a device sends to the others of its node, bytes/s."
    )
    node_size: PositiveInt = Field(default=8, description="Devices in a node.")
    network_bytes_per_s: PositiveFloat = Field(
        default=50e9, description="What a device sends to other nodes, bytes/s."
    )
    utilisation: float = Field(
        default=0.5, gt=0, le=1, description="Share of the peak reached while computing."
    )
    price_per_hour: PositiveFloat | None = Field(
        default=None, description="Price of one device-hour, in any currency; null omits costs."
    )

    def hardware(self) -> Hardware:
        """Returns the profile's values."""
        values = self.model_dump(exclude={"memory_gb"})
        return Hardware(**values, memory_bytes=int(self.memory_gb * GIB))


def _gpu(
    name: str, tflops: float, gib: int, read: float, link: float = 32.0, node: int = 8
) -> Hardware:
    """Returns a table entry: TFLOP/s, GiB, GB/s of memory, GB/s of a link in one direction."""
    return Hardware(
        name=name,
        flops_per_s=tflops * 1e12,
        memory_bytes=gib * GIB,
        read_bytes_per_s=read * 1e9,
        link_bytes_per_s=link * 1e9,
        node_size=node,
    )


HARDWARE = {
    gpu.name: gpu
    for gpu in (
        _gpu("V100-16GB", 125, 16, 900, 150),
        _gpu("V100-32GB", 125, 32, 900, 150),
        _gpu("T4-16GB", 65, 16, 320, 16),
        _gpu("A10-24GB", 125, 24, 600),
        _gpu("A30-24GB", 165, 24, 933, 100),
        _gpu("A40-48GB", 149.7, 48, 696, 56),
        _gpu("A100-40GB", 312, 40, 1555, 300),
        _gpu("A100-80GB", 312, 80, 2039, 300),
        _gpu("A800-80GB", 312, 80, 2039, 200),
        _gpu("RTX3090-24GB", 71, 24, 936, 32, 4),
        _gpu("RTX4090-24GB", 165.2, 24, 1008, 32, 4),
        _gpu("RTX5090-32GB", 209.5, 32, 1792, 64, 4),
        _gpu("RTX6000Ada-48GB", 364.2, 48, 960, 32, 4),
        _gpu("A6000-48GB", 154.8, 48, 768, 56, 4),
        _gpu("L4-24GB", 121, 24, 300, 32),
        _gpu("L40S-48GB", 362, 48, 864, 32),
        _gpu("H20-96GB", 148, 96, 4000, 450),
        _gpu("H100-80GB", 989.4, 80, 3352, 450),
        _gpu("H100-PCIE-80GB", 756, 80, 2000, 64),
        _gpu("H100-NVL-94GB", 835, 94, 3900, 300),
        _gpu("H800-80GB", 989.4, 80, 3352, 200),
        _gpu("H200-141GB", 989.4, 141, 4800, 450),
        _gpu("B200-180GB", 2250, 180, 8000, 900),
        _gpu("MI250X-128GB", 383, 128, 3277, 250),
        _gpu("MI300X-192GB", 1307.4, 192, 5300, 448),
        _gpu("TPUv4-32GB", 275, 32, 1228, 300, 4),
    )
}
"""Devices by name; a link is NVLink's, or PCIe's where there is none."""


def find_hardware(name: str) -> Hardware:
    """Returns a device of the table by its name, in any case.

    Raises:
        ConfigError: there is no such device; the message names similar ones.
    """
    by_key = {_key(known): known for known in HARDWARE}
    key = _key(name)
    if key in by_key:
        return HARDWARE[by_key[key]]
    near = [known for known in HARDWARE if _key(known).startswith(key) or key in _key(known)]
    near = near or [by_key[k] for k in difflib.get_close_matches(key, by_key, n=3, cutoff=0.5)]
    if len(near) == 1 and key and _key(near[0]).startswith(key):
        return HARDWARE[near[0]]
    hint = f"; did you mean {', '.join(near)}?" if near else ""
    raise ConfigError(
        f"GPU {name!r} is not in the table{hint} known are {', '.join(HARDWARE)}; or describe "
        "yours with --profile FILE"
        if near
        else f"GPU {name!r} is not in the table; known are {', '.join(HARDWARE)}; or describe "
        "yours with --profile FILE"
    )


def parse_gpus(text: str) -> tuple[int, str | None]:
    """Returns the number of devices and their name in `8xH100-80GB`, `H100-80GB` or `8`.

    Raises:
        ConfigError: the text has no such form.
    """
    found = re.fullmatch(r"(?:(\d{1,30})\s*[x×*]\s*)?([A-Za-z].*)|(\d{1,30})", text.strip())
    if found is None:
        raise ConfigError(
            f"--gpus {text!r} is not a number and name of GPUs; write it as 8xH100-80GB"
        )
    count = int(found[3] or found[1] or 1)
    if not 1 <= count <= MAX_GPUS:
        raise ConfigError(
            f"--gpus {text!r} has {count:,} GPUs; give at least 1 and at most {MAX_GPUS:,}"
        )
    return count, found[2]


def read_profile(path: str | Path) -> Hardware:
    """Reads a device from a JSON file with the keys of `ProfileConfig`.

    Raises:
        ConfigError: the file cannot be read, or a value is missing or wrong.
    """
    file = expanded(path)
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not JSON"
        raise ConfigError(
            f"profile {str(path)!r} cannot be read ({reason}); write a JSON object with "
            "flops_per_s, memory_gb and read_bytes_per_s"
        ) from None
    if not isinstance(values, dict):
        raise ConfigError(
            f"profile {str(path)!r} is not a JSON object; write one with flops_per_s, memory_gb "
            "and read_bytes_per_s"
        )
    return validate(ProfileConfig, values, source=f"profile {str(path)!r}").hardware()


def with_options(
    hardware: Hardware, *, utilisation: float | None = None, price: float | None = None
) -> Hardware:
    """Returns a profile with another utilisation or price, where they are given.

    Raises:
        ConfigError: the utilisation is not above 0 and at most 1, or the price is negative.
    """
    if utilisation is not None and not 0 < utilisation <= 1:
        raise ConfigError(
            f"--mfu {utilisation:g} is not a share of the peak; give a number above 0, at most 1"
        )
    if price is not None and price < 0:
        raise ConfigError(f"--price {price:g} is negative; give the price of one device-hour")
    return replace(
        hardware,
        utilisation=hardware.utilisation if utilisation is None else utilisation,
        price_per_hour=hardware.price_per_hour if price is None else price,
    )


def _key(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


__all__ = [
    "HARDWARE",
    "Hardware",
    "ProfileConfig",
    "find_hardware",
    "parse_gpus",
    "read_profile",
    "with_options",
]
