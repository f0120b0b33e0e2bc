"""Quantizes a model a layer at a time: statistics, factors between modules, then the weights.

A layer's inputs come from the layers before it, which are quantized already. Only the statistics of
one layer are in memory.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields

import torch
from torch import Tensor

from easyllm.core.errors import ConfigError
from easyllm.core.json_types import JsonObject
from easyllm.nn.decoder import Decoder, DecoderLayer
from easyllm.nn.linear import Linear
from easyllm.nn.moe import ROUTERS
from easyllm.nn.storage import WeightStorage
from easyllm.quant.calibrate import LayerWalk
from easyllm.quant.layer_files import FinishedLayer, LayerFiles, finished_layer
from easyllm.quant.methods import Method
from easyllm.quant.quant_tensor import QuantTensor
from easyllm.quant.scaling import scale_groups
from easyllm.quant.spec import QuantSpec
from easyllm.quant.statistics import Statistics, output_error

Store = Callable[[str, QuantTensor], WeightStorage]
"""(name of the linear, quantized weight) → its storage."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearReport:
    """What quantization did to one linear.

    Attributes:
        name: its full name.
        weight_error: ‖W' − W‖ / ‖W‖.
        output_error: ‖(W' − W) X‖ / ‖W X‖ on the calibration text; None without statistics.
        reached: whether a calibration token reached it (experts).
    """

    name: str
    weight_error: float
    output_error: float | None
    reached: bool = True


@dataclass(slots=True)
class Report:
    """What quantization did to a model."""

    linears: list[LinearReport] = field(default_factory=list)

    @property
    def unreached(self) -> list[str]:
        """Names of the linears that no calibration token reached, rounded to nearest."""
        return [linear.name for linear in self.linears if not linear.reached]


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerQuantizer:
    """Quantizes the layers of a model in place.

    Attributes:
        method: the method.
        spec_of: returns the grid of a linear by its full name; None leaves it in full precision.
        store: makes the storage of a quantized weight.
        unsupported_reason: (spec, N, K) → why the storage cannot hold such a weight; None if it
            can.
    """

    method: Method
    spec_of: Callable[[str], QuantSpec | None]
    store: Store
    unsupported_reason: Callable[[QuantSpec, int, int], str | None] = lambda spec, _, inputs: (
        spec.unsupported_reason(inputs)
    )

    @torch.no_grad()
    def run(
        self,
        model: Decoder,
        sequences: Sequence[Tensor],
        *,
        files: LayerFiles | None = None,
        done: Callable[[int], object] = lambda _: None,
    ) -> Report:
        """Quantizes all layers of a model.

        Args:
            model: the model, dense, without adapters; changed in place.
            sequences: token ids of the calibration text; may be empty if the method needs none.
            files: where finished layers are kept; those that are there are not quantized again.
            done: called with the number of each finished layer.

        Raises:
            ConfigError: the method needs text and there is none, or a group size does not divide
                the width of a linear.
        """
        self.check(model)
        walk = None if self.method.needs == "nothing" else LayerWalk(model, sequences)

        def quantize(number: int, layer: DecoderLayer) -> FinishedLayer:
            prefix = f"layers.{number}."
            chosen = {name: (linear, spec) for name, linear, spec in self._chosen(layer, prefix)}
            finished = finished_layer(
                files,
                number,
                specs={name: spec for name, (_, spec) in chosen.items()},
                suits=lambda found: _suits(found, layer, chosen),
                make=lambda: self._finished(layer, prefix, chosen, walk),
            )
            layer.load_state_dict(dict(finished.full), strict=False)
            for name, weight in finished.weights.items():
                chosen[name][0].store(self.store(prefix + name, weight))
            return finished

        return run_layers(model, walk, quantize, done)

    def check(self, model: Decoder) -> None:
        """Checks that every linear can be quantized to its grid, before any work.

        Raises:
            ConfigError: the grid does not suit the shape of a linear, or none is selected.
        """
        chosen = [
            (f"layers.{number}.{name}", linear, spec)
            for number, layer in enumerate(model.layers)
            for name, linear, spec in self._chosen(layer, f"layers.{number}.")
        ]
        if not chosen:
            raise ConfigError("no linear of the model is to be quantized; select some")
        for name, linear, spec in chosen:
            outputs, inputs = linear.out_features, linear.in_features
            reason = self.unsupported_reason(spec, outputs, inputs)
            if reason is not None:
                raise ConfigError(f"{name} cannot be quantized: {reason}")

    def _chosen(self, layer: torch.nn.Module, prefix: str) -> list[tuple[str, Linear, QuantSpec]]:
        found = list[tuple[str, Linear, QuantSpec]]()
        for name, module in layer.named_modules():
            if not isinstance(module, Linear) or name.endswith(ROUTERS):
                continue
            spec = self.spec_of(prefix + name)
            if spec is not None:
                found.append((name, module, spec))
        return found

    def _finished(
        self,
        layer: DecoderLayer,
        prefix: str,
        chosen: Mapping[str, tuple[Linear, QuantSpec]],
        walk: LayerWalk | None,
    ) -> FinishedLayer:
        """Quantizes the weights of a layer; factors change its other tensors."""
        statistics: dict[str, Statistics] = {}
        if walk is not None:
            statistics = walk.statistics(layer, chosen, gram=self.method.needs == "gram")
        if self.method.factors is not None:
            statistics = self._scale(layer, chosen, statistics)
        weights, reports = dict[str, QuantTensor](), list[JsonObject]()
        for name, (linear, spec) in chosen.items():
            its = statistics.get(name)
            weight = linear.weight.detach()
            weights[name] = self.method.quantize(weight, its, spec)
            rounded = weights[name].dequantize()
            reports.append(asdict(linear_report(prefix + name, weight, rounded, its)))
        replaced = {f"{name}.weight" for name in chosen}
        full = {name: t for name, t in layer.state_dict().items() if name not in replaced}
        return FinishedLayer(weights=weights, full=full, reports=reports)

    def _scale(
        self,
        layer: DecoderLayer,
        chosen: Mapping[str, tuple[Linear, QuantSpec]],
        statistics: Mapping[str, Statistics],
    ) -> dict[str, Statistics]:
        """Moves factors between the modules of a layer; returns the statistics after it."""
        assert self.method.factors is not None
        found = dict(statistics)
        for group in scale_groups(layer):
            specs = {chosen[name][1] for name in group.linears if name in chosen}
            if len(specs) != 1 or any(name not in chosen for name in group.linears):
                continue  # a reader in full precision, or on another grid, is left alone
            its = [found[name] for name in group.linears]
            factors = self.method.factors(group, its, specs.pop())
            group.fold(factors)
            divided = {id(s): s.divided(group.spread(factors)) for s in its}
            found |= {n: divided[id(s)] for n, s in zip(group.linears, its, strict=True)}
        return found


def run_layers(
    model: Decoder,
    walk: LayerWalk | None,
    quantize: Callable[[int, DecoderLayer], FinishedLayer],
    done: Callable[[int], object],
) -> Report:
    """Quantizes the layers of a model from the first to the last, and returns what it did.

    Args:
        model: the model.
        walk: the calibration text, which advances through each quantized layer; None without.
        quantize: (number, layer) → the layer's parts, which it has put into the layer.
        done: called with the number of each finished layer.
    """
    report = Report()
    for number, layer in enumerate(model.layers):
        assert isinstance(layer, DecoderLayer)
        finished = quantize(number, layer)
        report.linears += [LinearReport(**figures) for figures in finished.reports]
        if walk is not None and number + 1 < len(model.layers):
            walk.advance(layer)
        done(number)
    return report


def has_reports(finished: FinishedLayer) -> bool:
    """Returns whether the figures of a layer from a file are those of a `LinearReport`."""
    names = {each.name for each in fields(LinearReport)}
    return all(report.keys() == names for report in finished.reports)


def _suits(
    finished: FinishedLayer, layer: DecoderLayer, chosen: Mapping[str, tuple[Linear, QuantSpec]]
) -> bool:
    """Returns whether a layer from a file has the shapes of this one; a damaged one does not."""
    own = layer.state_dict()
    full = finished.full
    if full.keys() != own.keys() - {f"{name}.weight" for name in chosen}:
        return False
    return (
        all(full[name].shape == own[name].shape for name in full)
        and all(
            finished.weights[n].shape == linear.storage.shape for n, (linear, _) in chosen.items()
        )
        and finished.is_finite
        and has_reports(finished)
    )


def linear_report(
    name: str, weight: Tensor, rounded: Tensor, statistics: Statistics | None
) -> LinearReport:
    """Returns what quantization did to one linear.

    Args:
        name: its full name.
        weight: [N, K].
        rounded: [N, K] fp32, the quantized weight.
        statistics: those of its inputs, if there are any.
    """
    wide = weight.float()
    difference = rounded - wide
    error = None
    if statistics is not None and statistics.gram is not None and statistics.rows:
        whole = output_error(wide, statistics.gram)
        error = float((output_error(difference, statistics.gram) / whole.clamp(min=1e-38)).sqrt())
    return LinearReport(
        name=name,
        weight_error=float(difference.norm() / wide.norm().clamp(min=1e-38)),
        output_error=error,
        reached=statistics is None or statistics.rows > 0,
    )


__all__ = [
    "LayerQuantizer",
    "LinearReport",
    "Report",
    "has_reports",
    "linear_report",
    "run_layers",
]
