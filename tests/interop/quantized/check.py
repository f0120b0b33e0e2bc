"""Quantized folders in transformers: compressed-tensors and bitsandbytes, in both directions."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["TORCHDYNAMO_DISABLE"] = "1"  # bitsandbytes compiles a function for every odd shape

import torch
from compressed_tensors.compressors import ModelCompressor
from compressed_tensors.quantization import (
    QuantizationArgs,
    QuantizationConfig,
    QuantizationScheme,
    apply_quantization_config,
)
from figures import Figures
from random_llama import hf_weights, random_llama
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, CompressedTensorsConfig

from easyllm.models import load_model, save_model
from easyllm.quant import quantize_weights
from easyllm.quant.formats import UNIFORM
from easyllm.quant.layers import LayerQuantizer
from easyllm.quant.methods import find_method
from easyllm.quant.spec import QuantSpec

IDS = [(7 * i * i + 3 * i) % 250 + 3 for i in range(40)]


GRIDS = {
    "4 bits, groups of 32": QuantSpec(bits=4, group_size=32),
    "4 bits, groups of 64, bf16 scales": QuantSpec(bits=4, group_size=64, scale_dtype="bfloat16"),
    "4 bits, by row": QuantSpec(bits=4),
    "8 bits, groups of 64": QuantSpec(bits=8, group_size=64),
    "8 bits, by row": QuantSpec(bits=8),
    "4 bits asymmetric, groups of 32": QuantSpec(bits=4, group_size=32, symmetric=False),
    "W8A8": QuantSpec(bits=8, activations=True),
}


def compressed(figures: Figures, name: str, spec: QuantSpec, folder: Path) -> None:
    """A folder written here, read by transformers; its weights and logits."""
    layout = UNIFORM["compressed-tensors"]
    model = random_llama()
    LayerQuantizer(
        method=find_method("rtn"),
        spec_of=lambda _: spec,
        store=lambda _, weight: layout.storage(weight, torch.float32),
        unsupported_reason=layout.unsupported_reason,
    ).run(model, ())
    save_model(model, folder)
    expected = hf_weights(load_model(folder, dtype="float32"))
    config = CompressedTensorsConfig(run_compressed=False, dequantize=True)
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, quantization_config=config
    )
    worst = 0.0
    for module, weight in expected.items():
        got = theirs.get_submodule(module).weight.float()
        weight = weight.to(spec.torch_scale_dtype).float()  # transformers multiplies in this dtype
        worst = max(worst, float((got - weight).abs().max() / weight.abs().max()))
    figures.at_most(f"{name}: weights in transformers", worst, 1e-6)
    packed = spec.symmetric
    if packed:
        as_is = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        logits = as_is(torch.tensor([IDS])).logits[0]
        mine = theirs(torch.tensor([IDS])).logits[0]
        # quantized activations; or weights that only one of the two rounds to the scales' dtype
        bound = 5e-2 if spec.activations else 2 * torch.finfo(spec.torch_scale_dtype).eps
        figures.at_most(
            f"{name}: logits as is", float((logits - mine).abs().max() / mine.abs().max()), bound
        )


def from_compressed(figures: Figures, name: str, spec: QuantSpec, folder: Path) -> None:
    """A folder written by compressed-tensors, read here."""
    save_model(random_llama(), folder / "full")
    model = AutoModelForCausalLM.from_pretrained(folder / "full", dtype=torch.float32)
    args: dict[str, Any] = {"num_bits": spec.bits, "symmetric": spec.symmetric, "type": "int"}
    args |= (
        {"strategy": "channel"}
        if spec.group_size is None
        else {"strategy": "group", "group_size": spec.group_size}
    )
    tokens = QuantizationArgs(num_bits=8, symmetric=True, strategy="token", dynamic=True)
    scheme = QuantizationScheme(
        targets=["Linear"],
        weights=QuantizationArgs(**args),
        input_activations=tokens if spec.activations else None,
    )
    config = QuantizationConfig(config_groups={"group_0": scheme}, ignore=["lm_head"])
    apply_quantization_config(model, config)
    for module in model.modules():
        if hasattr(module, "weight_scale"):
            weight = module.weight.detach()
            groups = weight.shape[1] if spec.group_size is None else spec.group_size
            parts = weight.view(len(weight), -1, groups)
            if spec.symmetric:
                scale = parts.abs().amax(2) / ((1 << spec.bits) - 1) * 2
                zero = torch.zeros_like(scale)
            else:
                low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
                scale = (high - low) / ((1 << spec.bits) - 1)
                zero = (-(1 << (spec.bits - 1)) - low / scale).round()
            module.weight_scale.data.copy_(scale.view_as(module.weight_scale))
            if hasattr(module, "weight_zero_point"):
                module.weight_zero_point.data.copy_(zero.view_as(module.weight_zero_point))
    compressor = ModelCompressor.from_pretrained_model(model)
    compressor.compress_model(model)
    model.save_pretrained(folder / "theirs")
    compressor.update_config(folder / "theirs")
    compressor.decompress_model(model)
    mine = hf_weights(load_model(folder / "theirs", dtype="float32"))
    worst = 0.0
    for module, weight in mine.items():
        expected = model.get_submodule(module).weight.float()
        worst = max(worst, float((expected - weight).abs().max() / expected.abs().max()))
    figures.at_most(f"{name}: their file read here", worst, 1e-6)


SCHEMES = {
    "nf4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True},
    "nf4-single": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"},
    "fp4": {"load_in_4bit": True, "bnb_4bit_quant_type": "fp4", "bnb_4bit_use_double_quant": True},
    "llm.int8": {"load_in_8bit": True},
}


def dense_of(module: Any) -> Tensor:
    """Returns the dequantized weight of a module of bitsandbytes."""
    import bitsandbytes.functional as bnb

    weight = module.weight
    if weight.dtype == torch.int8:
        scale = module.state.SCB if weight.SCB is None else weight.SCB
        return weight.data.float() * scale[:, None] / 127
    return bnb.dequantize_4bit(weight.data, weight.quant_state).float()


def bitsandbytes(figures: Figures, scheme: str, options: dict[str, Any], folder: Path) -> None:
    """Folders of bitsandbytes in both directions."""
    model = quantize_weights(random_llama(), scheme)
    save_model(model, folder / "ours")
    expected = hf_weights(load_model(folder / "ours", dtype="float32"))
    theirs = AutoModelForCausalLM.from_pretrained(folder / "ours", dtype=torch.float32)
    figures.at_most(f"{scheme}: our file in transformers", farthest(theirs, expected), 1e-6)
    save_model(random_llama(), folder / "full")
    config = BitsAndBytesConfig(**options)
    made = AutoModelForCausalLM.from_pretrained(
        folder / "full", dtype=torch.float32, quantization_config=config
    )
    made.save_pretrained(folder / "theirs")
    mine = hf_weights(load_model(folder / "theirs", dtype="float32"))
    figures.at_most(f"{scheme}: their file read here", farthest(made, mine), 1e-6)


def farthest(theirs: Any, expected: dict[str, Tensor]) -> float:
    """Returns the largest relative difference of a weight."""
    worst = 0.0
    for module, weight in expected.items():
        got = dense_of(theirs.get_submodule(module)).view_as(weight)
        worst = max(worst, float((got - weight).abs().max() / weight.abs().max()))
    return worst


def main() -> int:
    """Returns 1 if a figure is wrong."""
    torch.set_num_threads(1)
    figures = Figures("torch", "transformers", "compressed-tensors", "bitsandbytes")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        for number, (name, spec) in enumerate(GRIDS.items()):
            folder = work / f"c{number}"
            figures.run(name, lambda n=name, s=spec, f=folder: compressed(figures, n, s, f))
            there = work / f"f{number}"
            figures.run(name, lambda n=name, s=spec, f=there: from_compressed(figures, n, s, f))
        for scheme, options in SCHEMES.items():
            folder = work / scheme
            figures.run(
                scheme, lambda s=scheme, o=options, f=folder: bitsandbytes(figures, s, o, f)
            )
    return figures.end()


if __name__ == "__main__":
    sys.exit(main())
