"""One grid for the whole weight and one for its inputs, whose large channels are split into pieces (FlattenQuant)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Self

import torch
from torch import Tensor, nn

from .base import Fields, PackedForm, Replaceable
from .packing import pack, packed_words, unpack, zero_words


class FlattenQuantLinear(PackedForm):
    """Weights and inputs on one symmetric grid each for the whole tensor, their large channels split into pieces.

    y = W' round(x') with x' [n'] of `flatten_inputs`, rounded to threshold / (2^(bits-1) - 1) and held within the
    threshold. weight_packed: [m, words] codes stored from 0, zero at 2^(bits-1); weight_scale, weight_threshold: [1];
    weight_source, weight_piece: [n'] int32, see `models.replacements.FlattenQuant`. Arithmetic is simulated in floats.
    """

    weight_packed: Tensor
    weight_source: Tensor
    weight_piece: Tensor
    weight_scale: Tensor
    weight_threshold: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bits: int,
        expanded: int,
        bias: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = in_features, out_features
        self.bits, self.expanded = bits, expanded

        self.register_buffer("weight_packed", zero_words(out_features, packed_words(expanded, bits), device=device))
        self.register_buffer("weight_source", zero_words(expanded, device=device))
        self.register_buffer("weight_piece", zero_words(expanded, device=device))
        self.register_buffer("weight_scale", torch.ones(1, device=device, dtype=dtype))
        self.register_buffer("weight_threshold", torch.ones(1, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(out_features, device=device, dtype=dtype)) if bias else None

    @classmethod
    def from_replacement(cls, replacement: Any, linear: Replaceable, as_stored: Callable[[Tensor], Tensor]) -> Self:
        codes, bits, bias = replacement.codes, replacement.bits, linear.bias
        scale = as_stored(replacement.scale)
        factory = {"device": codes.device, "dtype": scale.dtype}
        form = cls(linear.in_features, len(codes), bits, codes.shape[1], bias is not None, **factory)
        form.weight_packed = pack(codes + 2 ** (bits - 1), bits)
        form.weight_source = replacement.source.to(torch.int32)
        form.weight_piece = replacement.piece.to(torch.int32)
        form.weight_scale = scale
        form.weight_threshold = as_stored(torch.tensor([replacement.threshold], device=codes.device))
        form.bias = None if bias is None else nn.Parameter(bias)
        return form

    def fields(self) -> Fields:
        return {"bits": self.bits, "expanded": self.expanded}

    @property
    def expanded_weight(self) -> Tensor:
        """W' [m, n'], in the dtype of the scale."""
        codes = unpack(self.weight_packed, self.bits, self.expanded) - 2 ** (self.bits - 1)
        return codes.to(self.weight_scale.dtype) * self.weight_scale

    @property
    def weight(self) -> Tensor:  # type: ignore[override]  # decoded, not held
        """[m, n] what the layer multiplies by where no input saturates."""
        source, expanded = self.weight_source.long(), self.expanded_weight
        # An input's pieces see the same columns; the parts of a split column add up.
        pieces = torch.ones(self.in_features, device=source.device, dtype=source.dtype)
        pieces = pieces.scatter_reduce(0, source, self.weight_piece.long() + 1, "amax")
        shares = expanded / pieces[source].to(expanded.dtype)
        return expanded.new_zeros(self.out_features, self.in_features).index_add(1, source, shares)

    def forward(self, x: Tensor) -> Tensor:
        flat = flatten_inputs(x, self.weight_source.long(), self.weight_piece, self.weight_threshold)
        step = self.weight_threshold / (2 ** (self.bits - 1) - 1)
        rounded = torch.round(torch.clamp(flat, -self.weight_threshold, self.weight_threshold) / step) * step
        return nn.functional.linear(flat + (rounded - flat).detach(), self.expanded_weight, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bits={self.bits}, expanded={self.expanded}"


def flatten_inputs(x: Tensor, source: Tensor, piece: Tensor, threshold: Tensor) -> Tensor:
    """[..., n] -> [..., n']: of input source[c] the piece[c]-th stretch of length T; the last one takes the rest.

    The pieces of an input add up to it exactly; piece -1 is the whole input.
    """
    chosen = x[..., source]
    last = torch.zeros(x.shape[-1], device=x.device, dtype=piece.dtype).scatter_reduce(0, source, piece, "amax")[source]
    low = piece.clamp(min=0).to(x.dtype) * threshold
    stretch = (chosen.abs() - low).clamp(min=0)
    stretch = torch.where(piece < last, torch.minimum(stretch, threshold), stretch)
    return torch.sign(chosen) * stretch
