"""Reads sentence encoders of the family BERT from Hugging Face folders.

The pooling and the prefixes of questions and passages come from the files that the
sentence-transformers library writes next to the weights, where they exist.
"""

from pathlib import Path

from torch import Tensor

from easyllm.checkpoint.store import TensorFolder, read_object
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonObject
from easyllm.embed.encoder import EncoderShape, TextEncoder
from easyllm.ops.pooling import SequencePooling

_REMEDY = "copy the folder again"
_LAYER = {
    "mixer.q_proj": "attention.self.query",
    "mixer.k_proj": "attention.self.key",
    "mixer.v_proj": "attention.self.value",
    "mixer.o_proj": "attention.output.dense",
    "mixer_after_norm": "attention.output.LayerNorm",
    "feed_forward.up_proj": "intermediate.dense",
    "feed_forward.down_proj": "output.dense",
    "feed_forward_after_norm": "output.LayerNorm",
}


def is_bert(folder: Path) -> bool:
    """Returns whether a folder contains a model of the type `bert`."""
    file = folder / "config.json"
    return file.is_file() and read_object(file, _REMEDY).get("model_type") == "bert"


def load_bert(folder: Path) -> TextEncoder:
    """Loads an encoder from a folder with `config.json` and safetensors.

    Raises:
        CheckpointError: the configuration is not supported, or tensors are missing.
    """
    config = read_object(folder / "config.json", _REMEDY)
    model = TextEncoder(_shape(config, folder))
    with TensorFolder(folder) as tensors:
        prefix = "bert." if "bert.embeddings.word_embeddings.weight" in tensors.shapes else ""
        names = file_names(model)
        missing = [n for n in [*names.values(), TYPES] if prefix + n not in tensors.shapes]
        if missing:
            raise CheckpointError(
                f"{folder} lacks the tensor {missing[0]} (and {len(missing) - 1} others); {_REMEDY}"
            )
        state = {ours: tensors.load(prefix + theirs).float() for ours, theirs in names.items()}
        types = tensors.load(prefix + TYPES).float()
    return with_weights(model, state, types[0])


def with_weights(model: TextEncoder, state: dict[str, Tensor], type_row: Tensor) -> TextEncoder:
    """Returns the model with its weights, frozen and in evaluation mode.

    Args:
        model: an encoder without weights.
        state: the weights by our names; those of packed storages are set already.
        type_row: [D], the embedding of the first segment.
    """
    positions = "embedding_position.weight"
    state[positions] = state[positions] + type_row
    model.load_state_dict(state, assign=True, strict=False)
    absent = [
        name for name, value in model.named_parameters() if name not in state and value.numel()
    ]
    assert not absent, f"weights without a value: {absent}"
    return model.requires_grad_(False).eval()


TYPES = "embeddings.token_type_embeddings.weight"


def file_names(model: TextEncoder) -> dict[str, str]:
    """Returns the name in BERT's files of each of our weights."""
    names = {
        "embed_tokens.weight": "embeddings.word_embeddings.weight",
        "embedding_position.weight": "embeddings.position_embeddings.weight",
        "embedding_norm.weight": "embeddings.LayerNorm.weight",
        "embedding_norm.bias": "embeddings.LayerNorm.bias",
    }
    for number in range(model.config.num_layers):
        for ours, theirs in _LAYER.items():
            for kind in ("weight", "bias"):
                names[f"layers.{number}.{ours}.{kind}"] = f"encoder.layer.{number}.{theirs}.{kind}"
    return names


def pooling_of(folder: Path) -> SequencePooling:
    """Returns the pooling of a folder, the mean if no file names one.

    Raises:
        CheckpointError: it is neither the mean nor the first or the last token.
    """
    file = folder / "1_Pooling" / "config.json"
    if not file.is_file():
        return "mean"
    values = read_object(file, _REMEDY)
    modes: dict[str, SequencePooling] = {
        "pooling_mode_mean_tokens": "mean",
        "pooling_mode_cls_token": "first",
        "pooling_mode_lasttoken": "last",
    }
    chosen = [
        name for name, on in values.items() if name.startswith("pooling_mode_") and on is True
    ]
    if len(chosen) != 1 or chosen[0] not in modes:
        raise CheckpointError(
            f"{file} selects {', '.join(chosen) or 'no pooling'}, expected one of "
            f"{', '.join(modes)}; use another encoder"
        )
    return modes[chosen[0]]


def prefixes_of(folder: Path) -> tuple[str, str]:
    """Returns the texts that belong before a question and before a passage; empty if none."""
    file = folder / "config_sentence_transformers.json"
    prompts = read_object(file, _REMEDY).get("prompts", {}) if file.is_file() else {}
    passage = prompts.get("passage") or prompts.get("document") or ""
    return prompts.get("query") or "", passage


def _shape(config: JsonObject, folder: Path) -> EncoderShape:
    """Reads the sizes from a `config.json`.

    Raises:
        CheckpointError: a value is missing or not supported.
    """
    for key, expected in (("hidden_act", "gelu"), ("position_embedding_type", "absolute")):
        if config.get(key, expected) != expected:
            raise CheckpointError(
                f"{folder / 'config.json'} has {key} {config[key]!r}, expected {expected!r}; use "
                "another encoder"
            )
    try:
        return EncoderShape(
            vocab_size=config["vocab_size"],
            hidden_size=config["hidden_size"],
            num_layers=config["num_hidden_layers"],
            num_heads=config["num_attention_heads"],
            intermediate_size=config["intermediate_size"],
            max_seq_len=config["max_position_embeddings"],
            norm_eps=config.get("layer_norm_eps", 1e-12),
        )
    except KeyError as error:
        raise CheckpointError(f"{folder / 'config.json'} lacks {error}; {_REMEDY}") from None


__all__ = ["file_names", "is_bert", "load_bert", "pooling_of", "prefixes_of", "with_weights"]
