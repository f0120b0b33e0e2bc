"""GPTQ on the values of NF4 and FP4: files of bitsandbytes that lose less.

bitsandbytes rounds each weight to the nearest value of its block. A file only holds codes and
scales, so any codes can be in it; these are chosen by GPTQ (`column_correction`), with calibration
text. The scale of a block is the one, of some near its absmax, that changes the block's part of the
outputs least; with double quantization, it is rounded before the codes are chosen.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import cache

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.nn.blockwise4 import Blockwise4Weight
from easyllm.nn.decoder import Decoder, DecoderLayer
from easyllm.nn.linear import Linear
from easyllm.nn.storage import WeightStorage
from easyllm.ops.blockwise4 import BLOCK, Blockwise4, codebook, dequantize
from easyllm.quant.blockwise4 import SMALLEST, quantize_blockwise4, rounding, with_scales
from easyllm.quant.calibrate import LayerWalk
from easyllm.quant.column_correction import checked_hessian, inverse_factor, round_columns
from easyllm.quant.grid_search import best_ratio, diagonal_blocks
from easyllm.quant.layer_files import FinishedLayer, LayerFiles, finished_layer
from easyllm.quant.layers import Report, has_reports, linear_report, run_layers
from easyllm.quant.registry import find_scheme

RATIOS = tuple(1.05 - i / 20 for i in range(10))
"""Scales that are tried, as shares of the absmax: 1.05, 1 … 0.6."""
ROWS = 256
"""Outputs whose scales are searched at once."""
SINGLE = "-single"
"""End of the names of schemes without double quantization."""
NESTED_PARTS = ("codes", "absmax", "nested_absmax", "nested_offset")


@torch.no_grad()
def gptq_blockwise4(
    weight: Tensor, gram: Tensor, codebook: str, *, nested: bool, damping: float = 0.01
) -> Blockwise4:
    """Quantizes `weight: [N, K]` to the values of a codebook, with GPTQ.

    Args:
        weight: [N, K], floating point, finite; K is a multiple of 64.
        gram: [K, K], Σ x xᵀ over the calibration rows.
        codebook: `nf4` or `fp4`.
        nested: whether to use double quantization.
        damping: share of the mean of diag(H) that is added to it.

    Raises:
        ConfigError: 64 does not divide K, or `gram` is not finite.
    """
    outputs, inputs = weight.shape
    check_width("the weight", inputs, codebook)
    weight = weight.detach().float()
    hessian, order = checked_hessian(gram)
    scales = _best_scales(weight.unflatten(1, (-1, BLOCK)), hessian.float(), codebook).view(-1)
    nothing = scales.new_empty(0, dtype=torch.uint8)
    found = with_scales(nothing, scales, codebook, nested=nested, shape=(outputs, inputs))
    # a file's scales may be zero, of a block of zeros
    effective = found.scales().view(outputs, -1).T.contiguous()
    positive = torch.where(effective > 0, effective, torch.ones_like(effective))
    bounds, codes_of, values_of = _ordered(codebook, weight.device)

    def round_column(index: int, rest: Tensor) -> tuple[Tensor, Tensor]:
        group = int(order[index]) // BLOCK
        ranks = torch.bucketize(rest[0] / positive[group], bounds)
        return codes_of[ranks], values_of[ranks] * effective[group]

    factor = inverse_factor(hessian[order][:, order], damping)
    rounded = round_columns(weight.T[order].contiguous(), factor, round_column)
    codes = torch.empty(outputs, inputs, dtype=torch.uint8, device=weight.device)
    codes[:, order] = rounded.T.to(torch.uint8)
    flat = codes.view(-1)
    return replace(found, codes=(flat[::2] << 4) | flat[1::2])


def check_width(name: str, inputs: int, scheme: str) -> None:
    """Checks that blocks do not run over the ends of rows.

    Raises:
        ConfigError: they do.
    """
    if inputs % BLOCK:
        raise ConfigError(
            f"{name} has {inputs} inputs, but GPTQ on blocks needs a multiple of {BLOCK}; use "
            f"method {scheme.removesuffix(SINGLE)} without GPTQ, whose blocks run over row ends"
        )


@cache
def _ordered(name: str, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Returns midpoints [15], codes [16] fp32 and values [16], all in the order of values."""
    bounds, order = rounding(name, device)
    with torch.inference_mode(False):
        return bounds, order.float(), codebook(name, device)[order.long()]


def _best_scales(groups: Tensor, hessian: Tensor, name: str) -> Tensor:
    """Returns the scales [N, G] with the smallest Σ ‖(W' − W) x‖², each for its block alone.

    Args:
        groups: [N, G, 64], the blocks of the weight.
        hessian: [K, K] fp32.
        name: the codebook.
    """
    bounds, _, values = _ordered(name, groups.device)
    blocks = diagonal_blocks(hessian, BLOCK)
    found = []
    for part in groups.split(ROWS):
        most = part.abs().amax(-1)

        def nearest(ratio: float, part: Tensor = part, most: Tensor = most) -> Tensor:
            scales = (most * ratio).clamp(min=SMALLEST)[..., None]
            return values[torch.bucketize(part / scales, bounds)] * scales

        found.append(most * best_ratio(part, blocks, nearest, RATIOS))
    return torch.cat(found)


@torch.no_grad()
def quantize_layers(
    model: Decoder,
    sequences: Sequence[Tensor],
    chosen: Mapping[str, Linear],
    scheme: str,
    *,
    files: LayerFiles | None = None,
    done: Callable[[int], object] = lambda _: None,
) -> Report:
    """Quantizes linears of a model in place, a layer at a time.

    Args:
        model: the model, with full weights, without adapters.
        sequences: token ids of the calibration text.
        chosen: the linears by full name (`layers.0.mixer.q_proj`).
        scheme: `nf4`, `fp4`, or one of them with `-single`.
        files: where finished layers are kept; those that are there are not quantized again.
        done: called with the number of each finished layer.
    """
    walk = LayerWalk(model, sequences)

    def quantize(number: int, layer: DecoderLayer) -> FinishedLayer:
        prefix = f"layers.{number}."
        own = {n.removeprefix(prefix): m for n, m in chosen.items() if n.startswith(prefix)}
        finished = finished_layer(
            files,
            number,
            specs={},
            suits=lambda found: _suits(found, own, scheme),
            make=lambda: _finished(layer, prefix, own, walk, scheme),
        )
        for name, linear in own.items():
            linear.store(_storage(finished, name, linear, scheme))
        return finished

    return run_layers(model, walk, quantize, done)


def _finished(
    layer: DecoderLayer, prefix: str, own: Mapping[str, Linear], walk: LayerWalk, scheme: str
) -> FinishedLayer:
    """Quantizes the linears of a layer; the buffers of their storages are its tensors."""
    statistics = walk.statistics(layer, own, gram=True)
    tensors, reports = dict[str, Tensor](), list[JsonObject]()
    name_of, nested = scheme.removesuffix(SINGLE), not scheme.endswith(SINGLE)
    for name, linear in own.items():
        its, weight = statistics[name], linear.weight.detach()
        assert its.gram is not None
        if its.rows:
            matrix = gptq_blockwise4(weight, its.gram, name_of, nested=nested)
        else:
            matrix = quantize_blockwise4(weight, name_of, nested=nested)
        storage = Blockwise4Weight(matrix, weight.dtype, scheme)
        tensors |= {f"{name}.{key}": value for key, value in storage.tensors().items()}
        reports.append(asdict(linear_report(prefix + name, weight, dequantize(matrix), its)))
    return FinishedLayer(weights={}, full=tensors, reports=reports)


def _suits(finished: FinishedLayer, own: Mapping[str, Linear], scheme: str) -> bool:
    """Returns whether a layer from a file holds these linears; a damaged one does not."""
    parts = ("codes", "absmax") if scheme.endswith(SINGLE) else NESTED_PARTS
    if finished.full.keys() != {f"{name}.{part}" for name in own for part in parts}:
        return False
    return (
        has_reports(finished)
        and finished.is_finite
        and all(
            2 * finished.full[f"{name}.codes"].numel() == linear.weight.numel()
            and BLOCK * finished.full[f"{name}.absmax"].numel() == linear.weight.numel()
            for name, linear in own.items()
        )
    )


def _storage(finished: FinishedLayer, name: str, linear: Linear, scheme: str) -> WeightStorage:
    weight = linear.weight
    buffers = {
        key.removeprefix(f"{name}."): value
        for key, value in finished.full.items()
        if key.startswith(f"{name}.")
    }
    from_buffers = find_scheme(scheme).from_buffers
    assert from_buffers is not None, "NF4 and FP4 have one"
    shape = (weight.shape[0], weight.shape[1])
    return from_buffers({**buffers, "like": weight.new_empty(0)}, shape)


__all__ = ["check_width", "gptq_blockwise4", "quantize_layers"]
