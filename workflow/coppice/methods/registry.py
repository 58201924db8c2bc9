"""The registry of methods: the package's own, and those of other packages by entry point."""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from coppice.errors import UserError, did_you_mean

if TYPE_CHECKING:
    pass

from coppice.methods.contracts import Source
from coppice.methods.options import MethodOptions

FAMILIES = ("prune", "decompose", "quantize", "compensate", "recover")


# The function that tells each contract.
CONTRACTS = {
    "layer": "compress",
    "structure": "choose",
    "rotation": "rotation",
    "cache": "cache",
    "training": "prepare",
}


@dataclass(frozen=True)
class Method:
    """A registered method: its module and what the registry reads off it."""

    name: str
    family: str
    module: ModuleType

    @property
    def contract(self) -> str:
        """layer, structure, rotation, cache or training: which functions the module defines."""
        for contract, function in CONTRACTS.items():
            if hasattr(self.module, function):
                return contract
        raise TypeError(f"Method {self.name!r} ({self.file}) defines none of {', '.join(CONTRACTS.values())}.")

    @property
    def file(self) -> Path:
        return Path(self.module.__file__)

    @property
    def files(self) -> list[Path]:
        """The method's file and those of the solvers that it rests on: with one of them changed, nodes are outdated."""
        return [self.file, *solver_files(self.file)]

    @property
    def source(self) -> Source:
        return self.module.SOURCE

    @property
    def options(self) -> type[MethodOptions]:
        return self.module.Options

    @property
    def makes(self) -> frozenset[str]:
        return self.module.MAKES

    @property
    def refuses(self) -> Mapping[str, str]:
        return self.module.REFUSES

    def needs(self, options: MethodOptions | None = None) -> frozenset[str]:
        """What the method reads besides the parent, under these options (None: at least)."""
        if options is None:
            return self.module.NEEDS
        found = self.module.NEEDS | options.needs
        if getattr(options, "propagate", False) and "moments" in found:
            # What is allocated or planned for the whole model is read from the parent.
            behind = found | {"behind"}
            return behind if self.allocates(options) or hasattr(self.module, "plan") else behind - {"moments"}
        return found

    @staticmethod
    def allocates(options: MethodOptions) -> bool:
        """Whether a budget is spread unevenly over the linears."""
        return getattr(options, "allocation", None) is not None and options.allocation.by != "uniform"

    def marks(self, parent: frozenset[str], options: MethodOptions) -> frozenset[str]:
        """The marks of a node that this method makes: the parent's and MAKES, or what the module's `marks` says."""
        own = getattr(self.module, "marks", None)
        return frozenset(own(parent, options)) if own else parent | self.makes

    def validated(self, options: Mapping[str, Any]) -> MethodOptions:
        """The options, checked. Raises UserError with every problem in one sentence."""
        try:
            return self.options.model_validate(options)
        except ValidationError as error:
            found = [f"{'.'.join(map(str, each['loc'])) or 'options'}: {each['msg']}" for each in error.errors()]
            raise UserError(f"The options of method {self.name!r} are not valid: {'; '.join(found)}.") from None


@cache
def solver_files(file: Path) -> list[Path]:
    """The files under `methods/solvers` that a file imports, and those that they import, sorted."""
    found: set[Path] = set()
    waiting = [file]
    while waiting:
        text = waiting.pop().read_text(encoding="utf-8")
        for name in re.findall(r"^\s*from coppice\.methods\.solvers\.(\w+) import", text, re.MULTILINE):
            solver = Path(__file__).parent / "solvers" / f"{name}.py"
            if solver not in found:
                found.add(solver)
                waiting.append(solver)
    return sorted(found)


@cache
def methods() -> dict[str, Method]:
    """Every registered method by name: the package's own, then those of other packages.

    Raises UserError when two methods share a name.
    """
    found: dict[str, Method] = {}
    for family in FAMILIES:
        package = import_module(f"coppice.methods.{family}")
        for entry in pkgutil.iter_modules(package.__path__):
            module = import_module(f"{package.__name__}.{entry.name}")
            _register(found, Method(entry.name.replace("_", "-"), family, module))
    for entry_point in entry_points(group="coppice.methods"):
        module = entry_point.load()
        _register(found, Method(entry_point.name, module.FAMILY, module))
    return found


def _register(found: dict[str, Method], method: Method) -> None:
    if method.name in found:
        raise UserError(f"Two methods are named {method.name!r}: {found[method.name].file} and {method.file}.")
    found[method.name] = method


def method(name: str) -> Method:
    """The method of that name. Raises UserError, with the nearest known name, when there is none."""
    known = methods()
    if name not in known:
        raise UserError(f"There is no method {name!r}.{did_you_mean(name, known)}")
    return known[name]
