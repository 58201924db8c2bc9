"""Linears as columns, link and rows."""

from __future__ import annotations

import torch

from coppice.models import modules


def test_a_cur_linear_computes_its_effective_weight() -> None:
    module = modules.CURLinear(12, 8, 3, bias=True, dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.allclose(module(x), x @ modules.effective_weight(module).T + module.bias)
    assert modules.effective_weight(module).shape == (8, 12)
