"""Writes the model or the adapter of a checkpoint from the middle of a run.

Whatever the number of ranks and the layout that wrote the checkpoint, the result is what the run
would have saved at that step: a Hugging Face folder in fp32, or an adapter in peft's format.
"""

from pathlib import Path

import torch
from torch import Tensor

from easyllm.checkpoint.stream import Under
from easyllm.core.atomic import check_output_free, write_json
from easyllm.core.config import validate
from easyllm.core.device import parse_dtype
from easyllm.core.errors import CheckpointError, ConfigError
from easyllm.core.finite import all_finite
from easyllm.core.manifest import MANIFEST_FILE, Manifest, hash_path
from easyllm.core.run_folder import RECIPE_FILE
from easyllm.core.yaml_text import read_yaml
from easyllm.models.save import save_streamed
from easyllm.train.config import TrainConfig
from easyllm.train.factories import BaseModelSource, build_model, find_base_model
from easyllm.train.objectives import build_objective
from easyllm.train.preflight import empty_model
from easyllm.train.result import end_ids, save_trained_adapter, set_full_parameters
from easyllm.train.sharded_state import open_tensors

MASTER = "optimizer.master."


def consolidate(checkpoint: Path, folder: Path, *, dtype: str | None = None) -> Path:
    """Writes the model of a checkpoint with one tensor in memory at a time, or its adapter.

    Args:
        checkpoint: a folder `checkpoints/step-N` (or `checkpoints/best`) of a run.
        folder: the folder to write.
        dtype: dtype of the saved weights; None is fp32, the dtype that is trained in.

    Returns:
        `folder`.

    Raises:
        ConfigError: the checkpoint is not in the folder of its run, or its values do not fit
            `dtype`.
        CheckpointError: the checkpoint is incomplete or damaged.
        SourceError: the model that the run began with is missing.
        OutputError: the folder is not empty, or cannot be written.
    """
    check_output_free(folder)
    recipe = checkpoint.absolute().parent.parent / RECIPE_FILE
    if not recipe.is_file():
        raise ConfigError(
            f"checkpoint {str(checkpoint)!r} is not in the folder of its run: {str(recipe)!r} does "
            "not exist; leave checkpoints where the run wrote them"
        )
    config = validate(TrainConfig, read_yaml(recipe), source=str(recipe))
    try:
        tensors = open_tensors(checkpoint)
    except OSError as error:
        raise CheckpointError(f"checkpoint {str(checkpoint)!r} cannot be read ({error})") from None
    origin = find_base_model(config)
    manifest = Manifest.create(
        "convert",
        config={"model": str(checkpoint), "dtype": dtype},
        inputs={"checkpoint": hash_path(checkpoint)},
    ).model_dump(mode="json")
    if config.adapter is not None:
        if dtype is not None:
            raise ConfigError(
                f"--dtype is that of a model, but {str(checkpoint)!r} has an adapter; remove it"
            )
        _save_adapter(config, origin, Under(tensors, "adapter."), Under(tensors, MASTER), folder)
        write_json(folder / MANIFEST_FILE, manifest)
        return folder
    empty = empty_model(config, origin, build_objective(config.objective))
    weights = Under(tensors, MASTER)
    to = torch.float32 if dtype is None else parse_dtype(dtype)

    def read(name: str) -> Tensor:
        try:
            value = weights[name].float()
        except KeyError:  # a parameter group that is frozen
            value = origin.values([name])[name]
        if not all_finite(value.to(to)):
            raise ConfigError(
                f"{name} of {str(checkpoint)!r} has values that {to} cannot hold; use a dtype with "
                "a larger range, or an earlier checkpoint"
            )
        return value

    return save_streamed(
        empty,
        read,
        folder,
        dtype=to,
        tokenizer=origin.tokenizer,
        end_ids=end_ids(config, origin.tokenizer),
        extra_files={MANIFEST_FILE: manifest},
    )


def _save_adapter(
    config: TrainConfig, origin: BaseModelSource, own: Under, weights: Under, folder: Path
) -> None:
    """Attaches the adapter with the values of a checkpoint, and writes it."""
    objective = build_objective(config.objective)
    trained = build_model(config, origin, objective, torch.device("cpu"))
    assert trained.adapters is not None, "the recipe has an adapter"
    parameters = dict(trained.model.named_parameters())
    missing = sorted(set(weights) - set(parameters))
    if missing:
        raise CheckpointError(
            f"the checkpoint has {missing[0]}, which the recipe's model has not; restore the "
            "recipe and the model that it was trained with"
        )
    values = {name: weights[name].view(parameters[name].shape).clone() for name in weights}
    set_full_parameters(trained.model, values)
    trained.adapters.load_state({name: tensor.clone() for name, tensor in own.items()})
    ends = end_ids(config, origin.tokenizer)
    save_trained_adapter(trained.model, config, folder, ends)


__all__ = ["consolidate"]
