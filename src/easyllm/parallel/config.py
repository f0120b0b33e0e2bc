"""How a run is divided among processes."""

from typing import Literal

from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from easyllm.core.config import Config

Layout = Literal["ddp", "zero1", "zero2", "zero3", "fsdp"]
FULLY_SHARDED = ("zero3", "fsdp")
"""Layouts whose weights are sharded as well; both run on PyTorch's FSDP2."""


class ParallelConfig(Config):
    """The division of a run among the processes that it is launched with."""

    layout: Layout = Field(
        default="ddp",
        description="What the data-parallel ranks share: `ddp` shares nothing, `zero1` divides the "
        "optimizer state, `zero2` the gradients too, `zero3` and `fsdp` the weights too (`fsdp` "
        "keeps the embedding and the head gathered between forward and backward).",
    )
    tensor: PositiveInt = Field(
        default=1,
        description="Tensor-parallel degree: the number of ranks that share each layer. The heads, "
        "the key-value heads, the widths of feed-forward blocks and the vocabulary must be "
        "divisible by it.",
    )
    sequence: bool = Field(
        default=False,
        description="Whether tensor-parallel ranks also divide the tokens of norms and of the "
        "residual stream (sequence parallel, arXiv 2205.05198); needs tensor above 1.",
    )
    bucket_mb: PositiveFloat = Field(
        default=25.0,
        description="Size of the buckets in which gradients are reduced while the backward pass "
        "runs, in MiB (ddp, zero1, zero2).",
    )
    offload: bool = Field(
        default=False,
        description="Whether weights, gradients and optimizer state stay in host memory between "
        "uses (zero3 and fsdp on an accelerator).",
    )
    timeout_s: PositiveFloat = Field(
        default=600.0,
        description="Seconds after which a collective that a rank does not join fails the run.",
    )

    @model_validator(mode="after")
    def _sequence_needs_tensor(self) -> "ParallelConfig":
        if self.sequence and self.tensor == 1:
            raise ValueError(
                "parallel.sequence=true divides tokens among tensor-parallel ranks, but "
                "parallel.tensor=1; raise parallel.tensor, or remove parallel.sequence"
            )
        if self.offload and self.layout not in FULLY_SHARDED:
            raise ValueError(
                f"parallel.offload=true needs sharded weights, but parallel.layout={self.layout} "
                "replicates them; set parallel.layout to zero3 or fsdp"
            )
        return self


__all__ = ["FULLY_SHARDED", "Layout", "ParallelConfig"]
