from __future__ import annotations

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.solvers.loss import relative_error


def test_is_the_ratio_of_output_powers(linear, inputs, statistics):
    difference = linear.weight * 0.1 + 0.01
    expected = (inputs @ difference.T).square().sum() / (inputs @ linear.weight.T).square().sum()
    assert relative_error(difference, linear.weight, statistics.second_moment) == pytest.approx(
        expected.item(), rel=1e-12
    )


def test_without_moments_is_the_ratio_of_frobenius_norms(linear):
    assert relative_error(0.5 * linear.weight, linear.weight, None) == pytest.approx(0.25, rel=1e-12)


def test_ends(linear, statistics):
    zero = torch.zeros_like(linear.weight)
    assert relative_error(zero, linear.weight, statistics.second_moment) == 0
    assert relative_error(zero, zero, statistics.second_moment) == 0
    assert relative_error(linear.weight, linear.weight, statistics.second_moment) == pytest.approx(1)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_not_finite(linear, statistics, value):
    difference = linear.weight.clone()
    difference[2, 3] = value
    with pytest.raises(UserError, match="The error of this layer is not finite"):
        relative_error(difference, linear.weight, statistics.second_moment)
    with pytest.raises(UserError, match="The error of this layer is not finite"):
        relative_error(linear.weight, torch.zeros_like(linear.weight), statistics.second_moment)
