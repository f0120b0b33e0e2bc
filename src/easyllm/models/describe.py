"""Model configurations from a source or a published size, without reading any weights.

What reads files of weights and tokenizers is imported only for a source that consists of them: a
published size is described without.
"""

from pydantic import ValidationError

from easyllm.checkpoint.store import read_object
from easyllm.core.config import first_problem
from easyllm.core.errors import CheckpointError, EasyllmError, SourceError, suggest
from easyllm.core.json_types import JsonMapping, JsonObject
from easyllm.core.paths import expanded
from easyllm.models.families import FAMILIES
from easyllm.models.hf_config import CONFIG_FILE, read_config, read_files
from easyllm.models.sources import HUB_PREFIX, KNOWN_MODELS, hub_file
from easyllm.nn.config import ModelConfig

_REMEDY = "give a config.json"


def published_sizes() -> dict[str, JsonObject]:
    """Returns the `config.json` values of published models by name (`llama2-7b`)."""
    return {name: values for family in FAMILIES.values() for name, values in family.sizes.items()}


def describe(source: str) -> ModelConfig:
    """Returns the model configuration that a source or the name of a published size refers to.

    Args:
        source: any source that `load_model` accepts (a folder needs only its `config.json`, and
            for `hf:org/name` only that file is fetched), the name of a published size, or the
            path of a `config.json`.

    Raises:
        SourceError: there is no such model; the message suggests the closest name.
        CheckpointError: a file is damaged, or describes an unsupported model.

    Example:
        >>> describe("llama2-7b").num_layers
        32
    """
    sizes, path = published_sizes(), expanded(source)
    if source in KNOWN_MODELS:
        return _opened(source)
    if source in sizes:
        return _read(sizes[source], source)
    if source.startswith(HUB_PREFIX):
        path = hub_file(source.removeprefix(HUB_PREFIX), CONFIG_FILE)
        return _read(read_object(path, _REMEDY), source)
    if path.is_dir() and (path / CONFIG_FILE).is_file():
        return _read(read_files(path), source)
    if path.is_file() and path.suffix == ".json":
        return _read(read_object(path, _REMEDY), source)
    if path.is_file() and path.suffix != ".gguf":
        raise SourceError(
            f"{source!r} is a file that describes no model; give a config.json, a .gguf file, a "
            f"folder, hf:org/name, or a name such as {next(iter(sizes))}"
        )
    if path.exists() or path.suffix == ".gguf" or "/" in source:
        return _opened(source)
    known = [*KNOWN_MODELS, *sizes]
    raise SourceError(
        f"model {source!r} is not known{suggest(source, known)}; known models are "
        f"{', '.join(known)}; or give a folder, a .gguf file, a config.json or hf:org/name"
    )


def _opened(source: str) -> ModelConfig:
    from easyllm.models.load import open_source

    return open_source(source).config


def _read(values: JsonMapping, source: str) -> ModelConfig:
    try:
        return read_config(values)
    except EasyllmError:
        raise
    except (ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        reason = first_problem(error) if isinstance(error, ValidationError) else str(error)
        raise CheckpointError(
            f"the values in {source!r} do not describe a valid model ({reason}); correct them"
        ) from None
