"""The contracts of methods, and the registry that finds them.

A method is a module (one file under `methods/<family>/`, or one named by another package's entry point
`coppice.methods`). Its name is its file's name with dashes. It defines

- `SOURCE`: a `Source`, the paper it follows;
- `Options(MethodOptions)`: its options, validated when the study is loaded;
- `NEEDS`: the kinds of statistics it reads ("moments", "blocks", "gradients"), empty when it needs none;
- `MAKES`: the marks that it leaves on a node ("masked", "factorized", "quantized", "compensated", "smaller"); where
  they depend on the parent's, a function `marks(parent) -> marks` beside it says how;
- `REFUSES`: for each mark of the parent that it cannot work on, the reason as half a sentence;

and the functions of one of three contracts:

- layer method: `compress(linear: Linear, statistics: LinearStatistics | None, options) -> Replacement`, pure, one
  linear at a time, in the dtype and on the device of `linear.weight`;
- structure method: `choose(structure: Structure, statistics: dict[str, Tensor], options) -> Removal`;
- training method: `prepare(model, options) -> model` and `finish(model) -> model`.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from coppice.errors import UserError, nearest

if TYPE_CHECKING:
    import torch
    from torch import Tensor

FAMILIES = ("prune", "decompose", "quantize", "compensate", "recover")
KINDS = ("moments", "blocks", "gradients")


@dataclass(frozen=True)
class Source:
    """Where a method comes from: the paper's title, its arXiv id (or another identifier) and the equation used."""

    title: str
    identifier: str
    equation: str


class MethodOptions(BaseModel):
    """Options that a method's own class extends; an unknown key is an error."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class LayerOptions(MethodOptions):
    """Options that every layer method has."""

    propagate: bool = Field(
        default=False,
        description="Gather statistics block by block behind the blocks already compressed, instead of reading the "
        "parent's.",
    )


class RecoverOptions(MethodOptions):
    """Options that every training method of the family recover has. Tokens, not steps, are the axis of training."""

    text: str = Field(description="The text (by name) whose role recovery is trained on.")
    validation: str = Field(description="The text (by name) whose role validation gives the held-out loss.")
    tokens: int = Field(ge=1, description="Tokens to train on; the last step is taken whole.")
    length: int = Field(default=512, ge=2, description="Tokens in a window, of training and of validation.")
    pack: bool = Field(
        default=True, description="Fill windows with several documents; false gives each its own, cut or padded."
    )
    validation_windows: int = Field(default=64, ge=1, description="Windows that the held-out loss is measured on.")
    batch_size: int = Field(default=32, ge=1, description="Windows a step.")
    micro_batch_size: int | None = Field(
        default=None,
        ge=1,
        description="Windows on the device at once, where a step does not fit; a divisor of batch_size.",
    )
    learning_rate: float = Field(default=1e-4, gt=0, description="After warm-up.")
    schedule: Literal["constant", "cosine"] = Field(
        default="constant",
        description="Learning rate after warm-up. Under `constant` the loss at a budget of the ladder does not depend "
        "on how long the run goes on after it; `cosine` falls to zero at the last step.",
    )
    warmup: float = Field(
        default=10, ge=0, description="Linear warm-up: below 1 a share of the steps, otherwise a number of steps."
    )
    betas: tuple[float, float] = Field(default=(0.9, 0.95), description="AdamW's decay rates of the two moments.")
    weight_decay: float = Field(default=0.0, ge=0, description="AdamW's decay of matrices; vectors have none.")
    gradient_clip: float = Field(default=1.0, ge=0, description="Largest norm of the gradient; 0 leaves it alone.")
    gradient_checkpointing: bool = Field(
        default=False, description="Compute activations twice instead of keeping them: less memory, a third more time."
    )
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Of the products; weights are trained in float32. `auto`: bfloat16 where the GPU has it.",
    )

    @model_validator(mode="after")
    def _micro_batches_fill_a_step(self) -> RecoverOptions:
        if self.micro_batch_size is not None and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size {self.batch_size} is not a multiple of micro_batch_size {self.micro_batch_size}; "
                "make it one."
            )
        return self

    @model_validator(mode="after")
    def _betas_are_decay_rates(self) -> RecoverOptions:
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"betas are {self.betas}; both must be at least 0 and less than 1.")
        return self


@dataclass(frozen=True)
class LinearStatistics:
    """Inputs x of one linear over the calibration tokens (n = in_features).

    second_moment: [n, n] E[x x^T], uncentred; mean, absmean, absmax: [n]; tokens: how many x were seen.
    """

    second_moment: Tensor
    mean: Tensor
    absmean: Tensor
    absmax: Tensor
    tokens: int


@dataclass(frozen=True)
class Linear:
    """What a layer method sees of a linear (m = out_features, n = in_features).

    weight: [m, n] what the layer computes now. mask: [m, n] bool, True where a weight is kept, or None for a layer that
    is not masked: a method keeps what is pruned at zero. reference: [m, n] what the layer computed before it was
    compressed; given to compensate methods only. storage: the type in which the checkpoint stores the layer's floating
    point numbers, None for the weight's own: codes are computed against scales as they will be read back.
    """

    weight: Tensor
    mask: Tensor | None = None
    reference: Tensor | None = None
    storage: torch.dtype | None = None


@dataclass(frozen=True)
class Replacement:
    """What a layer method puts in a linear's place, and the record of how (numbers that go into the manifest)."""

    record: dict[str, Any] = field(default_factory=dict, kw_only=True)


@dataclass(frozen=True)
class Unchanged(Replacement):
    """The linear stays as it is; record["unchanged"] is a sentence that says why."""


@dataclass(frozen=True)
class Masked(Replacement):
    """weight: [m, n] with exact zeros where mask ([m, n] bool, True = kept) is False."""

    weight: Tensor
    mask: Tensor


@dataclass(frozen=True)
class Factors(Replacement):
    """y = second (first x): first [k, n], second [m, k]. The bias stays on the output."""

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Quantized(Replacement):
    """w[i, j] = scale[i, g] * (codes[i, j] - zero_point[i, g]) with g = group_index[j].

    codes: [m, n] int32; symmetric: -2^(bits-1) .. 2^(bits-1)-1 with zero_point 0; asymmetric: 0 .. 2^bits-1.
    scale, zero_point: [m, groups] (zero_point int32); group_index: [n] int32, j // group_size unless activation order
    with dynamic groups permuted it.
    """

    codes: Tensor
    scale: Tensor
    zero_point: Tensor
    group_index: Tensor
    bits: int
    group_size: int
    symmetric: bool


@dataclass(frozen=True)
class Compensation(Replacement):
    """Added to what the layer computes: y += second (first x): first [r, n], second [m, r]."""

    first: Tensor
    second: Tensor


@dataclass(frozen=True)
class Structure:
    """The units of a decoder that structure methods count: blocks, key/value groups and neurons in each block."""

    blocks: int
    kv_groups: int
    neurons: int


@dataclass(frozen=True)
class Removal:
    """Units to remove. blocks: indices. kv_groups and neurons: for each block the indices, equally many in each."""

    blocks: tuple[int, ...] = ()
    kv_groups: tuple[tuple[int, ...], ...] = ()
    neurons: tuple[tuple[int, ...], ...] = ()
    record: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Method:
    """A registered method: its module and what the registry reads off it."""

    name: str
    family: str
    module: ModuleType

    @property
    def contract(self) -> str:
        """layer, structure or training: which functions the module defines."""
        for contract, function in (("layer", "compress"), ("structure", "choose"), ("training", "prepare")):
            if hasattr(self.module, function):
                return contract
        raise TypeError(f"Method {self.name!r} ({self.file}) defines none of compress, choose and prepare.")

    @property
    def file(self) -> Path:
        return Path(self.module.__file__)

    @property
    def source(self) -> Source:
        return self.module.SOURCE

    @property
    def options(self) -> type[MethodOptions]:
        return self.module.Options

    @property
    def needs(self) -> frozenset[str]:
        return self.module.NEEDS

    @property
    def makes(self) -> frozenset[str]:
        return self.module.MAKES

    @property
    def refuses(self) -> Mapping[str, str]:
        return self.module.REFUSES

    def marks(self, parent: frozenset[str]) -> frozenset[str]:
        """The marks of a node that this method makes: the parent's and MAKES, or what the module's `marks` says."""
        own = getattr(self.module, "marks", None)
        return frozenset(own(parent)) if own else parent | self.makes

    def propagates(self, options: MethodOptions) -> bool:
        """Whether moments are gathered behind the blocks already compressed, instead of being read."""
        return "moments" in self.needs and isinstance(options, LayerOptions) and options.propagate

    def validated(self, options: Mapping[str, Any]) -> MethodOptions:
        """The options, checked. Raises UserError with every problem in one sentence."""
        try:
            return self.options.model_validate(options)
        except ValidationError as error:
            found = [f"{'.'.join(map(str, each['loc'])) or 'options'}: {each['msg']}" for each in error.errors()]
            raise UserError(f"The options of method {self.name!r} are not valid: {'; '.join(found)}.") from None


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
        raise UserError(f"There is no method {name!r}.{nearest(name, known)}")
    return known[name]
