"""Tables of values in [-1, 1] that a few bits index, and weights coded by them in blocks of one scale each.

Sources: Dettmers and Zettlemoyer, The case for 4-bit precision: k-bit Inference Scaling Laws (arXiv 2212.09720), for
blocks and the integer, float, dynamic exponent and quantile types. Dettmers et al., 8-bit Optimizers via Block-wise
Quantization (arXiv 2110.02861), for the dynamic exponent; Dettmers et al., QLoRA (arXiv 2305.14314), for NormalFloat.

A weight w of a block with a = max|w| is stored as the index of the entry of the table that is nearest to w / a, and
read as a table[index]. Every table is sorted, float64, of exactly 2^bits entries (a type with fewer values repeats one)
and holds 0, so that zeros stay exactly zero.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.models.replacements import Codebook

if TYPE_CHECKING:
    from torch import Tensor

# The highest probability whose quantile NF4 takes: 1 - (1/32 + 1/30) / 2, as published.
_NORMAL_OFFSET = 0.9677083


def integer_table(bits: int) -> Tensor:
    """{-m .. m} / m with m = 2^(bits-1) - 1: symmetric integers, whose 2^bits - 1 values repeat the last."""
    top = 2 ** (bits - 1) - 1
    values = torch.arange(-top, top + 1, dtype=torch.float64) / top
    return torch.cat([values, values[-1:]])


def float_table(bits: int, exponent_bits: int) -> Tensor:
    """Sign, E exponent bits and p = bits - 1 - E mantissa bits, without infinities and NaN, divided by the largest.

    An exponent field e > 0 means 2^(e - bias) (1 + f / 2^p), e = 0 the subnormal 2^(1 - bias) f / 2^p; the bias,
    2^(E-1), drops out. Zero comes twice. E = 0 gives the symmetric integers.
    """
    mantissas = 2 ** (bits - 1 - exponent_bits)
    fractions = torch.arange(mantissas, dtype=torch.float64) / mantissas
    exponents = torch.arange(2**exponent_bits, dtype=torch.float64)[:, None]
    magnitudes = torch.where(exponents == 0, 2 * fractions, 2**exponents * (1 + fractions)).flatten()
    # Adding 0 makes the negative zero positive.
    return torch.cat([-magnitudes.flip(0) + 0.0, magnitudes]) / magnitudes[-1]


def dynamic_table(bits: int) -> Tensor:
    """Dynamic exponent: z leading zeros give 10^-z, an indicator bit ends them, the rest is linear in [0.1, 1].

    With z = 0 .. bits - 2, the 2^(bits - 2 - z) values of each sign are the mid-points of equal cells of [0.1, 1],
    times 10^-z; 0 and 1 complete them. As published, -1 is not a value.
    """
    positive = []
    for zeros in range(bits - 1):
        cells = 2 ** (bits - 2 - zeros)
        middles = 0.1 + 0.9 * (torch.arange(cells, dtype=torch.float64) + 0.5) / cells
        positive.append(middles * 10.0**-zeros)
    magnitudes = torch.cat(positive)
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    return torch.cat([-magnitudes, ends, magnitudes]).sort().values


def quantile_table(bits: int, values: Tensor) -> Tensor:
    """Quantiles of `values`, so that every entry codes equally many of them, with 0 and both ends put in.

    q_i = (Q(p_i) + Q(p_(i+1))) / 2 for i = 0 .. 2^bits - 1, with Q the empirical quantile, divided by the largest
    |q_i|; then the inner entry nearest 0 becomes 0 and the ends -1 and 1. p_i = (i + 1/2) / (2^bits + 1), half a cell
    above the published i / (2^bits + 1), whose first quantile is the minimum: the more weights, the further out. Zeros
    among the values are left out: pruned weights need no further entry.
    """
    values = values.flatten()
    values = values[values != 0].sort().values
    count = 2**bits
    if len(values) == 0:
        return integer_table(bits)
    probabilities = (torch.arange(count + 1, dtype=torch.float64, device=values.device) + 0.5) / (count + 1)
    position = probabilities * (len(values) - 1)
    below = position.long()
    above = (below + 1).clamp(max=len(values) - 1)
    quantiles = torch.lerp(values[below].double(), values[above].double(), position - below)
    entries = (quantiles[1:] + quantiles[:-1]) / 2
    entries = entries / entries.abs().max().clamp(min=torch.finfo(torch.float64).tiny)
    entries[1 + entries[1:-1].abs().argmin()] = 0
    entries[0], entries[-1] = -1, 1
    return entries.sort().values.cpu()


def normal_float_table() -> Tensor:
    """NF4: quantiles of N(0, 1), 8 positive and 7 negative ones and 0, divided by the largest.

    The probabilities are evenly spaced from the offset 0.9677083 to 1/2 (not included), for each sign by itself.
    """

    def positive(count: int) -> Tensor:
        probabilities = torch.linspace(_NORMAL_OFFSET, 0.5, count + 1, dtype=torch.float64)[:-1]
        return torch.special.ndtri(probabilities)

    entries = torch.cat([-positive(7), torch.zeros(1, dtype=torch.float64), positive(8).flip(0)])
    return entries / entries[-1]


def encode(values: Tensor, table: Tensor) -> Tensor:
    """The index (int32) of the nearest entry of a sorted table, of two equally near ones the lower."""
    middles = ((table[1:] + table[:-1]) / 2).to(values)
    return torch.bucketize(values.contiguous(), middles, out_int32=True)


def require_finite(weight: Tensor) -> None:
    """Raises UserError when a weight is not finite."""
    if not torch.isfinite(weight).all():
        raise UserError(
            "This layer's weights hold values that are not finite, so they cannot be quantized: check the parent."
        )


def quantize_blocks(
    weight: Tensor,
    table: Tensor,
    bits: int,
    block: int,
    outliers: Tensor | None = None,
    storage: torch.dtype | None = None,
) -> Codebook:
    """Codes weight [m, n] by the table in runs of `block` weights, row after row (-1: one block).

    outliers: [p] int64 inputs, in increasing order, whose columns stay as they are. Codes are chosen against scales
    rounded to `storage` (None: the weight's type). Raises UserError when the weight is not finite.
    """
    require_finite(weight)
    coded, outlier_weight = weight, None
    if outliers is not None:
        kept = torch.ones(weight.shape[1], dtype=torch.bool, device=weight.device)
        kept[outliers] = False
        coded, outlier_weight = weight[:, kept], weight[:, outliers]
    count = coded.numel()
    width = count if block == -1 else min(block, count)
    blocks = torch.nn.functional.pad(coded.flatten(), (0, -count % width)).view(-1, width)
    storage = storage or weight.dtype
    absmax = blocks.abs().amax(dim=1).clamp(max=torch.finfo(storage).max).to(storage).to(weight.dtype)
    # A block of zeros, or one too small for the stored type, is zero whatever its codes are.
    divisor = torch.where(absmax == 0, torch.inf, absmax)
    codes = encode(blocks / divisor[:, None], table).flatten()[:count].view_as(coded)
    return Codebook(codes, table.to(weight), absmax, width, bits, outliers, outlier_weight)


def dequantize(codebook: Codebook) -> Tensor:
    """[m, n] the weights that the codes represent, in the scales' type."""
    shape = codebook.codes.shape
    block = torch.arange(codebook.codes.numel(), device=codebook.codes.device).view(shape) // codebook.block
    values = codebook.table[codebook.codes.long()] * codebook.absmax[block]
    if codebook.outliers is not None and codebook.outlier_weight is not None:
        whole = values.new_empty(shape[0], shape[1] + len(codebook.outliers))
        kept = torch.ones(whole.shape[1], dtype=torch.bool, device=values.device)
        kept[codebook.outliers] = False
        whole[:, kept], whole[:, codebook.outliers] = values, codebook.outlier_weight
        values = whole
    return values.T if codebook.transposed else values
