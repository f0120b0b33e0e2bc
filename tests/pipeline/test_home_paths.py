"""`~` is the home folder in recipes, overrides and arguments, as in a shell."""

import json
import re
from pathlib import Path

import pytest
import yaml

from easyllm import cli
from easyllm.cli.output import home_path
from easyllm.core.paths import expanded
from easyllm_command import GOOD, RECIPE, easyllm

PARAMETER = re.compile(r"Annotated\[\s*Path(?: \| None)?,\s*typer\.\w+\([^)]*\)")
"""A path among the parameters of a command."""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A home folder with a file of rows, and another working directory."""
    (tmp_path / "home").mkdir()
    (tmp_path / "cwd").mkdir()
    (tmp_path / "home" / "rows.jsonl").write_text(GOOD)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path / "cwd")
    yield tmp_path / "home"
    assert list((tmp_path / "cwd").iterdir()) == [], "nothing is written to a folder named ~"


def test_a_training_reads_and_writes_below_the_home_folder(home, tiny_folder, tmp_path):
    recipe = home / "recipe.yaml"
    recipe.write_text(RECIPE.format(model=tiny_folder, data="~/rows.jsonl", output="~/run"))
    done = easyllm("train", "~/recipe.yaml", "max_steps=1", "retention=[~/rows.jsonl]", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["output"] == str(home / "run")
    assert (home / "run" / "adapter").is_dir()


def test_a_pipeline_reads_and_writes_below_the_home_folder(home, tiny_folder):
    (home / "model").symlink_to(tiny_folder)
    data = {"rows": "~/rows.jsonl"}
    stage = {"kind": "evaluate", "model": "~/model", "data": data, "max_tokens": 2}
    path = home / "recipe.yaml"
    path.write_text(yaml.safe_dump({"name": "r", "output": "~/run", "stages": {"score": stage}}))
    done = easyllm("run", path)
    assert done.returncode == 0, done.stderr
    assert (home / "run" / "stages" / "score.json").is_file()


def test_a_corpus_reads_and_writes_below_the_home_folder(home, tiny_folder):
    (home / "text.txt").write_text("A short text.\n" * 9)
    path = home / "corpus.yaml"
    values = {"name": "c", "output": "~/corpus", "tokenizer": str(tiny_folder), "clean": None}
    path.write_text(yaml.safe_dump(values | {"sources": {"a": {"paths": "~/text.txt"}}}))
    done = easyllm("data", "build", path)
    assert done.returncode == 0, done.stderr
    assert (home / "corpus" / "shards" / "manifest.json").is_file()


def test_arguments_are_expanded(home, tiny_folder):
    done = easyllm("convert", tiny_folder, "~/converted")
    assert done.returncode == 0, done.stderr
    assert (home / "converted" / "config.json").is_file()
    assert easyllm("eval", "~/converted", "~/rows.jsonl").returncode == 0


def test_every_path_of_a_command_is_expanded():
    files = sorted(Path(cli.__file__).parent.glob("*.py"))
    found = {f"{file.name}: {m[0]}" for file in files for m in PARAMETER.finditer(file.read_text())}
    assert len(found) > 8
    assert [text for text in found if "callback=home_path" not in text] == []


def test_an_unknown_user_is_no_home_folder():
    assert expanded("~nosuchuser/x") == Path("~nosuchuser/x")
    assert home_path(None) is None
    done = easyllm("chat", "~nosuchuser/x")
    assert done.returncode == 2
    assert "does not exist" in done.stderr
