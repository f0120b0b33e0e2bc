"""LoRA of a mixture of experts in peft's files, for models of transformers 5.

transformers 5 stores the matrices of a layer's E experts in two parameters, `gate_up_proj`
[E, 2·inner, D] and `down_proj` [E, D, inner], which peft adapts by `target_parameters`:

    A: [E·r, in], row e·r + i;   B: [out, E·r], column i·E + e    for rank i of expert e

Gate and up projection share one A of the layer. Two adapters that do not share it are written with
rank r = r_gate + r_up, A_e = [A_gate; A_up] and a block-diagonal B_e. If both parameters are
adapted, `experts.base_layer.lora_A` belongs to `gate_up_proj` and `experts.lora_A` to `down_proj`;
otherwise `experts.lora_A` belongs to the adapted one. Observed in peft 0.21.2.

Here each expert has linears of its own. Files of transformers 4 name those (`experts.3.w1`) and
need no conversion. peft converts them on loading, but drops an adapter of `gate_proj` and `up_proj`
without `down_proj`, and takes linears outside the experts with the same names for experts.
"""

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor

from easyllm.adapters.peft_keys import matches
from easyllm.adapters.peft_whole import FileNames
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import Json, JsonMapping, JsonObject
from easyllm.nn.decoder import Decoder
from easyllm.nn.moe import MoE

if TYPE_CHECKING:
    from easyllm.nn.linear import Linear

FUSED = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
"""Our linears in each of the two parameters of transformers 5."""
CONVERTED = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})
"""Last parts of module names that peft takes for experts or routers in models with experts."""
A, B = "lora_A.weight", "lora_B.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class Low:
    """A low-rank update s B A with A [r, in] and B [out, r]."""

    a: Tensor
    b: Tensor
    scale: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertLayer:
    """The names of a layer with experts.

    Attributes:
        ours: our name (`layers.0.feed_forward`).
        before: its name in transformers 4 (`model.layers.0.block_sparse_moe`).
        now: its name in transformers 5 (`model.layers.0.mlp`).
        num_experts: E.
        names: maps our names to those of transformers 4.
    """

    ours: str
    before: str
    now: str
    num_experts: int
    names: FileNames

    def linears(self, leaf: str) -> list[str]:
        """Returns the names that a linear of each expert has in transformers 4."""
        return [self.names(f"{self.ours}.experts.{e}.{leaf}") for e in range(self.num_experts)]


def expert_layers(model: Decoder, names: FileNames) -> Iterator[ExpertLayer]:
    """Yields the layers of a model that have experts."""
    for ours, module in model.named_modules():
        if isinstance(module, MoE):
            before = names(f"{ours}.router").rpartition(".")[0]
            yield ExpertLayer(
                ours=ours,
                before=before,
                now=before.replace("block_sparse_moe", "mlp"),
                num_experts=module.config.num_experts,
                names=names,
            )


class LowRankFile:
    """The low-rank matrices of an adapter file, with their ranks and scales.

    Args:
        description: the parsed `adapter_config.json`.
        tensors: the tensors, without peft's prefix.
    """

    def __init__(self, description: JsonMapping, tensors: Mapping[str, Tensor]) -> None:
        self.tensors = dict(tensors)
        self._description = description
        self.ranks: JsonObject = {}
        self.alphas: JsonObject = {}

    def described(self, **changes: Json) -> JsonObject:
        """Returns the configuration with the new ranks and values of α before its own."""
        found = {**self._description, **changes}
        for key, new in (("rank_pattern", self.ranks), ("alpha_pattern", self.alphas)):
            old: JsonMapping = self._description.get(key) or {}
            found[key] = {**new, **{name: v for name, v in old.items() if name not in new}}
        return found

    def stems(self) -> list[str]:
        """Returns the names of all linears with an A."""
        return [name.removesuffix(f".{A}") for name in self.tensors if name.endswith(f".{A}")]

    def take(self, stem: str, parameter: str = "", copies: int = 1) -> Low | None:
        """Removes and returns the update of a linear or parameter; None if there is none.

        Args:
            stem: the beginning of the tensors' names.
            parameter: its name in the patterns, if it is not `stem`.
            copies: number of experts whose matrices are fused.

        Raises:
            CheckpointError: B is missing, or the rank is another than the configuration's.
        """
        a, b = self.tensors.pop(f"{stem}.{A}", None), self.tensors.pop(f"{stem}.{B}", None)
        if a is None and b is None:
            return None
        name = parameter or stem
        if a is None or b is None or a.ndim != 2 or b.ndim != 2 or len(a) != b.shape[1]:
            shapes = [None if tensor is None else list(tensor.shape) for tensor in (a, b)]
            raise CheckpointError(
                f"{stem} has lora_A of shape {shapes[0]} and lora_B of shape {shapes[1]} in the "
                "adapter's file, which do not fit each other; copy the adapter again"
            )
        said = matches(self._description.get("rank_pattern"), name) or [self._description["r"]]
        if not any(len(a) == copies * rank for rank in said):
            raise CheckpointError(
                f"{stem} has {len(a)} rows of lora_A in the adapter's file, expected "
                f"{copies} times the rank {said[0]} of its configuration; copy the adapter again"
            )
        alphas = matches(self._description.get("alpha_pattern"), name)
        alpha = alphas[0] if alphas else self._description["lora_alpha"]
        return Low(a=a, b=b, scale=alpha / self._divisor(len(a) // copies))

    def put(self, stem: str, low: Low, parameter: str = "", copies: int = 1) -> None:
        """Adds the update of a linear or parameter; the arguments are those of `take`."""
        rank, name = len(low.a) // copies, parameter or stem
        self.tensors[f"{stem}.{A}"], self.tensors[f"{stem}.{B}"] = low.a, low.b
        self.ranks[name], self.alphas[name] = rank, low.scale * self._divisor(rank)

    def _divisor(self, rank: int) -> float:
        return math.sqrt(rank) if self._description.get("use_rslora") else rank


def is_plain_lora(description: JsonMapping) -> bool:
    """Returns whether an `adapter_config.json` describes a LoRA that peft can apply to experts."""
    return description.get("peft_type") == "LORA" and not description.get("use_dora")


# ---- writing


def fuse_experts(
    model: Decoder,
    names: FileNames,
    description: JsonMapping,
    tensors: Mapping[str, Tensor],
    targets: Collection[str],
) -> tuple[JsonObject, dict[str, Tensor]]:
    """Returns the configuration and the tensors of a LoRA in the form for transformers 5.

    A model without experts, and an adapter without linears that peft would convert, are unchanged.

    Args:
        model: the adapted model.
        names: maps our module names to those of transformers 4.
        description: `adapter_config.json`, with patterns by full names.
        tensors: the adapter's tensors, without peft's prefix.
        targets: full names of the adapted modules in transformers 4.
    """
    layers = list(expert_layers(model, names))
    converted = [target for target in targets if target.rpartition(".")[2] in CONVERTED]
    if not layers or not converted:
        return dict(description), dict(tensors)
    file = LowRankFile(description, tensors)
    for layer in layers:
        found = dict[str, Low]()
        for parameter, leaves in FUSED.items():
            parts = [[file.take(stem) for stem in layer.linears(leaf)] for leaf in leaves]
            if any(low is not None for rows in parts for low in rows):
                found[parameter] = _fused(parts)
        container = f"{layer.now}.experts"
        for parameter, low in found.items():
            inner = ".base_layer" if parameter != list(found)[-1] else ""
            file.put(f"{container}{inner}", low, f"{container}.{parameter}", layer.num_experts)
    for stem in converted:
        other = file.take(stem)
        if other is not None:  # a router, or a linear outside the experts
            now = _renamed(stem, layers)
            file.put(now, other, f"{now}.weight")
    changed = file.described(
        target_modules=sorted(set(targets) - set(converted)),
        target_parameters=sorted(file.ranks),
        lora_dropout=0.0,  # peft has none on parameters, and it has no effect after training
    )
    for key in ("rank_pattern", "alpha_pattern"):
        changed[key] = {name: v for name, v in changed[key].items() if name not in converted}
    return changed, file.tensors


def _renamed(name: str, layers: Sequence[ExpertLayer], *, back: bool = False) -> str:
    """Returns a name of transformers 4 in transformers 5, or the reverse."""
    for layer in layers:
        old, new = (layer.now, layer.before) if back else (layer.before, layer.now)
        if name.startswith(f"{old}."):
            return f"{new}.{name.removeprefix(f'{old}.')}"
    return name


def _fused(parts: Sequence[Sequence[Low | None]]) -> Low:
    """Returns the fused matrices of all experts.

    Args:
        parts: the updates of one or two linears of each expert, [number of linears][E]; None for
            linears that are not adapted.
    """
    like = next(low for rows in parts for low in rows if low is not None)
    wide = [_padded(rows, like) for rows in parts]
    if len(parts) == 2 and torch.equal(wide[0][0], wide[1][0]):
        a, b = wide[0][0], torch.cat([b for _, b in wide], dim=1)
    else:
        a = torch.cat([a for a, _ in wide], dim=1)
        each = zip(*(b for _, b in wide), strict=True)
        b = torch.stack([torch.block_diag(*matrices) for matrices in each])
    return Low(a=a.flatten(0, 1), b=b.permute(1, 2, 0).flatten(1), scale=like.scale)


def _padded(rows: Sequence[Low | None], like: Low) -> tuple[Tensor, Tensor]:
    """Returns A [E, r, in] and B [E, out, r] of a linear of all experts, padded with zeros."""
    rank = max(0 if low is None else len(low.a) for low in rows)
    a = like.a.new_zeros(len(rows), rank, like.a.shape[1])
    b = like.b.new_zeros(len(rows), like.b.shape[0], rank)
    for expert, low in enumerate(rows):
        if low is not None:
            same = low.scale == like.scale
            a[expert, : len(low.a)] = low.a
            b[expert, :, : len(low.a)] = low.b if same else low.b * (low.scale / like.scale)
    return a, b


# ---- reading


def split_experts(
    model: Decoder, names: FileNames, description: JsonMapping, tensors: Mapping[str, Tensor]
) -> tuple[JsonMapping, Mapping[str, Tensor]]:
    """Returns the configuration and the tensors of a LoRA with a linear for each expert.

    Parameters of other linears that are targets are read as LoRA of those linears. Ranks that have
    no effect on a linear (the other half of a block-diagonal B) are left out.

    Args:
        model: the base model.
        names: maps our module names to those of transformers 4.
        description: the parsed `adapter_config.json`.
        tensors: the file's tensors, without peft's prefix.

    Raises:
        CheckpointError: tensors do not fit each other, the model or the configuration.
    """
    if not description.get("target_parameters"):
        return description, tensors
    layers = list(expert_layers(model, names))
    file = LowRankFile(description, tensors)
    for layer in layers:
        container = f"{layer.now}.experts"
        both = f"{container}.base_layer.{A}" in file.tensors
        if both:
            _split(file, layer, f"{container}.base_layer", "gate_up_proj", model)
        if f"{container}.{A}" in file.tensors:
            width = file.tensors[f"{container}.{A}"].shape[-1]
            rows = file.tensors.get(f"{container}.{B}", torch.empty(0)).shape[0]
            alone = not both and (width, rows) == _shape(model, layer, "gate_up_proj")
            _split(file, layer, container, "gate_up_proj" if alone else "down_proj", model)
    for stem in file.stems():
        parameter = f"{stem}.weight"
        if any(f".{parameter}".endswith(f".{t}") for t in description["target_parameters"]):
            low = file.take(stem, parameter)
            assert low is not None, "has an A"
            file.put(_renamed(stem, layers, back=True), low)
    return file.described(target_parameters=None), file.tensors


def _shape(model: Decoder, layer: ExpertLayer, parameter: str) -> tuple[int, int]:
    """Returns the inputs and outputs of one expert's part of a parameter."""
    leaf = FUSED[parameter][0]
    linear = cast("Linear", model.get_submodule(f"{layer.ours}.experts.0.{leaf}"))
    return linear.in_features, linear.out_features * len(FUSED[parameter])


def _split(
    file: LowRankFile, layer: ExpertLayer, stem: str, parameter: str, model: Decoder
) -> None:
    """Replaces the fused matrices of a parameter by those of each expert's linears."""
    experts = layer.num_experts
    low = file.take(stem, f"{layer.now}.experts.{parameter}", experts)
    assert low is not None, "has an A"
    width, rows = _shape(model, layer, parameter)
    if low.a.shape[1] != width or low.b.shape[0] != rows:
        raise CheckpointError(
            f"{stem} has lora_A of shape {list(low.a.shape)} and lora_B of shape "
            f"{list(low.b.shape)} in the adapter's file, which do not fit {experts} experts with "
            f"{width} inputs and {rows} outputs; use the model that it was trained on"
        )
    a = low.a.unflatten(0, (experts, -1))  # [E, r, in]
    b = low.b.unflatten(1, (-1, experts)).permute(2, 0, 1)  # [E, out, r]
    leaves = FUSED[parameter]
    halves = dict(zip(leaves, b.chunk(len(leaves), dim=1), strict=True))
    is_new = not bool(b.any())  # an untrained adapter, whose B is zero
    for leaf, half in halves.items():
        used = half.flatten(0, 1).any(0)  # [r]
        for expert, theirs in enumerate(layer.linears(leaf)):
            kept = is_new | (used & (a[expert].any(1) | half[expert].any(0)))
            if kept.any():
                its = Low(a=a[expert, kept], b=half[expert][:, kept], scale=low.scale)
                file.put(theirs, its)


__all__ = ["expert_layers", "fuse_experts", "is_plain_lora", "split_experts"]
