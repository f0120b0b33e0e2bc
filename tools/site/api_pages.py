"""Pages of the API from docstrings: one for each package, read with `ast` without importing it."""

import ast
from collections.abc import Iterator
from pathlib import Path
from textwrap import indent

Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def api_pages(source: Path) -> dict[str, str]:
    """Returns the pages by package name, each with all public definitions of its modules.

    A module has the anchor `MODULE`, a definition `MODULE.NAME`, a method `MODULE.CLASS.NAME`.

    Args:
        source: the folder of the package `easyllm`.
    """
    pages: dict[str, list[str]] = {}
    for path in sorted(source.rglob("*.py")):
        parts = path.relative_to(source).with_suffix("").parts
        if len(parts) == 1 and parts[0].startswith("_"):
            continue
        package = parts[0] if len(parts) > 1 else "easyllm"
        pages.setdefault(package, [f"# {package}\n"])
        pages[package] += _module(path, ".".join(p for p in parts if p != "__init__"))
    return {package: "\n".join(lines) + "\n" for package, lines in pages.items()}


def _module(path: Path, name: str) -> list[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    definitions = list(_definitions(tree))
    if not definitions and not ast.get_docstring(tree):
        return []
    lines = [f'\n<a id="{name}"></a>\n\n## {name}\n', _text(ast.get_docstring(tree))]
    for each in definitions:
        lines += _definition(each, f"{name}.{each.name}", level=3)
    return lines


def _definitions(tree: ast.Module | ast.ClassDef) -> Iterator[Definition]:
    for node in tree.body:
        if isinstance(node, Definition) and not node.name.startswith("_"):
            yield node


def _definition(node: Definition, anchor: str, *, level: int) -> list[str]:
    lines = [
        f'\n<a id="{anchor}"></a>\n\n{"#" * level} {node.name}\n',
        f"```python\n{_signature(node)}\n```\n",
        _text(ast.get_docstring(node)),
    ]
    if isinstance(node, ast.ClassDef):
        for method in _definitions(node):
            lines += _definition(method, f"{anchor}.{method.name}", level=level + 1)
    return lines


def _signature(node: Definition) -> str:
    """Returns the first lines of a definition; of a class its annotated fields, too."""
    if isinstance(node, ast.ClassDef):
        bases = ", ".join(ast.unparse(base) for base in node.bases)
        fields = [
            ast.unparse(ast.AnnAssign(each.target, each.annotation, None, each.simple))
            for each in node.body
            if isinstance(each, ast.AnnAssign) and not ast.unparse(each.target).startswith("_")
        ]
        head = f"class {node.name}({bases})" if bases else f"class {node.name}"
        return head + (":\n" + indent("\n".join(fields), "    ") if fields else "")
    prefix = "async def" if isinstance(node, ast.AsyncFunctionDef) else "def"
    arguments = ast.unparse(node.args)
    returns = f" -> {ast.unparse(node.returns)}" if node.returns is not None else ""
    line = f"{prefix} {node.name}({arguments}){returns}"
    if len(line) <= 90:
        return line
    parts = [ast.unparse(argument) for argument in _single(node.args)]
    return f"{prefix} {node.name}(\n" + indent(",\n".join(parts), "    ") + f",\n){returns}"


def _single(arguments: ast.arguments) -> Iterator[ast.arguments]:
    """Yields arguments with one parameter each, so that each can be written in a line."""
    empty = {"posonlyargs": [], "args": [], "kwonlyargs": [], "kw_defaults": [], "defaults": []}
    plain = [*arguments.posonlyargs, *arguments.args]
    missing = len(plain) - len(arguments.defaults)
    for number, each in enumerate(plain):
        defaults = arguments.defaults[number - missing : number - missing + 1]
        own = {"args": [each], "defaults": defaults if number >= missing else []}
        yield ast.arguments(**(empty | own))
    if arguments.vararg or arguments.kwonlyargs:
        yield ast.arguments(**(empty | {"args": [arguments.vararg or ast.arg("*")]}))
    for each, default in zip(arguments.kwonlyargs, arguments.kw_defaults, strict=True):
        yield ast.arguments(**(empty | {"args": [each], "defaults": [default] if default else []}))
    if arguments.kwarg:
        yield ast.arguments(**(empty | {"kwarg": arguments.kwarg}))


def _text(docstring: str | None) -> str:
    """Returns a docstring as a block of text, as it stands in the source."""
    if not docstring:
        return ""
    first, _, rest = docstring.partition("\n\n")
    lines = [first.replace("<", "&lt;").replace("*", "\\*").replace("_", "\\_"), ""]
    if rest:
        fence = "````" if "```" in rest else "```"
        lines += [f"{fence}text", rest, fence, ""]
    return "\n".join(lines)


__all__ = ["api_pages"]
