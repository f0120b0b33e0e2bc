"""Rules of the code base: import order of packages, cost of importing, and exported names."""

import ast
import importlib
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import easyllm

SOURCE = Path(easyllm.__file__).parent
ORDER = [
    *("core", "ops"),
    *("tokenizer", "checkpoint", "nn", "parallel"),
    *("corpus", "examples", "batches", "quant", "adapters", "models", "plan", "engine"),
    *("train", "reporting", "evaluate", "prompt", "serve"),
    *("rl", "verify", "pipeline", "cli"),
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
    graph = {}
    for path in FILES:
        name = ".".join(("easyllm", *path.relative_to(SOURCE).with_suffix("").parts))
        graph[name.removesuffix(".__init__")] = _top_level_modules(path)
    done, path_now = set(), []

    def visit(name):
        assert name not in path_now, f"circle: {[*path_now[path_now.index(name) :], name]}"
        if name in done or name not in graph:
            return
        path_now.append(name)
        for other in graph[name]:
            visit(other)
        path_now.pop()
        done.add(name)

    for name in graph:
        visit(name)


def _top_level_modules(path: Path) -> set[str]:
    """Returns the modules imported on import of the file (not in TYPE_CHECKING or functions)."""
    own_package = ".".join(("easyllm", *path.relative_to(SOURCE).parts[:-1]))
    found = set()
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("easyllm."):
            # a package that imports its own modules is circular only if they import the package
            submodules = {f"{node.module}.{alias.name}" for alias in node.names}
            existing = {m for m in submodules if _exists(m)}
            found |= existing or {node.module}
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("easyllm.")}
    return found - {own_package}


def _exists(module: str) -> bool:
    path = SOURCE.joinpath(*module.split(".")[1:])
    return path.with_suffix(".py").exists() or (path / "__init__.py").exists()


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


@pytest.mark.parametrize("verb", [[], ["train"], ["serve"], ["quickstart"]])
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
