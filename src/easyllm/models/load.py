"""Loading models and tokenizers from any source; `models/save` writes them."""

from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from easyllm.checkpoint.file_state import FileState
from easyllm.checkpoint.gguf import GGUFFile
from easyllm.checkpoint.gguf_parts import SplitGGUF, open_gguf
from easyllm.checkpoint.keymap import Binding, KeyMap
from easyllm.checkpoint.store import TensorFolder, check_values
from easyllm.core.config import first_problem
from easyllm.core.device import parse_dtype, pick_device
from easyllm.core.errors import CheckpointError, ConfigError, EasyllmError
from easyllm.core.paths import expanded
from easyllm.models.context import ContextConfig, extend_context
from easyllm.models.gguf_import import GGUFTensors, hf_config, kept_type
from easyllm.models.hf_config import read_config, read_files
from easyllm.models.hf_names import keymap_of
from easyllm.models.sources import locate
from easyllm.models.weight_cache import CachedWeights
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.encoder_decoder import build_model
from easyllm.nn.linear import Embedding, Linear
from easyllm.nn.storage import PackedStorage
from easyllm.quant import (
    KEPT,
    PackedLayers,
    StorageFormat,
    format_of_checkpoint,
    is_cacheable,
    quantizable,
    quantize_weight,
    weight_bytes,
)
from easyllm.quant.gguf_weight import GGUFWeight, gguf_format
from easyllm.tokenizer.folder import tokenizer_file
from easyllm.tokenizer.tokenizer import Tokenizer


class TensorSource(Protocol):
    """Tensors by their Hugging Face names, read one at a time, from some files."""

    shapes: dict[str, tuple[int, ...]]
    files: list[FileState]

    def load(self, name: str) -> Tensor:
        """Reads one tensor."""
        ...


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A located model whose configuration has been read, but not its weights.

    Attributes:
        path: the folder or GGUF file.
        config: the model configuration.
        tensors: the weights under their Hugging Face names.
        gguf: the GGUF file; None for a folder.
        packed: the quantized format of the checkpoint; None if its weights are not quantized.
    """

    path: Path
    config: ModelConfig
    tensors: TensorSource
    gguf: GGUFFile | SplitGGUF | None
    packed: StorageFormat | None = None

    def tokenizer(self) -> Tokenizer:
        """Loads the model's tokenizer."""
        if self.gguf is not None:
            return Tokenizer.from_gguf(self.gguf.metadata)
        return Tokenizer.from_folder(self.path)

    def model(
        self,
        dtype: torch.dtype | None,
        device: torch.device,
        *,
        quantize: str | None = None,
        weight_cache: bool = True,
    ) -> Decoder:
        """Builds the model and loads its weights; the result shares no memory with other models.

        Args:
            dtype: dtype of the weights; None keeps the dtype of the file.
            device: device of the weights.
            quantize: quantizes each weight as soon as it is read, to limit peak memory; `gguf`
                keeps the blocks of a GGUF file.
            weight_cache: whether quantized weights are mapped from the weight cache, or stored
                there.

        Raises:
            ConfigError: `quantize` is set, but the checkpoint is already quantized.
            CheckpointError: the tensors do not match the configuration.
        """
        cached = self._cached(dtype, device, quantize) if weight_cache else None
        if cached is None or quantize is None:
            return self._read(dtype, device, quantize)
        found = self._mapped(cached, device, quantize)
        if found is None:
            found = self._read(dtype, device, quantize)
            if cached.store(found):  # other processes share the mapped weights
                found = self._mapped(cached, device, quantize) or found
        return found

    def _mapped(self, cached: CachedWeights, device: torch.device, quantize: str) -> Decoder | None:
        """Builds the model with weights of the cache; None if they are not there."""
        model = self.skeleton()
        if not cached.load(model, self.packed_layers(model, quantize), device):
            return None
        return model.requires_grad_(False).eval()

    def _cached(
        self, dtype: torch.dtype | None, device: torch.device, quantize: str | None
    ) -> CachedWeights | None:
        """Returns the place of the quantized weights in the cache; None if they are not cached."""
        if quantize is None or quantize == KEPT:
            return None
        self.check_unquantized(quantize)
        if not is_cacheable(quantize):
            return None
        facts = {
            "config": self.config.model_dump(mode="json"),
            "quantize": quantize,
            "dtype": str(dtype),
            "device": device.type,
        }
        return CachedWeights.of(self.tensors.files, facts)

    @torch.no_grad()
    def _read(
        self, dtype: torch.dtype | None, device: torch.device, quantize: str | None
    ) -> Decoder:
        """Builds the model and reads its weights from the source."""
        model = self.skeleton()
        source = self.tensors.reopened() if isinstance(self.tensors, TensorFolder) else self.tensors
        rounded = {} if quantize is None else self.packed_layers(model, quantize)
        layers = {f"{name}.weight": layer for name, layer in model.weight_modules()}
        fp32 = {name for name, _ in model.named_buffers()}  # a bias that selects experts
        state, packed = dict[str, Tensor](), list[Binding]()
        for binding in self.check(model):
            if binding.packed:
                packed.append(binding)  # stored below, once the dtype of the full weights is known
                continue
            if quantize == KEPT and rounded.keys() >= set(binding.ours):
                self._keep(binding, layers, dtype or torch.float32, device)
                continue
            loaded = source.load(binding.theirs)
            if not loaded.is_floating_point():
                raise CheckpointError(
                    f"{binding.theirs} of {self.path} has dtype {loaded.dtype}, but no scales that "
                    "belong to it were found; copy the checkpoint again"
                )
            check_values(loaded, binding.theirs, self.path)
            parts = binding.rule.split(loaded)
            for name, part in zip(binding.ours, parts, strict=True):
                kept = dtype or part.dtype
                kept = torch.promote_types(kept, torch.float32) if name in fp32 else kept
                weight = part.to(device=device, dtype=kept)
                if name in rounded:
                    layer, format = rounded[name]
                    layer.store(quantize_weight(weight, format, name))
                else:
                    state[name] = weight.contiguous()
        if self.gguf is not None:
            self.gguf.release_pages()
        # the check above found every tensor; the packed weights are stored below
        floats = (t.dtype for t in state.values() if t.is_floating_point())
        activations = dtype or next(floats, torch.float32)
        for binding in packed:
            layer = layers[binding.ours[0]]
            found = {ending: source.load(name) for ending, name in binding.packed.items()}
            layer.store(self._storage(binding, found, layer.storage.shape, activations).to(device))
        model.load_state_dict(state, assign=True, strict=not (rounded or packed))
        return model.requires_grad_(False).eval()

    def packed_layers(self, model: Decoder, quantize: str | None) -> PackedLayers:
        """Returns the modules of `model` that are quantized while loading, with their formats.

        Args:
            model: the model, without weights.
            quantize: as for `model`; None for those that the checkpoint stores quantized.

        Raises:
            ConfigError: `quantize` is set, but the checkpoint is already quantized, or is not a
                GGUF file with quantized weights if they are to be kept.
        """
        if quantize is None and self.packed is None:
            return {}
        if quantize is not None and quantize != KEPT:
            self.check_unquantized(quantize)
            return quantizable(model, quantize)
        layers = {f"{name}.weight": layer for name, layer in model.weight_modules()}
        packed = self.packed
        if quantize is None:
            assert packed is not None, "checked above"
            names = (name for each in self.check(model) if each.packed for name in each.ours)
            return {name: (layers[name], packed) for name in names}
        found: PackedLayers = {}
        if isinstance(self.tensors, GGUFTensors):
            for binding in self.keymap().bindings(layers):
                kind = kept_type(binding, self.tensors)
                if kind is not None:
                    found |= {name: (layers[name], gguf_format(kind)) for name in binding.ours}
        if not found:
            raise ConfigError(
                f"quantize={KEPT} keeps the blocks of a GGUF file, but {self.path} is none with "
                "quantized weights; leave it out, or name a .gguf file"
            )
        return found

    def keeps_blocks(self) -> bool:
        """Returns whether the source is a GGUF file with quantized weights."""
        tensors = self.tensors
        if not isinstance(tensors, GGUFTensors):
            return False
        return any(tensors.block_type(name) is not None for name in tensors.shapes)

    def weight_bytes(self, dtype: torch.dtype, quantize: str | None = None) -> int:
        """Returns the size in memory of the weights, loaded with these options.

        Raises:
            ConfigError: as for `packed_layers`.
        """
        model = self.skeleton()
        return weight_bytes(model, dtype, packed=self.packed_layers(model, quantize))

    def _keep(
        self,
        binding: Binding,
        layers: Mapping[str, Linear | Embedding],
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        """Stores the blocks of a matrix of a GGUF file."""
        assert isinstance(self.tensors, GGUFTensors), "packed_layers found its blocks"
        kind = self.tensors.block_type(binding.theirs)
        assert kind is not None, "packed_layers found its blocks"
        parts = binding.rule.split(self.tensors.blocks(binding.theirs))
        for name, part in zip(binding.ours, parts, strict=True):
            shape = layers[name].storage.shape
            layers[name].store(GGUFWeight(part, kind, shape, dtype).to(device))

    def _storage(
        self,
        binding: Binding,
        found: Mapping[str, Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> PackedStorage:
        """Returns a quantized weight in the format of the checkpoint."""
        assert self.packed is not None, "the binding is packed"
        assert self.packed.from_file is not None, "a format with file tensors can read them"
        for ending, tensor in found.items():
            check_values(tensor, binding.packed[ending], self.path)
        try:
            storage = self.packed.from_file(found, shape, dtype)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
            raise CheckpointError(
                f"{binding.theirs} of {self.path} cannot be read as {self.packed.name} ({error}); "
                "copy the checkpoint again"
            ) from None
        if tuple(storage.shape) != tuple(shape):
            raise CheckpointError(
                f"{binding.theirs} of {self.path} has shape {list(storage.shape)} as "
                f"{self.packed.name}, expected {list(shape)}; use the config.json that belongs to "
                "these weights"
            )
        return storage

    def check_unquantized(self, quantize: str) -> None:
        """Checks that the weights can be quantized to the format `quantize`.

        Raises:
            ConfigError: they are already quantized.
        """
        if self.packed is not None:
            raise ConfigError(
                f"the weights of {self.path} are already quantized as {self.packed.name}; "
                f"leave out quantize={quantize}"
            )

    def check(self, model: Decoder) -> list[Binding]:
        """Checks tensor names and shapes in the file against `model` without reading any values.

        Returns:
            The parameters of `model` with the tensors that hold them.

        Raises:
            CheckpointError: they do not match.
        """
        expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        return self.keymap().check(
            expected,
            self.tensors.shapes,
            source=str(self.path),
            file_tensors=self.packed.file_tensors if self.packed is not None else (),
            optional_tensors=self.packed.optional_tensors if self.packed is not None else (),
        )

    def parameters(self, names: Collection[str]) -> dict[str, Tensor]:
        """Loads the named parameters in fp32; names that the file does not contain are omitted.

        Args:
            names: parameter names of `Decoder` (not Hugging Face names).
        """
        keymap = self.keymap()
        found: dict[str, Tensor] = {}
        for binding in keymap.bindings(names):
            if binding.theirs in self.tensors.shapes:
                parts = binding.rule.split(self.tensors.load(binding.theirs))
                found |= {
                    name: part.float()
                    for name, part in zip(binding.ours, parts, strict=True)
                    if name in names
                }
        return found

    def keymap(self) -> KeyMap:
        """Returns the map from parameter names to the names of `tensors`."""
        return keymap_of(self.config, gguf=self.gguf is not None)

    def skeleton(self) -> Decoder:
        """Builds the model on the meta device, without weights."""
        with torch.device("meta"):
            return build_model(self.config)


def open_source(source: str | Path, *, context: ContextConfig | None = None) -> OpenSource:
    """Locates a model and reads its configuration, but not its weights.

    Args:
        source: as for `load_model`.
        context: an extended context; by default the trained one.

    Raises:
        SourceError: there is no such model.
        CheckpointError: a file is damaged, or its format is unknown.
        ConfigError: the model's positions do not support `context`.
    """
    opened = _open(locate(source))
    if context is None:
        return opened
    return replace(opened, config=extend_context(opened.config, context))


def _open(path: Path) -> OpenSource:
    if path.suffix == ".gguf":
        file = open_gguf(path)
        with _impossible_values(path):
            hf = hf_config(file.metadata, file.tensors, file.load)
            config = read_config(hf)
        return OpenSource(path, config, GGUFTensors(file, hf), file)
    hf = read_files(path)
    with _impossible_values(path):
        config = read_config(hf)
    packed = format_of_checkpoint(hf.get("quantization_config"))
    return OpenSource(path, config, TensorFolder(path), None, packed)


def load_model(
    source: str | Path,
    *,
    dtype: str | torch.dtype | None = None,
    device: str = "cpu",
    context: ContextConfig | None = None,
    quantize: str | None = None,
    weight_cache: bool = True,
    adapter: str | Path | None = None,
) -> Decoder:
    """Loads a model for inference (no parameter requires a gradient).

    Args:
        source: `"smollm2"`, a folder, a `.gguf` file, or `"hf:org/name"`.
        dtype: `"float32"`, `"bfloat16"` ...; by default the dtype stored in the file (fp32 for
            quantized GGUF files).
        device: `"cpu"`, `"cuda"`, `"auto"`.
        context: extends the context beyond the trained length.
        quantize: `"int8"`, `"int4"`, `"nf4"` ...: quantizes the weights as they are read
            (`quant.quantize_weights`); `"gguf"` keeps the blocks of a GGUF file.
        weight_cache: whether quantized weights are stored in the user's cache folder, and mapped
            from there the next time (`models.weight_cache`).
        adapter: the folder of an adapter in peft format; it is applied to every sequence.

    Raises:
        SourceError, CheckpointError: there is no such model, or its files do not match.
        ConfigError: the model does not support `context`, or the quantization is unknown.

    Example:
        >>> model = load_model("smollm2", dtype="float32")      # doctest: +SKIP
        >>> model.logits([1, 2, 3]).shape                       # doctest: +SKIP
        torch.Size([3, 49152])
    """
    wanted = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    opened = open_source(source, context=context)
    on = pick_device(device)
    if adapter is None:
        return opened.model(wanted, on, quantize=quantize, weight_cache=weight_cache)
    # imports all methods of adapters
    from easyllm.adapters import read_adapter
    from easyllm.models.adapter_files import add_adapter

    file = read_adapter(expanded(adapter))  # before the base is loaded
    model = opened.model(wanted, on, quantize=quantize, weight_cache=weight_cache)
    return add_adapter(model, file, base=str(source))


def load_tokenizer(source: str | Path) -> Tokenizer:
    """Loads the tokenizer of a source, including its chat template.

    Args:
        source: as for `load_model`; also a folder that contains only a tokenizer.

    Raises:
        SourceError, CheckpointError: there is no such model, or it contains no tokenizer.
    """
    folder = expanded(source)
    if tokenizer_file(folder) is not None:
        return Tokenizer.from_folder(folder)
    path = locate(source)
    if path.suffix == ".gguf":
        return Tokenizer.from_gguf(open_gguf(path).metadata)
    return Tokenizer.from_folder(path)


@contextmanager
def _impossible_values(path: Path) -> Iterator[None]:
    """Converts errors caused by invalid configuration values to `CheckpointError`."""
    try:
        yield
    except EasyllmError:
        raise
    except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(
            f"the configuration in {path} does not describe a valid model ({reason}); "
            "copy the checkpoint again"
        ) from None
