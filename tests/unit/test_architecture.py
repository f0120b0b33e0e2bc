"""Rules of the code base: import order of packages, cost of importing, and exported names."""

import ast
import importlib
import importlib.util
import pkgutil
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest

import easyllm

SOURCE = Path(easyllm.__file__).parent
ORDER = [
    *("core", "ops"),
    *("tokenizer", "checkpoint", "nn", "parallel"),
    *("corpus", "examples", "batches", "quant", "adapters", "models", "plan", "engine"),
    *("train", "reporting", "prompt", "embed", "retrieval", "evaluate", "serve"),
    *("rl", "verify", "probe", "pipeline", "lab", "cli"),
]
FORBIDDEN_NAMES = {"utils.py", "common.py", "helpers.py", "misc.py"}
FILES = sorted(SOURCE.rglob("*.py"))


def imports_of(path: Path) -> set[str]:
    """Returns the packages of easyllm that a file imports anywhere."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
            names = [node.module]
            if node.module == "easyllm":
                names = [f"easyllm.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        else:
            continue
        found |= {name.split(".")[1] for name in names if name.startswith("easyllm.")}
    return found


def test_every_package_is_in_the_import_order():
    folders = {p.name for p in SOURCE.iterdir() if p.is_dir() and (p / "__init__.py").exists()}
    assert folders <= set(ORDER)


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(SOURCE)))
def test_a_folder_imports_only_folders_above_it(path):
    parts = path.relative_to(SOURCE).parts
    if len(parts) == 1:
        return  # easyllm/__init__.py re-exports names lazily
    here = ORDER.index(parts[0])
    below = {name for name in imports_of(path) if name in ORDER and ORDER.index(name) > here}
    assert not below, f"{parts[0]} may not import {below}"


def test_modules_have_no_circular_imports():
    """Imports under TYPE_CHECKING and inside functions count too."""
    shape = _code_shape()
    assert shape.cycles(shape.module_graph(shape.sources())) == []


def test_a_cycle_hidden_in_a_function_or_under_type_checking_is_found():
    sources = {
        "a.py": "def run():\n    from easyllm.b import y",
        "b.py": "if TYPE_CHECKING:\n    from easyllm import c",
        "c.py": "import easyllm.a",
        "d.py": "import easyllm.c",
    }
    shape = _code_shape()
    graph = shape.module_graph({path: ast.parse(text) for path, text in sources.items()})
    assert shape.cycles(graph) == [["easyllm.a", "easyllm.b", "easyllm.c"]]


def _code_shape() -> ModuleType:
    """Returns `bench/code_shape.py`, which is a script outside any package."""
    path = Path(__file__).parents[2] / "bench" / "code_shape.py"
    spec = importlib.util.spec_from_file_location("code_shape", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_no_dumping_ground_names():
    assert not [p for p in FILES if p.name in FORBIDDEN_NAMES]


def test_transformers_is_imported_by_the_reference_file_only():
    allowed = SOURCE / "verify" / "reference.py"
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [node.module or ""]
            for name in names:
                outside = name.split(".")[0] in {"transformers", "peft", "trl"}
                assert not outside or path == allowed, f"{path} imports {name}"


def test_nothing_reads_pickles_or_runs_code_from_files():
    forbidden = {"pickle", "dill", "cloudpickle", "marshal", "shelve"}
    for path in FILES:
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                assert not forbidden & {a.name.split(".")[0] for a in node.names}, path
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
                assert node.func.id not in {"eval", "exec"}, path
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert (node.value.id, node.attr) != ("torch", "load"), path


def test_importing_the_package_loads_no_torch():
    code = "import easyllm, sys; print(any(m.split('.')[0] == 'torch' for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@pytest.mark.parametrize(
    "verb",
    [[], ["train"], ["serve"], ["quickstart"], ["generate"], ["bench", "engine"], ["schema"]],
)
def test_help_does_not_import_torch(verb):
    code = (
        "import sys; sys.argv = ['easyllm', *{verb!r}, '--help']\n"
        "from easyllm.cli.main import main\n"
        "try: main()\nexcept SystemExit as e: code = e.code\n"
        "assert not code, code\n"
        "assert not any(m.split('.')[0] in ('torch', 'fastapi', 'numpy') for m in sys.modules)"
    ).replace("{verb!r}", repr(verb))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "Usage" in done.stdout


def test_every_command_shows_examples_in_its_help():
    from typer.main import get_command

    from easyllm.cli.main import app

    for name, command in get_command(app).commands.items():
        assert f"easyllm {name}" in (command.help or ""), f"easyllm {name} --help shows no example"


def test_exported_names_exist():
    for module in pkgutil.walk_packages([str(SOURCE)], "easyllm."):
        loaded = importlib.import_module(module.name)
        for name in getattr(loaded, "__all__", ()):
            assert hasattr(loaded, name), f"{module.name}.__all__ names {name}"
    for name in easyllm.__all__:
        assert getattr(easyllm, name) is not None
