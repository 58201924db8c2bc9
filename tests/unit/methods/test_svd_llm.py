from __future__ import annotations

import dataclasses

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.base import Unchanged
from coppice.methods.decompose import svd
from coppice.methods.decompose.svd_llm import Options, compress
from coppice.methods.solvers.loss import relative_error


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
