"""Runs a lab and writes what it found: `numbers.json`, `figure.svg`, `figure.png`, a page."""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from easyllm.core.atomic import check_output_free, check_writable, write_atomic, write_json
from easyllm.core.config import apply_overrides, validate
from easyllm.core.errors import ConfigError, OutputError, install
from easyllm.core.json_types import JsonObject
from easyllm.lab.figure import draw
from easyllm.lab.lab import NUMBERS, Lab, LabConfig, Language, Result
from easyllm.lab.page import PAGE_NAME, build_page

SVG, PNG = "figure.svg", "figure.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished:
    """A lab that ran.

    Attributes:
        lab: the lab.
        parameters: its parameters.
        result: what it returned.
        seconds: how long it took.
        folder: where its files are.
    """

    lab: Lab
    parameters: LabConfig
    result: Result
    seconds: float
    folder: Path

    def as_dict(self) -> JsonObject:
        """Returns the content of `numbers.json`."""
        return numbers_of(self.lab, self.parameters, self.result)


def run_lab(
    lab: Lab,
    output: Path,
    *,
    words: Sequence[str] = (),
    quick: bool = False,
    language: Language = "en",
) -> Finished:
    """Runs a lab and writes its files to `output`, replacing those of an earlier run of it.

    Args:
        lab: the lab.
        output: the folder.
        words: parameters as `key=value`.
        quick: whether sizes are those of `quick_values`, unless `words` set them.
        language: language of the page.

    Raises:
        ConfigError: a parameter is not valid, or a module is not installed.
        OutputError: the folder has other contents.
    """
    parameters = check_lab(lab, output, words=words, quick=quick)
    started = time.perf_counter()
    result = lab.run(parameters, output) if lab.in_folder else lab.run(parameters)
    seconds = time.perf_counter() - started
    svg, png = draw(result.figures)
    output.mkdir(parents=True, exist_ok=True)
    write_atomic(output / SVG, svg)
    write_atomic(output / PNG, png)
    for name, spoken in pages_of(lab, language).items():
        page = build_page(lab, parameters, result, svg.decode(), language=spoken)
        write_atomic(output / name, page)
    write_json(output / NUMBERS, numbers_of(lab, parameters, result))
    return Finished(lab=lab, parameters=parameters, result=result, seconds=seconds, folder=output)


def check_lab(
    lab: Lab, output: Path, *, words: Sequence[str] = (), quick: bool = False
) -> LabConfig:
    """Checks that a lab can run, and returns its parameters.

    Args:
        lab, output, words, quick: as for `run_lab`.

    Raises:
        ConfigError, OutputError: as for `run_lab`.
    """
    parameters = parameters_of(lab, words, quick=quick)
    check_installed(lab)
    _check_folder(lab, output)
    check_writable(output)
    return parameters


def parameters_of(lab: Lab, words: Sequence[str], *, quick: bool) -> LabConfig:
    """Returns the parameters of a run.

    Raises:
        ConfigError: one is not known or outside its range.
    """
    values = apply_overrides(dict(lab.parameters.quick_values) if quick else {}, words)
    return validate(lab.parameters, values, source=f"lab {lab.name}", overrides=words)


def check_installed(lab: Lab) -> None:
    """Checks that the module that a lab needs is installed.

    Raises:
        ConfigError: it is not.
    """
    if lab.module is None:
        return
    module, extra = lab.module
    if find_spec(module) is None:
        raise ConfigError(
            f"lab {lab.name} needs {module}, which is not installed; {install(extra)}"
        )


def pages_of(lab: Lab, language: Language) -> dict[str, Language]:
    """Returns the pages to write with their languages: of a long run, one in each."""
    found: dict[str, Language] = {PAGE_NAME: language}
    return found | ({"index.en.html": "en", "index.zh.html": "zh"} if lab.in_folder else {})


def numbers_of(lab: Lab, parameters: LabConfig, result: Result) -> JsonObject:
    """Returns the content of `numbers.json`."""
    return {
        "lab": lab.name,
        "rows": list(lab.rows),
        "parameters": parameters.model_dump(mode="json"),
        "numbers": {number.key: number.value for number in result.numbers},
        "claims": [
            {
                "claim": claim.claim.en,
                "seen": claim.seen.en,
                "outcome": claim.outcome,
                "reason": None if claim.reason is None else claim.reason.en,
            }
            for claim in result.claims
        ],
        "series": dict(result.series),
    }


def _check_folder(lab: Lab, output: Path) -> None:
    """Checks that a folder is new, empty, or that of an earlier run of the lab."""
    if not output.is_dir() or not any(output.iterdir()):
        if output.exists() and not output.is_dir():
            check_output_free(output)
        return
    try:
        found = json.loads((output / lab.marker).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or found.get("lab") != lab.name:
        raise OutputError(
            f"the folder {str(output)!r} holds something else than lab {lab.name}; "
            "choose another with output=DIR"
        )


__all__ = [
    "NUMBERS",
    "PNG",
    "SVG",
    "Finished",
    "check_installed",
    "check_lab",
    "numbers_of",
    "run_lab",
]
