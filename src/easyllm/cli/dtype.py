"""The `easyllm dtype` command."""

import math
import re
import sys
from fractions import Fraction
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from easyllm.cli.output import JsonFlag, print_json, print_table

if TYPE_CHECKING:
    from easyllm.core.json_types import JsonObject
    from easyllm.models.cast_report import CastReport
    from easyllm.ops.number_formats import Format

DEFAULT = "fp32,bf16,fp16,fp8e4m3,fp8e5m2"


def register(app: typer.Typer) -> None:
    """Adds the command to `app`."""
    # a number may begin with a minus sign, as options do
    app.command("dtype", context_settings={"ignore_unknown_options": True})(dtype)


def dtype(
    value: Annotated[
        str,
        typer.Argument(
            metavar="NUMBER|BITS|MODEL",
            help="A number (0.1, -3e38, inf, nan); bits such as 0x3DCD, with --from; or a model, "
            "whose weights are cast.",
        ),
    ],
    formats: Annotated[
        str,
        typer.Option(
            "--as",
            help="Formats, separated by commas.",
            metavar="fp64|fp32|tf32|bf16|fp16|fp8e4m3|fp8e5m2|int16|int8|int4",
        ),
    ] = DEFAULT,
    source: Annotated[
        str | None, typer.Option("--from", help="Format of bits that are given in hexadecimal.")
    ] = None,
    rounding: Annotated[
        str,
        typer.Option(help="To the nearest number (ties to even, as PyTorch), or toward zero."),
    ] = "nearest",
    absmax: Annotated[
        float | None,
        typer.Option(
            min=0.0, help="Largest absolute value that an integer format covers; sets its scale."
        ),
    ] = None,
    json_output: JsonFlag = False,
) -> None:
    """Show how a number is stored in a format, or what casting a model's weights loses.

    Bits, value and error of each format; truncated and rounded; overflow, underflow, subnormals.

    [bold]Examples[/bold]

        easyllm dtype 0.1 --as bf16,fp16

        easyllm dtype 70000 --as fp16,bf16,fp8e4m3 --json

        easyllm dtype 0x3DCD --from bf16

        easyllm dtype 2.7 --as int8 --absmax 6

        easyllm dtype smollm2 --as bf16,fp16,fp8e4m3
    """
    from easyllm.core.errors import ConfigError
    from easyllm.ops.number_formats import find_format

    names = [name.strip() for name in formats.split(",") if name.strip()]
    if not names:
        raise ConfigError("--as names no format; write it as bf16,fp16")
    wanted = {name: find_format(name) for name in names}
    if rounding not in ("nearest", "truncate"):
        raise ConfigError(f"--rounding {rounding!r} is not known; use nearest or truncate")
    if absmax is not None and not 0 < absmax < math.inf:
        raise ConfigError(f"--absmax {absmax:g} cannot be scaled to; give a finite number above 0")
    number = _number(value, source)
    if number is None:
        if source is not None or absmax is not None or rounding != "nearest":
            raise ConfigError(
                f"--from, --absmax and --rounding concern a number, but {value!r} is none; give a "
                "number, or leave them out to cast a model"
            )
        _cast(value, wanted, json_output=json_output)
        return
    mode: Literal["nearest", "truncate"] = "nearest" if rounding == "nearest" else "truncate"
    found = {name: _described(number, format, mode, absmax) for name, format in wanted.items()}
    if json_output:
        print_json(found)
    else:
        _show(value, number, found)


def _number(text: str, source: str | None) -> Fraction | float | None:
    """Returns the number that a word stands for; None if it is none, and so names a model."""
    from easyllm.core.errors import ConfigError
    from easyllm.ops.number_formats import find_format

    if re.fullmatch(r"0[xX][0-9a-fA-F]{1,16}", text):
        if source is None:
            raise ConfigError(f"{text} are bits; say of which format with --from, such as bf16")
        format, pattern = find_format(source), int(text, 16)
        if pattern >> format.bits:
            raise ConfigError(f"{text} has more than the {format.bits} bits of {format.name}")
        value = format.value(pattern)
        return Fraction(value) if math.isfinite(value) and value else value
    if source is not None:
        raise ConfigError(f"--from {source} is for bits such as 0x3DCD, but got {text!r}")
    if re.fullmatch(r"[+-]?(inf|infinity|nan)", text.lower()):
        return float(text)
    if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d{1,4})?", text):
        exact = Fraction(text)
        return -0.0 if not exact and text.startswith("-") else exact
    return None


def _described(
    number: Fraction | float,
    format: "Format",
    rounding: Literal["nearest", "truncate"],
    absmax: float | None,
) -> "JsonObject":
    from easyllm.ops.number_formats import IntFormat, encode

    scale = None
    if isinstance(format, IntFormat) and absmax:
        scale = Fraction(absmax) / format.limits[1]
    stored = encode(number, format, rounding=rounding, scale=scale)
    other = encode(number, format, rounding="truncate", scale=scale)
    return {
        "hex": stored.hex,
        "bits": stored.bits,
        "value": stored.value,
        "error": stored.error,
        "fields": list(stored.fields),
        "status": stored.status,
        "truncated": {"hex": other.hex, "value": other.value, "error": other.error},
        **_limits(format, scale),
    }


def _limits(format: "Format", scale: Fraction | None) -> "JsonObject":
    from easyllm.ops.number_formats import IntFormat

    if isinstance(format, IntFormat):
        low, high = format.limits
        step = scale or Fraction(1)
        return {"min": float(low * step), "max": float(high * step), "scale": float(step)}
    return {
        "max": float(format.max),
        "smallest_normal": float(format.smallest_normal),
        "smallest": float(format.smallest),
        "epsilon": float(format.epsilon),
    }


def _show(text: str, number: Fraction | float, found: "dict[str, JsonObject]") -> None:
    from easyllm.ops.number_formats import nearest_float

    rows = []
    for name, each in found.items():
        cut = each["truncated"]
        rows.append(
            (
                name,
                " ".join(each["fields"]),
                each["hex"],
                repr(each["value"]),
                f"{each['error']:.4g}",
                each["status"],
                f"{cut['hex']} {cut['value']!r}",
            )
        )
    nearest = repr(nearest_float(number)) if isinstance(number, Fraction) else text
    columns = ("format", "sign exponent mantissa", "hex", "value", "error", "", "truncated")
    title = text if nearest in (text, "inf", "-inf") else f"{text} = {nearest}"
    print_table(title, columns, rows)
    if any(each["status"] == "overflow" for each in found.values()):
        sys.stdout.write("overflow: larger than the format's largest number\n")
    if any(each["status"] == "underflow" for each in found.values()):
        sys.stdout.write("underflow: less than half of the smallest number, stored as 0\n")


def _cast(source: str, formats: "dict[str, Format]", *, json_output: bool) -> None:
    from easyllm.models.cast_report import cast_report

    reports = cast_report(source, list(formats.values()))
    by_name = {name: reports[format.name] for name, format in formats.items()}
    if json_output:
        print_json({name: report.as_dict() for name, report in by_name.items()})
        return
    columns = ("format", "changed", "overflow", "underflow", "subnormal", "relative error", "max")
    print_table(f"casting {source}", columns, [_cells(n, r) for n, r in by_name.items()])
    for name, report in by_name.items():
        worst = report.worst[0] if report.worst else None
        if worst is not None and (worst.overflow or worst.changed):
            sys.stdout.write(
                f"{name}: worst is {worst.name}, relative error {worst.relative_error:.3g}, "
                f"{worst.overflow:,} overflow\n"
            )


def _cells(name: str, report: "CastReport") -> tuple[str, ...]:
    total = report.total
    share = total.changed / total.count if total.count else 0.0
    return (
        name,
        f"{share:.1%} of {total.count:,}",
        f"{total.overflow:,}",
        f"{total.underflow:,}",
        f"{total.subnormal:,}",
        f"{total.relative_error:.3g}",
        f"{total.max_error:.3g}",
    )


__all__ = ["register"]
