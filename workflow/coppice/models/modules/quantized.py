"""Uniform integer grids, one scale for each group of a row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import Fields, PackedForm, Replaceable
from .packing import pack, packed_words, unpack, zero_words


class QuantizedLinear(PackedForm):
    """A linear whose weight is stored as packed integers, in the pack-quantized form of compressed-tensors.

    w[i, j] = weight_scale[i, g] (code[i, j] - zero_point[i, g]), g = j // group_size (group_size -1: one group a row).
    weight_packed: [m, ceil(n b / 32)] int32, code j of a row at its bits j b .. (j+1) b; weight_scale: [m, groups];
    weight_zero_point (asymmetric only): [ceil(m b / 32), groups] int32, packed down the rows; weight_shape: (m, n).
    Codes are stored from 0; a symmetric grid has its zero at 2^(b-1). The product is computed with the dequantized
    weight: storage is saved, arithmetic is not.
    """

    weight_packed: Tensor
    weight_scale: Tensor
    weight_zero_point: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        group_size: int,
        symmetric: bool,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.group_size, self.symmetric = bits, group_size, symmetric
        groups = 1 if group_size == -1 else in_features // group_size

        self.register_buffer("weight_packed", zero_words(out_features, packed_words(in_features, bits), device=device))
        self.register_buffer("weight_scale", torch.ones((out_features, groups), device=device, dtype=dtype))
        if not symmetric:
            words = packed_words(out_features, bits)
            self.register_buffer("weight_zero_point", zero_words(words, groups, device=device))
        self.register_buffer("weight_shape", torch.tensor((out_features, in_features), device=device))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_replacement(cls, replacement: Any, linear: Replaceable, as_stored: Callable[[Tensor], Tensor]) -> Self:
        bits, symmetric, bias = replacement.bits, replacement.symmetric, linear.bias
        out_features, in_features = replacement.codes.shape
        scale = as_stored(replacement.scale)
        factory = {"device": replacement.codes.device, "dtype": scale.dtype}
        form = cls(in_features, out_features, bits, replacement.group_size, symmetric, bias is not None, **factory)
        form.weight_packed = pack(replacement.codes + 2 ** (bits - 1) if symmetric else replacement.codes, bits)
        form.weight_scale = scale
        if not symmetric:
            form.weight_zero_point = pack(replacement.zero_point.T, bits).T.contiguous()
        form.bias = None if bias is None else nn.Parameter(bias)
        return form

    def fields(self) -> Fields:
        return {"bits": self.bits, "group_size": self.group_size, "symmetric": self.symmetric}

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # decoded, not held
        """The dequantized weight [m, n], in the dtype of the scale."""
        codes = unpack(self.weight_packed, self.bits, self.in_features)
        groups = self.weight_scale.shape[1]
        if self.symmetric:
            zero = torch.full_like(self.weight_scale, 2 ** (self.bits - 1), dtype=torch.int32)
        else:
            zero = unpack(self.weight_zero_point.T, self.bits, self.out_features).T
        levels = codes.view(self.out_features, groups, -1) - zero[:, :, None]
        return (levels.to(self.weight_scale.dtype) * self.weight_scale[:, :, None]).flatten(1)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, group_size={self.group_size}"
