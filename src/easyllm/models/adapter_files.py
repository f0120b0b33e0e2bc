"""Loading an adapter from a folder and attaching it to a model."""

from pathlib import Path

from easyllm.adapters import load_adapter, read_adapter
from easyllm.adapters.peft_format import CONFIG, WEIGHTS, AdapterFile, read_description
from easyllm.adapters.peft_values import check_values
from easyllm.adapters.peft_whole import HEAD
from easyllm.checkpoint.store import open_safetensors
from easyllm.core.errors import ConfigError, EasyllmError
from easyllm.core.paths import expanded
from easyllm.models.heads import to_classifier
from easyllm.models.hf_names import hf_module_name
from easyllm.nn.decoder import Decoder


def check_adapter(folder: Path) -> None:
    """Checks that a folder holds an adapter with whole files, without reading its tensors.

    Raises:
        CheckpointError: there is none, or a file is damaged or truncated.
    """
    check_values(read_description(folder), folder / CONFIG)
    with open_safetensors(folder / WEIGHTS):
        pass


def add_adapter(
    model: Decoder, folder: str | Path | AdapterFile, *, name: str = "", base: str = ""
) -> Decoder:
    """Loads an adapter from a folder and attaches it to the model.

    A classification head that was trained with the adapter is loaded too. If the embedding and the
    output head are tied and the adapter changes them differently, the head is untied first.

    Args:
        model: the model, changed in place.
        folder: the folder of the adapter, in peft format, or what was read from it
            (`adapters.read_adapter`).
        name: name under which several adapters are selected per sequence
            (`ForwardContext.adapters`); without a name, the adapter applies to every sequence.
        base: the source of `model`, for messages.

    Returns:
        `model` itself.

    Raises:
        CheckpointError: the folder contains no adapter, or one for another model.
        ConfigError: the model already has an adapter, or a named adapter has its own
            classification head.
    """
    file = folder if isinstance(folder, AdapterFile) else read_adapter(expanded(folder))
    labels = file.num_labels()
    another_head = labels is not None and model.config.num_labels != labels
    own_head = file.has_own_head(model, hf_module_name(model))
    if name and another_head:
        raise ConfigError(
            f"the adapter in {str(file.folder)!r} has a classification head with {labels} labels "
            "and cannot be loaded by name alongside others; load it alone"
        )
    before = model.config, model.lm_head, model.score

    def undo() -> None:
        heirs = [a for a in model.adapter_sets.values() if HEAD in a.linears]
        if own_head and heirs:  # other adapters still change the head, so it stays untied for now
            heirs[0].undo.append(undo)
        else:
            model.config, model.lm_head, model.score = before

    try:
        if another_head:
            assert labels is not None, "another_head implies a number of labels"
            to_classifier(model, labels)
        if own_head:
            model.untie_head()
        names = hf_module_name(model)
        adapters = load_adapter(model, file, module_name=names, name=name, base=base)
    except EasyllmError:
        undo()
        raise
    if another_head or own_head:
        adapters.undo.append(undo)
    return model


__all__ = ["add_adapter", "check_adapter"]
