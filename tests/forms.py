"""Stored forms from replacements, with values as they are."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coppice.models import modules
from coppice.models.replacements import Quantized, Replacement


def stored_form(replacement: Replacement, linear: nn.Module) -> modules.StoredForm:
    """What takes the linear's place after a method returned the replacement."""
    form = modules.FORMS[type(replacement).__name__]
    return form.from_replacement(replacement, linear, lambda values: values)


def quantized_linear(
    codes: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bits: int,
    group_size: int,
    symmetric: bool,
    bias: Tensor | None = None,
) -> nn.Linear:
    """A linear on the grid of a `Quantized`, with its values."""
    columns = codes.shape[1]
    groups = torch.arange(columns) // (columns if group_size == -1 else group_size)
    replacement = Quantized(codes, scale, zero_point, groups, bits, group_size, symmetric)
    return stored_form(replacement, dense_linear(columns, len(codes), bias))


def dense_linear(in_features: int, out_features: int, bias: Tensor | None) -> nn.Linear:
    """A linear of that shape and with that bias."""
    linear = nn.Linear(in_features, out_features, bias is not None)
    linear.bias = None if bias is None else nn.Parameter(bias)
    return linear
