"""The installation commands, run in an empty environment; opt-in, because they download torch.

EASYLLM_TEST_INSTALL=1 python -m pytest tests/pipeline/test_installation.py
"""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import easyllm

ROOT = Path(easyllm.__file__).parents[2]
TEXTS = [*ROOT.glob("src/**/*.py"), *ROOT.glob("docs/**/*.md"), ROOT / "CONTRIBUTING.md"]


def test_nothing_promises_a_package_index():
    """Until it is published, `pip install easyllm-stack` installs nothing, or another package."""
    promise = re.compile(r"pip install [^\n]*easyllm-stack(?!\S* @ git)")
    assert not [str(path) for path in TEXTS if promise.search(path.read_text(encoding="utf-8"))]


def test_every_extra_named_in_a_message_exists():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = set()
    for path in TEXTS:
        text = path.read_text(encoding="utf-8")
        found = [
            *re.findall(r"pip install '\.\[([\w,]+)\]'", text),
            *re.findall(r"install\('(\w+)'\)", text),
        ]
        named |= {extra for group in found for extra in group.split(",")}
    assert named
    assert named <= set(project["optional-dependencies"])


@pytest.mark.slow
@pytest.mark.skipif(
    not os.environ.get("EASYLLM_TEST_INSTALL"), reason="set EASYLLM_TEST_INSTALL=1 to fetch torch"
)
def test_a_clone_installs_into_an_empty_environment(tmp_path):
    clone, venv = tmp_path / "easyllm", tmp_path / "venv"
    run("git", "clone", "--quiet", ROOT, clone)
    run(sys.executable, "-m", "venv", venv)
    python = venv / "bin" / "python"
    quiet = ("--quiet", "--disable-pip-version-check")
    constraints = ("--constraint", clone / "constraints.txt")
    run(python, "-m", "pip", "install", *quiet, *constraints, clone)
    shown = run(venv / "bin" / "easyllm", "plan", "llama2-7b", "--json", cwd=tmp_path)
    assert json.loads(shown)["parameters_total"] == 6_738_415_616
    recipe = run(venv / "bin" / "easyllm", "plan", "no-recipe.yaml", cwd=tmp_path, code=2)
    assert "sft-lora" in recipe  # the built-in recipes are installed
    assert str(clone) not in run(
        python, "-c", "import easyllm; print(easyllm.__file__)", cwd=tmp_path
    )


def run(*words, cwd=None, code=0):
    """Returns what a command prints on both streams."""
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    done = subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT if code else subprocess.PIPE,
    )
    assert done.returncode == code, done.stdout + (done.stderr or "")
    return done.stdout
