"""Presents a GGUF file as a Hugging Face checkpoint: metadata as `config.json`, HF tensor names.

The family modules handle what differs between families (tensor names, metadata keys, row order);
this module handles what all GGUF files share.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from easyllm.checkpoint.gguf import GGUFFile
from easyllm.checkpoint.gguf_parts import SplitGGUF
from easyllm.checkpoint.keymap import Binding, Converted, Fused
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.models.families import layout_of
from easyllm.models.families.gguf_layout import GGUFLayout, GGUFMetadata, Transform
from easyllm.tokenizer.from_gguf import end_ids_from_gguf, token_id_from_gguf

PLAIN_TYPES = ("F32", "F16", "BF16", "F64")
MAX_NAMED = 4
MAX_EXPERTS = 4096
"""An upper bound above any real model, so that a damaged file cannot make us list millions of
experts; experts beyond it are reported as missing."""


def hf_config(
    metadata: JsonMapping,
    tensors: JsonMapping,
    load: Callable[[str], Tensor] | None = None,
) -> JsonObject:
    """Returns the `config.json` values that the metadata of a GGUF file describe.

    Args:
        metadata: the key-value metadata of the file.
        tensors: the tensors of the file by name; their presence shows, for example, whether the
            embeddings are tied.
        load: loads one tensor in fp32, for tensors that are part of the configuration.

    Raises:
        CheckpointError: the architecture is unknown, a key is missing, or a key that changes the
            result is not implemented.
    """
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(
            f"the GGUF file is of type {kind!r}, expected 'model'; give the model's own file"
        )
    architecture = metadata.get("general.architecture")
    layout = layout_of(architecture)
    reader = GGUFMetadata(metadata, tensors, load)
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    values = layout.read_config(reader)
    reader.reject_unread()
    return values | {
        "vocab_size": len(tokens) or reader.need("vocab_size"),
        "bos_token_id": token_id_from_gguf(metadata, "bos"),
        "eos_token_id": end_ids_from_gguf(metadata),
        "pad_token_id": token_id_from_gguf(metadata, "padding"),
    }


class GGUFTensors:
    """The tensors of a GGUF file under their Hugging Face names.

    Attributes:
        shapes: the shape of each tensor by its HF name.
        files: the file, or its parts, as they were before they were opened.

    Raises:
        CheckpointError: the file contains a tensor that its architecture is not known to have.
    """

    def __init__(self, file: GGUFFile | SplitGGUF, config: JsonMapping) -> None:
        self._file, self._config, self.files = file, config, file.files
        self._sources: dict[str, tuple[str, Transform | None, int | None]] = {}
        self.shapes: dict[str, tuple[int, ...]] = {}
        layout = layout_of(file.metadata.get("general.architecture"))
        unknown = []
        for name, place in file.tensors.items():
            try:
                found = layout.locate(name)
            except LookupError:
                unknown.append(name)
                continue
            if found is not None:
                theirs, transform = found
                stacked = "{e}" in theirs and bool(place.shape)
                parts = range(min(place.shape[0], MAX_EXPERTS)) if stacked else [None]
                for part in parts:
                    hf = theirs.replace("{e}", str(part))
                    shape = place.shape[1:] if stacked else place.shape
                    self._sources[hf] = name, transform, part
                    self.shapes[hf] = _shape(shape, transform, config)
        self._joins = self._find_joins(layout)
        if unknown:
            named = ", ".join(unknown[:MAX_NAMED]) + (" ..." if len(unknown) > MAX_NAMED else "")
            raise CheckpointError(
                f"{file.path} contains {len(unknown)} tensors that are not implemented for its "
                f"architecture ({named}); load the model's Hugging Face folder if its family is "
                "supported"
            )

    def _find_joins(self, layout: GGUFLayout) -> dict[str, tuple[Fused, tuple[str, ...]]]:
        """Presents the parts of divided matrices as one; returns rule and parts by HF name."""
        found = {}
        for template, divided in layout.divided.items():
            rule = divided.rule(self._config)
            for i in range(self._config["num_hidden_layers"]):
                parts = tuple(f"{part.replace('{i}', str(i))}.weight" for part in divided.parts)
                if not all(part in self.shapes for part in parts):
                    continue
                shapes = [self.shapes.pop(part) for part in parts]
                name = f"{template.replace('{i}', str(i))}.weight"
                found[name] = rule, parts
                self.shapes[name] = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return found

    def block_type(self, name: str) -> str | None:
        """Returns the type, in lower case, of a matrix that the file stores in blocks.

        None for other types, and where the family's layout does more than move rows.
        """
        if name in self._joins:
            return None
        theirs, transform, part = self._sources[name]
        place = self._file.tensors[theirs]
        shape = place.shape if part is None else place.shape[1:]
        if len(shape) != 2 or place.type_name in PLAIN_TYPES:
            return None
        if transform is not None and self._row_order(transform, shape[0]) is None:
            return None
        return place.type_name.lower()

    def blocks(self, name: str) -> Tensor:
        """Returns the bytes of a matrix that has a `block_type`, [N, bytes of a row] uint8."""
        theirs, transform, part = self._sources[name]
        raw = self._file.raw(theirs, part=part)
        if transform is None:
            return raw
        order = self._row_order(transform, len(raw))
        assert order is not None, "it has a block type"
        return raw[order]

    def _row_order(self, transform: Transform, rows: int) -> Tensor | None:
        """Returns the order [N] of rows that a transform gives; None if it is not a permutation."""
        numbers = torch.arange(rows)[:, None].expand(rows, 2)
        try:
            moved = transform(numbers, self._config)
        except RuntimeError:
            return None
        if moved.shape != numbers.shape or not torch.equal(moved[:, 0], moved[:, 1]):
            return None
        order = moved[:, 0]
        return order if torch.equal(order.sort().values, numbers[:, 0]) else None

    def load(self, name: str) -> Tensor:
        """Loads the tensor with the HF name `name`, in fp32."""
        if name in self._joins:
            rule, parts = self._joins[name]
            return rule.join([self.load(each) for each in parts])
        theirs, transform, part = self._sources[name]
        tensor = self._file.load(theirs, torch.float32, part=part)
        return tensor if transform is None else transform(tensor, self._config)


def kept_type(binding: Binding, tensors: GGUFTensors) -> str | None:
    """Returns the block type of weights that can be kept as the file stores them; None if not."""
    rule = binding.rule
    if isinstance(rule, Converted) or rule.transposed or binding.theirs not in tensors.shapes:
        return None
    return tensors.block_type(binding.theirs)


def _shape(
    shape: tuple[int, ...], transform: Transform | None, config: JsonMapping
) -> tuple[int, ...]:
    if transform is None:
        return shape
    try:
        return tuple(transform(torch.empty(shape, device="meta"), config).shape)
    except (RuntimeError, ZeroDivisionError):
        return shape  # it does not match the configuration; the shape check reports it later
