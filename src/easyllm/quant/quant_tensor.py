"""A weight on a uniform grid, independent of how files and kernels store it."""

from dataclasses import dataclass

import torch
from torch import Tensor

from easyllm.quant.spec import QuantSpec


@dataclass(frozen=True, slots=True, kw_only=True)
class QuantTensor:
    """A quantized weight [N, K]: w[n, k] = scales[n, g(k)] · (codes[n, k] − zeros[n, g(k)]).

    Attributes:
        codes: [N, K] uint8 in 0 .. 2^bits − 1.
        scales: [N, G] fp32, exactly representable in `spec.scale_dtype`.
        zeros: [N, G] uint8, the zero points.
        spec: bits, group size, symmetry.
        group_of: [K] int64, the group g(k) of each input; None means k // group size. Activation
            order of GPTQ with groups has others.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor
    spec: QuantSpec
    group_of: Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, K), outputs and inputs."""
        outputs, inputs = self.codes.shape
        return outputs, inputs

    def groups(self) -> Tensor:
        """Returns the group of each input, [K] int64."""
        if self.group_of is not None:
            return self.group_of
        inputs = self.codes.shape[1]
        return torch.arange(inputs, device=self.codes.device) // self.spec.group(inputs)

    def dequantize(self) -> Tensor:
        """Returns the weight [N, K] in fp32."""
        groups = self.groups()
        centred = self.codes.float() - self.zeros.float()[:, groups]
        return centred.mul_(self.scales[:, groups])


__all__ = ["QuantTensor"]
