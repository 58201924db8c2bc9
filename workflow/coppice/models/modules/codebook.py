"""Indices into a table of values, with one scale for each block of weights and outliers stored whole."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import Fields, PackedForm, Replaceable
from .packing import pack, packed_words, unpack, zero_words

# Codebooks are stored as whole multiples of this, so that the type of a checkpoint's numbers does not round them.
TABLE_UNIT = 2.0**-30


class CodebookLinear(PackedForm):
    """A linear whose weight is stored as packed indices into a table, with one scale for each block of weights.

    D = W, or W^T when transposed; the columns of D at `weight_outlier_index` [p] are stored whole in `weight_outliers`
    [rows, p]; the others, row after row, are absmax[block] table[code]. weight_packed: [words] int32; weight_table:
    [2^bits] int32 in units of `TABLE_UNIT`; weight_absmax: one for each `block` codes. The product is computed with the
    dequantized weight.
    """

    weight_packed: Tensor
    weight_table: Tensor
    weight_absmax: Tensor
    weight_outliers: Tensor
    weight_outlier_index: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        block: int,
        outliers: int = 0,
        transposed: bool = False,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.block, self.outliers, self.transposed = bits, block, outliers, transposed
        rows, columns = (in_features, out_features) if transposed else (out_features, in_features)
        self.coded_shape = (rows, columns - outliers)
        count = prod(self.coded_shape)

        self.register_buffer("weight_packed", zero_words(packed_words(count, bits), device=device))
        self.register_buffer("weight_table", zero_words(2**bits, device=device))
        self.register_buffer("weight_absmax", torch.ones(-(-count // block), device=device, dtype=dtype))
        if outliers:
            self.register_buffer("weight_outliers", torch.zeros((rows, outliers), device=device, dtype=dtype))
            self.register_buffer("weight_outlier_index", zero_words(outliers, device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_replacement(cls, replacement: Any, linear: Replaceable, as_stored: Callable[[Tensor], Tensor]) -> Self:
        bits, bias, kept = replacement.bits, linear.bias, replacement.outliers
        out_features, in_features = replacement.shape
        absmax = as_stored(replacement.absmax)
        form = cls(
            in_features,
            out_features,
            bits,
            replacement.block,
            0 if kept is None else len(kept),
            replacement.transposed,
            bias is not None,
            device=replacement.codes.device,
            dtype=absmax.dtype,
        )
        form.weight_packed = pack(replacement.codes.reshape(1, -1), bits)[0]
        table = torch.round(replacement.table.double() / TABLE_UNIT).to(torch.int32)
        form.weight_table = table.to(replacement.codes.device)
        form.weight_absmax = absmax
        if kept is not None and len(kept):
            form.weight_outliers = as_stored(replacement.outlier_weight)
            form.weight_outlier_index = kept.to(torch.int32)
        form.bias = None if bias is None else nn.Parameter(bias)
        return form

    def fields(self) -> Fields:
        fields = {"bits": self.bits, "block": self.block, "outliers": self.outliers}
        return {**fields, "transposed": self.transposed}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # decoded, not held
        """The dequantized weight [m, n], in the dtype of the scales, to which each product is rounded once."""
        count = prod(self.coded_shape)
        codes = unpack(self.weight_packed[None], self.bits, count)[0]
        dtype = self.weight_absmax.dtype
        table = (self.weight_table.double() * TABLE_UNIT).to(torch.promote_types(dtype, torch.float32))
        block = torch.arange(count, device=codes.device) // self.block
        values = (table[codes] * self.weight_absmax[block]).to(dtype).view(self.coded_shape)
        if self.outliers:
            rows, columns = self.coded_shape
            whole = values.new_empty(rows, columns + self.outliers)
            index = self.weight_outlier_index.long()
            rest = torch.ones(columns + self.outliers, dtype=torch.bool, device=index.device)
            rest[index] = False
            whole[:, index], whole[:, rest] = self.weight_outliers, values
            values = whole
        return values.T if self.transposed else values

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, block={self.block}"
