"""Base tensors stored in an adapter file: fully trained modules, and copies that peft adds.

The modules are determined from the file's tensors. `modules_to_save` alone is not enough: peft
matches every module whose name *ends* in one of its entries, even in the middle of a word (`norm`
also matches `input_layernorm`), and lists entries that the model does not have (`classifier` and
`score` for every classifier). Observed in peft 0.21.2, `utils/other.py`.

peft trains a copy of each module named there. If embedding and head are tied, only the named one is
copied, so that the adapted model has two different matrices; if both are named, or with
`ensure_weight_tying`, the file contains both.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from easyllm.adapters.adapter import AdapterConfig
from easyllm.adapters.adapter_set import AdapterSet
from easyllm.core.errors import CheckpointError
from easyllm.nn.decoder import Decoder
from easyllm.nn.linear import Embedding, Linear

HEAD, EMBEDDING, SCORE = "lm_head", "embed_tokens", "score"
_COPY = "base_layer."
"""peft's prefix of the parameter name if a module has an adapter and its base weight is saved."""


class FileNames(Protocol):
    """Maps our module names to those of the file format (`models.hf_module_name(model)`)."""

    def __call__(self, module: str, /) -> str:
        """Returns the name that one of our modules has in the file."""

    def transposed(self, parameter: str, /) -> bool:
        """Returns whether the file stores one of our parameters transposed, as [in, out]."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseTensor:
    """A tensor in an adapter file that is a parameter of the base model.

    Attributes:
        name: its name in the file, without peft's prefix.
        module, leaf: our module and parameter names (`layers.0.mixer.o_proj` and `weight`).
        transposed: whether the file stores it as [in, out].
    """

    name: str
    module: str
    leaf: str
    transposed: bool

    @property
    def parameter(self) -> str:
        """The full name of our parameter."""
        return f"{self.module}.{self.leaf}"

    def turned(self, tensor: Tensor) -> Tensor:
        """Returns the tensor converted between our layout and the file's (its own inverse)."""
        return tensor.T if self.transposed else tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class BaseOfFile:
    """The base model's tensors in an adapter file.

    Attributes:
        replaced: tensors that replace the base's.
        copies: names of tensors equal to the base's values, and of the head if it stays tied.
    """

    replaced: tuple[BaseTensor, ...]
    copies: frozenset[str]

    @property
    def names(self) -> tuple[str, ...]:
        """Our names for the parameters in `replaced`."""
        return tuple(dict.fromkeys(entry.parameter for entry in self.replaced))

    @property
    def modules(self) -> tuple[str, ...]:
        """Our names for the modules of `replaced`."""
        return tuple(dict.fromkeys(entry.module for entry in self.replaced))


def base_of_file(model: Decoder, tensors: Mapping[str, Tensor], names: FileNames) -> BaseOfFile:
    """Returns the base tensors among a file's tensors, which are named without peft's prefix."""
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
    """Returns whether an adapter unties the head of a model whose base ties it to the embedding."""
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
    """Returns whether the head's weight is tied to the embedding."""
    return model.lm_head is None and model.score is None


def check_named(model: Decoder, saved: tuple[str, ...], base: BaseOfFile, names: FileNames) -> None:
    """Checks that the file contains the tensors of all modules in `modules_to_save`.

    Raises:
        CheckpointError: a module that is listed and exists in the model is missing from the file.
    """
    present = {entry.name for entry in base.replaced} | base.copies
    for entry in _possible(model, names):
        theirs = entry.name.removesuffix(f".{entry.leaf}")
        if entry.leaf != "weight" or theirs.endswith(f".{_COPY[:-1]}"):
            continue
        ends = [end for end in saved if theirs.endswith(end)]
        if ends and not {entry.name, f"{theirs}.{_COPY}weight"} & present:
            raise CheckpointError(
                f"the adapter was trained with {ends[0]!r} of its base (modules_to_save), but its "
                f"file contains no {entry.name}; copy the adapter again"
            )
    head, embedding = file_name(names, HEAD), file_name(names, EMBEDDING)
    if not is_tied(model) or head is None:
        return
    # a tied head may be stored once, as the embedding
    ends = [end for end in saved if head.endswith(end)]
    if ends and not {f"{head}.weight", f"{embedding}.weight"} & present:
        raise CheckpointError(
            f"the adapter was trained with {ends[0]!r} of its base (modules_to_save), but its file "
            f"contains no {head}.weight; copy the adapter again"
        )


def missing_biases(
    model: Decoder, config: AdapterConfig, tensors: Mapping[str, Tensor], names: FileNames
) -> list[str]:
    """Returns the names of trained biases that a file's `bias` announces but the file lacks."""
    present, expected = set[str](), dict[str, str]()
    for entry in _possible(model, names):
        if config.trains_bias(entry.parameter):
            expected.setdefault(entry.parameter, entry.name)
            present |= {entry.parameter} if entry.name in tensors else set()
    return [name for parameter, name in expected.items() if parameter not in present]


def saved_tensors(
    model: Decoder, adapters: AdapterSet, names: FileNames
) -> tuple[dict[str, Tensor], list[str]]:
    """Returns the base tensors to save with an adapter, and the matching `modules_to_save`.

    The tensors are keyed by their file names without peft's prefix. A tied embedding is saved
    twice, also as the head, because peft would otherwise leave the head unchanged. A classification
    head is saved whether it was trained or not.
    """
    tensors, modules = dict[str, Tensor](), set[str]()
    trained = adapters.base_parameters
    for parameter in _with_siblings(model, adapters):
        owner, _, leaf = parameter.rpartition(".")
        theirs, value = names(owner), model.get_parameter(parameter).detach()
        turned = value.T if names.transposed(parameter) else value
        infix = _COPY if owner in adapters.adapted else ""
        tensors[f"{theirs}.{infix}{leaf}"] = turned.contiguous()
        is_bias = parameter in trained and adapters.config.trains_bias(parameter)
        if adapters.config.saves_modules and not is_bias:
            modules.add(theirs)
    if model.score is not None:  # peft cannot load a classifier's adapter without its head
        tensors[f"{names(SCORE)}.weight"] = model.score.weight.detach()
        modules.add(names(SCORE))
    embedding, head = file_name(names, EMBEDDING), file_name(names, HEAD)
    if is_tied(model) and head is not None and f"{embedding}.weight" in tensors:
        tensors[f"{head}.weight"] = tensors[f"{embedding}.weight"].clone()
        modules.add(head)
    return tensors, sorted(modules)


def _with_siblings(model: Decoder, adapters: AdapterSet) -> list[str]:
    """Returns the trained base parameters, with the others of the modules that peft copies."""
    found = dict[str, None]()
    for parameter in adapters.base_parameters:
        found[parameter] = None
        if adapters.config.trains_bias(parameter) or not adapters.config.saves_modules:
            continue
        owner = parameter.rpartition(".")[0]
        module = model.get_submodule(owner)
        if owner not in adapters.adapted:
            found |= {f"{owner}.{leaf}": None for leaf, _ in module.named_parameters(recurse=False)}
    return list(found)


def file_name(names: FileNames, ours: str) -> str | None:
    """Returns a module's name in the file; None if the file format has no name for it."""
    try:
        return names(ours)
    except (CheckpointError, ValueError):
        return None


def _possible(model: Decoder, names: FileNames) -> Iterator[BaseTensor]:
    """Yields every parameter of the base under each name that a file may use for it."""
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
    """Returns whether a file's tensor equals the base's, or is its value before quantization."""
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
    "missing_biases",
    "saved_tensors",
]
