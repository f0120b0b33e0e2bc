"""Converting an old checkpoint with pickled weights to a Hugging Face folder."""

import shutil
import tempfile
from pathlib import Path

from easyllm.checkpoint.pickled import pickled_files, write_safetensors
from easyllm.core.errors import SourceError
from easyllm.core.paths import expanded
from easyllm.pipeline.stages import convert_model

COPIED = ("*.json", "*.model", "*.jinja", "merges.txt", "vocab.txt")
"""Files that go with weights: configuration and tokenizer, no code."""


def convert_pickled(source: str, folder: Path, dtype: str | None = None) -> Path:
    """Converts a folder with `pytorch_model*.bin` to a Hugging Face folder with safetensors.

    Args:
        source: the folder.
        folder: the folder to write.
        dtype: dtype of the saved weights; None keeps that of the file.

    Raises:
        SourceError: there is no such folder.
        CheckpointError: a file is not made of tensors alone, or they do not match the family.
    """
    path = expanded(source)
    if not (path / "config.json").is_file():
        raise SourceError(f"folder {source!r} contains no config.json; give a checkpoint folder")
    files = pickled_files(path)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=".from-bin-", dir=folder.parent) as name:
        work = Path(name)
        for pattern in COPIED:
            for file in path.glob(pattern):
                shutil.copyfile(file, work / file.name)
        write_safetensors(files, work)
        return convert_model(str(work), folder, dtype, made_from=source)


__all__ = ["convert_pickled"]
