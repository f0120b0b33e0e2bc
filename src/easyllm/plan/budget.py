"""Time, cost and size of complete training runs: tokens, days, MFU, compute-optimal models."""

import re
from dataclasses import dataclass

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.plan.hardware import Hardware
from easyllm.plan.published import TOKENS_PER_PARAMETER, compute_optimal

DAY, HOUR = 86400, 3600
LONGEST_SECONDS = 100 * 365 * DAY
_UNITS = {"": 1.0, "k": 1e3, "m": 1e6, "b": 1e9, "g": 1e9, "t": 1e12}
_TIMES = {"s": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0, "d": 86400.0}


@dataclass(frozen=True, slots=True, kw_only=True)
class Budget:
    """A training run of a number of tokens on several devices.

    Attributes:
        tokens: training tokens.
        flops: FLOPs that the devices execute.
        gpus: number of devices.
        seconds: time of the run.
        price: price of all device-hours; None if none is known.
    """

    tokens: float
    flops: float
    gpus: int
    seconds: float
    price: float | None

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        found: JsonObject = {
            "tokens": round(self.tokens),
            "flops": round(self.flops),
            "seconds": round(self.seconds),
            "days": round(self.seconds / DAY, 4),
            "gpu_hours": round(self.gpus * self.seconds / HOUR, 1),
        }
        return found if self.price is None else found | {"price": round(self.price, 2)}


def budget(
    flops: float, tokens: float, hardware: Hardware, gpus: int, *, utilisation: float | None = None
) -> Budget:
    """Returns the time and price of a run.

    Args:
        flops: FLOPs that the devices execute.
        tokens: training tokens.
        hardware: the devices, with the utilisation that is assumed.
        gpus: number of devices.
        utilisation: share of the peak, instead of that of the profile.
    """
    share = hardware.utilisation if utilisation is None else utilisation
    seconds = flops / (gpus * hardware.flops_per_s * share)
    hourly = hardware.price_per_hour
    return Budget(
        tokens=tokens,
        flops=flops,
        gpus=gpus,
        seconds=seconds,
        price=None if hourly is None else hourly * gpus * seconds / HOUR,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Optimum:
    """What a number of FLOPs trains best (Hoffmann et al. 2022, arXiv 2203.15556: D = 20N).

    Attributes:
        parameters: size of the model.
        tokens: training tokens.
    """

    parameters: float
    tokens: float

    def as_dict(self) -> JsonObject:
        """Returns plain values for JSON."""
        return {"parameters": round(self.parameters), "tokens": round(self.tokens)}


def optimum(flops: float) -> Optimum:
    """Returns the compute-optimal model and number of tokens for `flops` = 6ND."""
    parameters, tokens = compute_optimal(flops)
    return Optimum(parameters=parameters, tokens=tokens)


def optimal_tokens(parameters: float) -> float:
    """Returns the training tokens for which a model of this size is compute-optimal."""
    return TOKENS_PER_PARAMETER * parameters


def parse_count(text: str, what: str) -> float:
    """Returns the number in `300e9`, `1.4T` or `7.5B`.

    Raises:
        ConfigError: it is not a positive number.
    """
    found = re.fullmatch(r"([0-9][0-9_,]*\.?[0-9]*(?:e[+-]?[0-9]+)?)\s*([kmbgt]?)", text.lower())
    value = 0.0
    if found is not None:
        value = float(found[1].replace(",", "").replace("_", "")) * _UNITS[found[2]]
    if not 0 < value < 1e30:
        raise ConfigError(f"{what} {text!r} is not a number above 0; write it as 300e9 or 1.4T")
    return value


def parse_duration(text: str, what: str) -> float:
    """Returns the seconds in `4h`, `90m`, `2d` or `1h30m`.

    Raises:
        ConfigError: it is not a duration above 0.
    """
    parts = re.findall(r"([0-9]+(?:\.[0-9]+)?)\s*(min|[smhd])", text.lower())
    rest = re.sub(r"([0-9]+(?:\.[0-9]+)?)\s*(min|[smhd])", "", text.lower()).strip()
    seconds = sum(float(number) * _TIMES[unit] for number, unit in parts)
    if rest or not 0 < seconds < LONGEST_SECONDS:
        raise ConfigError(
            f"{what} {text!r} is not a duration above 0 and below 100 years; write it as 4h, 90m "
            "or 1h30m"
        )
    return seconds


def parse_size(text: str, what: str) -> int:
    """Returns the bytes in `24GB`, `80 GiB` or `512MB`.

    Raises:
        ConfigError: it is not a size of memory above 0, or has no unit.
    """
    # a number alone is refused: nobody who writes 24 means 24 bytes
    found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)\s*([kmgt])(i)?b?", text.strip().lower())
    scale = {"k": 1, "m": 2, "g": 3, "t": 4}
    size = 0
    if found is not None:
        size = int(float(found[1]) * (1024 if found[3] else 1000) ** scale[found[2]])
    if size < 1:
        raise ConfigError(
            f"{what} {text!r} is not a size of memory above 0 with its unit; write it as 24GB or "
            "24GiB"
        )
    return size


__all__ = [
    "Budget",
    "Optimum",
    "budget",
    "optimal_tokens",
    "optimum",
    "parse_count",
    "parse_duration",
    "parse_size",
]
