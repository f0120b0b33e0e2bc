"""What a run leaves: an adapter in peft's format, or a model as a Hugging Face folder."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor, nn

from easyllm.adapters import save_adapter
from easyllm.core.atomic import write_json
from easyllm.models import hf_module_name
from easyllm.models.hf_config import GENERATION_FILE, with_end_ids
from easyllm.nn.decoder import Decoder
from easyllm.tokenizer.tokenizer import Tokenizer
from easyllm.tokenizer.turn_ends import turn_end_ids
from easyllm.train.config import TrainConfig
from easyllm.train.factories import source_name
from easyllm.train.objectives import objective_kind


def end_ids(config: TrainConfig, tokenizer: Tokenizer) -> Sequence[int]:
    """Returns the end-of-turn tokens that a recipe trains; they become EOS ids of the result."""
    chats = config.data.has_chats and objective_kind(config.objective).generates
    return turn_end_ids(tokenizer) if chats else ()


def set_full_parameters(model: Decoder, values: Mapping[str, Tensor]) -> None:
    """Replaces parameters, such as low-precision copies by the fp32 master weights."""
    for name, value in values.items():
        owner, _, leaf = name.rpartition(".")
        setattr(model.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))


def save_trained_adapter(
    model: Decoder, config: TrainConfig, folder: Path, ends: Sequence[int], *, replace: bool = False
) -> None:
    """Writes the adapter of a trained model.

    Args:
        model: the model with its adapter.
        config: the run's recipe.
        folder: the folder to write.
        ends: what `end_ids` returned.
        replace: whether to overwrite an existing folder.

    Raises:
        OutputError: the folder is not empty, or cannot be written.
    """
    save_adapter(
        model,
        folder,
        module_name=hf_module_name(model),
        base=source_name(config),
        replace=replace,
    )
    if ends:
        ids = with_end_ids(model.config, ends).eos_token_ids
        write_json(folder / GENERATION_FILE, {"eos_token_id": list(ids)})


__all__ = ["end_ids", "save_trained_adapter", "set_full_parameters"]
