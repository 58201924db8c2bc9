"""Linears as two factors."""

from __future__ import annotations

import torch
from forms import dense_linear, stored_form

from coppice.models import modules
from coppice.models.replacements import Codebook, LowRank


def test_a_factor_may_be_packed_in_its_turn() -> None:
    """The second factor [6, 3] is described transposed, as [3, 6], and takes the bias."""
    codes = torch.randint(16, (3, 6), dtype=torch.int32)
    book = Codebook(codes, torch.linspace(-1, 1, 16), torch.ones(1), block=18, bits=4, transposed=True)
    first, bias = torch.randn(3, 5), torch.randn(6)
    module = stored_form(LowRank(first, book), dense_linear(5, 6, bias))
    assert module.describe() == {"type": "LowRank", "rank": 3}
    assert isinstance(module.second, modules.CodebookLinear)
    second = torch.linspace(-1, 1, 16)[codes].T
    torch.testing.assert_close(modules.effective_weight(module), second @ first)
    x = torch.randn(4, 5)
    torch.testing.assert_close(module(x), x @ (second @ first).T + bias)
