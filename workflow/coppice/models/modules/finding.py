"""The linears of a decoder and what takes their places: finding, describing and installing it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .activation_quantization import quantize_activations
from .base import FORMS, Entry, Replaceable, StoredForm, factory_of


def replaceable_modules(module: nn.Module) -> dict[str, Replaceable]:
    """The linears of a block as its architecture names them: a stored form counts once, its parts not."""
    modules: dict[str, Replaceable] = {}
    for name, child in module.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in modules)
        if not inside and isinstance(child, (nn.Linear, StoredForm)):
            modules[name] = child
    return modules


def replaceable_module(block: nn.Module, name: str) -> Replaceable:
    """The linear of that name, or the stored form in its place."""
    module = block.get_submodule(name)
    assert isinstance(module, (nn.Linear, StoredForm))  # as `replaceable_modules` and `weight_matrices` list them
    return module


def weight_matrices(module: nn.Module) -> dict[str, nn.Linear]:
    """Every matrix of a block: linears, and the factors inside stored forms."""
    return {name: child for name, child in module.named_modules() if isinstance(child, nn.Linear)}


def mask(linear: nn.Linear) -> Tensor | None:
    """[m, n] bool, True where a masked linear's weight is kept; None for a linear that is not masked."""
    return linear.weight != 0 if getattr(linear, "masked", False) else None


def set_masked(linear: nn.Module, masked: bool) -> None:
    """Whether a linear's zeros are pruned weights, which stay zero."""
    linear.masked = masked  # type: ignore[assignment]  # mypy lets a module hold tensors and modules only


def describe(module: nn.Module) -> Entry:
    """The entry of a module in `compression.json`; empty for an ordinary linear and for every other module."""
    entry: Entry
    if isinstance(module, StoredForm):
        entry = module.describe()
    else:
        entry = {"type": "Masked"} if getattr(module, "masked", False) else {}
    if hasattr(module, "quantized_activations"):
        entry = {"type": "Linear", **entry, "quantized_activations": module.quantized_activations}
    return entry


def describe_replacements(model: nn.Module) -> dict[str, Entry]:
    """The entries of all modules that take a linear's place, by name: what `install` needs to build them again.

    A module whose shape is not the one that the model's config gives it has its own shape in its entry.
    """
    with torch.device("meta"):
        stock = dict(type(model)(model.config).named_modules())
    entries: dict[str, Entry] = {}
    for name, module in model.named_modules():
        shape = _shape(module)
        # What is not in the stock model, a factor, has a shape that the form around it gives.
        resized = name in stock and shape != _shape(stock[name])
        if entry := ({"type": "Linear", **shape, **describe(module)} if resized else describe(module)):
            entries[name] = entry
    return entries


def _shape(module: nn.Module) -> dict[str, Any]:
    """The shape of a linear, a stored form or a norm, as it stands in an entry of `compression.json`."""
    if isinstance(module, (nn.Linear, StoredForm)):
        return {"in_features": module.in_features, "out_features": module.out_features}
    weight = module._parameters.get("weight")
    return {} if weight is None or weight.ndim != 1 else {"type": "Norm", "features": len(weight)}


def install(model: nn.Module, entries: Mapping[str, Mapping[str, Any]]) -> None:
    """Puts the described modules, without values, in the places of a dense model's linears."""
    for name in sorted(entries, key=lambda name: name.count(".")):
        fields = dict(entries[name])
        old: Any = model.get_submodule(name)
        kind, settings = fields.pop("type"), fields.pop("quantized_activations", None)
        if kind == "Norm":
            old.weight = nn.Parameter(old.weight.new_ones(fields["features"]))
            continue
        if "in_features" in fields:
            inputs, outputs = fields.pop("in_features"), fields.pop("out_features")
            old = nn.Linear(inputs, outputs, old.bias is not None, **factory_of(old))
            model.set_submodule(name, old)
        if kind == "Masked":
            set_masked(old, True)
        # A form brings the forms along that are always parts of it.
        elif kind != "Linear" and not isinstance(old, StoredForm):
            model.set_submodule(name, FORMS[kind].build(old, fields))
        if settings is not None:
            quantize_activations(model.get_submodule(name), settings)
