"""Linears with a low-rank correction."""

from __future__ import annotations

import torch

from coppice.models import modules


def test_a_correction_adds_to_the_effective_weight() -> None:
    base = modules.LowRankLinear(12, 8, 3, bias=True, dtype=torch.float64)
    module = modules.LowRankCorrectionLinear(base, 2, dtype=torch.float64)
    x = torch.randn(5, 12, dtype=torch.float64)
    assert torch.allclose(module(x), x @ modules.effective_weight(module).T + module.bias)
    assert torch.allclose(module(torch.zeros(1, 12, dtype=torch.float64))[0], base.second.bias)
