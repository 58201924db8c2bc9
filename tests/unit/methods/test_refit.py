from __future__ import annotations

import dataclasses

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.prune import magnitude, sparsegpt, wanda
from coppice.methods.solvers import refit as solver
from coppice.methods.solvers.damping import damp
from coppice.methods.solvers.refit import compensate, refit, solve_free
from coppice.models.contracts import Linear


def uneven() -> torch.Tensor:
    """[20, 24] bool: rows that keep different numbers, row 0 none and row 1 all."""
    shares = torch.linspace(0.05, 0.95, 20)[:, None]
    mask = torch.rand(20, 24, generator=torch.Generator().manual_seed(5)) < shares
    mask[0], mask[1] = False, True
    return mask


def alike() -> torch.Tensor:
    return uneven()[10].expand(20, 24)


@pytest.fixture(params=[uneven, alike])
def mask(request) -> torch.Tensor:
    return request.param()


def refitted(linear, statistics, mask, damping=0.0):
    return refit(linear.weight, linear.weight * mask, mask, statistics.second_moment, damping)


def test_is_the_least_squares_solution_of_each_row(linear, inputs, statistics, mask):
    found = refitted(linear, statistics, mask).weight
    assert (found[~mask] == 0).all()
    for row, kept, weight in zip(found, mask, linear.weight, strict=True):
        expected = torch.linalg.lstsq(inputs[:, kept], (inputs @ weight)[:, None]).solution[:, 0]
        torch.testing.assert_close(row[kept], expected, rtol=1e-6, atol=1e-8)


def test_the_gradient_vanishes_on_what_is_kept(linear, statistics, mask):
    found = refitted(linear, statistics, mask).weight
    gradient = (found - linear.weight) @ statistics.second_moment
    assert gradient[mask].abs().max() < 1e-8 * gradient.abs().max()


def test_batches_do_not_matter(linear, statistics, mask, monkeypatch):
    whole = refitted(linear, statistics, mask).weight
    monkeypatch.setattr(solver, "_BATCH_BYTES", 8 * 24 * 24 * 3)
    torch.testing.assert_close(refitted(linear, statistics, mask).weight, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("kept", [True, False])
def test_a_mask_of_one_kind(linear, statistics, kept):
    mask = torch.full((20, 24), kept)
    assert torch.equal(refitted(linear, statistics, mask).weight, linear.weight * mask)


@pytest.mark.parametrize("damping", [0.0, 0.01, 1.0])
def test_never_above_the_error_it_began_with(linear, statistics, loss, mask, damping):
    for start in (linear.weight * mask, linear.weight.flip(0) * mask, refitted(linear, statistics, mask).weight):
        found = refit(linear.weight, start, mask, statistics.second_moment, damping).weight
        assert loss(linear.weight - found) <= loss(linear.weight - start) * (1 + 1e-12)


def test_the_sweep_ends_above_the_refit_on_its_mask(linear, statistics, loss):
    swept = sparsegpt.compress(linear, statistics, sparsegpt.Options(sparsity=0.5))
    found = refit(linear.weight, swept.weight, swept.mask, statistics.second_moment, 0.0)
    assert loss(linear.weight - found.weight) < loss(linear.weight - swept.weight)


def test_compensation_is_the_formula(linear, statistics, mask):
    moment = damp(statistics.second_moment, 0.01).moment
    # Errors on the free places do not count.
    found = compensate(linear.weight, mask, moment)
    for row, free, error in zip(found, mask, linear.weight, strict=True):
        expected = torch.linalg.solve(moment[free][:, free], moment[free][:, ~free] @ error[~free])
        torch.testing.assert_close(row[free], expected, rtol=1e-8, atol=1e-10)
        assert (row[~free] == 0).all()


def test_dead_inputs_stay(linear, statistics, loss):
    moment = statistics.second_moment.clone()
    moment[5], moment[:, 5] = 0, 0
    mask = uneven()
    found = refit(linear.weight, linear.weight * mask, mask, moment, 0.0).weight
    assert torch.equal(found[:, 5], (linear.weight * mask)[:, 5])
    live = torch.arange(24) != 5
    alone = refit(linear.weight[:, live], (linear.weight * mask)[:, live], mask[:, live], moment[live][:, live], 0.0)
    torch.testing.assert_close(found[:, live], alone.weight, rtol=1e-8, atol=1e-10)


def test_fewer_tokens_than_inputs_grow_the_damping_on_record(linear, inputs):
    few = inputs[:10]
    moment, mask = few.T @ few / 10, uneven()
    found = refit(linear.weight, linear.weight * mask, mask, moment, 0.0)
    assert found.record == {"refit_damping_asked": 0.0, "refit_damping": 0.01}
    before, after = ((few @ (linear.weight - weight).T).norm() for weight in (linear.weight * mask, found.weight))
    assert after < before


def test_a_singular_moment_that_nobody_damped(linear, inputs):
    singular = inputs[:3].T @ inputs[:3]
    with pytest.raises(UserError, match="singular on the weights that are free"):
        solve_free(linear.weight, uneven(), -singular)


def test_float32(linear, statistics, mask):
    single = dataclasses.replace(linear, weight=linear.weight.float())
    found = refitted(single, statistics, mask).weight
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), refitted(linear, statistics, mask).weight, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("method", [magnitude, wanda, sparsegpt])
@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"pattern": "2:4"}])
def test_every_mask_gains(linear, statistics, loss, method, budget):
    kept = torch.ones(20, 24, dtype=torch.bool)
    kept[:, 20:] = False
    parent = Linear(linear.weight * kept, kept)
    plain = method.compress(parent, statistics, method.Options(**budget))
    ours = method.compress(parent, statistics, method.Options(**budget, refit=True))
    assert torch.equal(ours.mask, plain.mask)
    assert (ours.weight[~ours.mask] == 0).all()
    assert loss(parent.weight - ours.weight) < loss(parent.weight - plain.weight)
    assert ours.record == plain.record | {"refit_damping_asked": 0.001, "refit_damping": 0.001}
    # The kept places of a fresh fit would be what an exact fit finds.
    exact = method.compress(parent, statistics, method.Options(**budget, refit=True, refit_damping=0)).weight
    gradient = (exact - parent.weight) @ statistics.second_moment
    assert gradient[ours.mask].abs().max() < 1e-8 * gradient.abs().max()
