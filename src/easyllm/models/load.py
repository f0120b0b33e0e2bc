"""Models and tokenizers from any source, and back to a Hugging Face folder."""

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
from pydantic import ValidationError
from torch import Tensor

from easyllm.adapters import load_adapter, read_adapter
from easyllm.adapters.peft_whole import HEAD
from easyllm.checkpoint.gguf import GGUFFile
from easyllm.checkpoint.gguf_parts import SplitGGUF, open_gguf
from easyllm.checkpoint.keymap import Binding, KeyMap
from easyllm.checkpoint.store import TensorFolder, write_model_weights
from easyllm.core.atomic import atomic_directory, write_json
from easyllm.core.device import parse_dtype, pick_device
from easyllm.core.errors import CheckpointError, ConfigError, EasyllmError
from easyllm.models.context import ContextConfig, extend_context
from easyllm.models.families import family_named
from easyllm.models.gguf_import import GGUFTensors, hf_config
from easyllm.models.heads import to_classifier, untie_head, with_score
from easyllm.models.hf_config import (
    CONFIG_FILE,
    GENERATION_FILE,
    read_config,
    read_files,
    with_end_ids,
    write_config,
)
from easyllm.models.sources import locate
from easyllm.nn.config import ModelConfig
from easyllm.nn.decoder import Decoder
from easyllm.nn.storage import PackedStorage
from easyllm.quant import (
    FORMATS,
    StorageFormat,
    format_of_checkpoint,
    quantizable,
    quantize_weight,
)
from easyllm.tokenizer.folder import tokenizer_file
from easyllm.tokenizer.tokenizer import Tokenizer


class TensorSource(Protocol):
    """Tensors by HF's names, read one at a time."""

    shapes: dict[str, tuple[int, ...]]

    def load(self, name: str) -> Tensor: ...


@dataclass(frozen=True, slots=True)
class OpenSource:
    """A located model: its configuration, its weights unread, its tokenizer."""

    path: Path
    config: ModelConfig
    tensors: TensorSource
    gguf: GGUFFile | SplitGGUF | None
    packed: StorageFormat | None = None

    def tokenizer(self) -> Tokenizer:
        """The tokenizer that belongs to the model."""
        if self.gguf is not None:
            return Tokenizer.from_gguf(self.gguf.metadata)
        return Tokenizer.from_folder(self.path)

    @torch.no_grad()
    def model(
        self, dtype: torch.dtype | None, device: torch.device, *, quantize: str | None = None
    ) -> Decoder:
        """The model with its weights, which are its own; with `quantize` each is rounded as soon as it is read."""
        model = self.skeleton()
        source = self.tensors.reopened() if isinstance(self.tensors, TensorFolder) else self.tensors
        if quantize is not None and self.packed is not None:
            raise ConfigError(
                f"the weights of {self.path} are kept as {self.packed.name} already; leave out quantize={quantize}"
            )
        expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        rounded = {} if quantize is None else quantizable(model, quantize)
        layers = {f"{name}.weight": layer for name, layer in model.holders()}
        state, packed = dict[str, Tensor](), list[Binding]()
        for binding in keymap_of(self.config).check(
            expected,
            self.tensors.shapes,
            source=str(self.path),
            file_tensors=self.packed.file_tensors if self.packed is not None else (),
        ):
            if binding.packed:
                packed.append(binding)  # when the dtype of the full weights is known
                continue
            parts = binding.rule.split(source.load(binding.theirs))
            for name, part in zip(binding.ours, parts, strict=True):
                weight = part.to(device=device, dtype=dtype or part.dtype)
                if name in rounded:
                    layer, format = rounded[name]
                    layer.store(quantize_weight(weight, format, name))
                else:
                    state[name] = weight.contiguous()
        if self.gguf is not None:
            self.gguf.let_go()
        # the check has seen that nothing is missing but what is packed, and that is there already
        floats = (t.dtype for t in state.values() if t.is_floating_point())
        activations = dtype or next(floats, torch.float32)
        for binding in packed:
            layer = layers[binding.ours[0]]
            found = {ending: source.load(name) for ending, name in binding.packed.items()}
            layer.store(self._storage(binding, found, layer.storage.shape, activations).to(device))
        model.load_state_dict(state, assign=True, strict=not (rounded or packed))
        return model.requires_grad_(False).eval()

    def _storage(
        self,
        binding: Binding,
        found: Mapping[str, Tensor],
        shape: tuple[int, int],
        dtype: torch.dtype,
    ) -> PackedStorage:
        """A weight as the checkpoint keeps it."""
        assert self.packed is not None, "bound as packed"
        assert self.packed.from_file is not None, "registered with tensors of a file"
        try:
            storage = self.packed.from_file(found, shape, dtype)
        except (TypeError, ValueError, RuntimeError, IndexError, KeyError) as error:
            raise CheckpointError(
                f"{binding.theirs} of {self.path} cannot be read as {self.packed.name} ({error}); copy the checkpoint again"
            ) from None
        if tuple(storage.shape) != tuple(shape):
            raise CheckpointError(
                f"{binding.theirs} of {self.path} is {list(storage.shape)} as {self.packed.name}, expected {list(shape)}; "
                "use the config.json that belongs to these weights"
            )
        return storage

    def check(self, model: Decoder) -> None:
        """Compares names and shapes in the file with those of `model`; no values are read.

        Raises:
            CheckpointError: they do not fit.
        """
        expected = {name: tuple(p.shape) for name, p in model.state_dict().items()}
        keymap_of(self.config).check(
            expected,
            self.tensors.shapes,
            source=str(self.path),
            file_tensors=self.packed.file_tensors if self.packed is not None else (),
        )

    def parameters(self, names: Collection[str]) -> dict[str, Tensor]:
        """Some parameters by our names, in fp32; those that the file does not have are left out."""
        keymap = keymap_of(self.config)
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

    def skeleton(self) -> Decoder:
        """The model without its weights."""
        with torch.device("meta"):
            return Decoder(self.config)


def open_source(source: str | Path, *, context: ContextConfig | None = None) -> OpenSource:
    """Locates a model and reads its configuration, not yet its weights.

    Raises:
        SourceError: there is no such model.
        CheckpointError: a file is damaged, or of an unknown kind.
        ConfigError: its positions cannot be changed as `context` says.
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
    adapter: str | Path | None = None,
) -> Decoder:
    """The model a source holds, ready for inference (no parameter requires a gradient).

    Args:
        source: `"smollm2"`, a folder, a `.gguf` file, or `"hf:org/name"`.
        dtype: `"float32"`, `"bfloat16"` ...; by default the one the file keeps (fp32 for quantized files).
        device: `"cpu"`, `"cuda"`, `"auto"`.
        context: positions that reach further than the model was trained.
        quantize: `"int8"` or `"int4"`: weights are rounded as they are read (`quant.quantize_weights`).
        adapter: the folder of an adapter, in peft's layout, that every row goes through.

    Raises:
        SourceError, CheckpointError: no such model, or its files do not fit.
        ConfigError: its positions cannot be changed; no such quantization.

    Example:
        >>> model = load_model("smollm2", dtype="float32")      # doctest: +SKIP
        >>> model.logits([1, 2, 3]).shape                       # doctest: +SKIP
        torch.Size([3, 49152])
    """
    wanted = parse_dtype(dtype) if isinstance(dtype, str) else dtype
    opened = open_source(source, context=context)
    model = opened.model(wanted, pick_device(device), quantize=quantize)
    return model if adapter is None else add_adapter(model, adapter)


def add_adapter(model: Decoder, folder: str | Path, *, name: str = "") -> Decoder:
    """Attaches the adapter that a folder holds; a head of labels that was trained with it comes along. A head tied to the
    embedding becomes a matrix of its own where the adapter changes one of the two.

    Args:
        name: under which the adapter is held besides others (`ForwardContext.adapters`); without one it is of every row.

    Raises:
        CheckpointError: the folder holds no adapter, or one for another model.
        ConfigError: the model has an adapter already.
    """
    file = read_adapter(Path(folder))
    labels = file.num_labels()
    another_head = labels is not None and model.config.num_labels != labels
    own_head = file.has_own_head(model, hf_module_name(model))
    if name and another_head:
        raise ConfigError(
            f"the adapter in {str(file.folder)!r} has a head of {labels} labels, which cannot be held by name besides others; "
            "load it alone"
        )
    before = model.config, model.lm_head, model.score

    def undo() -> None:
        heirs = [a for a in model.adapter_sets.values() if HEAD in a.linears]
        if own_head and heirs:  # the head stays untied while others change it
            heirs[0].undo.append(undo)
        else:
            model.config, model.lm_head, model.score = before

    try:
        if another_head:
            assert labels is not None, "counted above"
            to_classifier(model, labels)
        if own_head:
            untie_head(model)
        adapters = load_adapter(model, file, module_name=hf_module_name(model), name=name)
    except EasyllmError:
        undo()
        raise
    if another_head or own_head:
        adapters.undo.append(undo)
    return model


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The tokenizer of a source, chat template included; a folder may hold a tokenizer and nothing else.

    Raises:
        SourceError, CheckpointError: no such model, or no tokenizer in it.
    """
    folder = Path(source).expanduser()
    if tokenizer_file(folder) is not None:
        return Tokenizer.from_folder(folder)
    path = locate(source)
    if path.suffix == ".gguf":
        return Tokenizer.from_gguf(open_gguf(path).metadata)
    return Tokenizer.from_folder(path)


def save_model(
    model: Decoder,
    folder: str | Path,
    *,
    tokenizer: Tokenizer | None = None,
    end_ids: Sequence[int] = (),
    replace: bool = False,
    extra_files: dict[str, Any] | None = None,
) -> Path:
    """Writes a Hugging Face folder that `transformers` loads as is; all of it or nothing.

    Args:
        tokenizer: saved beside the weights, chat template included.
        end_ids: further ids that end a generation (the ends of turns the model was tuned on).
        replace: whether a folder that holds something may be replaced.
        extra_files: further JSON files by name (a manifest, say).

    Raises:
        OutputError: the folder holds something, or cannot be written.
        CheckpointError: the family's layout cannot express the model, or its weights are quantized in a format that is
            not written.
    """
    if model.is_adapted:
        raise CheckpointError(
            "the model has an adapter, for which this layout has no place; merge it first, or save it with save_adapter"
        )
    dtype = str(model.dtype).removeprefix("torch.")
    config = write_config(with_end_ids(model.config, end_ids)) | {"torch_dtype": dtype}
    packed, quantization = _packed_tensors(model)
    if quantization is not None:
        config["quantization_config"] = quantization
    full = {name: t for name, t in model.state_dict().items() if ".storage." not in f".{name}"}
    tensors = keymap_of(model.config).to_file(full, packed)
    generation = {
        key: config[key]
        for key in ("bos_token_id", "eos_token_id", "pad_token_id")
        if config.get(key) is not None
    }
    with atomic_directory(Path(folder), replace=replace) as work:
        write_model_weights(work, tensors)
        write_json(work / CONFIG_FILE, config)
        write_json(work / GENERATION_FILE, generation)
        if tokenizer is not None:
            tokenizer.save(work)
        for name, value in (extra_files or {}).items():
            write_json(work / name, value)
    return Path(folder)


def _packed_tensors(
    model: Decoder,
) -> tuple[dict[str, Mapping[str, Tensor]], dict[str, Any] | None]:
    """The tensors of quantized weights, and the `quantization_config` that says how to read them."""
    formats = model.packed_formats()
    if not formats:
        return {}, None
    (name, *others) = sorted(formats)
    format = FORMATS.get(name)
    if others or format is None or not format.file_tensors:
        raise CheckpointError(
            f"weights quantized as {' and '.join([name, *others])} are made when a model is loaded and are not written in "
            "this layout; save the full model"
        )
    tensors = {
        f"{holder}.weight": layer.storage.tensors()
        for holder, layer in model.holders()
        if layer.storage.format == name
    }
    return tensors, {"quant_method": name, **format.file_config}


def keymap_of(config: ModelConfig) -> KeyMap:
    """Names of a model's parameters on disk."""
    return with_score(family_named(config.family).keymap(config))


class HFNames:
    """What Hugging Face calls our modules with a weight; where it has several of ours in one (GPT-2's `c_attn`), ours stay,
    and `peft` cannot read an adapter of theirs."""

    def __init__(self, keymap: KeyMap) -> None:
        self._keymap = keymap

    def __call__(self, module: str, /) -> str:
        (binding,) = self._keymap.bindings([f"{module}.weight"])
        return module if len(binding.ours) > 1 else binding.theirs.removesuffix(".weight")

    def transposed(self, parameter: str, /) -> bool:
        """Whether Hugging Face keeps one of our parameters as [in, out]."""
        (binding,) = self._keymap.bindings([parameter])
        return binding.rule.transposed and len(binding.ours) == 1


def hf_module_name(model: Decoder) -> HFNames:
    """A function from the name of one of our modules with a weight to HF's, under which its adapter is saved."""
    return HFNames(keymap_of(model.config))


@contextmanager
def _impossible_values(path: Path) -> Iterator[None]:
    """Turns what a configuration of the wrong types or sizes raises into a `CheckpointError`."""
    try:
        yield
    except EasyllmError:
        raise
    except (ValueError, TypeError, ArithmeticError, AttributeError, LookupError) as error:
        reason = str(error)
        if isinstance(error, ValidationError):
            first = error.errors(include_url=False)[0]
            place = ".".join(map(str, first["loc"]))
            reason = f"{place}: {first['msg']}" if place else first["msg"]
        raise CheckpointError(
            f"the configuration in {path} describes no model ({reason}); copy the checkpoint again"
        ) from None
