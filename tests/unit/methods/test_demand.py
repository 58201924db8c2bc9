from __future__ import annotations

import dataclasses

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.prune import wanda
from coppice.methods.quantize import rtn
from coppice.methods.solvers import demand
from coppice.methods.solvers.grid import GridOptions, dequantize
from coppice.methods.solvers.truncation import square_root, truncate
from coppice.models.contracts import Linear


def test_masking_loses_what_wanda_prunes(linear, statistics_with, statistics):
    power = statistics.second_moment.diagonal()
    uncorrelated = statistics_with(power.diag())
    shares = [0.0, 0.25, 0.5, 0.7]
    losses = demand.masking_losses(linear.weight, statistics.second_moment, shares)
    for share, loss in zip(shares, losses, strict=True):
        pruned = wanda.compress(linear, uncorrelated, wanda.Options(sparsity=share))
        new = linear.weight if share == 0 else pruned.weight
        assert loss == pytest.approx(((linear.weight - new).square() @ power).sum().item(), rel=1e-12, abs=1e-12)


def test_masking_everything_loses_everything(linear, statistics):
    (loss,) = demand.masking_losses(linear.weight, statistics.second_moment, [1.0])
    power = statistics.second_moment.diagonal()
    assert loss == pytest.approx((linear.weight.square() @ power).sum().item(), rel=1e-12)


def test_masking_in_chunks_of_rows(linear, statistics, monkeypatch):
    whole = demand.masking_losses(linear.weight, statistics.second_moment, [0.3, 0.6])
    monkeypatch.setattr(demand, "_CHUNK", 50)
    assert demand.masking_losses(linear.weight, statistics.second_moment, [0.3, 0.6]) == pytest.approx(whole, rel=1e-12)


def test_truncation_loses_the_error_of_the_factors(linear, statistics, loss, inputs):
    losses = demand.truncation_losses(linear.weight, statistics.second_moment)
    assert len(losses) == 21 and losses[-1] == 0.0
    for rank in (1, 5, 19):
        factors = truncate(linear.weight, rank, square_root(statistics.second_moment))
        expected = loss(linear.weight - factors.second @ factors.first) / len(inputs)
        assert losses[rank] == pytest.approx(expected, rel=1e-8)
    assert losses[0] == pytest.approx(loss(linear.weight) / len(inputs), rel=1e-9)


def test_rounding_loses_the_error_of_round_to_nearest(linear, statistics, loss, inputs):
    options = GridOptions(bits=4, group_size=8, symmetric=True)
    losses = demand.rounding_losses(linear, statistics.second_moment, options, [2, 4, 8])
    for bits, found in zip((2, 4, 8), losses, strict=True):
        rounded = rtn.compress(linear, None, rtn.Options(bits=bits, group_size=8, symmetric=True))
        expected = loss(linear.weight - dequantize(rounded)) / len(inputs)
        assert found == pytest.approx(expected, rel=1e-9)
    assert losses == sorted(losses, reverse=True)


def test_outliers_are_counted_over_all_scores_together():
    scores = [torch.tensor([[1.0, 1.0, 1.0, 9.0]]), torch.tensor([[1.0, 1.0], [1.0, 1.0]])]
    # The mean is 2; of the first alone it would be 3.
    assert demand.outlier_share(scores, 4) == 1 / 8
    assert demand.outlier_share(scores[:1], 3.5) == 0.0
    assert demand.outlier_share(scores, 0.1) == 1.0


@pytest.mark.parametrize("constant", [1e-3, 7.0, 1e4])
def test_outliers_do_not_depend_on_the_scale_of_the_weight(linear, statistics, constant):
    moment = statistics.second_moment
    share = demand.outlier_share([demand.outlier_scores(linear.weight, moment)], 2)
    assert 0 < share < 1
    assert demand.outlier_share([demand.outlier_scores(constant * linear.weight, moment)], 2) == share
    assert demand.outlier_share([demand.outlier_scores(linear.weight, constant * moment)], 2) == share


def test_a_weight_of_zeros(statistics):
    zeros, moment = torch.zeros(20, 24, dtype=torch.float64), statistics.second_moment
    assert demand.masking_losses(zeros, moment, [0.5, 1.0]) == [0.0, 0.0]
    assert not any(demand.truncation_losses(zeros, moment))
    assert demand.rounding_losses(Linear(zeros), moment, GridOptions(bits=2, group_size=-1), [2]) == [0.0]
    assert demand.outlier_share([demand.outlier_scores(zeros, moment)], 5) == 0.0


def test_dead_inputs_lose_nothing(linear, statistics):
    moment = statistics.second_moment.clone()
    moment[:12], moment[:, :12] = 0, 0
    assert demand.masking_losses(linear.weight, moment, [0.5]) == [0.0]
    losses = demand.truncation_losses(linear.weight, moment)
    assert losses[12] == pytest.approx(0, abs=1e-9 * losses[0])


@pytest.mark.parametrize("measure", ["masking", "truncation", "rounding", "outliers"])
@pytest.mark.parametrize("damaged", ["weight", "moment"])
def test_values_that_are_not_finite(linear, statistics, measure, damaged):
    weight, moment = linear.weight.clone(), statistics.second_moment.clone()
    (weight if damaged == "weight" else moment)[0, 0] = float("nan")
    with pytest.raises(UserError, match="not finite"):
        if measure == "masking":
            demand.masking_losses(weight, moment, [0.5])
        elif measure == "truncation":
            demand.truncation_losses(weight, moment)
        elif measure == "rounding":
            broken = dataclasses.replace(linear, weight=weight)
            demand.rounding_losses(broken, moment, GridOptions(bits=4, group_size=8), [4])
        else:
            demand.outlier_scores(weight, moment)
