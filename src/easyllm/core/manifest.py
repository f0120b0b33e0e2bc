"""Manifests: the inputs, configuration and versions of a result, so that it can be reproduced."""

import hashlib
import json
import platform
import sys
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path

from pydantic import Field

from easyllm.core.config import Config
from easyllm.core.errors import CheckpointError
from easyllm.core.json_types import JsonMapping, JsonObject

MANIFEST_FILE = "manifest.json"
RECORDED_PACKAGES = ("easyllm-stack", "torch", "numpy", "safetensors", "tokenizers", "gguf")


class Manifest(Config):
    """Configuration, input hashes and versions that produced a result, saved as `manifest.json`."""

    kind: str = Field(
        description="What produced the result: train, convert, merge, corpus, tokenizer ..."
    )
    created: str = Field(description="Time of creation in UTC, ISO 8601.")
    config: JsonObject = Field(description="The configuration that produced the result.")
    inputs: dict[str, str] = Field(description="Name or path of each input -> its SHA-256.")
    versions: dict[str, str] = Field(
        description="Versions of Python, the platform and the packages that affect results."
    )
    results: JsonObject = Field(
        default_factory=dict, description="Figures of the result, such as losses and counts."
    )

    @classmethod
    def create(
        cls,
        kind: str,
        *,
        config: JsonMapping,
        inputs: Mapping[str, str],
        results: JsonMapping | None = None,
    ) -> "Manifest":
        """Returns a manifest with the current time; `inputs` maps names to hashes of the inputs."""
        return cls(
            kind=kind,
            created=datetime.now(UTC).isoformat(timespec="seconds"),
            config=dict(config),
            inputs=dict(inputs),
            versions=versions(),
            results=dict(results or {}),
        )

    @classmethod
    def read(cls, path: Path) -> "Manifest":
        """Returns the manifest stored in the file `path`.

        Raises:
            CheckpointError: the file is not a valid manifest.
        """
        try:
            return cls.model_validate_json(path.read_bytes())
        except ValueError as error:
            raise CheckpointError(
                f"{path} is not a manifest ({error}); run the step again"
            ) from None


def versions() -> dict[str, str]:
    """Returns the versions of Python, the platform and the packages that affect results."""
    found = {"python": platform.python_version(), "platform": sys.platform}
    for name in RECORDED_PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def hash_value(value: object) -> str:
    """Returns the SHA-256 of a JSON-like value, independent of the order of keys."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    return hashlib.sha256(text.encode("utf-8")).hexdigest()


def hash_file(path: Path) -> str:
    """Returns the SHA-256 of a file's bytes."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_path(path: Path) -> str:
    """Returns the SHA-256 of a file, or of the names and contents of all files in a folder."""
    path = Path(path)
    if path.is_file():
        return hash_file(path)
    return hash_value(
        {str(p.relative_to(path)): hash_file(p) for p in sorted(_files_below(path))},
    )


def _files_below(path: Path) -> Iterable[Path]:
    return (p for p in path.rglob("*") if p.is_file() and not p.name.startswith("."))
