"""The contract of a stored form: a module that takes the place of a linear, or of a factor inside another form.

A form's class is named after its replacement (`coppice.models.replacements`) plus `Linear`; the replacement's name is
the type in `compression.json`. A form registers when its class is defined.

A checkpoint that stock classes cannot read carries copies of the files that it needs. So files of this folder import
each other relatively, and otherwise torch and transformers alone.

Shapes: m = out_features, n = in_features, k = rank, b = bits, x: [..., n].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar, Self, TypedDict

import torch
from torch import Tensor, nn

# What `build` needs to know of a form, and an entry of `compression.json`: JSON, whose keys are the form's own.
Fields = Mapping[str, Any]
Entry = Mapping[str, Any]


class Factory(TypedDict):
    """The device and the dtype of tensors to make."""

    device: torch.device
    dtype: torch.dtype


# The forms by their type in `compression.json`.
FORMS: dict[str, type[StoredForm]] = {}


class StoredForm(nn.Module):
    """What can take a linear's place. A form whose weight is one packed matrix is a `PackedForm`; all others hold their
    matrices as linears of their own, which may be packed in their turn."""

    kind: ClassVar[str]
    in_features: int
    out_features: int
    bias: nn.Parameter | None

    def __init_subclass__(cls, abstract: bool = False, **options: Any) -> None:
        super().__init_subclass__(**options)
        if not abstract:
            cls.kind = cls.__name__.removesuffix("Linear")
            FORMS[cls.kind] = cls

    @classmethod
    def from_replacement(cls, replacement: Any, linear: Replaceable, as_stored: Callable[[Tensor], Tensor]) -> Self:
        """The form that holds what a method returned (the dataclass of the same name) for a linear, whose bias it takes
        over. as_stored: values as they will be read back from the checkpoint, in the dtype to compute in."""
        raise NotImplementedError

    @classmethod
    def build(cls, linear: nn.Linear, fields: Fields) -> Self:
        """The form without values, for the place of a linear; fields: what `fields` returned."""
        bias = linear.bias is not None
        return cls(linear.in_features, linear.out_features, **fields, bias=bias, **factory_of(linear))

    def fields(self) -> Fields:
        """What `build` needs to know, as JSON."""
        raise NotImplementedError

    def describe(self) -> Entry:
        """The entry of `compression.json`."""
        return {"type": self.kind, **self.fields()}

    def effective_weight(self) -> Tensor:
        """[m, n] the matrix that the form multiplies by; one that is put together from parts, in float32 at least."""
        raise NotImplementedError


class PackedForm(StoredForm, nn.Linear, abstract=True):
    """A linear whose weight is decoded from packed codes: `weight` is a property, all buffers stand for it."""

    bias: nn.Parameter | None  # type: ignore[assignment]  # torch's own stub forgets None

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # decoded, not held
        """[m, n]."""
        raise NotImplementedError

    def effective_weight(self) -> Tensor:
        return self.weight

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias)


Replaceable = nn.Linear | StoredForm


def effective_weight(module: Replaceable) -> Tensor:
    """[m, n] the matrix that a linear or a stored form multiplies by."""
    return module.effective_weight() if isinstance(module, StoredForm) else module.weight


def wide_weight(module: Replaceable) -> Tensor:
    """The effective weight in float32, or in its own type where that is wider.

    A form's parts are put together in it: rounding their product would add an error that the layer does not make.
    """
    weight = effective_weight(module)
    return weight.to(torch.promote_types(weight.dtype, torch.float32))


def linear_of(matrix: Any, bias: nn.Parameter | None, as_stored: Callable[[Tensor], Tensor]) -> nn.Linear:
    """A linear that holds a matrix [m, n] of a replacement: a tensor, or a replacement of a packed form."""
    linear = nn.Linear(matrix.shape[1], matrix.shape[0], bias is not None, device="meta")
    linear.bias = bias  # type: ignore[assignment]  # the same
    if isinstance(matrix, Tensor):
        linear.weight = nn.Parameter(as_stored(matrix))
        return linear
    packed: Any = FORMS[type(matrix).__name__].from_replacement(matrix, linear, as_stored)
    return packed


def factory_of(linear: nn.Linear) -> Factory:
    """The device and the dtype of a linear's weight."""
    return {"device": linear.weight.device, "dtype": linear.weight.dtype}
