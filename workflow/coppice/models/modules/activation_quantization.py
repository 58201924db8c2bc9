"""Inputs of linears rounded token by token while the model runs."""

from __future__ import annotations

from typing import Any, TypedDict

import torch
from torch import Tensor, nn


class ActivationSettings(TypedDict):
    """How inputs are rounded: the parameters of `round_tokens`."""

    bits: int
    symmetric: bool
    clip: float


def round_tokens(x: Tensor, bits: int, symmetric: bool, clip: float) -> Tensor:
    """x [..., n] rounded token by token to 2^bits levels over `clip` of its range; gradients pass unchanged.

    Symmetric: s = clip max|x| / (2^(bits-1) - 1), levels -2^(bits-1) .. 2^(bits-1) - 1. Asymmetric: the range from the
    least to the largest value, widened to hold 0, with an integer zero point.
    """
    wide = x.detach().float()
    if symmetric:
        low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
        scale = clip * wide.abs().amax(dim=-1, keepdim=True) / high
        zero = torch.zeros_like(scale)
    else:
        low, high = 0, 2**bits - 1
        least = clip * wide.amin(dim=-1, keepdim=True).clamp(max=0)
        scale = (clip * wide.amax(dim=-1, keepdim=True).clamp(min=0) - least) / high
    scale = torch.where(scale == 0, torch.ones_like(scale), scale)
    if not symmetric:
        zero = torch.round(-least / scale)
    rounded = scale * ((torch.round(wide / scale) + zero).clamp(low, high) - zero)
    return x + (rounded.to(x.dtype) - x).detach()


def quantize_activations(linear: nn.Module, settings: ActivationSettings) -> None:
    """Makes a linear round its inputs token by token from now on: settings of `round_tokens`."""
    linear.quantized_activations = settings  # type: ignore[assignment]  # mypy lets a module hold tensors and modules only
    linear.register_forward_pre_hook(_quantize_first)


def _quantize_first(linear: Any, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (round_tokens(inputs[0], **linear.quantized_activations), *inputs[1:])
