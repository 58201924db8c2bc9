"""Laws: one file a law, found by name; `fit` is the engine, `stage` the command."""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from importlib import import_module
from types import ModuleType
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coppice.errors import UserError, nearest

_OTHERS = ("fit", "stage")


class LawOptions(BaseModel):
    """Options that every law has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    starts: int = Field(default=32, ge=1, description="How many points the search begins from.")
    bootstrap: int = Field(default=200, ge=0, description="How many resamples of the runs the intervals come from.")
    seed: int = Field(default=0, ge=0, description="Of the starts and the resamples.")


def names() -> tuple[str, ...]:
    """Names of the laws in this package, in alphabetical order."""
    return tuple(sorted(module.name for module in pkgutil.iter_modules(__path__) if module.name not in _OTHERS))


def load(name: str) -> ModuleType:
    """The law's module. Raises UserError where there is no law of that name."""
    if name not in names():
        raise UserError(f"There is no law named '{name}'. The laws are: {', '.join(names())}.")
    return import_module(f"{__name__}.{name}")


def validated(name: str, options: Mapping[str, Any]) -> LawOptions:
    """A law's options, checked. Raises UserError with every problem in one sentence."""
    known = load(name).Options
    unknown = [
        f"there is no option {key!r}.{nearest(key, known.model_fields)}"
        for key in options
        if key not in known.model_fields
    ]
    if unknown:
        raise UserError(f"Law {name!r}: {' '.join(unknown)}")
    try:
        return known.model_validate(options)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise UserError(f"The options of law {name!r} are not valid: {'; '.join(found)}.") from None
