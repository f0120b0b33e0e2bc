"""OFT: the input of a linear is rotated by trained orthogonal blocks.

    y = W (R x) + b,   R = diag(R_1, …, R_k),  R_i = (I + Q_i) (I - Q_i)⁻¹,  Q_i skew-symmetric
    (Qiu et al. 2023, arXiv 2306.07280; on the input side as in Qiu et al. 2025, arXiv 2506.19847)

With `neumann` the inverse is the first terms of its series, as by default in peft: for 5 terms,
R_i = I + 2 Q + 2 Q² + 2 Q³ + Q⁴, which is orthogonal to order Q⁵.
"""

from collections.abc import Mapping
from typing import Literal, Self

import torch
from pydantic import Field
from torch import Generator, Tensor, nn

from easyllm.adapters.adapter import Adapter, AdapterConfig
from easyllm.adapters.file_module import FileModule
from easyllm.adapters.peft_keys import check_keys
from easyllm.adapters.registry import register_adapter
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.nn.cost import FP32, Activation, CostTrace, LinearShape
from easyllm.nn.linear import BaseLinear
from easyllm.ops.deterministic import fixed_order_linear

ROTATION = "oft_R.weight"


class OFTConfig(AdapterConfig):
    """Size of the rotated blocks, and how the rotation is computed."""

    kind: Literal["oft"] = "oft"
    block_size: int = Field(
        default=32,
        ge=2,
        description="Size of the blocks that the inputs of a linear are divided into; it must "
        "divide their number.",
    )
    neumann_terms: int | None = Field(
        default=5,
        ge=4,
        description="Terms of the series in place of the inverse; null computes the inverse.",
    )

    def build(self, name: str, in_features: int, out_features: int) -> "OFT":  # noqa: ARG002
        """Builds the adapter of one linear with uninitialised parameters."""
        return OFT(in_features, min(self.block_size, in_features), self.neumann_terms)

    def check(self, name: str, in_features: int, out_features: int) -> None:  # noqa: ARG002
        """Checks that the blocks divide the inputs of the linear.

        Raises:
            ConfigError: they do not.
        """
        if in_features % self.block_size:
            fits = [n for n in range(2, in_features + 1) if in_features % n == 0 and n <= 256]
            raise ConfigError(
                f"adapter.block_size={self.block_size} does not divide the {in_features} inputs of "
                f"{name}; use one of {', '.join(map(str, fits))}"
            )

    def to_peft(self, modules: Mapping[str, str]) -> JsonObject:  # noqa: ARG002 - interface
        """Returns the OFT entries of `adapter_config.json`."""
        return {
            "r": 0,
            "oft_block_size": self.block_size,
            "use_cayley_neumann": self.neumann_terms is not None,
            "num_cayley_neumann_terms": self.neumann_terms or 5,
            "module_dropout": 0.0,
            "bias": "none",
            "coft": False,
            "block_share": False,
            "fan_in_fan_out": False,
            "init_weights": True,
        }

    @classmethod
    def from_peft(cls, description: JsonMapping, modules: Mapping[str, FileModule]) -> Self:
        """Returns the configuration of a peft OFT file.

        Raises:
            CheckpointError: an unsupported key changes the result, or a tensor is missing.
        """
        neutral: JsonObject = {
            "r": None,
            "module_dropout": None,  # of training
            "bias": "none",
            "coft": False,
            "eps": None,
            "block_share": False,
            "fan_in_fan_out": (True, False),
            "init_weights": (True, False),
        }
        honoured = ("oft_block_size", "use_cayley_neumann", "num_cayley_neumann_terms")
        check_keys(description, honoured=honoured, neutral=neutral)
        sizes = set[int]()
        for module in modules.values():
            if set(module.tensors) != {ROTATION}:
                raise module.unexpected(ROTATION)
            elements = module.tensors[ROTATION].shape[-1]
            sizes.add(round((1 + (1 + 8 * elements) ** 0.5) / 2))
        if len(sizes) != 1:
            raise CheckpointError(
                f"the adapter's blocks have sizes {', '.join(map(str, sorted(sizes))) or 'unknown'}"
                ", expected one size for all linears"
            )
        terms = description.get("num_cayley_neumann_terms", 5)
        return cls(
            block_size=sizes.pop(),
            neumann_terms=terms if description.get("use_cayley_neumann", True) else None,
            targets=tuple(modules),
        )


class OFT(Adapter):
    """The OFT adapter of one linear.

    Args:
        in_features: number of inputs.
        block_size: size b of the blocks.
        neumann_terms: terms of the series; None computes the inverse.

    Attributes:
        oft_R: the elements of the blocks Q above the diagonal, [in / b, b (b - 1) / 2] fp32.
    """

    batch_invariant = True
    rows: Tensor
    columns: Tensor

    def __init__(self, in_features: int, block_size: int, neumann_terms: int | None) -> None:
        super().__init__()
        self.block_size, self.terms = block_size, neumann_terms
        elements = block_size * (block_size - 1) // 2
        self.oft_R = nn.Parameter(torch.empty(in_features // block_size, elements))
        rows, columns = torch.triu_indices(block_size, block_size, 1)
        self.register_buffer("rows", rows, persistent=False)
        self.register_buffer("columns", columns, persistent=False)

    def reset_parameters(self, generator: Generator) -> None:  # noqa: ARG002 - all are zero
        """Initialises Q to zero, so that R is the identity."""
        nn.init.zeros_(self.oft_R)

    def rotations(self) -> Tensor:
        """Returns the blocks [in / b, b, b] that rows are multiplied by from the right, in fp32."""
        with torch.autocast(self.oft_R.device.type, enabled=False):
            return self._rotations()

    def _rotations(self) -> Tensor:
        size = self.block_size
        elements = self.oft_R.to(torch.promote_types(self.oft_R.dtype, torch.float32))
        upper = elements.new_zeros(len(elements), size, size)
        upper[:, self.rows, self.columns] = elements
        skew = upper - upper.transpose(1, 2)
        identity = torch.eye(size, device=skew.device, dtype=skew.dtype)
        if self.terms is None:
            inverse: Tensor = torch.linalg.solve(identity + skew, identity - skew, left=False)
            return inverse
        power, total = skew, identity + 2 * skew
        for _ in range(2, self.terms - 1):
            power = power @ skew
            total = total + 2 * power
        return total + power @ skew

    def forward(self, x: Tensor, base: BaseLinear) -> Tensor:
        """Returns `base(R x)`, [..., out] for `x: [..., in]`."""
        blocks = x.unflatten(-1, (-1, self.block_size))  # [..., in / b, b]
        rotations = self.rotations().to(x.dtype)
        if base.context is not None and base.context.deterministic:
            parts = [
                fixed_order_linear(block, rotation.T.contiguous())
                for block, rotation in zip(blocks.unbind(-2), rotations, strict=True)
            ]
            return base(torch.cat(parts, dim=-1))
        turned = torch.einsum("...kb,kbc->...kc", blocks, rotations)
        return base(turned.flatten(-2))

    def merged(self, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Returns W R [out, in] in fp32 and the unchanged bias."""
        blocks = weight.unflatten(1, (-1, self.block_size))  # [out, in / b, b]
        turned = torch.einsum("okc,kbc->okb", blocks, self.rotations().to(weight.device))
        return turned.flatten(1), bias

    def cost(
        self, trace: CostTrace, linear: LinearShape, x: Activation, rows: int, name: str
    ) -> None:
        """Records the rotation of the input, and the powers of the blocks."""
        size, blocks = self.block_size, len(self.oft_R) * linear.copies
        turn = 2 * rows * linear.in_features * size
        trace.keep_all(x)
        trace.product("adapters", turn, turn * (1 + x.grad))
        steps = 3 if self.terms is None else self.terms - 2
        power = 2 * blocks * size**3 * steps
        trace.product("adapters", power, 2 * power)
        trace.keep(f"{name}.rotations", FP32 * blocks * size * size * (steps + 2))

    def file_tensors(self) -> Mapping[str, nn.Parameter]:
        """Returns the elements of Q, keyed by their suffix in peft's file."""
        return {ROTATION: self.oft_R}


register_adapter(OFTConfig, peft_type="OFT")

__all__ = ["OFT", "OFTConfig"]
