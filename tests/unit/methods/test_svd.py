from __future__ import annotations

import pytest
import torch

from coppice.methods.decompose.svd import Options, compress
from coppice.models.replacements import Unchanged

# Read by tests/rows.py.
ROWS = [{"rank": 3}]


def test_is_the_best_in_the_frobenius_norm(linear):
    factors = compress(linear, None, Options(keep=0.5))
    assert factors.first.shape == (5, 24) and factors.second.shape == (20, 5)  # floor(0.5 * 480 / 44)
    dropped = torch.linalg.svdvals(linear.weight)[5:].square().sum()
    difference = (linear.weight - factors.second @ factors.first).square().sum()
    assert difference.item() == pytest.approx(dropped.item(), rel=1e-12)
    assert factors.record["truncation_error"] == pytest.approx((dropped / linear.weight.square().sum()).item())
    assert factors.record["rank"] == 5
    assert factors.record["keep"] == pytest.approx(5 * 44 / 480)


@pytest.mark.parametrize("keep", [0.1, 0.35, 0.6, 0.9])
def test_budget_is_met_within_one_rank(linear, keep):
    rank = len(compress(linear, None, Options(keep=keep)).first)
    assert keep * 480 - 44 < rank * 44 <= keep * 480


def test_the_weight_of_the_factors_is_shared(linear):
    factors = compress(linear, None, Options(rank=4))
    torch.testing.assert_close(factors.first.norm(dim=1), factors.second.norm(dim=0), rtol=1e-9, atol=0)


@pytest.mark.parametrize("options", [{"keep": 1}, {"rank": 10}, {"rank": 20}])
def test_stays_dense_from_break_even(linear, options):
    unchanged = compress(linear, None, Options(**options))
    assert isinstance(unchanged, Unchanged)
    assert "reaches 10" in unchanged.record["unchanged"]
