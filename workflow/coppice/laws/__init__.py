"""Laws: one file a law, found by name; `fit` is the engine, `stage` the command."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType

from coppice.errors import UserError

_OTHERS = ("fit", "stage")


def names() -> tuple[str, ...]:
    """Names of the laws in this package, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _OTHERS))


def load(name: str) -> ModuleType:
    """The law's module. Raises UserError where there is no law of that name."""
    if name not in names():
        raise UserError(f"There is no law named '{name}'. The laws are: {', '.join(names())}.")
    return import_module(f"{__name__}.{name}")
