"""What an adapter's file holds of its base: modules that were trained whole, and the copies that peft adds.

The file's tensors say which modules they are; `modules_to_save` alone does not: peft takes every module whose name *ends* in
one of its entries, in the middle of a word too (`norm` is `input_layernorm` as well), and lists entries that the model does
not have (`classifier` and `score` for every classifier). Seen in peft 0.21.2, `utils/other.py`.

peft trains a copy of a module named there. Of two tied matrices, the embedding and the head, only the one that is named is
copied, so that the adapted model has two different ones; with both named, or `ensure_weight_tying`, the file holds both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from easyllm.adapters.adapter_set import AdapterSet, own_parameters
from easyllm.core.errors import CheckpointError
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Embedding, Linear

HEAD, EMBEDDING, SCORE = "lm_head", "embed_tokens", "score"
_COPY = "base_layer."
"""peft puts this in front of the leaf where a module has an adapter and its base weight is saved, too."""


class FileNames(Protocol):
    """What the file's layout calls our modules (`models.hf_module_name(model)`)."""

    def __call__(self, module: str, /) -> str:
        """The file's name of one of our modules."""

    def transposed(self, parameter: str, /) -> bool:
        """Whether the file keeps one of our parameters as [in, out]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTensor:
    """A tensor of a file that is a parameter of the base.

    Attributes:
        name: the file's, without peft's prefix.
        module, leaf: ours (`layers.0.mixer.o_proj` and `weight`).
        transposed: whether the file keeps it as [in, out].
    """

    name: str
    module: str
    leaf: str
    transposed: bool

    def turned(self, tensor: Tensor) -> Tensor:
        """From our layout to the file's, or back."""
        return tensor.T if self.transposed else tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseOfFile:
    """The base's share of an adapter's file.

    Attributes:
        replaced: tensors that take the place of the base's.
        copies: names of those that are the base's own values, and of the head of a pair that stays tied.
    """

    replaced: tuple[BaseTensor, ...]
    copies: frozenset[str]

    @property
    def modules(self) -> tuple[str, ...]:
        """Our names of the modules that have a tensor in `replaced`."""
        return tuple(dict.fromkeys(entry.module for entry in self.replaced))


def base_of_file(model: Decoder, tensors: Mapping[str, Tensor], names: FileNames) -> BaseOfFile:
    """What of the base a file's tensors hold, by their names without peft's prefix."""
    replaced, copies = list[BaseTensor](), set[str]()
    for entry in _possible(model, names):
        if entry.name not in tensors:
            continue
        if _is_copy(model, entry, tensors[entry.name]):
            copies.add(entry.name)
        else:
            replaced.append(entry)
    if is_tied(model) and not has_own_head(model, tensors, names):
        copies |= {f"{file_name(names, HEAD)}.weight"} & set(tensors)
    return BaseOfFile(replaced=tuple(replaced), copies=frozenset(copies))


def has_own_head(model: Decoder, tensors: Mapping[str, Tensor], names: FileNames) -> bool:
    """Whether the adapted model's head is another matrix than its embedding, although the base ties the two."""
    head, embedding = file_name(names, HEAD), file_name(names, EMBEDDING)
    if not is_tied(model) or head is None:
        return False
    if any(name.startswith(f"{head}.lora_") for name in tensors):
        return True
    one, other = tensors.get(f"{head}.weight"), tensors.get(f"{embedding}.weight")
    if one is None or other is None:
        return one is not other
    return not torch.equal(one, other)


def is_tied(model: Decoder) -> bool:
    """Whether the embedding is the head's weight as well."""
    return model.lm_head is None and model.score is None


def check_named(model: Decoder, saved: tuple[str, ...], base: BaseOfFile, names: FileNames) -> None:
    """Holds `modules_to_save` against the tensors.

    Raises:
        CheckpointError: a module that is named there, and that the model has, is missing.
    """
    present = {entry.name for entry in base.replaced} | base.copies
    for entry in _possible(model, names):
        theirs = entry.name.removesuffix(f".{entry.leaf}")
        if entry.leaf != "weight" or theirs.endswith(f".{_COPY[:-1]}"):
            continue
        ends = [end for end in saved if theirs.endswith(end)]
        if ends and not {entry.name, f"{theirs}.{_COPY}weight"} & present:
            raise CheckpointError(
                f"the adapter was trained with {ends[0]!r} of its base (modules_to_save), and its file holds no "
                f"{entry.name}; copy the adapter again"
            )


def saved_tensors(
    model: Decoder, adapters: AdapterSet, names: FileNames
) -> tuple[dict[str, Tensor], list[str]]:
    """What of the base is saved with an adapter, by names without peft's prefix, and the `modules_to_save` that go with it.

    An embedding that is the head as well is saved as both: peft would leave the head as the base has it. A head of labels is
    saved whether it was trained or not.
    """
    tensors, modules = dict[str, Tensor](), set[str]()
    for whole, module in adapters.whole.items():
        for inner, parameter in own_parameters(module).items():
            owner, _, leaf = f"{whole}.{inner}".rpartition(".")
            theirs, value = names(owner), parameter.detach()
            turned = value.T if names.transposed(f"{owner}.{leaf}") else value
            tensors[f"{theirs}.{leaf}"] = turned.contiguous()
            modules.add(theirs)
    if model.score is not None:  # peft reads no adapter of a classifier without its head
        tensors[f"{names(SCORE)}.weight"] = model.score.weight.detach()
        modules.add(names(SCORE))
    embedding, head = file_name(names, EMBEDDING), file_name(names, HEAD)
    if is_tied(model) and head is not None and f"{embedding}.weight" in tensors:
        tensors[f"{head}.weight"] = tensors[f"{embedding}.weight"].clone()
        modules.add(head)
    return tensors, sorted(modules)


def file_name(names: FileNames, ours: str) -> str | None:
    """The file's name of a module; None where its layout has none."""
    try:
        return names(ours)
    except (CheckpointError, ValueError):
        return None


def _possible(model: Decoder, names: FileNames) -> Iterator[BaseTensor]:
    """Every parameter of the base under the names that a file may have for it."""
    for ours, module in model.named_modules():
        theirs = file_name(names, ours)
        leaves = [name for name, _ in module.named_parameters(recurse=False)]
        if isinstance(module, Linear | Embedding) and "weight" not in leaves:
            leaves.append("weight")  # quantized
        for leaf in leaves if theirs is not None else ():
            transposed = names.transposed(f"{ours}.{leaf}")
            for name in (f"{theirs}.{leaf}", f"{theirs}.{_COPY}{leaf}"):
                yield BaseTensor(name=name, module=ours, leaf=leaf, transposed=transposed)


def _is_copy(model: Decoder, entry: BaseTensor, tensor: Tensor) -> bool:
    """Whether a tensor of the file is the base's own, or what peft saved of it before it was quantized."""
    module: nn.Module = model.get_submodule(entry.module)
    value = entry.turned(tensor)
    is_packed = isinstance(module, Linear | Embedding) and module.storage.format != "dense"
    if is_packed and entry.leaf == "weight":
        return _COPY in entry.name and value.shape == _shape(module)
    own = module.get_parameter(entry.leaf)
    return value.shape == own.shape and torch.equal(value.to(own), own)


def _shape(module: nn.Module) -> tuple[int, int]:
    assert isinstance(module, Linear | Embedding), "has a storage"
    outputs, inputs = module.storage.shape
    return outputs, inputs


__all__ = [
    "BaseOfFile",
    "BaseTensor",
    "FileNames",
    "base_of_file",
    "check_named",
    "file_name",
    "has_own_head",
    "is_tied",
    "saved_tensors",
]
