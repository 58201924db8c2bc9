"""The registry of laws: the package's own, one file each, and those of other packages (entry point `coppice.laws`).

An entry point names a module, or another object, with a `LAW`; its own name is the law's name in a study.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import ModuleType
from typing import Any

from pydantic import ValidationError

import coppice.laws
from coppice.errors import UserError, did_you_mean
from coppice.laws.contracts import Law, find_problems
from coppice.laws.options import LawOptions
from coppice.records.source_files import imported_files

_NOT_LAWS = frozenset({"contracts", "engine", "figure", "options", "points", "registry", "stage"})


@dataclass(frozen=True)
class RegisteredLaw:
    """A law, its name, and the module that defines it."""

    name: str
    law: Law
    module: ModuleType

    @property
    def file(self) -> Path:
        return Path(str(self.module.__file__))


@cache
def laws() -> dict[str, RegisteredLaw]:
    """Every law by its name, in alphabetical order: the package's own and those of other packages.

    Raises UserError for a law whose record is not valid, and where two have one name.
    """
    registered: dict[str, RegisteredLaw] = {}
    for entry in pkgutil.iter_modules(coppice.laws.__path__):
        if entry.name not in _NOT_LAWS:
            module = import_module(f"coppice.laws.{entry.name}")
            _register(registered, entry.name.replace("_", "-"), module, module)
    for entry_point in entry_points(group="coppice.laws"):
        owner, module = _load(entry_point)
        _register(registered, entry_point.name, owner, module)
    return dict(sorted(registered.items()))


def _load(entry_point: EntryPoint) -> tuple[object, ModuleType]:
    """What an entry point names, and the module that holds it."""
    try:
        return entry_point.load(), import_module(entry_point.module)
    except Exception as error:
        raise UserError(
            f"Law {entry_point.name!r} ({entry_point.value}) cannot be loaded: {type(error).__name__}: {error}. Repair "
            "or remove the package that provides it."
        ) from error


def _register(registered: dict[str, RegisteredLaw], name: str, owner: object, module: ModuleType) -> None:
    if name in registered:
        raise UserError(
            f"Two laws are named {name!r}: {registered[name].module.__name__} and {module.__name__}; rename the entry "
            "point of one."
        )
    if not hasattr(owner, "LAW"):
        raise UserError(f"Law {name!r} (module {module.__name__}): it defines no `LAW`.")
    problems = list(find_problems(owner.LAW))
    if problems:
        raise UserError(f"Law {name!r} (module {module.__name__}): {'; '.join(problems)}.")
    registered[name] = RegisteredLaw(name, owner.LAW, module)


def names() -> tuple[str, ...]:
    """Names of all laws, in alphabetical order."""
    return tuple(laws())


def find(name: str) -> RegisteredLaw:
    """The law of that name with its module. Raises UserError, with the nearest name, where there is none."""
    if name not in laws():
        raise UserError(f"There is no law named '{name}'.{did_you_mean(name, names())}")
    return laws()[name]


def load(name: str) -> Law:
    """The law of that name. Raises UserError, with the nearest name, where there is none."""
    return find(name).law


def validate_options(name: str, options: Mapping[str, Any]) -> LawOptions:
    """A law's options, checked. Raises UserError with every problem in one sentence."""
    known = load(name).options
    unknown = [
        f"there is no option {key!r}.{did_you_mean(key, known.model_fields)}"
        for key in options
        if key not in known.model_fields
    ]
    if unknown:
        raise UserError(f"Law {name!r}: {' '.join(unknown)}")
    try:
        return known.model_validate(options)
    except ValidationError as error:
        problems = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise UserError(f"The options of law {name!r} are not valid: {'; '.join(problems)}.") from None


@cache
def source_files(name: str) -> list[Path]:
    """The files that a fit of the law rests on, sorted: with one of them changed, the law is fitted again.

    They are the law's file, the stage's, and all of `coppice.laws` that either imports; of a law of another package
    also what it imports of that package.
    """
    law, stage = find(name), Path(__file__).with_name("stage.py")
    files = {law.file, stage, *imported_files(law.file, "coppice.laws"), *imported_files(stage, "coppice.laws")}
    package = law.module.__name__.partition(".")[0]
    if package != "coppice":
        files.update(imported_files(law.file, package))
    return sorted(files)
