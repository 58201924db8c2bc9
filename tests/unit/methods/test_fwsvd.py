from __future__ import annotations

import dataclasses

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.decompose import svd, svd_llm
from coppice.methods.decompose.fwsvd import Options, compress, plan
from coppice.models.contracts import Linear
from coppice.models.replacements import Unchanged

# Read by tests/rows.py.
ROWS = [{"rank": 3}]


class FakeDecoder:
    def __init__(self, gradients):
        self.batches = []
        self._gradients = gradients

    def gradients(self, batch):
        self.batches.append(batch)
        yield from self._gradients


def product(factors):
    return factors.second @ factors.first


def test_importance_is_the_root_of_the_mean_of_squared_gradients_over_outputs():
    generator = torch.Generator().manual_seed(0)
    gradients = [{"a": torch.randn(5, 4, generator=generator), "b": torch.zeros(2, 3)} for _ in range(3)]
    decoder = FakeDecoder(gradients)
    found = plan(decoder, Options(rank=2, batch=4))
    fisher = torch.stack([each["a"].double().square() for each in gradients]).mean(0)
    torch.testing.assert_close(found["a"], fisher.sum(0).sqrt())
    assert not found["b"].any()
    assert decoder.batches == [4]


def test_minute_gradients_do_not_vanish():
    found = plan(FakeDecoder([{"a": torch.full((2, 3), 1e-30)}]), Options(rank=2))
    torch.testing.assert_close(found["a"], torch.full((3,), 2**0.5 * 1e-30, dtype=torch.float64), rtol=1e-6, atol=0)
    linear = Linear(torch.randn(8, 3, generator=torch.Generator().manual_seed(1)), plan=found["a"])
    ours, plain = compress(linear, None, Options(rank=1)), svd.compress(linear, None, svd.Options(rank=1))
    torch.testing.assert_close(product(ours), product(plain))


def test_no_other_matrix_of_that_rank_is_better(linear):
    importance = torch.logspace(-2, 2, 24, dtype=torch.float64)
    weighted = dataclasses.replace(linear, plan=importance)
    ours = compress(weighted, None, Options(rank=6))

    def loss(approximation):
        return ((linear.weight - approximation) * importance).square().sum().item()

    assert ours.record["truncation_error"] == pytest.approx(
        loss(product(ours)) / loss(torch.zeros_like(linear.weight)), rel=1e-9
    )
    assert loss(product(ours)) < loss(product(svd.compress(linear, None, svd.Options(rank=6))))
    left, values, right = torch.linalg.svd(linear.weight * importance, full_matrices=False)
    expected = left[:, :6] * values[:6] @ right[:6] / importance
    torch.testing.assert_close(product(ours), expected, rtol=1e-9, atol=1e-9)


def test_equals_svd_llm_on_independent_inputs_of_that_size(linear, statistics_with):
    importance = torch.logspace(-2, 2, 24, dtype=torch.float64)
    ours = compress(dataclasses.replace(linear, plan=importance), None, Options(rank=6))
    other = svd_llm.compress(linear, statistics_with(importance.square().diag()), svd_llm.Options(rank=6))
    torch.testing.assert_close(product(ours), product(other), rtol=1e-9, atol=1e-9)


def test_inputs_without_importance_are_projected_like_the_rest(linear):
    importance = torch.ones(24, dtype=torch.float64)
    importance[[3, 17]] = 0
    ours = compress(dataclasses.replace(linear, plan=importance), None, Options(rank=6))
    assert ours.record["inputs_without_importance"] == 2
    alive = importance > 0
    alone = compress(Linear(linear.weight[:, alive], plan=importance[alive]), None, Options(rank=6))
    torch.testing.assert_close(product(ours)[:, alive], product(alone), rtol=1e-9, atol=1e-9)
    basis = torch.linalg.qr(ours.second).Q
    torch.testing.assert_close(product(ours), basis @ (basis.T @ linear.weight), rtol=1e-9, atol=1e-9)


def test_no_importance_at_all(linear):
    with pytest.raises(UserError, match="zero on every window"):
        compress(dataclasses.replace(linear, plan=torch.zeros(24)), None, Options(rank=6))
    with pytest.raises(UserError, match="not finite"):
        compress(dataclasses.replace(linear, plan=torch.full((24,), float("nan"))), None, Options(rank=6))


def test_stays_dense_from_break_even(linear):
    assert isinstance(compress(dataclasses.replace(linear, plan=torch.ones(24)), None, Options(keep=1)), Unchanged)
