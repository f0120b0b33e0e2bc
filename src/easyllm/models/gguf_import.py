"""A GGUF file as if it were a Hugging Face folder: its metadata as `config.json`, its tensors by HF's names.

What differs between families (names, keys, order of rows) is in each family's file; this module reads what all files share.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from easyllm.checkpoint.gguf import GGUFFile
from easyllm.checkpoint.gguf_parts import SplitGGUF
from easyllm.core.errors import CheckpointError
from easyllm.models.families import layout_of
from easyllm.models.families.gguf_layout import GGUFMetadata, Transform
from easyllm.tokenizer.from_gguf import end_ids_from_gguf, token_id_from_gguf

MAX_NAMED = 4
MAX_EXPERTS = 4096
"""More experts than any model has: a damaged file must not make us list millions; the rest is reported as missing."""


def hf_config(
    metadata: Mapping[str, Any],
    tensors: Mapping[str, Any],
    load: Callable[[str], Tensor] | None = None,
) -> dict[str, Any]:
    """The `config.json` that the metadata describe.

    Args:
        tensors: the file's by name (which ones there are says whether embeddings are tied, say).
        load: the fp32 values of one, for tensors that are part of the configuration.

    Raises:
        CheckpointError: the architecture is not known, a key is missing, or one changes the result and is not implemented.
    """
    kind = metadata.get("general.type", "model")
    if kind != "model":
        raise CheckpointError(
            f"the GGUF file is of type {kind!r}, expected 'model'; name the model's own file"
        )
    architecture = metadata.get("general.architecture")
    layout = layout_of(architecture)
    reader = GGUFMetadata(metadata, tensors, load)
    tokens = metadata.get("tokenizer.ggml.tokens") or []
    values = layout.read_config(reader)
    reader.refuse_unread()
    return values | {
        "vocab_size": len(tokens) or reader.need("vocab_size"),
        "bos_token_id": token_id_from_gguf(metadata, "bos"),
        "eos_token_id": end_ids_from_gguf(metadata),
        "pad_token_id": token_id_from_gguf(metadata, "padding"),
    }


class GGUFTensors:
    """The tensors of a GGUF file by HF's names.

    Raises:
        CheckpointError: the file holds a tensor that its architecture is not known to have.
    """

    def __init__(self, file: GGUFFile | SplitGGUF, config: Mapping[str, Any]) -> None:
        self._file, self._config = file, config
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
        if unknown:
            named = ", ".join(unknown[:MAX_NAMED]) + (" ..." if len(unknown) > MAX_NAMED else "")
            raise CheckpointError(
                f"{file.path} holds {len(unknown)} tensors that are not implemented for its architecture ({named}); "
                "load the model's Hugging Face folder if its family is read"
            )

    def load(self, name: str) -> Tensor:
        """The tensor HF calls `name`, in fp32."""
        theirs, transform, part = self._sources[name]
        tensor = self._file.load(theirs, torch.float32, part=part)
        return tensor if transform is None else transform(tensor, self._config)


def _shape(
    shape: tuple[int, ...], transform: Transform | None, config: Mapping[str, Any]
) -> tuple[int, ...]:
    if transform is None:
        return shape
    try:
        return tuple(transform(torch.empty(shape, device="meta"), config).shape)
    except (RuntimeError, ZeroDivisionError):
        return shape  # it does not fit the configuration, and is reported as of wrong shape
