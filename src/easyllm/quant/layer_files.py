"""Finished layers of a quantization, kept in a folder until all are done, so that it can resume."""

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from easyllm.core.atomic import atomic_file, check_output_free, write_atomic
from easyllm.core.finite import all_finite
from easyllm.core.json_types import JsonObject
from easyllm.quant.quant_tensor import QuantTensor
from easyllm.quant.spec import QuantSpec

KEY_FILE = "key.json"
PARTS = ("codes", "scales", "zeros", "group_of")


@dataclass(frozen=True, slots=True, kw_only=True)
class FinishedLayer:
    """What a quantized layer consists of.

    Attributes:
        weights: the quantized weights, by the names of their linears.
        full: all other tensors of the layer by name, which factors may have changed.
        reports: figures of each linear.
    """

    weights: Mapping[str, QuantTensor]
    full: Mapping[str, Tensor]
    reports: Sequence[JsonObject]

    @property
    def is_finite(self) -> bool:
        """Whether no scale and no other tensor has a NaN or infinite value."""
        scales = (weight.scales for weight in self.weights.values())
        return all(all_finite(t) for t in (*self.full.values(), *scales) if t.is_floating_point())


class LayerFiles:
    """A folder of finished layers of one quantization.

    Args:
        folder: the folder; created with the first layer. One of another quantization is emptied.
        key: identifies the model, the calibration text and the options.
    """

    def __init__(self, folder: Path, key: str) -> None:
        self.folder, self.key = folder, key
        path = folder / KEY_FILE
        if not path.is_file():
            check_output_free(folder)  # of someone else
        elif path.read_bytes() != json.dumps(key).encode():
            self.remove()

    @property
    def count(self) -> int:
        """Number of finished layers."""
        return len(list(self.folder.glob("layer-*.safetensors")))

    def load(self, number: int, specs: Mapping[str, QuantSpec]) -> FinishedLayer | None:
        """Returns a finished layer; None if it is not there, or damaged.

        Args:
            number: number of the layer.
            specs: the grid of each quantized linear.
        """
        try:
            with safe_open(self._path(number), "pt") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                reports = json.loads(file.metadata()["reports"])
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError):
            return None
        weights = {}
        for name, spec in specs.items():
            found = {part: tensors.pop(f"{name}.{part}", None) for part in PARTS}
            codes, scales, zeros = found["codes"], found["scales"], found["zeros"]
            if codes is None or scales is None or zeros is None or scales.shape != zeros.shape:
                return None
            weights[name] = QuantTensor(
                codes=codes, scales=scales, zeros=zeros, spec=spec, group_of=found["group_of"]
            )
        return FinishedLayer(weights=weights, full=tensors, reports=reports)

    def save(self, number: int, layer: FinishedLayer) -> None:
        """Saves a finished layer."""
        self.folder.mkdir(parents=True, exist_ok=True)
        write_atomic(self.folder / KEY_FILE, json.dumps(self.key))
        tensors = {name: tensor.detach().contiguous() for name, tensor in layer.full.items()}
        for name, weight in layer.weights.items():
            for part in PARTS:
                value = getattr(weight, part)
                if value is not None:
                    tensors[f"{name}.{part}"] = value.contiguous()
        with atomic_file(self._path(number), replace=True) as work:
            save_file(tensors, work, metadata={"reports": json.dumps(list(layer.reports))})

    def remove(self) -> None:
        """Removes the folder."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _path(self, number: int) -> Path:
        return self.folder / f"layer-{number:04}.safetensors"


def finished_layer(
    files: LayerFiles | None,
    number: int,
    *,
    specs: Mapping[str, QuantSpec],
    suits: Callable[[FinishedLayer], bool],
    make: Callable[[], FinishedLayer],
) -> FinishedLayer:
    """Returns a layer that was finished before, or makes it and keeps it.

    Args:
        files: where finished layers are kept; None keeps none.
        number: number of the layer.
        specs: the grid of each quantized linear.
        suits: whether a layer from a file is that of this model.
        make: quantizes the layer.
    """
    found = None if files is None else files.load(number, specs)
    if found is not None and suits(found):
        return found
    made = make()
    if files is not None:
        files.save(number, made)
    return made


__all__ = ["FinishedLayer", "LayerFiles", "finished_layer"]
