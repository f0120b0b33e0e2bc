"""What `easyllm quantize` writes: method, grid, format, calibration text."""

from typing import Literal, Self

from pydantic import Field, NonNegativeInt, PositiveInt, model_validator

from easyllm.core.config import Config
from easyllm.core.paths import PathText
from easyllm.quant.spec import QuantSpec


class QuantizeOptions(Config):
    """Method, grid, format and calibration text of a quantized file."""

    method: Literal["rtn", "gptq", "awq"] = Field(
        default="gptq",
        description="How weights are rounded: to the nearest code (rtn), gptq, or awq. GGUF's "
        "blocks have their own rounding.",
    )
    format: Literal["gptq", "awq", "compressed-tensors", "gguf"] | None = Field(
        default=None,
        description="File format; by default that of the method (compressed-tensors for rtn), or "
        "gguf if a type is set.",
    )
    type: str | None = Field(
        default=None,
        description="GGUF type: q8_0, q6_k, q5_k, q4_k, q5_1, q5_0, q4_1 or q4_0.",
    )
    bits: Literal[2, 3, 4, 8] = Field(default=4, description="Bits per weight.")
    group_size: NonNegativeInt = Field(
        default=64, description="Inputs that share a scale; 0 is one scale per output row."
    )
    asymmetric: bool = Field(
        default=False,
        description="Grids that span the minimum to the maximum of a group, with zero points.",
    )
    dtype: Literal["float16", "bfloat16", "float32"] = Field(
        default="float16",
        description="Dtype of what is not quantized: embedding, head, norms. GGUF has its own.",
    )
    act_order: bool = Field(
        default=False,
        description="GPTQ: quantizes columns in the order of their activations, largest first.",
    )
    data: PathText | None = Field(
        default=None,
        description="Calibration text: a file of texts or conversations; by default English, "
        "Chinese and code that come with the package.",
    )
    samples: PositiveInt = Field(default=128, description="Number of calibration sequences.")
    length: int = Field(default=512, ge=2, description="Tokens of a calibration sequence.")
    importance: bool = Field(
        default=True,
        description="GGUF: weighs rounding errors by the inputs on calibration text.",
    )
    text: PathText | None = Field(
        default=None,
        description="A text file to measure the result on; by default a built-in text.",
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.is_gguf and self.type is None:
            raise ValueError("format gguf needs a type, such as q4_k; set type")
        if not self.is_gguf and self.type is not None:
            raise ValueError(f"type {self.type} is GGUF's, but format is {self.format}; remove one")
        if self.act_order and (self.method != "gptq" or self.file_format != "gptq"):
            raise ValueError(
                "act_order moves inputs between groups, which only method gptq does and only "
                f"format gptq can hold, got {self.method} and {self.file_format}; remove it"
            )
        return self

    @property
    def is_gguf(self) -> bool:
        """Whether a GGUF file is written."""
        return self.format == "gguf" or (self.format is None and self.type is not None)

    @property
    def file_format(self) -> str:
        """The file format."""
        if self.is_gguf:
            return "gguf"
        return self.format or {"rtn": "compressed-tensors"}.get(self.method, self.method)

    @property
    def spec(self) -> QuantSpec:
        """The grid; GGUF's types have their own."""
        return QuantSpec(
            bits=self.bits, group_size=self.group_size or None, symmetric=not self.asymmetric
        )


__all__ = ["QuantizeOptions"]
