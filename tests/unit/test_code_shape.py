"""The figures of bench/code_shape.py stay within their bounds, so that the code stays readable."""

import ast
import importlib.util
from pathlib import Path

import pytest

from conftest import SLOW

ROOT = Path(__file__).parents[2]
LONG = {
    "ops/gpu/paged_attention.py:_split_kernel": "a GPU kernel keeps its state in registers",
}
"""Functions above 60 lines, at most ten, each with its reason."""


@pytest.fixture(scope="module")
def code_shape():
    spec = importlib.util.spec_from_file_location("code_shape", ROOT / "bench" / "code_shape.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def figures(code_shape):
    return code_shape.measure()


def lines_of(*folders, suffixes=(".py",)):
    """Yields the path and the lines of each file in folders of the project."""
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*")):
            if path.suffix in suffixes:
                yield path.relative_to(ROOT).as_posix(), path.read_text("utf-8").splitlines()


# ---- sizes


def test_no_file_is_longer_than_450_lines(figures):
    assert figures["biggest_file"][0] <= 450, figures["biggest_file"]


def test_no_test_file_is_longer_than_600_lines():
    assert [(path, len(lines)) for path, lines in lines_of("tests") if len(lines) > 600] == []


def test_the_files_that_start_first_exist():
    assert [name for name in SLOW if not (ROOT / "tests" / name).is_file()] == []


def test_functions_have_at_most_60_lines(figures):
    assert len(LONG) <= 10
    assert {name: n for name, n in figures["long_functions"].items() if name not in LONG} == {}


def test_half_of_the_functions_have_at_most_8_lines(figures):
    assert figures["function_median"] <= 8


def test_no_line_of_the_source_is_wider_than_100_columns(code_shape):
    assert code_shape.wide_lines() == []


def test_no_line_of_python_is_wider_than_100_columns():
    folders = ("src", "tests", "bench", "tools")
    wide = [
        f"{path}:{number}"
        for path, lines in lines_of(*folders)
        for number, line in enumerate(lines, start=1)
        if len(line) > 100
    ]
    assert wide == []


# ---- structure


def test_few_calls_separate_a_command_from_a_step_and_from_a_token(figures):
    assert figures["hops_to_step"] <= 4
    assert figures["hops_to_token"] <= 6


def test_no_packages_import_each_other(figures):
    assert figures["mutual_packages"] == []


def test_no_modules_import_each_other_in_a_circle(figures):
    assert figures["cycles"] == []


def test_no_c_files_include_each_other_in_a_circle(figures):
    assert figures["c_cycles"] == []


# ---- documentation and types


def test_public_names_have_docstrings(figures):
    assert figures["public_docstrings_percent"] >= 95


def test_any_is_rare(figures):
    assert figures["any"] <= 290


# ---- the figures themselves


def test_a_circle_is_found_wherever_its_imports_are(code_shape):
    trees = {
        "a.py": ast.parse("from easyllm.b import x"),
        "b.py": ast.parse("def f():\n    import easyllm.c"),
        "c.py": ast.parse("if TYPE_CHECKING:\n    from easyllm import a"),
        "d.py": ast.parse("from easyllm.a import y"),
    }
    graph = code_shape.module_graph(trees)
    assert code_shape.cycles(graph) == [["easyllm.a", "easyllm.b", "easyllm.c"]]


def test_the_length_of_a_function_excludes_decorators_and_docstring(code_shape):
    code = '@cache\n@other\ndef f(\n    x,\n):\n    """Long.\n\n    Text.\n    """\n    return x\n'
    assert code_shape.function_lengths({"m.py": ast.parse(code)}) == {"m.py:f": 4}


def test_a_chain_whose_function_does_not_call_the_next_is_an_error(code_shape):
    trees = {"m.py": ast.parse("def f():\n    g()\n\ndef g():\n    pass\n\ndef h():\n    pass\n")}
    assert code_shape.check_chain(trees, ["m.py:f", "m.py:g"]) == 1
    with pytest.raises(ValueError, match="does not call h"):
        code_shape.check_chain(trees, ["m.py:f", "m.py:h"])
