"""Laws: one file a law, found by name; `fit` holds the engine that fits them."""

from __future__ import annotations

import pkgutil
from importlib import import_module
from types import ModuleType


def names() -> tuple[str, ...]:
    """Names of the laws in this package, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name != "fit"))


def load(name: str) -> ModuleType:
    """The law's module. Raises ValueError where there is no law of that name."""
    if name not in names():
        raise ValueError(f"There is no law named '{name}'. The laws are: {', '.join(names())}.")
    return import_module(f"{__name__}.{name}")
