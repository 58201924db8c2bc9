"""The registry of methods: the package's own, and those of other packages by the entry point `coppice.methods`.

A method is one file under `methods/<family>/`; its name is the file's name with dashes. It declares itself as `METHOD`
(see `methods.declaration`). The module of an entry point has `METHOD` too, and `FAMILY`.
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

from coppice.errors import UserError, did_you_mean
from coppice.methods.declaration import (
    CacheMethod,
    Declaration,
    LayerMethod,
    Resources,
    RotationMethod,
    Source,
    StructureMethod,
    TrainingMethod,
)
from coppice.methods.options import MethodOptions, TargetOptions
from coppice.records import renamed
from coppice.records.source_files import imported_files

# The contracts that a family's methods may have.
CONTRACTS: Mapping[str, tuple[type[Declaration], ...]] = {
    "prune": (LayerMethod, StructureMethod),
    "decompose": (LayerMethod, StructureMethod),
    "quantize": (LayerMethod, RotationMethod, CacheMethod),
    "compensate": (LayerMethod,),
    "recover": (TrainingMethod,),
}
FAMILIES = tuple(CONTRACTS)


@dataclass(frozen=True)
class Method:
    """A registered method: its name, its family, its declaration and the file that it is in."""

    name: str
    family: str
    declaration: Declaration
    file: Path

    @property
    def contract(self) -> str:
        """layer, structure, rotation, cache or training."""
        return self.declaration.contract

    @property
    def layer(self) -> LayerMethod:
        """The declaration of a layer method."""
        assert isinstance(self.declaration, LayerMethod)
        return self.declaration

    @property
    def structure(self) -> StructureMethod:
        """The declaration of a structure method."""
        assert isinstance(self.declaration, StructureMethod)
        return self.declaration

    @property
    def rotation(self) -> RotationMethod:
        """The declaration of a rotation method."""
        assert isinstance(self.declaration, RotationMethod)
        return self.declaration

    @property
    def cache(self) -> CacheMethod:
        """The declaration of a cache method."""
        assert isinstance(self.declaration, CacheMethod)
        return self.declaration

    @property
    def training(self) -> TrainingMethod:
        """The declaration of a training method."""
        assert isinstance(self.declaration, TrainingMethod)
        return self.declaration

    @property
    def files(self) -> list[Path]:
        """The method's file and those of the solvers that it rests on: when one changes, its nodes are outdated."""
        return [self.file, *imported_files(self.file, "coppice.methods.solvers")]

    @property
    def source(self) -> Source:
        return self.declaration.source

    @property
    def options(self) -> type[MethodOptions]:
        return self.declaration.options

    @property
    def adds_traits(self) -> frozenset[str]:
        return self.declaration.adds_traits

    @property
    def incompatible_with(self) -> Mapping[str, str]:
        return self.declaration.incompatible_with

    @property
    def resources(self) -> Resources:
        return self.declaration.resources

    def needs(self, options: MethodOptions | None = None) -> frozenset[str]:
        """What the method reads in addition to the parent, under these options (None: at least)."""
        if options is None:
            return self.declaration.needs
        needs = self.declaration.needs | options.needs
        if getattr(options, "sequential", False) and "moments" in needs:
            sequential = needs | {"sequential_moments"}
            # What is allocated or planned for the whole model is read from the parent.
            whole = self.allocates(options) or self.layer.plan is not None
            return sequential if whole else sequential - {"moments"}
        return needs

    @staticmethod
    def allocates(options: MethodOptions) -> bool:
        """Whether a target is spread unevenly over the linears."""
        return isinstance(options, TargetOptions) and options.allocation.by != "uniform"

    def traits(self, parent: frozenset[str], options: MethodOptions) -> frozenset[str]:
        """The traits of a node that this method makes of a parent with these traits."""
        if self.declaration.traits is not None:
            return frozenset(self.declaration.traits(parent, options))
        return parent | self.adds_traits

    def incompatibility(self, traits: frozenset[str]) -> tuple[str, str] | None:
        """(trait, reason) of the first trait of a parent that the method cannot work on; None when it can."""
        for trait in sorted(traits & self.incompatible_with.keys()):
            return trait, self.incompatible_with[trait]
        return None

    def validate_options(self, options: Mapping[str, Any]) -> MethodOptions:
        """The options, checked. Raises UserError with every problem in one sentence."""
        if sentence := renamed_options_sentence(options, self.options):
            raise UserError(f"The options of method {self.name!r} are not valid: {sentence}")
        try:
            return self.options.model_validate(options)
        except ValidationError as error:
            problems = [f"{'.'.join(map(str, each['loc'])) or 'options'}: {each['msg']}" for each in error.errors()]
            raise UserError(f"The options of method {self.name!r} are not valid: {'; '.join(problems)}.") from None


@cache
def methods() -> dict[str, Method]:
    """Every registered method by name: the package's own, then those of other packages.

    Raises UserError when two methods share a name, or a plug-in's declaration is not one.
    """
    registered: dict[str, Method] = {}
    for family in FAMILIES:
        package = import_module(f"coppice.methods.{family}")
        for entry in pkgutil.iter_modules(package.__path__):
            module = import_module(f"{package.__name__}.{entry.name}")
            _register(registered, read_declaration(entry.name.replace("_", "-"), family, module))
    for entry_point in entry_points(group="coppice.methods"):
        _register(registered, _plug_in(entry_point))
    return registered


def read_declaration(name: str, family: Any, module: ModuleType) -> Method:
    """The method that a module declares. Raises UserError, naming it, when the module declares none."""
    file = Path(module.__file__ or "")
    if family not in FAMILIES:
        raise UserError(f"Method {name!r} ({file}): FAMILY is {family!r}; it must be one of {', '.join(FAMILIES)}.")
    declaration = getattr(module, "METHOD", None)
    if not isinstance(declaration, Declaration):
        wrong = "is missing" if declaration is None else f"is {declaration!r}"
        raise UserError(
            f"Method {name!r} ({file}): METHOD {wrong}; declare the method as METHOD = LayerMethod(...), or as another "
            "contract of coppice.methods.declaration."
        )
    if not isinstance(declaration, CONTRACTS[family]):
        allowed = " or a ".join(contract.__name__ for contract in CONTRACTS[family])
        raise UserError(
            f"Method {name!r} ({file}): METHOD is a {type(declaration).__name__}, and a method of the family "
            f"{family!r} is a {allowed}: declare it so, or choose another family."
        )
    return Method(name, family, declaration, file)


def _plug_in(entry_point: EntryPoint) -> Method:
    """The method of another package. Raises UserError, naming it and its module, for a broken contract."""
    try:
        module = entry_point.load()
    except Exception as error:  # The module is not ours: whatever it raises, the user needs its name.
        raise UserError(
            f"Method {entry_point.name!r} ({entry_point.value}) cannot be registered: "
            f"{_sentence(error)} Fix that package, or uninstall it."
        ) from error
    return read_declaration(entry_point.name, getattr(module, "FAMILY", None), module)


def _sentence(error: Exception) -> str:
    text = str(error) or type(error).__name__
    return text if text.endswith((".", "?")) else f"{text}."


def _register(registered: dict[str, Method], method: Method) -> None:
    if method.name in registered:
        raise UserError(f"Two methods are named {method.name!r}: {registered[method.name].file} and {method.file}.")
    registered[method.name] = method


def method(name: str) -> Method:
    """The method of that name. Raises UserError, with the nearest known name, for an unknown one."""
    known = methods()
    if (new := current_name(name)) != name:
        raise UserError(f"The method `{name}` is now `{new}`; rename it.")
    if name not in known:
        raise UserError(f"{name!r} is not a method.{did_you_mean(name, known)}")
    return known[name]


def current_name(name: str) -> str:
    """The name that a method has in this version, by the one that an older version wrote."""
    new = renamed.METHODS.get(name, name)
    return new if new in methods() else name


def current_options(options: Mapping[str, Any], options_class: type[MethodOptions]) -> dict[str, Any]:
    """Options under the names that the class has for them, by those that an older version wrote."""
    known = options_class.model_fields
    names = {old: new for old, new in renamed.OPTIONS.items() if new in known and old not in known}
    return {names.get(key, key): value for key, value in options.items()}


def renamed_options_sentence(options: Mapping[str, Any], options_class: type[MethodOptions]) -> str:
    """The new name of each option that is given by its old one; empty without such."""
    # Key by key, as the old and the new name of one option may both be given.
    new_names = {old: next(iter(current_options({old: None}, options_class))) for old in options}
    return " ".join(f"The option `{old}` is now `{new}`; rename it." for old, new in new_names.items() if old != new)
