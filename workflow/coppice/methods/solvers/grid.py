"""Uniform integer grids, one for each group of consecutive inputs of an output.

w = s (q - z), with integer codes q, scale s > 0 and integer zero point z; q = clip(round(w / s) + z, low, high).
From b bits and the group's range [x_min, x_max], widened to hold 0:

- asymmetric: q in 0 .. 2^b - 1, s = (x_max - x_min) / (2^b - 1), z = round(-x_min / s);
- symmetric: q in -2^(b-1) .. 2^(b-1) - 1, s = 2 max|x| / (2^b - 1), z = 0 (GPTQ's and compressed-tensors' convention;
  not max|x| / (2^(b-1) - 1)).

|w - s (q - z)| <= s / 2 within the group's range, up to the rounding of s to the type it is stored in; 0 is always on
the grid. Source: Frantar et al., GPTQ (arXiv 2210.17323), section 4, "min-max" grids.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.options import LayerOptions, TargetOptions
from coppice.models.contracts import Linear
from coppice.models.replacements import Quantized
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor


class GroupOptions(LayerOptions):
    """The groups of weights that share a scale, and the kind of grid."""

    group_size: int = Field(
        default=128, description="Consecutive inputs that share a scale and a zero point; -1: the whole row."
    )
    symmetric: bool = Field(default=False, description="Signed codes with zero point 0, instead of unsigned codes.")
    indivisible: Literal["error", "row"] = Field(
        default="error",
        description="What to do where the group size does not divide the number of inputs: stop, or take the row.",
    )

    @field_validator("group_size")
    @classmethod
    def _is_size(cls, group_size: int) -> int:
        if group_size < 1 and group_size != -1:
            raise ValueError(f"a group size is a positive number of inputs, or -1 for the whole row, not {group_size}")
        return group_size


class GridOptions(GroupOptions, TargetOptions):
    """The grid on which weights are rounded."""

    TARGET: ClassVar[str] = "bits"
    RULES: ClassVar[frozenset[str]] = frozenset({"uniform", "sensitivity", "knapsack"})

    bits: int = Field(ge=2, le=8, description="Bits of a code.")


class OptionalGridOptions(GroupOptions):
    """The grid on which a method that prunes rounds the weights too, where it has bits."""

    bits: int | None = Field(
        default=None, ge=2, le=8, description="Bits of a code; when left out, weights are not rounded."
    )

    @model_validator(mode="after")
    def _grid_with_bits(self) -> OptionalGridOptions:
        # Defaults are let through: an effective study writes them out.
        fields = GroupOptions.__annotations__
        given = [name for name in fields if getattr(self, name) != GroupOptions.model_fields[name].default]
        if self.bits is None and given:
            raise ValueError(f"'{given[0]}' requires 'bits', which rounds the weights")
        return self


@dataclass(frozen=True)
class Grid:
    """bits, symmetry, and the type that scales are stored in."""

    bits: int
    symmetric: bool
    storage: torch.dtype

    @property
    def low(self) -> int:
        return -(2 ** (self.bits - 1)) if self.symmetric else 0

    @property
    def high(self) -> int:
        return self.low + 2**self.bits - 1

    def fit(self, values: Tensor, shrink: float = 1.0) -> tuple[Tensor, Tensor]:
        """Scale (in the values' type, rounded to `storage`) and zero point (int32) over the last axis of [..., g].

        The range is cut at -c and c, c = shrink max|x|. A group of zeros gets scale 1.
        """
        lowest, highest = values.amin(dim=-1).clamp(max=0), values.amax(dim=-1).clamp(min=0)
        limit = shrink * torch.maximum(-lowest, highest)
        lowest, highest = torch.maximum(lowest, -limit), torch.minimum(highest, limit)
        span = 2 * torch.maximum(-lowest, highest) if self.symmetric else highest - lowest
        scale = torch.where(span == 0, torch.ones_like(span), span / (2**self.bits - 1))
        # A range below the smallest stored number would round to a scale of zero.
        scale = scale.to(self.storage).clamp(min=torch.finfo(self.storage).tiny).to(values.dtype)
        if self.symmetric:
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        return scale, torch.round(-lowest / scale).clamp(self.low, self.high).to(torch.int32)

    def encode(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        """Codes (int32) of values; scale and zero_point broadcast against them."""
        return (torch.round(values / scale) + zero_point).clamp(self.low, self.high).to(torch.int32)


def decode(codes: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
    """s (q - z), in the scale's type."""
    return scale * (codes - zero_point)


def dequantize(quantized: Quantized) -> Tensor:
    """[m, n] the weights that the codes represent, in the scale's type."""
    index = quantized.group_index.long()
    return decode(quantized.codes, quantized.scale[:, index], quantized.zero_point[:, index])


def make_grid(linear: Linear, options: GridOptions | OptionalGridOptions) -> Grid:
    """The grid of the options; they have bits."""
    assert options.bits is not None
    return Grid(options.bits, options.symmetric, linear.storage or linear.weight.dtype)


def group_width(options: GroupOptions, width: int) -> int:
    """Inputs in a group of a linear with `width` inputs.

    Raises UserError when the requested size does not divide the width, unless `indivisible` allows the whole row.
    """
    if options.group_size == -1:
        return width
    if width % options.group_size == 0:
        return options.group_size
    if options.indivisible == "row":
        return width
    divisors = ", ".join(str(size) for size in range(1, width + 1) if width % size == 0)
    raise UserError(
        f"A group size of {options.group_size} does not divide the {width} inputs of this layer: choose one of "
        f"{divisors}, or set 'indivisible: row' to give such layers one group for each output."
    )


def fit_groups(grid: Grid, weight: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Scale and zero point [m, n / width] of each group of `width` consecutive inputs of weight [m, n]."""
    return grid.fit(weight.unflatten(1, (-1, width)))


def group_of_inputs(inputs: int, width: int, device: torch.device) -> Tensor:
    """[n] int32: j // width."""
    return torch.arange(inputs, device=device, dtype=torch.int32) // width


def grid_record(options: GridOptions | OptionalGridOptions, width: int) -> Json:
    return {
        "bits": options.bits,
        "symmetric": options.symmetric,
        "group_size_asked": options.group_size,
        "group_size": width,
    }
