"""Modules that are heavy to import and not needed to read a study.

The Snakefile asks the registry for every method's options, and must parse in well under a second. A method's file
therefore names torch through this proxy: `from coppice.lazy import torch`. The real module is imported at first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any


class LazyModule:
    """A module that is imported when one of its attributes is first read."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        return getattr(import_module(self._name), attribute)


torch: Any = LazyModule("torch")
