"""Rules of the C sources: parameters, line lengths, legends, includes, and their ctypes mirrors."""

import ctypes
import inspect
import re
from pathlib import Path

import pytest

from easyllm.ops.kernels import build, structs

FOLDER = Path(build.__file__).parent
FILES = sorted(path for path in FOLDER.iterdir() if path.suffix in (".c", ".h"))
STRUCTS = [
    member
    for _, member in inspect.getmembers(structs, inspect.isclass)
    if issubclass(member, ctypes.Structure)
]
MAX_PARAMETERS = 8
MAX_COLUMNS = 100
KEYWORDS = {"if", "for", "while", "switch", "return", "sizeof", "defined"}
KINDS = {
    ctypes.c_void_p: "pointer",
    ctypes.c_int: "int",
    ctypes.c_int64: "i64",
    ctypes.c_float: "float",
}
"""Types of C fields, by ctypes type."""


def without_comments(text: str) -> str:
    """Returns C code with comments and strings blanked, and continued lines joined."""
    text = re.sub(r"//[^\n]*|/\*.*?\*/", " ", text, flags=re.DOTALL)
    text = re.sub(r'"(?:[^"\\\n]|\\.)*"', '""', text)
    return re.sub(r"\\\n", " ", text)


def split_at_commas(text: str) -> list[str]:
    """Splits at the commas that are outside parentheses."""
    parts, depth = [""], 0
    for character in text:
        depth += (character == "(") - (character == ")")
        if character == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += character
    return [part.strip() for part in parts if part.strip()]


def functions(text: str) -> dict[str, int]:
    """Returns the number of parameters of each function that C code declares or defines.

    Functions in macros count too. Bodies are skipped, so that calls are not taken for functions.
    """
    text = re.sub(r"__attribute__\s*\(\(.*?\)\)(?!\))", " ", without_comments(text))
    text = re.sub(r"^[ \t]*#[ \t]*define[ \t]+\w+(\([^)]*\))?", " ", text, flags=re.MULTILINE)
    text = re.sub(r"^[ \t]*#.*$", "", text, flags=re.MULTILINE)
    outside, depth = "", 0
    for character in text:
        depth += character == "{"
        outside += character if depth == 0 or (depth == 1 and character == "{") else ""
        depth -= character == "}"
    assert depth == 0, "braces do not match"
    found = {}
    for match in re.finditer(r"(\w+)\s*\(((?:[^(){};]|\([^(){};]*\))*)\)\s*[{;]", outside):
        name, parameters = match[1], split_at_commas(match[2])
        if name not in KEYWORDS:
            found[name] = 0 if parameters == ["void"] else len(parameters)
    return found


def legend(text: str) -> str:
    """Returns the comment at the top of a file."""
    match = re.match(r"(//[^\n]*\n)+", text)
    return match[0] if match else ""


def includes() -> dict[str, set[str]]:
    """Returns the files of the project that each file includes."""
    pattern = re.compile(r'^#include "([^"]+)"', re.MULTILINE)
    return {path.name: set(pattern.findall(path.read_text("utf-8"))) for path in FILES}


def reachable(graph: dict[str, set[str]], start: str) -> set[str]:
    """Returns every node that can be reached from `start` by at least one step."""
    found: set[str] = set()
    waiting = [*graph[start]]
    while waiting:
        name = waiting.pop()
        if name not in found:
            found.add(name)
            waiting += graph[name]
    return found


def c_fields(file_name: str, struct: str) -> list[tuple[str, str]]:
    """Returns names and kinds of a C struct's fields: pointer, a number's type, or a struct."""
    text = without_comments((FOLDER / file_name).read_text("utf-8"))
    body = re.search(r"typedef struct \{([^{}]*)\}\s*" + struct + r"\s*;", text)
    assert body, f"{file_name} does not define {struct}"
    fields = []
    for declaration in filter(None, map(str.strip, body[1].split(";"))):
        match = re.fullmatch(r"(?:const\s+)?(\w+)\s+(.*)|(?:const\s+)?(\w+)\s*(\*.*)", declaration)
        assert match, f"cannot read the field {declaration!r}"
        for name in split_at_commas(match[2] or match[4]):
            kind = "pointer" if name.startswith("*") else match[1]
            fields.append((name.lstrip("* "), kind))
    return fields


def mirrored(struct: type[ctypes.Structure]) -> tuple[str, str]:
    """Returns file and name of the C struct that a ctypes struct names in its docstring."""
    match = re.search(r": `(\w+)` in (\w+\.[ch])", struct.__doc__.splitlines()[0])
    assert match, f"{struct.__name__} does not name the C struct that it mirrors"
    return match[2], match[1]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_c_function_has_more_than_eight_parameters(path):
    counts = functions(path.read_text("utf-8"))
    assert counts
    assert {name: n for name, n in counts.items() if n > MAX_PARAMETERS} == {}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_c_line_has_more_than_100_columns(path):
    lines = path.read_text("utf-8").splitlines()
    assert [number for number, line in enumerate(lines, 1) if len(line) > MAX_COLUMNS] == []


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_every_c_file_starts_with_a_legend_of_terms_and_data_layout(path):
    found = legend(path.read_text("utf-8"))
    assert re.search(r"^// Terms", found, re.MULTILINE)
    assert re.search("data layout", found, re.IGNORECASE)


def test_headers_do_not_include_each_other_in_a_cycle():
    graph = includes()
    assert [name for name in graph if name in reachable(graph, name)] == []


def test_every_c_file_is_built_or_hashed():
    """A header that is missing here would not cause a rebuild when it changes."""
    assert {path.name for path in FILES} == {*build.SOURCES, *build.HEADERS}


def test_every_declared_kernel_exists_with_as_many_parameters():
    counts = {}
    for path in FILES:
        counts |= functions(path.read_text("utf-8"))
    declared = {name: len(parameters) for name, parameters in build._PARAMETERS.items()}
    assert declared == {name: counts.get(name) for name in declared}
    assert set(build._RESULTS) <= set(declared)


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_ctypes_structs_have_the_fields_of_their_c_structs(struct):
    found = []
    for name, kind in struct._fields_:
        if issubclass(kind, ctypes.Structure):
            found.append((name, mirrored(kind)[1]))
        else:
            is_pointer = issubclass(kind, ctypes._Pointer)
            found.append((name, "pointer" if is_pointer else KINDS[kind]))
    assert found == c_fields(*mirrored(struct))


@pytest.mark.parametrize("struct", STRUCTS, ids=lambda struct: struct.__name__)
def test_every_field_of_a_ctypes_struct_is_documented(struct):
    names = re.findall(r"^        (\w+(?:, \w+)*): ", struct.__doc__, re.MULTILINE)
    assert {name for line in names for name in line.split(", ")} == {n for n, _ in struct._fields_}


NINE = "i64 a, i64 b, i64 c, i64 d, i64 e, i64 f, i64 g, i64 h, float *i"


@pytest.mark.parametrize(
    "text",
    [
        f"void many({NINE}) {{ few(1, 2); }}",
        f"void many({NINE});",
        f"static __attribute__((noinline)) int\nmany({NINE}) {{ return 0; }}",
        f"#define MAKE(NAME) \\\n    static void many({NINE}) {{ \\\n    }}\nMAKE(x)\n",
        f"#ifdef A\nvoid many(i64 a) {{}}\n#else\nvoid many({NINE}) {{}}\n#endif",
    ],
)
def test_the_ninth_parameter_is_counted(text):
    assert functions(text) == {"many": 9}


def test_calls_comments_and_function_pointers_are_not_taken_for_parameters():
    text = """
    // void nine(int, int, int, int, int, int, int, int, int);
    static int one(void (*f)(int, int), int b) {
        if (b) { f(1, 2, 3, 4, 5, 6, 7, 8, 9); }
        return 0;
    }
    void none(void);
    """
    assert functions(text) == {"one": 2, "none": 0}


def test_cycles_of_includes_are_found():
    graph = {"a.h": {"b.h"}, "b.h": {"c.h"}, "c.h": {"b.h"}, "d.c": {"a.h"}}
    assert [name for name in graph if name in reachable(graph, name)] == ["b.h", "c.h"]
