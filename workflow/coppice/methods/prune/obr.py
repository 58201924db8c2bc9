"""OBR: the remaining weights compensate for what pruning, and then rounding half of the inputs, loses.

Guo et al., Optimal Brain Restoration for Joint Quantization and Sparsification of LLMs (arXiv 2509.11177), algorithm 1.
W: [m, n]; H = E[x x^T] + damping mean(diag H) I, [n, n]. With an error e = w - w_hat fixed at the places E of a row,
w_hat is best at the places R with d_R = H_RR^-1 H_RE e_E added to it (see `solvers.refit`). In each row:

1. Wanda's score |w_j| sqrt(H_jj) chooses what is pruned, E_1; R_1 is kept: w_bar = w + d of e = w on E_1;
2. E_2 are the kept inputs j < alpha n, R_2 the others: d of e = w_bar - round(w_bar) on E_2 is added on R_2. As the
   gradient of step 1 vanishes on R_1, this is the best for both errors together;
3. R_2 is rounded as well: to nearest, or in a sweep of GPTQ over the inputs j >= alpha n, whose Cholesky factor is the
   trailing block of that of all inputs.

Scales come from the weights before pruning; the paper has one symmetric grid for each output (`symmetric: true`,
`group_size: -1`). Without bits only step 1 is taken. Differs from the paper: its algorithm has d with a minus sign and
its text with a plus, which is right under its own definitions. Inputs are split by their index at floor(alpha n), as
its code does. Ranges are not clipped; the rotation is a step of its own, `rotate`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from coppice.lazy import torch
from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import PRUNE_AND_ROUND
from coppice.methods.solvers.damping import damp
from coppice.methods.solvers.grid import (
    Grid,
    OptionalGridOptions,
    decode,
    fit_groups,
    grid_record,
    group_of_inputs,
    group_width,
    make_grid,
)
from coppice.methods.solvers.mask import (
    PruningOptions,
    comparison_group,
    keep_largest,
    nothing_to_prune,
    pruning_record,
)
from coppice.methods.solvers.moments import input_power
from coppice.methods.solvers.refit import compensate
from coppice.methods.solvers.selection import share_of
from coppice.methods.solvers.sweep import CholeskyFactor, Quantizer, cholesky_factor, sweep
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import Masked, Quantized, Unchanged
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "Optimal Brain Restoration for Joint Quantization and Sparsification of LLMs",
    "arXiv 2509.11177",
    "algorithm 1, with the sign of the text: d_R = H_RR^-1 H_RE e_E",
    "Llama-2-7B, rotated as in QuaRot, half of the weights pruned, weights, activations and key/value cache in 4 bits: "
    "WikiText-2 perplexity 9.23 (rtn) and 8.40 (gptq), against 12.94 of SparseGPT with GPTQ and 5.47 of the dense "
    "model; its calibration text is WikiText-2 too.",
)


class Options(PruningOptions, OptionalGridOptions):
    """Exactly one of sparsity and pattern; bits round what stays."""

    form: Literal["rtn", "gptq"] = Field(
        default="gptq", description="How the inputs after the split are rounded: to nearest, or in a sweep of GPTQ."
    )
    alpha: float = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Share of the inputs, from the first on, whose rounding errors the others make up for.",
    )
    damping: float = Field(default=0.01, ge=0, le=1, description="Share of mean(diag H) added to H's diagonal.")
    block: int = Field(default=128, ge=1, description="Inputs swept before the rest is corrected; changes speed only.")

    @model_validator(mode="after")
    def _a_budget(self) -> Options:
        if self.sparsity is None and self.pattern is None:
            raise ValueError("give exactly one of 'sparsity' and 'pattern'")
        return self

    @model_validator(mode="after")
    def _rounding_with_bits(self) -> Options:
        # Defaults are let through: an effective study writes them out.
        for name in ("form", "alpha"):
            if self.bits is None and getattr(self, name) != type(self).model_fields[name].default:
                raise ValueError(f"'{name}' requires 'bits', which rounds the weights")
        return self


def traits(parent: frozenset[str], options: Options) -> frozenset[str]:
    return parent | {"masked"} if options.bits is None else parent | {"masked", "quantized"}


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> Masked | Quantized | Unchanged:
    """Prunes and restores the weight and, with bits, rounds and restores it; weights of dead inputs become zero.

    Raises UserError when M of N:M or the group size does not divide the width, or when the statistics are unfit (see
    `solvers.damping`).
    """
    if options.bits is None and options.pruned_share == 0:
        return nothing_to_prune()
    factor = cholesky_factor(statistics.second_moment, options.damping)
    moment = damp(statistics.second_moment, factor.damping).moment
    weight = linear.weight.masked_fill(factor.dead, 0)
    mask = _wanda(weight, statistics.second_moment, linear.mask, options)
    restored = restore(weight, weight.masked_fill(~mask, 0), mask, moment)
    record = pruning_record(options, mask) | factor.record
    if options.bits is None:
        return Masked(restored, mask, record=record)
    return _quantize(linear, weight, restored, mask, moment, factor, options, record)


def restore(weight: Tensor, compressed: Tensor, free: Tensor, moment: Tensor) -> Tensor:
    """compressed [m, n], its free places corrected for the error weight - compressed of the others."""
    correction = compensate(weight - compressed, free, moment)
    return compressed + correction.to(weight.dtype)


def _wanda(weight: Tensor, moment: Tensor, kept: Tensor | None, options: Options) -> Tensor:
    width = weight.shape[1]
    scores = weight.abs() * input_power(moment).sqrt().to(weight.dtype)
    return keep_largest(scores, *comparison_group(options, width, width), kept)


def _quantize(
    linear: Linear,
    weight: Tensor,
    restored: Tensor,
    mask: Tensor,
    moment: Tensor,
    factor: CholeskyFactor,
    options: Options,
    record: Json,
) -> Quantized:
    inputs = weight.shape[1]
    width = group_width(options, inputs)
    grid = make_grid(linear, options)
    scale, zero_point = fit_groups(grid, weight, width)
    groups = group_of_inputs(inputs, width, weight.device)
    split = share_of(options.alpha, inputs)

    codes = _round(grid, restored, scale, zero_point, groups)
    after_split = torch.arange(inputs, device=weight.device) >= split
    rounded = torch.where(after_split, restored, decode(codes, scale[:, groups], zero_point[:, groups]))
    restored = restore(restored, rounded, mask & after_split, moment)
    if options.form == "rtn":
        codes = _round(grid, restored, scale, zero_point, groups)
    elif split < inputs:
        codes[:, split:] = sweep(
            restored[:, split:],
            CholeskyFactor(factor.upper[split:, split:], factor.dead[split:], factor.damping, factor.requested),
            options.block,
            kept=mask[:, split:],
            quantizer=Quantizer(grid, width, groups[split:], (scale, zero_point)),
        ).on_grid[0]
    record = record | grid_record(options, width) | {"form": options.form, "split": split}
    return Quantized(codes, scale, zero_point, groups, grid.bits, width, options.symmetric, record=record)


def _round(grid: Grid, weight: Tensor, scale: Tensor, zero_point: Tensor, groups: Tensor) -> Tensor:
    return grid.encode(weight, scale[:, groups], zero_point[:, groups])


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"masked", "quantized"}),
    incompatible_with=PRUNE_AND_ROUND,
    traits=traits,
    compress=compress,
)
