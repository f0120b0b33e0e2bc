"""NF4 and FP4 weights compared with bitsandbytes' build for CPUs: bits of codes and constants."""

import os
import sys

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes compiles a function for every odd shape

import bitsandbytes.functional as bnb
import torch
from figures import Figures
from torch import Tensor

from easyllm.nn.blockwise4 import Blockwise4Weight
from easyllm.ops.blockwise4 import codebook, dynamic_map
from easyllm.quant import find_scheme

SHAPES = [(64, 64), (576, 1536), (13, 70), (1, 63), (3, 21), (1, 1), (200, 257), (1030, 1024)]
CPU = torch.device("cpu")


def weights(shape: tuple[int, int]) -> dict[str, Tensor]:
    """Returns weights with ordinary, extreme and degenerate values."""
    random = torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape)))
    outlier = random.clone()
    outlier.view(-1)[::97] *= 1e4
    flat = torch.arange(random.numel()).view(shape)
    return {
        "random": random * 0.02,
        "outliers": outlier,
        "constant": torch.full(shape, -0.37),
        "zero": torch.zeros(shape),
        "some zero blocks": random * (flat // 64 % 3 > 0),
        "midpoints": (flat % 241).float() / 120 - 1,
        "tiny": random * 1e-30,
        "bf16": (random * 0.02).to(torch.bfloat16),
        "fp16": (random * 0.02).to(torch.float16),
    }


def held(weight: Tensor, scheme: str) -> Blockwise4Weight:
    """Returns our storage of a weight."""
    quantize = find_scheme(scheme).quantize
    assert quantize is not None
    storage = quantize(weight, "weight")
    assert isinstance(storage, Blockwise4Weight)
    return storage


def compare(figures: Figures, shape: tuple[int, int], kind: str, nested: bool) -> None:
    """Compares every tensor of a format, and the dequantized weight."""
    scheme = kind if nested else f"{kind}-single"
    for name, weight in weights(shape).items():
        codes, state = bnb.quantize_4bit(weight, quant_type=kind, compress_statistics=nested)
        theirs = {"codes": codes.flatten(), "absmax": state.absmax}
        if nested:
            theirs |= {"nested_absmax": state.state2.absmax, "nested_offset": state.offset}
        mine = held(weight, scheme)
        wrong = [n for n, t in mine.tensors().items() if not torch.equal(t, theirs[n])]
        if len(theirs) != len(mine.tensors()):
            wrong.append("number of tensors")
        full = bnb.dequantize_4bit(codes, state).reshape(shape)
        if not torch.equal(full, mine.dense()):
            wrong.append("dequantized")
        figures.equal(f"{scheme} {list(shape)} {name}", wrong, [])


def main() -> int:
    """Returns 1 if a bit differs."""
    torch.set_num_threads(1)
    figures = Figures("torch", "bitsandbytes")
    for kind in ("nf4", "fp4"):
        theirs = bnb.get_4bit_type(kind, device="cpu")
        figures.true(f"codebook of {kind}", torch.equal(codebook(kind, CPU), theirs))
    figures.true("map of scales", torch.equal(dynamic_map(CPU), bnb.create_dynamic_map()))
    for kind in ("nf4", "fp4"):
        for nested in (True, False):
            for shape in SHAPES:
                compare(figures, shape, kind, nested)
    return figures.end()


if __name__ == "__main__":
    sys.exit(main())
