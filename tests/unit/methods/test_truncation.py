from __future__ import annotations

import gc
import weakref

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.solvers.sweep import cholesky_factor
from coppice.methods.solvers.truncation import (
    RankOptions,
    break_even,
    cholesky_root,
    chosen_rank,
    square_root,
    stays_dense,
    truncate,
    truncate_outputs,
)


def test_square_root(statistics, inputs):
    for moment in (statistics.second_moment, inputs[:10].T @ inputs[:10] / 10):
        root = square_root(moment)
        torch.testing.assert_close(root @ root.T, moment, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("rank", [1, 5, 19])
def test_error_is_what_was_dropped(linear, inputs, statistics, loss, rank):
    truncation = truncate(linear.weight, rank, square_root(statistics.second_moment))
    singular = torch.linalg.svdvals(inputs @ linear.weight.T)
    difference = loss(linear.weight - truncation.second @ truncation.first)
    assert difference == pytest.approx(singular[rank:].square().sum().item(), rel=1e-9)
    assert truncation.error == pytest.approx(difference / loss(linear.weight), rel=1e-9)


def test_error_is_what_was_dropped_for_a_singular_moment(linear, inputs):
    dead = inputs.clone()
    dead[:, [3, 17]] = 0
    for few in (dead, inputs[:10]):
        truncation = truncate(linear.weight, 5, square_root(few.T @ few))
        assert torch.isfinite(truncation.first).all() and torch.isfinite(truncation.second).all()
        outputs = few @ linear.weight.T
        difference = outputs - few @ (truncation.second @ truncation.first).T
        expected = torch.linalg.svdvals(outputs)[5:].square().sum().item()
        assert difference.square().sum().item() == pytest.approx(expected, rel=1e-9)


def test_few_inputs_are_exact_from_their_rank_on(linear, inputs):
    few = inputs[:10]
    truncation = truncate(linear.weight, 10, square_root(few.T @ few))
    difference = linear.weight - truncation.second @ truncation.first
    torch.testing.assert_close(few @ difference.T, torch.zeros(10, 20, dtype=torch.float64), rtol=0, atol=1e-8)
    assert difference.norm() > 1


def test_is_the_formula_with_the_inverse_of_any_square_root(linear, statistics):
    ours = truncate(linear.weight, 7, square_root(statistics.second_moment))
    lower = torch.linalg.cholesky(statistics.second_moment)
    left, values, right = torch.linalg.svd(linear.weight @ lower, full_matrices=False)
    expected = left[:, :7] * values[:7] @ right[:7] @ torch.linalg.inv(lower)
    torch.testing.assert_close(ours.second @ ours.first, expected, rtol=1e-7, atol=1e-7)
    by_cholesky = truncate(linear.weight, 7, lower)
    torch.testing.assert_close(by_cholesky.second @ by_cholesky.first, expected, rtol=1e-7, atol=1e-7)


def test_inputs_not_seen_are_projected_like_the_rest(linear, statistics):
    moment = statistics.second_moment.clone()
    moment[3] = 0
    moment[:, 3] = 0
    truncation = truncate(linear.weight, 7, square_root(moment))
    basis = torch.linalg.qr(truncation.second).Q
    column = (truncation.second @ truncation.first)[:, 3]
    torch.testing.assert_close(column, basis @ (basis.T @ linear.weight[:, 3]), rtol=1e-9, atol=1e-9)


def test_full_rank_gives_the_matrix_even_for_nearly_singular_inputs(linear, inputs):
    powers = torch.logspace(0, -12, 24, dtype=torch.float64)
    moment = inputs.T @ inputs * powers[:, None].sqrt() * powers.sqrt()
    truncation = truncate(linear.weight, 20, square_root(moment))
    torch.testing.assert_close(truncation.second @ truncation.first, linear.weight, rtol=1e-9, atol=1e-9)


def test_factors_share_the_norm(linear, statistics):
    one = truncate(linear.weight, 7, square_root(statistics.second_moment))
    torch.testing.assert_close(one.first.norm(dim=1), one.second.norm(dim=0), rtol=1e-9, atol=0)
    other = truncate(linear.weight, 7, square_root(1e6 * statistics.second_moment))
    torch.testing.assert_close(one.first.abs(), other.first.abs(), rtol=1e-7, atol=1e-9)


def test_full_rank_gives_the_matrix(linear, statistics):
    for scaling in (None, square_root(statistics.second_moment)):
        truncation = truncate(linear.weight, 20, scaling)
        torch.testing.assert_close(truncation.second @ truncation.first, linear.weight, rtol=1e-9, atol=1e-9)
        assert truncation.error == 0


def test_white_inputs_give_the_plain_truncation(linear):
    plain = truncate(linear.weight, 7, None)
    white = truncate(linear.weight, 7, square_root(3 * torch.eye(24, dtype=torch.float64)))
    torch.testing.assert_close(white.second @ white.first, plain.second @ plain.first, rtol=1e-9, atol=1e-9)


def test_error_falls_with_rank(linear, statistics, loss):
    scaling = square_root(statistics.second_moment)
    losses = [
        loss(linear.weight - cut.second @ cut.first)
        for cut in (truncate(linear.weight, rank, scaling) for rank in range(1, 21))
    ]
    assert losses == sorted(losses, reverse=True)


def test_no_other_matrix_of_that_rank_is_better(linear, statistics, loss):
    ours = truncate(linear.weight, 7, square_root(statistics.second_moment))
    least = loss(linear.weight - ours.second @ ours.first)
    powers = statistics.second_moment.diagonal()
    others = [None]
    for exponent in (0.25, 0.5, 1.0):
        others.append(powers**exponent)
    for scaling in others:
        other = truncate(linear.weight, 7, None if scaling is None else scaling.diag())
        assert least < loss(linear.weight - other.second @ other.first)
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        step = 1e-3 * torch.randn(20, 7, generator=generator, dtype=torch.float64)
        assert least < loss(linear.weight - (ours.second + step) @ ours.first)


def test_a_zero_matrix(statistics):
    truncation = truncate(torch.zeros(20, 24, dtype=torch.float64), 3, square_root(statistics.second_moment))
    assert not truncation.first.any() and not truncation.second.any()
    assert truncation.error == 0


def test_float32_agrees_with_float64(linear, statistics):
    scaling = square_root(statistics.second_moment)
    single, double = truncate(linear.weight.float(), 7, scaling), truncate(linear.weight, 7, scaling)
    assert single.first.dtype == single.second.dtype == torch.float32
    product = (single.second @ single.first).double()
    torch.testing.assert_close(product, double.second @ double.first, rtol=1e-3, atol=1e-3)


def test_unfit_inputs(linear, statistics):
    moment = statistics.second_moment
    with pytest.raises(UserError, match="negative mean square"):
        square_root(-moment)
    indefinite = torch.tensor([[1.0, 2.0], [2.0, 1.0]])
    with pytest.raises(UserError, match=r"not positive semidefinite \(its smallest eigenvalue is -1, its largest 3\)"):
        square_root(indefinite)
    with pytest.raises(UserError, match="zero everywhere"):
        square_root(torch.zeros_like(moment))
    damaged = moment.clone()
    damaged[1, 2] = float("inf")
    with pytest.raises(UserError, match="statistics of this layer's inputs hold values that are not finite"):
        square_root(damaged)
    with pytest.raises(UserError, match="weights hold values that are not finite"):
        truncate(linear.weight * float("nan"), 3, None)


def test_rounding_of_float32_sums_is_no_error(inputs):
    few = (100 * inputs[:10]).float()
    moment = few.T @ few
    assert torch.linalg.eigvalsh(moment.double())[0] < 0
    root = square_root(moment)
    torch.testing.assert_close(root @ root.T, moment.double(), rtol=1e-5, atol=10.0)


def test_rank_from_a_share():
    assert break_even(4096, 4096) == 2048
    assert break_even(1024, 4096) == 819
    assert break_even(11008, 4096) == 2985
    assert break_even(128, 896) == 112
    assert chosen_rank(RankOptions(keep=0.8), 64, 64) == 25
    assert chosen_rank(RankOptions(keep=0.001), 64, 64) == 1
    assert chosen_rank(RankOptions(keep=0.8, align=8), 64, 64) == 24
    assert chosen_rank(RankOptions(keep=0.1, align=8), 64, 64) == 3
    assert chosen_rank(RankOptions(rank=30, align=8), 64, 64) == 24
    assert chosen_rank(RankOptions(keep=1), 64, 64) == break_even(64, 64)


def test_a_linear_that_stays_dense_says_why():
    unchanged = stays_dense(40, 64, 64)
    assert unchanged.record["unchanged"] == "Rank 40 reaches 32, where factors of 64 x 64 save no parameters."


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "exactly one of 'keep' and 'rank'"),
        ({"keep": 0.5, "rank": 3}, "exactly one of 'keep' and 'rank'"),
        ({"keep": 0}, "greater than 0"),
        ({"keep": 1.1}, "less than or equal to 1"),
        ({"rank": 0}, "greater than or equal to 1"),
        ({"rank": 4, "align": 0}, "greater than or equal to 1"),
        ({"rank": 4, "allocation": {"by": "sensitivity"}}, "give 'keep' instead of 'rank'"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValidationError, match=message):
        RankOptions(**options)


def test_diagonal_scaling(linear):
    scaling = torch.logspace(-1, 1, 24, dtype=torch.float64)
    short, long = truncate(linear.weight, 7, scaling), truncate(linear.weight, 7, scaling.diag())
    torch.testing.assert_close(short.second @ short.first, long.second @ long.first, rtol=1e-9, atol=1e-9)


def test_smaller_ranks_are_its_first_terms(linear, statistics):
    scaling = square_root(statistics.second_moment)
    large, small = truncate(linear.weight, 9, scaling), truncate(linear.weight, 4, scaling)
    assert torch.equal(large.first[:4], small.first) and torch.equal(large.second[:, :4], small.second)


@pytest.mark.parametrize("transposed", [False, True])
def test_by_outputs_is_the_same(linear, inputs, transposed):
    weight = linear.weight.T.contiguous() if transposed else linear.weight
    seen = inputs[:, : weight.shape[1]]
    for tokens in (200, 10):
        moment = seen[:tokens].T @ seen[:tokens]
        ours, other = truncate_outputs(weight, 7, moment), truncate(weight, 7, square_root(moment))
        torch.testing.assert_close(ours.second @ ours.first, other.second @ other.first, rtol=1e-7, atol=1e-7)
        assert ours.error == pytest.approx(other.error, rel=1e-7)
    with pytest.raises(UserError, match="weights hold values that are not finite"):
        truncate_outputs(weight * float("inf"), 7, moment)


def test_cholesky_root(statistics, inputs):
    lower, damping = cholesky_root(statistics.second_moment)
    assert damping == 0 and not lower.triu(1).any()
    torch.testing.assert_close(lower @ lower.T, statistics.second_moment, rtol=1e-9, atol=1e-9)


def test_cholesky_root_grows_its_damping_tenfold():
    indefinite = torch.full((4, 4), 1 + 5e-7, dtype=torch.float64)
    indefinite.fill_diagonal_(1)  # smallest eigenvalue -5e-7
    lower, damping = cholesky_root(indefinite)
    assert damping == pytest.approx(1e-6)
    torch.testing.assert_close(lower @ lower.T, indefinite + damping * torch.eye(4, dtype=torch.float64))
    with pytest.raises(UserError, match="not positive semidefinite, even when damped"):
        cholesky_root(torch.tensor([[1.0, 5.0], [5.0, 1.0]]))


def test_roots_are_computed_once_for_linears_that_share_an_input(statistics):
    moment = statistics.second_moment
    for root in (
        square_root,
        lambda moment: cholesky_root(moment)[0],
        lambda moment: cholesky_factor(moment, 0.1).upper,
    ):
        first = root(moment)
        assert root(moment) is first
        equal = moment.clone()
        assert root(equal) is not first
        torch.testing.assert_close(root(equal), first)
    assert cholesky_factor(moment, 0.1) is not cholesky_factor(moment, 0.2)
    assert cholesky_factor(moment, 0.2).damping == 0.2


def test_a_root_is_given_up_with_its_moment(statistics):
    moment = statistics.second_moment.clone()
    root = weakref.ref(square_root(moment))
    assert root() is not None
    del moment
    gc.collect()
    assert root() is None
