"""Inputs rounded token by token."""

from __future__ import annotations

import pytest
import torch

from coppice.models import modules


@pytest.mark.parametrize("symmetric", [True, False])
def test_rounded_tokens_stay_within_half_a_step_and_pass_gradients(symmetric: bool) -> None:
    x = torch.randn(3, 40, requires_grad=True)
    rounded = modules.round_tokens(x, 6, symmetric, 1.0)
    span = 2 * x.abs().amax(1) / 62 if symmetric else (x.amax(1) - x.amin(1)) / 63
    assert ((rounded - x).abs().amax(1) <= span / 2 * 1.001).all()
    assert all(len(row.unique()) <= 64 for row in rounded)
    rounded.sum().backward()
    assert torch.equal(x.grad, torch.ones_like(x))
    assert torch.equal(modules.round_tokens(torch.zeros(1, 4), 4, symmetric, 1.0), torch.zeros(1, 4))
