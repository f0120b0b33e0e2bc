"""The options of `easyllm plan` about devices, splits, budgets and what is to fit."""

from typing import Literal

from pydantic import Field, NonNegativeFloat, PositiveFloat, PositiveInt

from easyllm.core.config import Config


class PlanOptions(Config):
    """Devices, split, budget, and what is to fit; every field is a flag of `easyllm plan`."""

    gpus: str | None = Field(
        default=None,
        description="Devices, such as 8xH100-80GB: lists the ways to split training over them, and "
        "what one copy serves; with --profile a number is enough.",
    )
    profile: str | None = Field(
        default=None, description="JSON file that describes a device which the table lacks."
    )
    price: NonNegativeFloat | None = Field(
        default=None, description="Price of one device-hour, for the cost of --tokens."
    )
    mfu: float | None = Field(
        default=None,
        gt=0,
        le=1,
        description="Share of the peak that training reaches; by default 0.5.",
    )
    batch: PositiveInt | None = Field(
        default=None, description="Sequences per optimizer step over all devices."
    )
    micro_batch: PositiveInt | None = Field(
        default=None, description="Sequences per forward pass of a device."
    )
    tensor: PositiveInt | None = Field(default=None, description="Tensor parallel degree.")
    pipeline: PositiveInt | None = Field(default=None, description="Pipeline stages.")
    interleave: PositiveInt = Field(
        default=1, description="Model chunks per pipeline stage, for --formulas."
    )
    zero: Literal[0, 1, 2, 3] | None = Field(
        default=None, description="ZeRO stage; 3 is FSDP's FULL_SHARD, 2 its SHARD_GRAD_OP."
    )
    offload: Literal["none", "optimizer", "all"] = Field(
        default="none", description="States in the memory of the host."
    )
    recompute: Literal["none", "selective", "full"] | None = Field(
        default=None, description="Activations that the backward pass recomputes."
    )
    tokens: str | None = Field(
        default=None, description="Training tokens, such as 300e9 or 1.4T: adds days and cost."
    )
    step_seconds: PositiveFloat | None = Field(
        default=None, description="Measured seconds of a step of --batch sequences: adds MFU, HFU."
    )
    tokens_per_s: str | None = Field(
        default=None, description="Measured training tokens/s of all devices: adds the MFU."
    )
    fit: str | None = Field(
        default=None,
        description="Memory, such as 24GB: the largest batch and the longest context that fit.",
    )
    evening: str | None = Field(
        default=None, description="Duration, such as 4h: what this machine trains in that time."
    )
    formulas: bool = Field(
        default=False,
        description="Also the closed forms that publications print for a GPT of this shape.",
    )
    shape: str | None = Field(
        default=None,
        description="layers=L,hidden=H,heads=A,vocab=V: the shape of a model that is given as a "
        "number of parameters, such as 540B.",
    )


__all__ = ["PlanOptions"]
