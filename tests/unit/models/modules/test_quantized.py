"""Linears on integer grids."""

from __future__ import annotations

import pytest
import torch
from forms import quantized_linear


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("group_size", [16, -1])
def test_a_quantized_linear_computes_with_its_grid(symmetric: bool, group_size: int) -> None:
    groups = 1 if group_size == -1 else 3
    low = -4 if symmetric else 0
    codes = torch.randint(low, low + 8, (10, 48), dtype=torch.int32)
    scale = torch.rand(10, groups) + 0.1
    zero = (
        torch.zeros(10, groups, dtype=torch.int32) if symmetric else torch.randint(8, (10, groups), dtype=torch.int32)
    )
    bias = torch.randn(10)
    module = quantized_linear(codes, scale, zero, 3, group_size, symmetric, bias)
    expected = ((codes.view(10, groups, -1) - zero[:, :, None]) * scale[:, :, None]).view(10, 48)
    assert torch.equal(module.weight, expected)
    x = torch.randn(2, 48)
    assert torch.allclose(module(x), x @ expected.T + bias, atol=1e-5)
