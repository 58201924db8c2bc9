"""Learned rounding: for each weight, whether it goes up or down on its grid is learned for the layer's outputs.

Chen, Giannoula and Moshovos, Low-Bitwidth Floating Point Quantization for Efficient High-Quality Diffusion Models
(arXiv 2408.06995), for low-bit floats; Nagel et al., Up or Down? Adaptive Rounding for Post-Training Quantization
(arXiv 2004.10568), the relaxation that it generalizes. A weight w lies between two neighbours of its grid, low and
low + step; W^ = low + step h(V) with h = clip(1.2 sigmoid(V) - 0.1, 0, 1), and Adam minimises by V

    N tr((W - W^) H (W - W^)^T) / L + lambda sum(1 - |2 h - 1|^beta),

H = E[x x^T], L the loss tr(..) of rounding to nearest, N the number of weights, beta falling from 20 to 2 after a fifth
of the steps without the second term, which drives h to 0 or 1.

On an integer grid (`solvers.grid`) step is the scale everywhere: AdaRound. On floats it is
the local step of the format, 2^(floor(log2 |w|) - mantissa bits) in its unit: one format for the whole matrix, its
largest value c and, unless given, its exponent bits those of least |W - round(W)|^2, c in max|W| 2^(-i/8), i = 0 .. 47.

Ten times on the way, and at the end, h is rounded; what is kept is the best of these and of rounding to nearest.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from coppice.lazy import torch
from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import QUANTIZE
from coppice.methods.solvers.codebook import encode, float_table, require_finite
from coppice.methods.solvers.grid import (
    GridOptions,
    GroupOptions,
    decode,
    fit_groups,
    grid_record,
    group_of_inputs,
    group_width,
    make_grid,
)
from coppice.methods.solvers.loss import output_power
from coppice.methods.solvers.moments import second_moment
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import Codebook, Quantized
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "Low-Bitwidth Floating Point Quantization for Efficient High-Quality Diffusion Models",
    "arXiv 2408.06995",
    "learned rounding, h(V) = clip(1.2 sigmoid(V) - 0.1, 0, 1), on floats whose format is searched by mean square",
    "Diffusion models lose nothing noticeable with weights and activations in 8-bit floats, and little with weights in "
    "4 bits and activations in 8.",
)

_STRETCH, _OFFSET = 1.2, 0.1
_BETAS = (20.0, 2.0)
_WARMUP = 0.2
_LOOKS = 10


class Options(GridOptions):
    format: Literal["int", "float"] = Field(
        default="int", description="A uniform grid for each group, or one low-bit float format for the whole matrix."
    )
    exponent_bits: int | None = Field(
        default=None,
        ge=0,
        description="Exponent bits of the format float, fewer than bits; 0 is a uniform grid. The best of 1 to "
        "bits - 1 when left out.",
    )
    steps: int = Field(default=1000, ge=1, description="Steps of Adam; small layers need fewer.")
    learning_rate: float = Field(default=0.03, gt=0, description="Of Adam, on V.")
    regularization: float = Field(
        default=3.0, ge=0, description="lambda, the weight of the term that drives h to 0 or 1."
    )

    @model_validator(mode="after")
    def _format_exists(self) -> Options:
        if self.format == "int" and self.exponent_bits is not None:
            raise ValueError("'exponent_bits' requires 'format: float'")
        if self.format == "float":
            for name in ("group_size", "symmetric"):
                if getattr(self, name) != GroupOptions.model_fields[name].default:
                    raise ValueError(f"{name!r} requires 'format: int'; a float format is that of the whole matrix")
        if self.exponent_bits is not None and self.exponent_bits >= self.bits:
            raise ValueError(
                f"{self.exponent_bits} exponent bits and a sign do not fit in {self.bits} bits; "
                f"take at most {self.bits - 1}"
            )
        if self.exponent_bits is not None and self.allocation.by != "uniform":
            raise ValueError("leave 'exponent_bits' out where bits are allocated: they fit one number of bits only")
        return self


@dataclass(frozen=True)
class Neighbours:
    """low, step: [m, n], the values that a weight can take are low and low + step; codes: [m, n] int32, that of low.

    share: [m, n] in [0, 1], where between them the weight lies; nearest: [m, n] bool, where the upper one is nearest.
    step is 0 where there is nothing to choose.
    """

    low: Tensor
    step: Tensor
    codes: Tensor
    share: Tensor
    nearest: Tensor


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> Quantized | Codebook:
    """Learns the rounding of every weight; pruned weights stay zero, weights of unseen inputs go to the nearest.

    Raises UserError when the weight is not finite, when the group size does not divide the width and `indivisible` is
    "error", or when the statistics are unfit (see `solvers.moments` and `solvers.loss`).
    """
    require_finite(linear.weight)
    moment = second_moment(statistics.second_moment)
    return _on_floats(linear, moment, options) if options.format == "float" else _on_integers(linear, moment, options)


def _on_integers(linear: Linear, moment: Tensor, options: Options) -> Quantized:
    weight = linear.weight
    width = group_width(options, weight.shape[1])
    grid = make_grid(linear, options)
    scale, zero_point = fit_groups(grid, weight, width)
    scales, zero_points = (part.repeat_interleave(width, dim=1) for part in (scale, zero_point))
    below = torch.floor(weight / scales) + zero_points
    codes, above = (code.clamp(grid.low, grid.high).to(torch.int32) for code in (below, below + 1))
    low, high = (decode(code, scales, zero_points) for code in (codes, above))
    neighbours = _neighbours(linear, codes, low, high, grid.encode(weight, scales, zero_points))
    up, record = learn(weight, neighbours, moment, options)
    return Quantized(
        codes + up,
        scale,
        zero_point,
        group_of_inputs(weight.shape[1], width, weight.device),
        options.bits,
        width,
        options.symmetric,
        record=grid_record(options, width) | record,
    )


def _on_floats(linear: Linear, moment: Tensor, options: Options) -> Codebook:
    weight = linear.weight
    exponent_bits, limit = best_format(weight, options, linear.storage or weight.dtype)
    table = float_table(options.bits, exponent_bits).to(weight)
    relative = (weight / limit).contiguous()
    codes = torch.searchsorted(table, relative, right=True, out_int32=True) - 1
    codes = codes.clamp(0, len(table) - 2)
    low, high = limit * table[codes], limit * table[codes + 1]
    neighbours = _neighbours(linear, codes, low, high, encode(relative, table))
    up, record = learn(weight, neighbours, moment, options)
    largest = weight.abs().max().item()
    record = {
        "bits": options.bits,
        "exponent_bits": exponent_bits,
        "largest": limit.item(),
        "range_kept": limit.item() / largest if largest > 0 else 1.0,
        **record,
    }
    return Codebook(codes + up, table, limit[None], codes.numel(), options.bits, record=record)


def best_format(weight: Tensor, options: Options, storage: torch.dtype) -> tuple[int, Tensor]:
    """Exponent bits and the largest value c (rounded to `storage`, in the weight's type) of least mean square error.

    A sorted |W| and its running sums give the error of a table in one look-up for each entry.
    """
    sizes = weight.abs().flatten().sort().values
    sums, squares = (
        torch.cat([part.new_zeros(1), part.cumsum(0)]) for part in (sizes.double(), sizes.double().square())
    )
    largest = torch.where(sizes[-1] == 0, 1, sizes[-1])
    factors = 2.0 ** (-torch.arange(48, dtype=weight.dtype, device=weight.device) / 8)
    limits = (largest * factors).clamp(torch.finfo(storage).tiny, torch.finfo(storage).max).to(storage).to(weight.dtype)
    splits = range(1, options.bits) if options.exponent_bits is None else [options.exponent_bits]
    formats = []
    for exponent_bits in splits:
        table = float_table(options.bits, exponent_bits)
        values = limits[:, None].double() * table[len(table) // 2 :].to(limits.device)
        middles = ((values[:, 1:] + values[:, :-1]) / 2).to(sizes.dtype)
        inner = torch.searchsorted(sizes, middles.contiguous())
        edges = torch.nn.functional.pad(inner, (1, 0))
        edges = torch.nn.functional.pad(edges, (0, 1), value=len(sizes))
        errors = squares[-1] - 2 * (values * sums[edges].diff()).sum(1) + (values.square() * edges.diff()).sum(1)
        best = errors.argmin()
        formats.append((errors[best].item(), exponent_bits, limits[best]))
    return min(formats, key=lambda each: each[0])[1:]


def _neighbours(linear: Linear, codes: Tensor, low: Tensor, high: Tensor, nearest: Tensor) -> Neighbours:
    step = high - low
    if linear.mask is not None:
        # A pruned weight is at 0 = low already.
        step = step.masked_fill(~linear.mask, 0)
    share = torch.where(step == 0, 0, (linear.weight - low) / step).clamp(0, 1)
    return Neighbours(low, step, codes, share, (nearest > codes) & (step != 0))


def learn(weight: Tensor, neighbours: Neighbours, moment: Tensor, options: Options) -> tuple[Tensor, Json]:
    """Which weights [m, n] (int32, 0 or 1) go up, and the record of how."""
    step, rest = neighbours.step, weight - neighbours.low
    movable = step != 0

    def loss(up: Tensor) -> float:
        return output_power(rest - step * up, moment)

    nearest = neighbours.nearest
    baseline = loss(nearest)
    best, least, steps = nearest, baseline, 0
    values = torch.special.logit((neighbours.share + _OFFSET) / _STRETCH)
    if baseline > 0:
        scaled = (moment * (values.numel() / baseline)).to(weight.dtype)
        optimizer = torch.optim.Adam([values], lr=options.learning_rate)
        looks = {options.steps * look // _LOOKS for look in range(1, _LOOKS + 1)}
        for steps in range(1, options.steps + 1):
            values.grad = gradient(values, rest, step, scaled, *pressure(steps - 1, options))
            optimizer.step()
            if steps in looks:
                up = (values > 0) & movable
                if (value := loss(up)) < least:
                    best, least = up, value
    undecided = ((soft_rounding(values) - 0.5).abs() < 0.5) & movable
    return best.to(torch.int32), {
        "steps": steps,
        "loss_nearest": baseline,
        "loss": least,
        "moved_codes": (best != nearest).double().mean().item(),
        "undecided": undecided.double().mean().item(),
    }


def soft_rounding(values: Tensor) -> Tensor:
    """h(V)."""
    return (_STRETCH * torch.sigmoid(values) - _OFFSET).clamp(0, 1)


def pressure(step: int, options: Options) -> tuple[float, float]:
    """lambda and beta at a step, counted from 0."""
    progress = step / options.steps
    if progress < _WARMUP:
        return 0.0, _BETAS[0]
    share = (progress - _WARMUP) / (1 - _WARMUP)
    return options.regularization, _BETAS[0] + share * (_BETAS[1] - _BETAS[0])


def gradient(values: Tensor, rest: Tensor, step: Tensor, moment: Tensor, strength: float, beta: float) -> Tensor:
    """The gradient by V of tr((R - step h) H (R - step h)^T) + lambda sum(1 - |2 h - 1|^beta), R = W - low."""
    sigmoid = torch.sigmoid(values)
    rounding = soft_rounding(values)
    by_rounding = -2 * step * ((rest - step * rounding) @ moment)
    if strength > 0:
        distance = 2 * rounding - 1
        by_rounding -= 2 * strength * beta * distance.abs().pow(beta - 1) * distance.sign()
    return by_rounding * (_STRETCH * sigmoid * (1 - sigmoid)) * ((rounding > 0) & (rounding < 1))


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"quantized"}),
    incompatible_with=QUANTIZE,
    compress=compress,
)
