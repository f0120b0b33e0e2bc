"""Bounds of numbers, rewritten so that llguidance accepts none outside them.

llguidance 1.9.1 stores bounds in fp64 and turns them into regular expressions. Found by comparing
with exact arithmetic:

- integers above 2^53 are rounded to the nearest fp64 number, decimal numbers of more than 15 digits
  are read with an error of one unit in the last place: either may be beyond the bound;
- with `exclusiveMinimum: 0` and a maximum below 1, the number 0 is accepted (so for every integer);
- with an excluded bound 1, a text such as 0.99999999999999999999 is accepted, which is read as 1.0;
- with `maximum: 2.75`, the number 2.7 is not accepted, because its digits are the beginning of the
  bound's (the same for every bound of several decimals).

So integers are bounded by integers, other bounds become included ones of at most 15 digits on the
allowed side, and the numbers of the last kind are allowed one by one.
"""

import math
from decimal import ROUND_CEILING, ROUND_FLOOR, Context, Decimal

from easyllm.core.json_types import Json, JsonObject

MAX_INTEGER = 2**63 - 1024
"""Bound of integers without bounds: the largest fp64 number of 64 bits, so that a model cannot add
digits without end, and others can read the number."""
EXACT_DIGITS = 15
"""Decimal numbers of so many digits are read exactly."""
SMALLEST = 1e-15
"""The smallest positive number where zero is excluded."""
BOUNDS = ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum")


def rewrite_bounds(node: JsonObject) -> None:
    """Rewrites the bounds of numbers of a schema in place; their values must be numbers."""
    names = node.get("type")
    names = names if isinstance(names, list) else [names]
    if "integer" in names and "number" not in names:
        _bound_integers(node)
    elif any(keyword in node for keyword in BOUNDS):
        _bound_numbers(node)


def is_exact(value: float) -> bool:
    """Whether llguidance reads a constant exactly."""
    if isinstance(value, int):
        return abs(value) <= 2**53
    return value == float(f"{value:.{EXACT_DIGITS}g}") and abs(value) <= 2**53


def _bound_integers(node: JsonObject) -> None:
    low = [-MAX_INTEGER]
    if "minimum" in node:
        low.append(math.ceil(node["minimum"]))
    if "exclusiveMinimum" in node:
        low.append(math.floor(node["exclusiveMinimum"]) + 1)
    high = [MAX_INTEGER]
    if "maximum" in node:
        high.append(math.floor(node["maximum"]))
    if "exclusiveMaximum" in node:
        high.append(math.ceil(node["exclusiveMaximum"]) - 1)
    for keyword in BOUNDS:
        node.pop(keyword, None)
    node["minimum"], node["maximum"] = _fp64(max(low), upper=False), _fp64(min(high), upper=True)


def _fp64(value: int, *, upper: bool) -> int:
    """Returns the nearest fp64 integer that is not above (not below) a bound."""
    rounded = int(float(value))
    if (rounded > value) if upper else (rounded < value):
        rounded = int(math.nextafter(float(value), -math.inf if upper else math.inf))
    return rounded


def _bound_numbers(node: JsonObject) -> None:
    low = [_inside(node[k], upper=False, excluded=k != "minimum") for k in BOUNDS[::2] if k in node]
    high = [
        _inside(node[k], upper=True, excluded=k != "maximum") for k in BOUNDS[1::2] if k in node
    ]
    for keyword in BOUNDS:
        node.pop(keyword, None)
    bounds: JsonObject = {}
    if low:
        bounds["minimum"] = max(low)
    if high:
        bounds["maximum"] = min(high)
    between = [
        value
        for value in (*_shortened(bounds.get("minimum")), *_shortened(bounds.get("maximum")))
        if value >= bounds.get("minimum", value) and value <= bounds.get("maximum", value)
    ]
    if between:
        kind = {"type": node["type"]} if "type" in node else {}
        choices: Json = {"anyOf": [{**kind, **bounds}, {"enum": between}]}
        node["allOf"] = [*node.get("allOf", ()), choices]
    else:
        node.update(bounds)


def _inside(value: float, *, upper: bool, excluded: bool) -> float:
    """Returns the nearest number on the allowed side of a bound that is read exactly."""
    if excluded and not value:
        return -SMALLEST if upper else SMALLEST
    context = Context(EXACT_DIGITS, ROUND_FLOOR if upper else ROUND_CEILING)
    number = Decimal(repr(value))
    if excluded:
        number = context.next_minus(number) if upper else context.next_plus(number)
    else:
        number = context.plus(number)
    return int(number) if number == int(number) else float(number)


def _shortened(bound: float | None) -> list[float]:
    """Returns the numbers whose decimals are a beginning of the bound's: 2.7 for 2.75."""
    whole, _, decimals = format(Decimal(repr(bound or 0)), "f").partition(".")
    return [float(f"{whole}.{decimals[:count]}") for count in range(1, len(decimals))]
