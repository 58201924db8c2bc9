"""AWQ: activation-aware weight quantization, by scaling the inputs and clipping the groups.

Lin et al., AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration (arXiv 2306.00978), equations
4 and 5. With a_j = E|x_j| and s = a^alpha / sqrt(max(a^alpha) min(a^alpha)), W becomes W diag(s), and whatever makes
the input is divided by s; alpha in {0, 1/20, .., 19/20} is the one whose rounding Q changes the outputs least:
L(s) = sum over the linears that share the input of tr(D H D^T), D = W - Q(W diag(s)) diag(s)^-1, H = E[x x^T]. With
alpha = 0 it is rounding to nearest. (The paper's code measures the output of the whole attention or MLP instead, on a
sample.)

Then the range of each group g of each row is cut at c max|w|, c in {1, 19/20, .., 11/20}, where
(w_g - q_g) H_gg (w_g - q_g)^T is least, with H_gg the group's block of H; and every weight goes to the nearest point of
its grid. All the grids are `solvers.grid`'s.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from coppice.lazy import torch
from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import QUANTIZE
from coppice.methods.solvers.grid import (
    Grid,
    GridOptions,
    decode,
    fit_groups,
    grid_record,
    group_of_inputs,
    group_width,
    make_grid,
)
from coppice.methods.solvers.loss import output_power
from coppice.methods.solvers.moments import input_size, second_moment
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import Quantized

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "AWQ: Activation-aware Weight Quantization for LLM Compression and Acceleration",
    "arXiv 2306.00978",
    "equations 4 and 5: s = E|x|^alpha, alpha = argmin |Q(W s)(x / s) - W x|",
)

_STEPS = 20
_CLIP_STEPS = 10
_SMALLEST = 1e-4


class Options(GridOptions):
    duo_scaling: bool = Field(
        default=False,
        description="Divide by the weights' own size too: s = E|x|^alpha / (w^(1 - alpha) + 1e-4), with w_j the mean "
        "over the outputs of |w_ij| / max|w| of its group.",
    )
    clip: bool = Field(default=True, description="Search a smaller range for each group after the scales.")
    clip_attention: bool = Field(
        default=False, description="Search it for q_proj and k_proj too, whose outputs are multiplied by each other."
    )


def scales(linears: list[Linear], statistics: LinearStatistics, options: Options) -> Tensor | None:
    """s [n] of the input that the linears share, in the weights' type; None where nothing beats rounding to nearest.

    The size of a_j counts relative to the mean of those seen, so that scaling all activations changes nothing; inputs
    that the calibration never saw get 1. Raises UserError when the group size does not divide the width and
    `indivisible` is "error", or when the statistics are unfit (see `solvers.moments` and `solvers.loss`).
    """
    moment = second_moment(statistics.second_moment)
    absmean = input_size(statistics.absmean, "mean absolute value")
    least, best = _scaled_loss(linears, moment, None, options), None
    sizes = _weight_sizes(linears, options) if options.duo_scaling else None
    for step in range(_STEPS):
        candidate = _candidate(absmean, sizes, step / _STEPS).to(linears[0].weight)
        loss = _scaled_loss(linears, moment, candidate, options)
        if loss < least:
            least, best = loss, candidate
    return best


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> Quantized:
    """Rounds each group to the grid of the range that costs its outputs least; zeros stay zeros.

    Raises UserError when the group size does not divide the width and `indivisible` is "error", or when the statistics
    are unfit (see `solvers.moments`).
    """
    weight = linear.weight
    width = group_width(options, weight.shape[1])
    grid = make_grid(linear, options)
    record = grid_record(options, width)
    if options.clip and (options.clip_attention or linear.role not in ("q", "k")):
        moment = second_moment(statistics.second_moment).to(weight.dtype)
        scale, zero_point, clipped = _clip_groups(grid, weight, moment, width)
        record |= {"clipped_groups": clipped}
    else:
        scale, zero_point = fit_groups(grid, weight, width)
    codes = grid.encode(weight.unflatten(1, (-1, width)), scale[:, :, None], zero_point[:, :, None]).flatten(1)
    return Quantized(
        codes,
        scale,
        zero_point,
        group_of_inputs(weight.shape[1], width, weight.device),
        options.bits,
        width,
        options.symmetric,
        record=record,
    )


def _candidate(absmean: Tensor, sizes: Tensor | None, alpha: float) -> Tensor:
    """s [n] in float64 for one alpha."""
    seen = absmean > 0
    powers = (absmean[seen] / absmean[seen].mean()).pow(alpha)
    if sizes is not None:
        powers = powers / (sizes[seen].pow(1 - alpha) + _SMALLEST)
    powers = powers.clamp(min=_SMALLEST)
    scales = torch.ones_like(absmean)
    scales[seen] = powers / (powers.max() * powers.min()).sqrt()
    return scales


def _weight_sizes(linears: list[Linear], options: Options) -> Tensor:
    """w [n] in float64: the mean over all outputs of |w_ij| / max|w| of the weight's group."""
    relative = []
    for linear in linears:
        groups = linear.weight.abs().unflatten(1, (-1, group_width(options, linear.weight.shape[1])))
        largest = groups.amax(dim=2, keepdim=True)
        relative.append((groups / torch.where(largest == 0, 1, largest)).flatten(1))
    return torch.cat(relative).mean(dim=0, dtype=torch.float64)


def _scaled_loss(linears: list[Linear], moment: Tensor, factors: Tensor | None, options: Options) -> float:
    """L(s); None: s = 1."""
    total = 0.0
    for linear in linears:
        weight, grid = linear.weight, make_grid(linear, options)
        width = group_width(options, weight.shape[1])
        scaled = weight if factors is None else weight * factors
        groups = scaled.unflatten(1, (-1, width))
        scale, zero_point = (part[:, :, None] for part in fit_groups(grid, scaled, width))
        rounded = decode(grid.encode(groups, scale, zero_point), scale, zero_point).flatten(1)
        total += output_power(weight - (rounded if factors is None else rounded / factors), moment)
    return total


def _clip_groups(grid: Grid, weight: Tensor, moment: Tensor, width: int) -> tuple[Tensor, Tensor, float]:
    """Scale and zero point [m, groups] of the best range of each group, and the share of groups whose range is cut."""
    groups = weight.unflatten(1, (-1, width))
    starts = range(0, len(moment), width)
    blocks = torch.stack([moment[start : start + width, start : start + width] for start in starts])
    for step in range(_CLIP_STEPS):
        scale, zero_point = grid.fit(groups, 1 - step / _STEPS)
        rounded = decode(
            grid.encode(groups, scale[:, :, None], zero_point[:, :, None]), scale[:, :, None], zero_point[:, :, None]
        )
        errors = (groups - rounded).transpose(0, 1)
        losses = (torch.bmm(errors, blocks) * errors).sum(dim=2).T
        if step == 0:
            best, least, first = (scale, zero_point), losses, scale
            continue
        better = losses < least
        least = torch.where(better, losses, least)
        best = (torch.where(better, scale, best[0]), torch.where(better, zero_point, best[1]))
    return *best, (best[0] != first).double().mean().item()


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"quantized"}),
    incompatible_with=QUANTIZE,
    compress=compress,
    scales=scales,
)
