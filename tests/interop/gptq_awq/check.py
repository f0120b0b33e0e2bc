"""GPTQ and AWQ folders in gptqmodel, in both directions: dequantized weights, and logits."""

import os
import sys
import tempfile
from pathlib import Path
from typing import Any

os.environ["CUDA_VISIBLE_DEVICES"] = ""
os.environ["GPTQMODEL_CPU_WORKERS"] = "2"  # its default of one, on two CPUs, is an error there

import torch
from figures import Figures
from gptqmodel import BACKEND, GPTQModel
from gptqmodel.nn_modules.qlinear.torch_awq import AwqTorchLinear
from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm
from gptqmodel.quantization.config import GPTQConfig
from random_llama import hf_weights, random_llama
from torch import Tensor

from easyllm.models import load_model, load_tokenizer, save_model
from easyllm.quant.formats import UNIFORM, awq
from easyllm.quant.layers import LayerQuantizer
from easyllm.quant.methods import find_method
from easyllm.quant.spec import QuantSpec

SIZES = {"vocab_size": 49152, "tie_word_embeddings": True}  # those of the tokenizer's model
CALIBRATION = [[(5 * i * i + 11 * k * i + k) % 300 + 3 for i in range(64)] for k in range(12)]


GPTQ = {
    "4 bits, groups of 32": ({"bits": 4, "group_size": 32}, False),
    "4 bits, groups of 64, activation order": ({"bits": 4, "group_size": 64}, True),
    "4 bits asymmetric, groups of 64": ({"bits": 4, "group_size": 64, "symmetric": False}, False),
    "8 bits, by row": ({"bits": 8}, False),
    "3 bits, groups of 64": ({"bits": 3, "group_size": 64}, False),
    "3 bits asymmetric, groups of 64": ({"bits": 3, "group_size": 64, "symmetric": False}, False),
    "2 bits, groups of 32": ({"bits": 2, "group_size": 32}, False),
}
AWQ = (32, 64)


def dense_of(module: Any) -> Tensor:
    """Returns the dequantized weight [K, N] of a module of gptqmodel."""
    if hasattr(module, "dequantize_weight"):
        return module.dequantize_weight().float()
    return dequantize_gemm(
        qweight=module.qweight,
        qzeros=module.qzeros,
        scales=module.scales,
        bits=module.bits,
        group_size=module.group_size,
    ).float()


def farthest(theirs: Any, mine: dict[str, Tensor]) -> float:
    """Returns the largest relative difference of a weight."""
    worst = 0.0
    for name, weight in mine.items():
        got = dense_of(theirs.get_submodule(name)).T
        worst = max(worst, float((got - weight).abs().max() / weight.abs().max()))
    return worst


def written_here(
    figures: Figures, name: str, layout: str, spec: QuantSpec, act_order: bool, folder: Path
) -> None:
    """A folder written here, loaded by gptqmodel."""
    model, tokenizer = random_llama(**SIZES), load_tokenizer("smollm2")
    gptq = layout == "gptq"
    method = find_method("gptq", static_groups=not act_order) if gptq else find_method("awq")
    form = UNIFORM[layout]
    LayerQuantizer(
        method=method,
        spec_of=lambda _: spec,
        store=lambda _, weight: form.storage(weight, torch.float32),
        unsupported_reason=form.unsupported_reason,
    ).run(model, [torch.tensor(ids) for ids in CALIBRATION])
    save_model(model, folder, tokenizer=tokenizer)
    mine = load_model(folder, dtype="float32")
    kernel = BACKEND.GPTQ_TORCH if gptq else BACKEND.AWQ_TORCH
    theirs = GPTQModel.load(str(folder), device="cpu", backend=kernel, dtype=torch.float16)
    figures.at_most(
        f"{name}: our file in gptqmodel", farthest(theirs.model, hf_weights(mine)), 1e-3
    )


def written_there(figures: Figures, name: str, config: Any, folder: Path) -> None:
    """A folder that gptqmodel quantized with GPTQ, loaded here."""
    save_model(random_llama(**SIZES), folder / "full", tokenizer=load_tokenizer("smollm2"))
    model = GPTQModel.load(str(folder / "full"), config, device="cpu", dtype=torch.float16)
    data = [{"input_ids": ids, "attention_mask": [1] * len(ids)} for ids in CALIBRATION]
    model.quantize(data, batch_size=1)
    model.save(str(folder / "theirs"))
    theirs = GPTQModel.load(
        str(folder / "theirs"), device="cpu", backend=BACKEND.GPTQ_TORCH, dtype=torch.float16
    )
    mine = hf_weights(load_model(folder / "theirs", dtype="float32"))
    figures.at_most(f"{name}: their file read here", farthest(theirs.model, mine), 1e-3)


def packed_there(figures: Figures, name: str, size: int) -> None:
    """Weights that gptqmodel packed for AWQ, read here; it quantizes with AWQ on CUDA only."""
    weight = random_llama(**SIZES).layers[0].mixer.q_proj.weight.detach()
    parts = weight.view(len(weight), -1, size)
    low, high = parts.amin(2).clamp(max=0), parts.amax(2).clamp(min=0)
    scales = ((high - low) / 15).half().float()
    zeros = (-low / scales).round().clamp(0, 15)
    codes = (parts / scales[..., None] + zeros[..., None]).round().clamp(0, 15)
    linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
    linear.weight.data = ((codes - zeros[..., None]) * scales[..., None]).view_as(weight)
    module = AwqTorchLinear(
        bits=4,
        group_size=size,
        sym=False,
        desc_act=False,
        in_features=weight.shape[1],
        out_features=weight.shape[0],
        register_buffers=True,
    )
    module.pack(linear, scales, zeros)
    save = {n: getattr(module, n) for n in ("qweight", "qzeros", "scales")}
    config = {"quant_method": "awq", "bits": 4, "group_size": size, "version": "gemm"}
    mine = awq.from_tensors(save, (weight.shape[0], weight.shape[1]), config | {"zero_point": True})
    wrong = int((mine.codes != codes.view_as(weight)).sum() + (mine.zeros != zeros).sum())
    figures.equal(f"{name}: codes and zero points of their packing", wrong, 0)


def main() -> int:
    """Returns 1 if a figure is wrong."""
    torch.set_num_threads(2)
    figures = Figures("torch", "transformers", "gptqmodel")
    with tempfile.TemporaryDirectory() as temporary:
        work = Path(temporary)
        os.chdir(work)  # gptqmodel writes its log into the current folder
        for number, (name, (values, act_order)) in enumerate(GPTQ.items()):
            spec, folder = QuantSpec(**values), work / f"g{number}"
            figures.run(
                name,
                lambda n=name, s=spec, a=act_order, f=folder: written_here(
                    figures, f"GPTQ, {n}", "gptq", s, a, f
                ),
            )
            config = GPTQConfig(
                bits=spec.bits,
                group_size=spec.group_size or -1,
                sym=spec.symmetric,
                desc_act=act_order,
                act_group_aware=not act_order and spec.group_size is not None,
            )
            figures.run(
                name,
                lambda n=name, c=config, f=folder: written_there(
                    figures, f"GPTQ, {n}", c, f / "there"
                ),
            )
        for size in AWQ:
            spec, folder = QuantSpec(bits=4, group_size=size, symmetric=False), work / f"a{size}"
            name = f"AWQ, groups of {size}"
            figures.run(
                name,
                lambda n=name, s=spec, f=folder: written_here(figures, n, "awq", s, False, f),
            )
            figures.run(name, lambda n=name, g=size: packed_there(figures, n, g))
    return figures.end()


if __name__ == "__main__":
    sys.exit(main())
