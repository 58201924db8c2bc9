"""Which source files a file rests on: with one of them changed, what was computed by it is outdated."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable, Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path


def imported_files(file: Path, package: str) -> list[Path]:
    """The files of `package` that a file imports, and those that they import in turn, sorted, without itself.

    Imports inside functions count. So does the `__init__.py` of each package that an import passes through.
    """
    spec = find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        return []
    folder = Path(spec.submodule_search_locations[0])
    reached: set[Path] = set()
    pending = [file]
    while pending:
        imported = _imported_of_package(pending.pop(), package, folder) - reached
        reached |= imported
        pending += imported
    return sorted(reached - {file})


@cache
def _imported_of_package(file: Path, package: str, folder: Path) -> frozenset[Path]:
    """The files of `package`, which lies in `folder`, that one file imports itself."""
    depth = len(package.split("."))
    return frozenset(
        path
        for name in _imported_names(file, package, folder)
        if name[:depth] == tuple(package.split("."))
        for end in range(depth, len(name) + 1)
        for path in _module_files(folder.joinpath(*name[depth:end]))
    )


def _module_files(path: Path) -> list[Path]:
    """The file of the module or package at `path`, without suffix; none where it names something within a module."""
    return [file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()]


def _imported_names(file: Path, package: str, folder: Path) -> Iterator[tuple[str, ...]]:
    """The parts of all dotted names that a file imports."""
    statements = ast.walk(ast.parse(file.read_text(encoding="utf-8")))
    return imported_names(statements, lambda level: _anchor(file, level, package, folder))


def imported_names(
    statements: Iterable[ast.AST], anchor: Callable[[int], tuple[str, ...]] = lambda level: ()
) -> Iterator[tuple[str, ...]]:
    """The parts of all dotted names that statements import; of `from a import b` both `a` and `a.b`.

    anchor: the package that so many leading dots refer to.
    """
    for node in statements:
        if isinstance(node, ast.Import):
            yield from (tuple(alias.name.split(".")) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = (*anchor(node.level), *(node.module or "").split("."))
            module = tuple(part for part in base if part)
            yield module
            yield from ((*module, alias.name) for alias in node.names)


def _anchor(file: Path, level: int, package: str, folder: Path) -> tuple[str, ...]:
    """The package that `level` leading dots refer to in a file; empty for none, and for a file outside the package."""
    if level == 0 or not file.is_relative_to(folder):
        return ()
    return (*package.split("."), *file.parents[level - 1].relative_to(folder).parts)
