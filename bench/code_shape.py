"""The shape of the code base in figures, from its own syntax trees: `python bench/code_shape.py`.

`tests/unit/test_code_shape.py` holds them to their bounds. Nothing of the package is imported.
"""

import ast
import itertools
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src" / "easyllm"
MAX_COLUMNS, LONG_FUNCTION = 100, 60

# From a command to one optimizer step, and to one sampled token: each function calls the next.
STEP = [
    "cli/train.py:train",
    "train/run.py:train",
    "train/run.py:_run",
    "train/loop.py:run_steps",
    "train/loop.py:take_step",
]
TOKEN = [
    "cli/generate.py:generate",
    "cli/generate.py:_stream",
    "engine/llm.py:stream",
    "engine/engine.py:run",
    "engine/engine.py:step",
    "engine/step_sampling.py:sample_slots",
    "engine/sampling.py:sample_tokens",
]

Function = ast.FunctionDef | ast.AsyncFunctionDef


def sources() -> dict[str, ast.Module]:
    """Syntax trees by path under `src/easyllm`."""
    paths = sorted(SOURCE.rglob("*.py"))
    return {
        path.relative_to(SOURCE).as_posix(): ast.parse(path.read_text("utf-8")) for path in paths
    }


def functions_of(tree: ast.AST) -> Iterator[Function]:
    """Functions and methods, nested ones included."""
    return (node for node in ast.walk(tree) if isinstance(node, Function))


def length_of(function: Function) -> int:
    """Lines from `def` to the end, without decorators and docstring."""
    assert function.end_lineno is not None, "parsed from text"
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        assert first.end_lineno is not None, "parsed from text"
        lines -= first.end_lineno - first.lineno + 1
    return lines


def function_lengths(trees: dict[str, ast.Module]) -> dict[str, int]:
    """Lines of each function, by `path:name`; of several with one name in a file the longest."""
    found: dict[str, int] = {}
    for path, tree in trees.items():
        for function in functions_of(tree):
            name = f"{path}:{function.name}"
            texts = result_lines(function) if path.startswith("lab/labs/") else 0
            found[name] = max(found.get(name, 0), length_of(function) - texts)
    return found


def result_lines(function: Function) -> int:
    """Lines of a lab's `return Result(...)`, which is text in two languages rather than code."""
    return sum(
        (node.end_lineno or node.lineno) - node.lineno
        for node in ast.walk(function)
        if isinstance(node, ast.Return)
        and isinstance(node.value, ast.Call)
        and getattr(node.value.func, "id", "") == "Result"
    )


def public_docstrings(trees: dict[str, ast.Module]) -> tuple[int, list[str]]:
    """Number of public modules, classes, functions and methods, and those without a docstring."""
    count, without = 0, []
    for path, tree in trees.items():
        for name, node in _public(tree, path):
            count += 1
            if ast.get_docstring(node) is None:
                without.append(name)
    return count, without


def _public(
    node: ast.Module | ast.ClassDef, name: str
) -> Iterator[tuple[str, ast.Module | ast.ClassDef | Function]]:
    yield name, node
    for child in node.body:
        if not isinstance(child, ast.ClassDef | Function) or child.name.startswith("_"):
            continue
        if isinstance(child, ast.ClassDef):
            yield from _public(child, f"{name}:{child.name}")
        elif not _is_overload(child):
            yield f"{name}:{child.name}", child


def _is_overload(function: Function) -> bool:
    names = {ast.unparse(decorator).split("(")[0] for decorator in function.decorator_list}
    return bool(names & {"overload", "override"}) or any(n.endswith(".setter") for n in names)


def uses_of_any(trees: dict[str, ast.Module]) -> int:
    """How often `Any` stands in an annotation or alias."""
    return sum(
        isinstance(node, ast.Name) and node.id == "Any"
        for tree in trees.values()
        for node in ast.walk(tree)
    )


def wide_lines() -> list[str]:
    """Lines of Python and C above 100 columns, as `path:number`."""
    return [
        f"{path.relative_to(SOURCE).as_posix()}:{number}"
        for path in sorted(SOURCE.rglob("*"))
        if path.suffix in (".py", ".c", ".h")
        for number, line in enumerate(path.read_text("utf-8").splitlines(), start=1)
        if len(line) > MAX_COLUMNS
    ]


def module_graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """Modules that each module imports: at its top, under TYPE_CHECKING and inside functions."""
    names = {"easyllm." + path.removesuffix(".py").replace("/", "."): path for path in trees}
    modules = {name.removesuffix(".__init__"): path for name, path in names.items()}
    graph: dict[str, set[str]] = {}
    for module, path in modules.items():
        found: set[str] = set()
        for node in ast.walk(trees[path]):
            if isinstance(node, ast.ImportFrom) and node.module and node.level == 0:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= (inner & modules.keys()) or {node.module}
            elif isinstance(node, ast.Import):
                found |= {alias.name for alias in node.names}
        graph[module] = (found & modules.keys()) - {module}
    return graph


def include_graph() -> dict[str, set[str]]:
    """Files that each C file includes; a header also represents the C file that implements it."""
    folder = SOURCE / "ops" / "kernels"
    files = [path for path in sorted(folder.iterdir()) if path.suffix in (".c", ".h")]
    graph: dict[str, set[str]] = {}
    for path in files:
        includes = re.findall(r'^#include "([^"]+)"', path.read_text("utf-8"), re.MULTILINE)
        graph.setdefault(path.stem, set()).update(Path(name).stem for name in includes)
    return {name: others - {name} for name, others in graph.items()}


def cycles(graph: dict[str, set[str]]) -> list[list[str]]:
    """Strongly connected components of more than one node (Tarjan)."""
    index: dict[str, int] = {}
    low: dict[str, int] = {}
    stack: list[str] = []
    found: list[list[str]] = []

    def visit(name: str) -> None:
        index[name] = low[name] = len(index)
        stack.append(name)
        for other in sorted(graph.get(name, ())):
            if other not in index:
                visit(other)
                low[name] = min(low[name], low[other])
            elif other in stack:
                low[name] = min(low[name], index[other])
        if low[name] == index[name]:
            at = stack.index(name)
            if len(stack) - at > 1:
                found.append(sorted(stack[at:]))
            del stack[at:]

    for name in sorted(graph):
        if name not in index:
            visit(name)
    return found


def mutual_packages(graph: dict[str, set[str]]) -> list[tuple[str, str]]:
    """Pairs of packages that import each other."""
    pairs = {
        (module.split(".")[1], other.split(".")[1])
        for module, others in graph.items()
        for other in others
        if module.count(".") and other.count(".")
    }
    return sorted((a, b) for a, b in pairs if a < b and (b, a) in pairs)


def check_chain(trees: dict[str, ast.Module], chain: list[str]) -> int:
    """Calls from the first function to the last.

    Raises:
        ValueError: one of them does not call the next.
    """
    for caller, callee in itertools.pairwise(chain):
        path, name = caller.split(":")
        wanted = callee.split(":")[1]
        bodies = [f for f in functions_of(trees[path]) if f.name == name]
        called = {
            node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            for body in bodies
            for node in ast.walk(body)
            if isinstance(node, ast.Call)
        }
        renamed = {
            alias.asname
            for body in bodies
            for node in ast.walk(body)
            if isinstance(node, ast.ImportFrom)
            for alias in node.names
            if alias.name == wanted and alias.asname
        }
        if not called & ({wanted} | renamed):
            raise ValueError(f"{caller} does not call {wanted}; correct the chain")
    return len(chain) - 1


def measure() -> dict[str, Any]:
    """All figures."""
    trees = sources()
    lines = {p: len((SOURCE / p).read_text("utf-8").splitlines()) for p in trees}
    lengths = function_lengths(trees)
    public, without = public_docstrings(trees)
    graph = module_graph(trees)
    all_lengths = [length_of(f) for tree in trees.values() for f in functions_of(tree)]
    return {
        "python_lines": sum(lines.values()),
        "biggest_file": max((n, p) for p, n in lines.items()),
        "function_median": statistics.median(all_lengths),
        "long_functions": {k: n for k, n in sorted(lengths.items()) if n > LONG_FUNCTION},
        "hops_to_step": check_chain(trees, STEP),
        "hops_to_token": check_chain(trees, TOKEN),
        "public_docstrings_percent": round(100 * (1 - len(without) / public), 1),
        "any": uses_of_any(trees),
        "wide_lines": len(wide_lines()),
        "mutual_packages": mutual_packages(graph),
        "cycles": cycles(graph),
        "c_cycles": cycles(include_graph()),
    }


def main() -> None:
    print(json.dumps(measure(), indent=2))


if __name__ == "__main__":
    main()
