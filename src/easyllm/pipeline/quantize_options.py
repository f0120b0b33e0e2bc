"""What `easyllm quantize` writes: method, grid, format, calibration text."""

from collections.abc import Sequence
from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from easyllm.adapters.targets import check_patterns, name_matches
from easyllm.core.config import Config, validate
from easyllm.core.errors import suggest
from easyllm.core.json_types import JsonMapping
from easyllm.core.paths import PathText
from easyllm.quant.gguf_blocks import TYPES
from easyllm.quant.methods import METHODS, find_method
from easyllm.quant.spec import QuantSpec

FULL = "full"
GPTQ_BLOCKWISE = ("gptq-nf4", "gptq-fp4")
BLOCKWISE = ("nf4", "fp4", *GPTQ_BLOCKWISE)
BITSANDBYTES = (*BLOCKWISE, "llm.int8")
FORMATS = {
    "rtn": "compressed-tensors",
    "smoothquant": "compressed-tensors",
    **dict.fromkeys(BITSANDBYTES, "bitsandbytes"),
}
"""The format of a method, where it does not have its name."""
SEARCHED = tuple(name for name in TYPES if name != "q8_0")
"""GGUF types whose scales are searched; 8 bits need no search."""
GGUF_TYPES = ("f32", "f16", "bf16", *TYPES)
DEFAULT_LENGTH = 512
MAX_KL = 1.0
"""Largest mean KL divergence from the original in nats per token: more than rounding to 3 bits
costs a model, less than a broken file does."""
CALIBRATED = ("data", "samples", "length")
GRID = ("bits", "group_size", "asymmetric", "act_order")


def check_gguf_type(type: str) -> None:
    """Checks the name of a GGUF type.

    Raises:
        ValueError: there is no such type to write.
    """
    if type not in GGUF_TYPES:
        raise ValueError(
            f"there is no GGUF type {type!r}{suggest(type, GGUF_TYPES)}; use "
            f"{', '.join(GGUF_TYPES)}"
        )


class QuantizeOptions(Config):
    """Method, grid, format and calibration text of a quantized file."""

    method: Literal[
        "rtn", "gptq", "awq", "smoothquant", "nf4", "fp4", "gptq-nf4", "gptq-fp4", "llm.int8"
    ] = Field(
        default="gptq",
        description="How weights are rounded: to the nearest code (rtn), gptq, or awq; "
        "smoothquant quantizes activations to 8 bits, too (W8A8); nf4, fp4 and llm.int8 are those "
        "of bitsandbytes, and gptq-nf4 and gptq-fp4 write the same files with codes chosen by "
        "GPTQ. GGUF's blocks have their own rounding.",
    )
    format: Literal["gptq", "awq", "compressed-tensors", "bitsandbytes", "gguf"] | None = Field(
        default=None,
        description="File format; by default that of the method (compressed-tensors for rtn), or "
        "gguf if a type is set.",
    )
    type: str | None = Field(
        default=None,
        description="GGUF type: q8_0, q6_k, q5_k, q4_k, q5_1, q5_0, q4_1 or q4_0; f32, f16 or bf16 "
        "for full weights.",
    )
    bits: Literal[2, 3, 4, 8] | None = Field(
        default=None, description="Bits per weight; by default 4, and 8 for smoothquant."
    )
    group_size: NonNegativeInt | None = Field(
        default=None,
        description="Inputs that share a scale; 0 is one scale per output row. By default 64, and "
        "0 for smoothquant.",
    )
    asymmetric: bool = Field(
        default=False,
        description="Grids that span the minimum to the maximum of a group, with zero points.",
    )
    single: bool = Field(
        default=False,
        description="nf4 and fp4, with GPTQ or without: without double quantization of the scales.",
    )
    override: tuple[str, ...] = Field(
        default=(),
        description="PATTERN=VALUE for linears whose name (layers.0.mixer.q_proj) matches a "
        "pattern such as *.down_proj: other bits, a GGUF type, or `full` for full weights; the "
        "last one that matches counts. GGUF's embedding and head are embed_tokens and lm_head.",
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16",
        description="Dtype of what is not quantized: embedding, head, norms. GGUF has its own.",
    )
    act_order: bool = Field(
        default=False,
        description="GPTQ: groups are of columns in the order of their activations, with the order "
        "in the file (desc_act); by default they are of neighbours, and only the order of "
        "quantization follows the activations.",
    )
    data: PathText | None = Field(
        default=None,
        description="Calibration text: a file of texts or conversations; by default English, "
        "Chinese and code that come with the package.",
    )
    samples: PositiveInt = Field(default=128, description="Number of calibration sequences.")
    length: int = Field(
        default=DEFAULT_LENGTH, ge=2, description="Tokens of a calibration sequence."
    )
    no_importance: bool = Field(
        default=False,
        description="GGUF: does not weigh rounding errors by the inputs on calibration text.",
    )
    text: PathText | None = Field(
        default=None,
        description="A text file to measure the result on; by default a built-in text.",
    )
    dequantize: bool = Field(
        default=False,
        description="Allows a source that is already quantized: its dequantized weights are "
        "rounded again, which adds to their error.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.type is not None:
            check_gguf_type(self.type)
        if self.is_gguf and self.type is None:
            raise ValueError("format gguf needs a type, such as q4_k; set type")
        if not self.is_gguf and self.type is not None:
            raise ValueError(f"type {self.type} is GGUF's, but format is {self.format}; remove one")
        if self.act_order and (self.method != "gptq" or self.file_format != "gptq"):
            raise ValueError(
                "act_order moves inputs between groups, which only method gptq does and only "
                f"format gptq can hold, got {self.method} and {self.file_format}; remove it"
            )
        bitsandbytes = self.file_format == "bitsandbytes"
        if not self.is_gguf and (self.method in BITSANDBYTES) != bitsandbytes:
            raise ValueError(
                f"format {self.file_format} does not hold weights of method {self.method}; "
                f"bitsandbytes holds those of {', '.join(BITSANDBYTES)}, and no others"
            )
        what = f"type {self.type}" if self.is_gguf else f"method {self.method}"
        for name in sorted(self.model_fields_set & self._without_effect()):
            if getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"{name} has no effect on {what}; remove it")
        self.overrides()
        return self

    @classmethod
    def with_effect(cls, own: JsonMapping, shared: JsonMapping) -> Self:
        """Returns the options `own` with those of `shared` that have an effect on them.

        Raises:
            ConfigError: a value is not valid.
        """
        alone = validate(cls, dict(own), source="quantize options")
        unused = alone._without_effect() | {"method", "type", "format"}
        kept = {
            name: value
            for name, value in shared.items()
            if name not in unused and value not in (None, cls.model_fields[name].default)
        }
        return validate(cls, {**kept, **own}, source="quantize options")

    def _without_effect(self) -> set[str]:
        """Returns the fields that change nothing for this method and format."""
        if self.is_gguf:
            unused = {"method", *GRID, "dtype", "single"}
            if not self._searched:
                unused |= {"no_importance", *CALIBRATED}
        else:
            unused = {"no_importance"} if self.method in BLOCKWISE else {"no_importance", "single"}
            if self.method in BITSANDBYTES:
                unused |= set(GRID)
        return unused if self.needs_text else {*unused, *CALIBRATED}

    @property
    def _searched(self) -> bool:
        """Whether the scales of a GGUF type are searched."""
        return bool({self.type, *(value for _, value in self.overrides())} & set(SEARCHED))

    @property
    def needs_text(self) -> bool:
        """Whether calibration text is used."""
        if self.is_gguf:
            return self._searched and not self.no_importance
        if self.method in GPTQ_BLOCKWISE:
            return True
        return self.method in METHODS and find_method(self.method).needs != "nothing"

    @property
    def is_gguf(self) -> bool:
        """Whether a GGUF file is written."""
        return self.format == "gguf" or (self.format is None and self.type is not None)

    @property
    def file_format(self) -> str:
        """The file format."""
        if self.is_gguf:
            return "gguf"
        return self.format or FORMATS.get(self.method, self.method)

    @property
    def scheme(self) -> str | None:
        """The storage format of bitsandbytes' methods; None for others."""
        if self.is_gguf or self.method not in BITSANDBYTES:
            return None
        name = self.method.removeprefix("gptq-")
        return f"{name}-single" if self.single else name

    @property
    def spec(self) -> QuantSpec:
        """The grid; GGUF's types and bitsandbytes' methods have their own."""
        smooth = self.method == "smoothquant"
        group = self.group_size if self.group_size is not None else (0 if smooth else 64)
        return QuantSpec(
            bits=self.bits or (8 if smooth else 4),
            group_size=group or None,
            symmetric=not self.asymmetric,
            activations=smooth,
        )

    def overrides(self) -> list[tuple[str, str]]:
        """Returns `override` as pairs (pattern, value).

        Raises:
            ValueError: a value is not known.
        """
        found = []
        for text in self.override:
            pattern, sign, value = text.rpartition("=")
            known = self.is_gguf or value == FULL or value in ("2", "3", "4", "8")
            if not sign or not pattern or not known or (value != FULL and self.scheme):
                raise ValueError(
                    f"override {text!r} is not PATTERN=VALUE, with a value of full or, for grids, "
                    "of 2, 3, 4 or 8 bits"
                )
            if self.is_gguf and value != FULL:
                check_gguf_type(value)
            found.append((pattern, value))
        return found

    def spec_of(self, name: str) -> QuantSpec | None:
        """Returns the grid of a linear; None if it keeps its full weight."""
        spec: QuantSpec | None = self.spec
        for pattern, value in self.overrides():
            if name_matches(name, pattern):
                full = value == FULL
                spec = None if full else self.spec.model_copy(update={"bits": int(value)})
        return spec

    def check_overrides(self, names: Sequence[str]) -> None:
        """Checks that each pattern of `override` matches a name.

        Raises:
            ConfigError: one matches none.
        """
        patterns = [pattern for pattern, _ in self.overrides()]
        check_patterns(patterns, names, key="override", what="weight of this model")


__all__ = ["BITSANDBYTES", "FULL", "GPTQ_BLOCKWISE", "QuantizeOptions"]
