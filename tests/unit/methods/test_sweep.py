from __future__ import annotations

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.solvers.grid import Grid, decode, fit_groups, group_of_inputs
from coppice.methods.solvers.mask import keep_largest
from coppice.methods.solvers.sweep import Quantizer, Selection, cholesky_factor, sweep


def damped(moment: torch.Tensor, damping: float = 0.01) -> torch.Tensor:
    return moment + damping * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def power(difference: torch.Tensor, moment: torch.Tensor) -> float:
    return torch.trace(difference @ moment @ difference.T).item()


@pytest.fixture
def factor(statistics):
    return cholesky_factor(statistics.second_moment, 0.01)


@pytest.fixture
def kept() -> torch.Tensor:
    return torch.rand(20, 24, generator=torch.Generator().manual_seed(3)) > 0.5


def quantizer(bits: int, width: int, symmetric: bool = False) -> Quantizer:
    return Quantizer(Grid(bits, symmetric, torch.float64), width, group_of_inputs(24, width, torch.device("cpu")))


def half_of(width: int) -> Selection:
    """Prunes half of each `width` inputs over all outputs."""

    def choose(scores, kept):
        return keep_largest(scores, scores.numel(), scores.numel() // 2, kept)

    return Selection(width, choose)


def test_factor_is_the_inverse_of_the_upper_cholesky_factor_of_the_inverse(factor, statistics):
    inverse = torch.linalg.inv(damped(statistics.second_moment))
    upper = torch.linalg.inv(factor.upper)
    torch.testing.assert_close(upper, torch.linalg.cholesky(inverse, upper=True), rtol=1e-8, atol=1e-10)
    assert torch.equal(factor.upper, factor.upper.triu())


def test_trailing_blocks_of_the_factor(factor, statistics):
    trailing = factor.upper[9:, 9:]
    torch.testing.assert_close(trailing @ trailing.T, damped(statistics.second_moment)[9:, 9:], rtol=1e-12, atol=1e-12)


def optimal_brain_sweep(weight, moment, kept):
    """Prunes input after input of one row at a time, with the inverse of what is left formed again each time."""
    weight = weight.clone()
    for j in range(weight.shape[1]):
        inverse = torch.linalg.inv(moment[j:, j:])
        error = weight[:, j] * ~kept[:, j]
        weight[:, j:] -= error[:, None] * inverse[0] / inverse[0, 0]
    return weight


def test_equals_the_sweep_by_explicit_inverses(linear, factor, statistics, kept):
    swept = sweep(linear.weight, factor, 7, kept=kept)
    expected = optimal_brain_sweep(linear.weight, damped(statistics.second_moment), kept)
    torch.testing.assert_close(swept.weight, expected, rtol=1e-9, atol=1e-9)
    assert (swept.weight[~kept] == 0).all()


@pytest.mark.parametrize("block", [4, 24])
def test_windows_see_weights_that_all_inputs_to_come_have_corrected(linear, factor, statistics, block):
    """Masks and grids of windows, against a sweep that corrects every input to come at once."""
    weight, moment = linear.weight.clone(), damped(statistics.second_moment)
    kept, scales = torch.ones_like(weight, dtype=torch.bool), []
    grid, choose = Grid(3, False, torch.float64), half_of(4).choose
    for j in range(24):
        inverse = torch.linalg.inv(moment[j:, j:])
        if j % 4 == 0:
            pivots = torch.linalg.cholesky(inverse, upper=True).diagonal()[:4]
            kept[:, j : j + 4] = choose((weight[:, j : j + 4] / pivots).square(), kept[:, j : j + 4])
        if j % 6 == 0:
            scale, zero_point = grid.fit(weight[:, j : j + 6] * kept[:, j : j + 6])
            scales.append(scale)
        error = weight[:, j] - decode(grid.encode(weight[:, j] * kept[:, j], scale, zero_point), scale, zero_point)
        weight[:, j:] -= error[:, None] * inverse[0] / inverse[0, 0]
    swept = sweep(linear.weight, factor, block, selection=half_of(4), quantizer=quantizer(3, 6))
    assert torch.equal(swept.mask, kept)
    torch.testing.assert_close(swept.scale, torch.stack(scales, dim=1), rtol=1e-9, atol=0)
    torch.testing.assert_close(swept.weight, weight, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("block", [1, 5, 8, 24, 128])
@pytest.mark.parametrize("case", ["mask", "select", "quantize", "straddle", "joint"])
def test_block_does_not_matter(linear, factor, kept, block, case):
    options = {
        "mask": {"kept": kept},
        "select": {"selection": half_of(8)},
        "quantize": {"quantizer": quantizer(3, 8)},
        "straddle": {"quantizer": quantizer(3, 6), "selection": half_of(4)},
        "joint": {"kept": kept, "selection": half_of(12), "quantizer": quantizer(4, 24, symmetric=True)},
    }[case]
    one, other = sweep(linear.weight, factor, 24, **options), sweep(linear.weight, factor, block, **options)
    torch.testing.assert_close(other.weight, one.weight, rtol=1e-10, atol=1e-10)
    assert torch.equal(other.mask, one.mask)
    if one.codes is not None:
        assert torch.equal(other.codes, one.codes)


def test_loss_is_the_damped_layer_loss(linear, factor, statistics, kept):
    for options in ({"kept": kept}, {"selection": half_of(8)}, {"kept": kept, "quantizer": quantizer(3, 8)}):
        swept = sweep(linear.weight, factor, 5, **options)
        expected = power(linear.weight - swept.weight, damped(statistics.second_moment))
        assert swept.loss == pytest.approx(expected, rel=1e-9)


def test_loss_lies_between_no_update_and_least_squares(linear, factor, statistics, kept):
    moment = damped(statistics.second_moment)
    refit = torch.zeros_like(linear.weight)
    for row, mask, weight in zip(refit, kept, linear.weight, strict=True):
        row[mask] = torch.linalg.solve(moment[mask][:, mask], moment[mask] @ weight)
    swept = sweep(linear.weight, factor, 8, kept=kept).loss
    assert power(linear.weight - refit, moment) < swept < power(linear.weight * ~kept, moment)


def test_nothing_to_do_is_the_identity(linear, factor):
    swept = sweep(linear.weight, factor, 8)
    assert torch.equal(swept.weight, linear.weight)
    assert swept.loss == 0


def test_joint_sweep_keeps_zeros_on_the_grid(linear, factor, kept):
    swept = sweep(linear.weight, factor, 8, kept=kept, quantizer=quantizer(3, 8))
    assert (swept.weight[~kept] == 0).all()
    assert torch.equal(swept.codes[~kept], swept.zero_point.repeat_interleave(8, dim=1)[~kept])


def test_groups_fixed_in_advance_stay(linear, factor):
    grid, groups = Grid(3, False, torch.float64), group_of_inputs(24, 8, torch.device("cpu"))
    parameters = fit_groups(grid, linear.weight, 8)
    swept = sweep(linear.weight, factor, 5, quantizer=Quantizer(grid, 8, groups, parameters))
    assert torch.equal(swept.scale, parameters[0]) and torch.equal(swept.zero_point, parameters[1])
    fitted = sweep(linear.weight, factor, 5, quantizer=Quantizer(grid, 8, groups))
    assert torch.equal(fitted.scale[:, 0], parameters[0][:, 0])
    assert not torch.equal(fitted.scale[:, 1:], parameters[0][:, 1:])


def test_dead_inputs_become_zero_and_disturb_nothing(linear, statistics, kept):
    dead, alive = [3, 17], [j for j in range(24) if j not in (3, 17)]
    moment = statistics.second_moment.clone()
    moment[dead] = 0
    moment[:, dead] = 0
    factor = cholesky_factor(moment, 0.01)
    assert factor.record == {"damping_asked": 0.01, "damping": 0.01, "dead_inputs": 2}
    swept = sweep(linear.weight, factor, 8, kept=kept)
    assert (swept.weight[:, dead] == 0).all()
    alone = sweep(linear.weight[:, alive], cholesky_factor(moment[alive][:, alive], 0.01), 8, kept=kept[:, alive])
    torch.testing.assert_close(swept.weight[:, alive], alone.weight, rtol=1e-9, atol=1e-9)


def test_scale_of_the_moment_does_not_matter(linear, statistics, kept):
    one = sweep(linear.weight, cholesky_factor(statistics.second_moment, 0.01), 8, kept=kept)
    other = sweep(linear.weight, cholesky_factor(1e6 * statistics.second_moment, 0.01), 8, kept=kept)
    torch.testing.assert_close(other.weight, one.weight, rtol=1e-9, atol=1e-9)


def test_fewer_tokens_than_inputs(linear, inputs, kept):
    moment = inputs[:10].T @ inputs[:10] / 10
    factor = cholesky_factor(moment, 0.01)
    assert factor.damping == 0.01
    assert torch.isfinite(sweep(linear.weight, factor, 8, kept=kept).weight).all()


def test_a_singular_moment_is_damped_and_the_record_says_so(inputs):
    moment = inputs[:10].T @ inputs[:10] / 10
    assert cholesky_factor(moment, 0.0).record == {"damping_asked": 0.0, "damping": 0.01, "dead_inputs": 0}


def test_a_moment_that_is_singular_in_float64_is_damped():
    powers = torch.tensor([1.0, 1e-20], dtype=torch.float64)
    assert cholesky_factor(powers.diag(), 0.0).damping == 0.01


def test_damping_grows_tenfold():
    indefinite = torch.full((4, 4), 1.05, dtype=torch.float64)
    indefinite.fill_diagonal_(1)  # smallest eigenvalue -0.05
    assert cholesky_factor(indefinite, 0.01).damping == pytest.approx(0.1)


def test_unfit_moments(statistics):
    moment = statistics.second_moment
    indefinite = moment.diagonal().diag() * 1.0
    indefinite[0, 1] = indefinite[1, 0] = 1e6
    with pytest.raises(UserError, match="not positive semidefinite, even when damped"):
        cholesky_factor(indefinite, 0.01)
    damaged = moment.clone()
    damaged[0, 1] = float("nan")
    with pytest.raises(UserError, match="hold values that are not finite"):
        cholesky_factor(damaged, 0.01)
    with pytest.raises(UserError, match="zero everywhere"):
        cholesky_factor(torch.zeros_like(moment), 0.01)
    with pytest.raises(UserError, match="negative mean square"):
        cholesky_factor(-moment, 0.01)
