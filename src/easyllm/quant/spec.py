"""How a weight is cut into whole numbers, whatever layout stores it."""

from typing import Literal

from pydantic import PositiveInt, model_validator

from easyllm.core.config import Config


class QuantSpec(Config):
    """Round-to-nearest codes of a weight [N, K].

    Attributes:
        bits: of a code.
        group_size: inputs that share a step, along K; None is the whole row of an output.
        symmetric: zero is a code and the range is ±max|w|; otherwise the codes span min to max.
    """

    bits: Literal[4, 8]
    group_size: PositiveInt | None = None
    symmetric: bool = True

    @model_validator(mode="after")
    def _is_served(self) -> "QuantSpec":
        served = [(8, None, True), (4, 32, False)]
        if (self.bits, self.group_size, self.symmetric) not in served:
            raise ValueError(
                f"bits={self.bits}, group_size={self.group_size}, symmetric={self.symmetric} is not served; "
                "use 8 bits, a whole row, symmetric, or 4 bits, groups of 32, asymmetric"
            )
        return self
