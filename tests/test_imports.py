"""Which file may import which: no circles, and no private names of another file."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

SOURCE = Path(__file__).parents[1] / "src" / "mmmamba"


def module_of(file: Path) -> str:
    """The name under which a file of the package is imported."""
    parts = file.relative_to(SOURCE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module_of(file): file for file in sorted(SOURCE.rglob("*.py"))}


def statements(tree: ast.AST) -> Iterator[ast.AST]:
    """All nodes of a file, but for those that only type checkers read."""
    for node in ast.iter_child_nodes(tree):
        if not (isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"):
            yield node
            yield from statements(node)


def imports(file: Path) -> Iterator[tuple[str, str]]:
    """The modules of the package that a file imports, anywhere in it; with each, the name that it takes from there.

    What is imported for type checkers alone does not count.
    """
    for node in statements(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from ((alias.name, "") for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{file}: write the whole name, not {'.' * node.level}{node.module or ''}"
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                if inner in MODULES:
                    yield inner, ""
                elif node.module in MODULES:
                    yield node.module, alias.name


def circles(graph: dict[str, set[str]]) -> list[frozenset[str]]:
    """The groups of modules each of which imports all others of its group, directly or through others (Tarjan)."""
    index: dict[str, int] = {}
    lowest: dict[str, int] = {}
    stack: list[str] = []
    found: list[frozenset[str]] = []

    def visit(module: str) -> None:
        index[module] = lowest[module] = len(index)
        stack.append(module)
        for other in sorted(graph[module]):
            if other not in index:
                visit(other)
                lowest[module] = min(lowest[module], lowest[other])
            elif other in stack:
                lowest[module] = min(lowest[module], index[other])
        if lowest[module] == index[module]:
            at = stack.index(module)
            found.append(frozenset(stack[at:]))
            del stack[at:]

    for module in graph:
        if module not in index:
            visit(module)
    return [group for group in found if len(group) > 1]


def test_circles_are_found() -> None:
    graph = {"a": {"b"}, "b": {"c", "d"}, "c": {"a"}, "d": {"e"}, "e": set()}
    assert circles(graph) == [frozenset("abc")]


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = {module: {other for other, _ in imports(file)} - {module} for module, file in MODULES.items()}
    found = [" ↔ ".join(sorted(group)) for group in circles(graph)]
    assert not found, "files that import each other in a circle: " + "; ".join(found)


def test_private_names_stay_in_their_file() -> None:
    taken = [
        f"{module} takes {name} from {other}"
        for module, file in MODULES.items()
        for other, name in imports(file)
        if name.startswith("_") and not name.startswith("__")
    ]
    assert not taken, "; ".join(taken)
