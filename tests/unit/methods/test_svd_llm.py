from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.decompose import asvd, fwsvd, svd
from coppice.methods.decompose.svd_llm import Options, compress
from coppice.methods.solvers.loss import relative_error
from coppice.models.contracts import LinearStatistics
from coppice.models.replacements import Unchanged

# Read by tests/rows.py.
ROWS = [{"rank": 5}, {"rank": 3, "whitening": "cholesky"}, {"rank": 3, "update": True}]


def test_recorded_error_is_the_layer_error(linear, inputs, statistics):
    factors = compress(linear, statistics, Options(rank=6))
    difference = linear.weight - factors.second @ factors.first
    assert factors.record["truncation_error"] == pytest.approx(
        relative_error(difference, linear.weight, statistics.second_moment), rel=1e-9
    )
    singular = torch.linalg.svdvals(inputs @ linear.weight.T).square()
    assert factors.record["truncation_error"] == pytest.approx((singular[6:].sum() / singular.sum()).item(), rel=1e-9)


@pytest.mark.parametrize("rank", range(1, 10))
def test_beats_the_plain_truncation_on_its_inputs(linear, statistics, loss, rank):
    ours = compress(linear, statistics, Options(rank=rank))
    plain = svd.compress(linear, None, svd.Options(rank=rank))
    assert loss(linear.weight - ours.second @ ours.first) < loss(linear.weight - plain.second @ plain.first)


def test_white_inputs_give_the_plain_truncation(linear, statistics_with):
    ours = compress(linear, statistics_with(torch.eye(24, dtype=torch.float64)), Options(rank=6))
    plain = svd.compress(linear, None, svd.Options(rank=6))
    torch.testing.assert_close(ours.second @ ours.first, plain.second @ plain.first, rtol=1e-9, atol=1e-9)


def test_scale_of_the_moment_does_not_matter(linear, statistics, statistics_with):
    one = compress(linear, statistics, Options(rank=6))
    other = compress(linear, statistics_with(1e6 * statistics.second_moment), Options(rank=6))
    torch.testing.assert_close(other.second @ other.first, one.second @ one.first, rtol=1e-9, atol=1e-9)


def test_stays_dense_from_break_even(linear, statistics):
    assert isinstance(compress(linear, statistics, Options(keep=1)), Unchanged)


def test_unfit_statistics(linear, statistics):
    damaged = dataclasses.replace(statistics, second_moment=statistics.second_moment * float("nan"))
    with pytest.raises(UserError, match="not finite"):
        compress(linear, damaged, Options(rank=3))


def behind(linear, inputs):
    moment = inputs.T @ inputs / len(inputs)
    blank = torch.zeros(len(moment), dtype=moment.dtype)
    return dataclasses.replace(linear, sequential=LinearStatistics(moment, blank, blank, blank, len(inputs)))


@pytest.fixture
def shifted(inputs):
    """Inputs as they are behind compressed blocks: others, of the same kind."""
    noise = torch.randn(inputs.shape, generator=torch.Generator().manual_seed(11), dtype=torch.float64)
    return inputs * 0.9 + 0.3 * noise * inputs.square().mean(0).sqrt()


def product(factors):
    return factors.second @ factors.first


def test_loss_identity(linear, inputs, statistics, loss):
    for whitening in ("eigen", "cholesky"):
        factors = compress(linear, statistics, Options(rank=6, whitening=whitening))
        dropped = torch.linalg.svdvals(inputs @ linear.weight.T)[6:].square().sum()
        assert loss(linear.weight - product(factors)) == pytest.approx(dropped.item(), rel=1e-9)


def test_both_square_roots_agree(linear, statistics):
    eigen = compress(linear, statistics, Options(rank=6))
    cholesky = compress(linear, statistics, Options(rank=6, whitening="cholesky"))
    assert cholesky.record["damping"] == 0
    torch.testing.assert_close(product(cholesky), product(eigen), rtol=1e-8, atol=1e-8)


def test_cholesky_damps_what_depends_on_each_other_and_says_so(linear, inputs, statistics_with):
    few = inputs[:10]
    moment = few.T @ few / 10
    moment -= 1e-9 * moment.diagonal().mean() * torch.eye(24, dtype=torch.float64)
    factors = compress(linear, statistics_with(moment), Options(rank=6, whitening="cholesky"))
    assert factors.record["damping"] == pytest.approx(1e-8)
    dropped = torch.linalg.svdvals(few @ linear.weight.T)[6:].square().sum().item()
    difference = (few @ (linear.weight - product(factors)).T).square().sum().item()
    assert difference == pytest.approx(dropped, rel=1e-4)


def test_loss_falls_with_rank(linear, statistics, loss):
    losses = [loss(linear.weight - product(compress(linear, statistics, Options(rank=k)))) for k in range(1, 10)]
    assert losses == sorted(losses, reverse=True)


@pytest.mark.parametrize("rank", [1, 4, 9])
def test_no_method_of_that_rank_is_better(linear, statistics, loss, rank):
    least = loss(linear.weight - product(compress(linear, statistics, Options(rank=rank))))
    importance = dataclasses.replace(linear, plan=torch.logspace(-1, 1, 24, dtype=torch.float64))
    for other in (
        svd.compress(linear, None, svd.Options(rank=rank)),
        fwsvd.compress(importance, None, fwsvd.Options(rank=rank)),
        asvd.compress(linear, statistics, asvd.Options(rank=rank)),
        asvd.compress(linear, statistics, asvd.Options(rank=rank, statistic="absmax", alpha=1)),
    ):
        assert least < loss(linear.weight - product(other))


def test_update_on_the_same_inputs_changes_nothing(linear, inputs, statistics):
    for seen in (inputs, inputs[:4]):
        moment = dataclasses.replace(statistics, second_moment=seen.T @ seen / len(seen))
        plain = compress(linear, moment, Options(rank=6))
        updated = compress(behind(linear, seen), moment, Options(rank=6, update=True))
        torch.testing.assert_close(updated.second, plain.second, rtol=1e-7, atol=1e-7)
        assert torch.equal(updated.first, plain.first)


@pytest.mark.parametrize("whitening", ["eigen", "cholesky"])
def test_update_is_the_least_squares_fit_behind_the_blocks(linear, statistics, shifted, whitening):
    options = Options(rank=6, whitening=whitening, update=True)
    plain = compress(linear, statistics, Options(rank=6, whitening=whitening))
    updated = compress(behind(linear, shifted), statistics, options)
    expected = torch.linalg.lstsq(shifted @ plain.first.T, shifted @ linear.weight.T).solution.T
    torch.testing.assert_close(updated.second, expected, rtol=1e-7, atol=1e-7)

    def power(difference):
        return (shifted @ difference.T).square().sum().item()

    assert power(linear.weight - product(updated)) < power(linear.weight - product(plain))
    scale = power(linear.weight)
    assert updated.record["behind_error"] == pytest.approx(power(linear.weight - product(updated)) / scale)
    assert updated.record["behind_error_before_update"] == pytest.approx(power(linear.weight - product(plain)) / scale)


@pytest.mark.parametrize("tokens", [1, 4, 10, 200])
def test_update_never_increases_the_loss(linear, statistics, shifted, tokens):
    seen = shifted[:tokens].clone()
    seen[:, [2, 5]] = 0
    record = compress(behind(linear, seen), statistics, Options(rank=6, update=True)).record
    assert record["behind_error"] <= record["behind_error_before_update"] * (1 + 1e-9)
    if tokens <= 4:
        # As many directions as the factor passes on can be fitted exactly.
        assert record["behind_error"] < 1e-12


def test_update_leaves_alone_what_only_rounding_reaches(linear, inputs, statistics):
    """Four tokens summed in float32: two of six directions have no power but rounding."""
    single = dataclasses.replace(linear, weight=linear.weight.float())
    few = inputs[:4].float()
    moment = dataclasses.replace(statistics, second_moment=few.T @ few / 4)
    plain = compress(single, moment, Options(rank=6))
    updated = compress(behind(single, few), moment, Options(rank=6, update=True))
    torch.testing.assert_close(updated.second, plain.second, rtol=1e-3, atol=1e-3)


def test_update_of_what_nothing_reaches_is_refused(linear, statistics):
    with pytest.raises(UserError, match="zero everywhere"):
        compress(behind(linear, torch.zeros(5, 24)), statistics, Options(rank=6, update=True))


def test_update_reads_the_inputs_behind_the_blocks():
    assert Options(rank=6, update=True).needs == {"sequential_moments"}
    assert Options(rank=6).needs == frozenset()
    with pytest.raises(ValidationError, match="'sequential' does both on the latter"):
        Options(rank=6, update=True, sequential=True)
