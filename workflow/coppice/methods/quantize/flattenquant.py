"""FlattenQuant: one grid for all weights and one for all inputs, with large channels split until they fit.

Zhang et al., FlattenQuant: Breaking Through the Inference Compute-bound for Large Language Models with Per-tensor
Quantization (arXiv 2402.17985). m = out_features, n = in_features, n' columns after the split.

Smoothing (Xiao et al., SmoothQuant, arXiv 2211.10438, equation 4): x_j <- x_j / s_j, w_j <- w_j s_j with
s_j = max|x_j|^a / max|w_j|^(1 - a).

Flattening: with m_j = max|x_j| an input is split into K_j = ceil(m_j / T) pieces
x_j^(k) = sign(x_j) clip(|x_j| - k T, 0, T), k = 0 .. K_j - 1, the last one without its upper bound; their sum is x_j
for every x_j, and the column w_j is repeated for each. A column of weights with max|w_j| > T_w is split in the same
way, and what it multiplies is repeated. The thresholds are T = Q3 + beta (Q3 - Q1) over the m_j > 0 (T_w: over the
max|w_j|), raised to the least value that leaves at most `expansion` n columns, those of the inputs counted first.

Grids: inputs step T / (2^(b-1) - 1); weights scale T_w / (2^(b-1) - 1). A piece that is full, |w| = T_w, lies on the
grid, so rounding the pieces equals rounding w_j on the same grid with codes up to R_j (2^(b-1) - 1), R_j its number of
pieces. The pieces of an input share the rounded column, so its error meets the whole input: GPTQ's sweep applies to the
n columns with the second moment of the inputs before they are split, and the codes are split after it.

The paper's criterion for 4 or 8 bits could not be followed from public text; here a linear gets 4 bits where the
relative error of its outputs, tr(dW H dW^T) + sum_j min(step^2 / 12, H_jj) |w_j|^2 over tr(W H W^T), is below
`tolerance`. A split input has one piece at most that is neither 0 nor T, so its error counts once.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from pydantic import Field

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import QUANTIZE, QUANTIZE_ACTIVATIONS
from coppice.methods.options import LayerOptions
from coppice.methods.solvers.codebook import require_finite
from coppice.methods.solvers.grid import Grid
from coppice.methods.solvers.loss import relative_error
from coppice.methods.solvers.moments import input_power, second_moment
from coppice.methods.solvers.selection import share_of
from coppice.methods.solvers.sweep import Quantizer, cholesky_factor, sweep
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import FlattenQuant
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "FlattenQuant: Breaking Through the Inference Compute-bound for Large Language Models with Per-tensor Quantization",
    "arXiv 2402.17985",
    "x_j = sum_k sign(x_j) clip(|x_j| - k T, 0, T), per-tensor grids",
    "On OPT, 48.3 % of the linears compute in 4 bits and the others in 8 with negligible loss; where arithmetic is the "
    "bottleneck, up to 2 times the speed of 16 bits and 2.3 times less memory.",
)


class Options(LayerOptions):
    bits: Literal[4, 8, "auto"] = Field(
        default="auto", description="Bits of weights and inputs; `auto`: 4 where the predicted error allows, else 8."
    )
    tolerance: float = Field(
        default=0.05,
        gt=0,
        description="Under `auto`, the relative mean squared error of the outputs below which a linear gets 4 bits.",
    )
    smoothing: float | None = Field(
        default=0.5,
        ge=0,
        le=1,
        description="Exponent a of SmoothQuant: 0 evens out the weights, 1 the inputs; null leaves both as they are.",
    )
    fence: float = Field(
        default=1.5, ge=0, description="beta of the threshold Q3 + beta (Q3 - Q1) beyond which a channel is split."
    )
    expansion: float = Field(
        default=1.2, ge=1, description="Columns after the split over columns before, at most; 1 splits none."
    )
    solver: Literal["rtn", "gptq"] = Field(
        default="rtn", description="Round weights to nearest, or let GPTQ's sweep make up for their rounding."
    )
    damping: float = Field(default=0.01, ge=0, le=1, description="Share of mean(diag H) added to H's diagonal in GPTQ.")
    block: int = Field(default=128, ge=1, description="Inputs swept before the rest is corrected; changes speed only.")


class CentredGrid(Grid):
    """Codes 0 .. 2 z around the zero point z: each input's own z lets its codes reach further on the same scale."""

    def encode(self, values: Tensor, scale: Tensor, zero_point: Tensor) -> Tensor:
        codes = (torch.round(values / scale) + zero_point).clamp(min=0)
        return torch.minimum(codes, (2 * zero_point).to(codes.dtype)).to(torch.int32)


@dataclass(frozen=True)
class Rounded:
    """codes: [m, n] int32 around 0; scale: [] of the weights; errors: of the outputs, relative to their mean square."""

    bits: int
    codes: Tensor
    scale: Tensor
    weight_error: float
    input_error: float
    record: Json

    @property
    def error(self) -> float:
        return self.weight_error + self.input_error


def scales(linears: list[Linear], statistics: LinearStatistics, options: Options) -> Tensor | None:
    """s [n] of the smoothing, with max|w_j| over all the linears; 1 where an input or its weights are zero.

    Raises UserError when a weight is not finite, or when the statistics are unfit (see `solvers.moments`).
    """
    if options.smoothing is None:
        return None
    for linear in linears:
        require_finite(linear.weight)
    inputs = _largest_inputs(statistics)
    weights = torch.stack([linear.weight.abs().amax(dim=0).double() for linear in linears]).amax(dim=0)
    factors = inputs.pow(options.smoothing) / weights.pow(1 - options.smoothing)
    live = (inputs > 0) & (weights > 0)
    return torch.where(live, factors, torch.ones_like(factors)).to(linears[0].weight.dtype)


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> FlattenQuant:
    """Splits the large channels and rounds what is left; pruned weights stay zero.

    Raises UserError when the weight holds values that are not finite, or when the statistics are unfit (see
    `solvers.moments` and, for GPTQ, `solvers.sweep`).
    """
    weight, width = linear.weight, linear.weight.shape[1]
    require_finite(weight)
    spare = share_of(options.expansion, width) - width
    largest = _largest_inputs(statistics)
    threshold, input_pieces = split(largest, torch.ones_like(largest), spare, options)
    left = spare - int(input_pieces.sum()) + width
    columns = weight.abs().amax(dim=0).double()
    weight_threshold, weight_pieces = split(columns, input_pieces.double(), left, options)

    record: Json = {"bits_asked": options.bits}
    widths = [4, 8] if options.bits == "auto" else [options.bits]
    for bits in widths:
        rounded = _round(linear, statistics, options, bits, threshold, weight_threshold, weight_pieces)
        if options.bits == "auto":
            record[f"error_at_{bits}_bits"] = rounded.error
        if rounded.error < options.tolerance:
            break
    source, piece, weight_piece = layout(input_pieces, weight_pieces)
    expansion = len(source) / width
    record |= rounded.record | {
        "bits": rounded.bits,
        "solver": options.solver,
        "threshold": threshold,
        "weight_threshold": weight_threshold,
        "flattened_inputs": int((input_pieces > 1).sum()),
        "split_columns": int((weight_pieces > 1).sum()),
        "expansion": expansion,
        "effective_bits": rounded.bits * expansion,
        "weight_error": rounded.weight_error,
        "input_error": rounded.input_error,
    }
    return FlattenQuant(
        flatten(rounded.codes, source, weight_piece, 2 ** (rounded.bits - 1) - 1),
        rounded.scale.reshape(1),
        source,
        piece,
        threshold,
        rounded.bits,
        record=record,
    )


def split(maxima: Tensor, cost: Tensor, spare: int, options: Options) -> tuple[float, Tensor]:
    """The threshold T and the pieces of each channel, int64 [n], for maxima [n] >= 0 in float64.

    Each further piece of channel j takes cost_j columns, of which `spare` are there. As ceil(m_j / T) - 1 counts the
    k >= 1 with m_j / k > T, the least T that fits is the first of the falling m_j / k at which their costs exceed
    `spare`. T is not above the largest m_j; without channels other than zero it is 0.
    """
    if not maxima.any():
        return 0.0, torch.ones_like(maxima, dtype=torch.int64)
    low, high = torch.quantile(maxima[maxima > 0], torch.tensor([0.25, 0.75]).to(maxima))
    threshold = torch.minimum(high + options.fence * (high - low), maxima.max())
    pieces = _pieces(maxima, threshold)
    if ((pieces - 1) * cost).sum() > spare:
        beyond = maxima > threshold
        ratios = maxima[beyond, None] / torch.arange(1, spare + 2, device=maxima.device)
        falling, order = ratios.flatten().sort(descending=True)
        taken = cost[beyond, None].expand_as(ratios).flatten()[order].cumsum(0)
        threshold = falling[(taken <= spare).sum()]
        pieces = _pieces(maxima, threshold)
    return threshold.item(), pieces


def layout(input_pieces: Tensor, weight_pieces: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Source, input piece and weight piece of each column, int64 [n']: every pair of pieces of an input in turn.

    -1 for a piece that is the only one.
    """
    counts = input_pieces * weight_pieces
    source = torch.repeat_interleave(counts)
    place = torch.arange(len(source), device=source.device) - (counts.cumsum(0) - counts)[source]
    of_weight = weight_pieces[source]
    piece = torch.where(input_pieces[source] > 1, place // of_weight, -1)
    return source, piece, torch.where(of_weight > 1, place % of_weight, -1)


def flatten(values: Tensor, source: Tensor, piece: Tensor, threshold: float) -> Tensor:
    """[.., n] -> [.., n']: piece `piece` of column `source`, the whole of it where that is -1."""
    last = torch.zeros(values.shape[-1], dtype=piece.dtype, device=piece.device)
    last = last.scatter_reduce(0, source, piece, "amax")[source] == piece
    whole = values[..., source]
    size = (whole.abs() - piece.to(values.dtype) * threshold).clamp(min=0)
    size = torch.where(last, size, size.clamp(max=threshold))
    return torch.where(piece < 0, whole, whole.sign() * size).to(values.dtype)


def _round(
    linear: Linear,
    statistics: LinearStatistics,
    options: Options,
    bits: int,
    threshold: float,
    weight_threshold: float,
    weight_pieces: Tensor,
) -> Rounded:
    """The weight on its grid, its columns' codes within +-R_j (2^(b-1) - 1)."""
    weight, moment = linear.weight, second_moment(statistics.second_moment)
    top = 2 ** (bits - 1) - 1
    storage = linear.storage or weight.dtype
    scale = torch.tensor(weight_threshold / top or 1.0, dtype=torch.float64, device=weight.device).to(storage)
    # A range below the smallest stored number would round to a scale of zero.
    scale = scale.clamp(min=torch.finfo(storage).tiny).to(weight.dtype)
    grid = CentredGrid(bits, True, storage)
    zero_point = (weight_pieces * top).to(torch.int32)
    record: Json = {}
    if options.solver == "rtn":
        codes = grid.encode(weight, scale, zero_point)
    else:
        # A group is what columns of equally many pieces share.
        counts, groups = weight_pieces.unique(return_inverse=True)
        shape = (len(weight), len(counts))
        parameters = scale.expand(shape), (counts * top).to(torch.int32).expand(shape)
        factor = cholesky_factor(moment, options.damping)
        swept = sweep(
            weight, factor, options.block, kept=linear.mask, quantizer=Quantizer(grid, len(groups), groups, parameters)
        )
        (codes, _, _), record = swept.on_grid, factor.record
    codes = codes - zero_point
    rounded = codes * scale
    step = threshold / top
    noise = moment.diagonal().clamp(max=step**2 / 12)
    power = ((weight.double() @ moment) * weight).sum().clamp(min=torch.finfo(torch.float64).tiny)
    return Rounded(
        bits,
        codes,
        scale,
        relative_error(weight - rounded, weight, moment),
        ((rounded.double().square().sum(dim=0) * noise).sum() / power).item(),
        record,
    )


def _pieces(maxima: Tensor, threshold: Tensor) -> Tensor:
    """1 + the number of k >= 1 with m_j / k > T, which rounding lets ceil(m_j / T) miss by one."""
    count = torch.ceil(maxima / threshold).clamp(min=1)
    count = torch.where((count > 1) & (maxima / (count - 1) <= threshold), count - 1, count)
    return torch.where(maxima / count > threshold, count + 1, count).long()


def _largest_inputs(statistics: LinearStatistics) -> Tensor:
    """m_j = max|x_j| [n] in float64. Raises UserError when it, or the second moment, is unfit."""
    input_power(statistics.second_moment)
    largest = statistics.absmax.double()
    if not torch.isfinite(largest).all() or (largest < 0).any() or not largest.any():
        raise UserError(
            "The largest values of this layer's inputs are not finite, negative or all zero, which no inputs explain: "
            "calibrate again."
        )
    return largest


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"quantized", "quantized-activations"}),
    incompatible_with=QUANTIZE | QUANTIZE_ACTIVATIONS,
    compress=compress,
    scales=scales,
)
