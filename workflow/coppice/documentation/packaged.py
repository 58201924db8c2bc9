"""Methods and laws of this package: what is generated does not depend on which other packages are installed."""

from __future__ import annotations

from pathlib import Path

from coppice.laws import registry as laws
from coppice.laws.contracts import Law
from coppice.methods.registry import FAMILIES, Method, methods

PACKAGE = Path(__file__).parents[1]


def packaged_methods() -> list[Method]:
    """By family, then by name."""
    own = [method for method in methods().values() if method.file.is_relative_to(PACKAGE)]
    return sorted(own, key=lambda method: (FAMILIES.index(method.family), method.name))


def packaged_laws() -> dict[str, Law]:
    """By name, in alphabetical order."""
    return {law.name: law.law for law in laws.laws().values() if law.file.is_relative_to(PACKAGE)}
