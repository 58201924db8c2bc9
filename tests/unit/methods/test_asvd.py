from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.decompose import svd, svd_llm
from coppice.methods.decompose.asvd import Candidate, Options, compress, plan, search
from coppice.methods.solvers.ranks import RankTarget
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import Unchanged

# Read by tests/rows.py.
ROWS = [
    {"keep": 0.6, "search": "strs", "grid": [0.4]},
    {"keep": 0.6},
    {"rank": 3, "statistic": "absmax", "alpha": 1},
    {"keep": 0.6, "search": "spectrum"},
]


def statistics_of(inputs: torch.Tensor) -> LinearStatistics:
    """Statistics of inputs x, [tokens, n]."""
    sizes = inputs.abs()
    return LinearStatistics(inputs.T @ inputs / len(inputs), inputs.mean(0), sizes.mean(0), sizes.amax(0), len(inputs))


def product(factors):
    return factors.second @ factors.first


class FakeDecoder:
    """Linears whose loss is the sum of their weighted output errors."""

    windows = 4
    seed = 0

    def __init__(self, sensitivity: dict[str, float]) -> None:
        generator = torch.Generator().manual_seed(3)
        self.names = list(sensitivity)
        self.sensitivity = sensitivity
        shapes = [(20, 24), (24, 24), (12, 24)]
        self.weights = {
            name: torch.randn(*shapes[place % 3], generator=generator, dtype=torch.float64)
            for place, name in enumerate(self.names)
        }
        self.inputs = torch.randn(50, 24, generator=generator, dtype=torch.float64)
        self.asked = []

    def linear(self, name: str) -> Linear:
        return Linear(self.weights[name], name=name)

    def statistics(self, name: str) -> LinearStatistics:
        return statistics_of(self.inputs)

    def loss(self, windows=None, weights=None, outputs=None):
        assert not torch.is_grad_enabled()
        ((name, weight),) = weights.items()
        self.asked.append((name, windows))
        return self.sensitivity[name] * (self.inputs @ (self.weights[name] - weight).T).square().sum()

    @property
    def shapes(self):
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}


def test_alpha_0_is_exactly_the_plain_truncation(linear, statistics):
    ours = compress(linear, statistics, Options(rank=6, alpha=0))
    plain = svd.compress(linear, None, svd.Options(rank=6))
    assert torch.equal(ours.first, plain.first) and torch.equal(ours.second, plain.second)


@pytest.mark.parametrize("statistic", ["absmean", "absmax"])
def test_constant_inputs_give_the_plain_truncation(linear, statistic):
    statistics = statistics_of(torch.full((10, 24), 3.0, dtype=torch.float64))
    ours = compress(linear, statistics, Options(rank=6, statistic=statistic))
    plain = svd.compress(linear, None, svd.Options(rank=6))
    torch.testing.assert_close(product(ours), product(plain), rtol=1e-9, atol=1e-9)


def test_equals_svd_llm_on_independent_inputs_of_that_size(linear, statistics, statistics_with):
    ours = compress(linear, statistics, Options(rank=6, alpha=0.7))
    moment = (statistics.absmean**1.4).diag()
    other = svd_llm.compress(linear, statistics_with(moment), svd_llm.Options(rank=6))
    torch.testing.assert_close(product(ours), product(other), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize(("statistic", "alpha"), [("absmean", 0.5), ("absmax", 1.0)])
def test_is_the_formula(linear, statistics, statistic, alpha):
    sizes = getattr(statistics, statistic) ** alpha
    left, values, right = torch.linalg.svd(linear.weight * sizes, full_matrices=False)
    expected = left[:, :6] * values[:6] @ right[:6] / sizes
    ours = compress(linear, statistics, Options(rank=6, alpha=alpha, statistic=statistic))
    torch.testing.assert_close(product(ours), expected, rtol=1e-9, atol=1e-9)


def test_dead_inputs_are_projected_like_the_rest(linear, inputs):
    inputs = inputs.clone()
    inputs[:, [3, 17]] = 0
    ours = compress(linear, statistics_of(inputs), Options(rank=6))
    basis = torch.linalg.qr(ours.second).Q
    torch.testing.assert_close(product(ours), basis @ (basis.T @ linear.weight), rtol=1e-9, atol=1e-9)


def test_unfit_statistics(linear, statistics):
    for value, message in ((float("nan"), "not finite"), (0.0, "zero everywhere"), (-1.0, "negative mean absolute")):
        damaged = dataclasses.replace(statistics, absmean=torch.full((24,), value))
        with pytest.raises(UserError, match=message):
            compress(linear, damaged, Options(rank=3))


def test_no_search_plans_nothing():
    assert plan(FakeDecoder({"a": 1.0}), Options(keep=0.5)) == {}


@pytest.mark.parametrize("keep", [0.4, 0.55, 0.63, 0.8, 0.95, 1.0])
@pytest.mark.parametrize("how", ["strs", "spectrum"])
def test_search_meets_the_budget_within_one_rank(keep, how):
    decoder = FakeDecoder({"a": 1.0, "b": 10.0, "c": 0.1, "d": 3.0, "e": 1.0, "f": 0.3})
    found = plan(decoder, Options(keep=keep, search=how))
    total = sum(rows * columns for rows, columns in decoder.shapes.values())
    used = 0
    for name, (rows, columns) in decoder.shapes.items():
        linear = dataclasses.replace(decoder.linear(name), plan=found[name])
        factors = compress(linear, decoder.statistics(name), Options(keep=keep, search=how))
        if isinstance(factors, Unchanged):
            used += rows * columns
        else:
            assert len(factors.first) == found[name].rank
            used += factors.first.numel() + factors.second.numel()
        assert factors.record["planned_parameters_asked"] == keep
    assert used <= keep * total
    # Between the largest rank that saves something and a dense linear there can be almost two ranks.
    assert used > keep * total - (2 * 48 if keep > 0.9 else 48)
    assert found["a"].record["planned_parameters"] == pytest.approx(used / total)


def test_search_keeps_more_of_what_the_loss_feels():
    decoder = FakeDecoder({"a": 1.0, "b": 1.0, "c": 1.0, "d": 1e3, "e": 1.0, "f": 1.0})
    found = plan(decoder, Options(keep=0.6, search="strs"))
    assert found["d"].rank > found["a"].rank
    assert {name for name, _ in decoder.asked} == set(decoder.names)
    assert all(windows is None for _, windows in decoder.asked)


def test_search_windows():
    decoder = FakeDecoder({"a": 1.0})
    plan(decoder, Options(keep=0.6, search="strs", search_windows=2))
    assert all(windows == range(2) for _, windows in decoder.asked)
    with pytest.raises(UserError, match="search_windows is 5, and calibration has 4 windows"):
        plan(decoder, Options(keep=0.6, search="strs", search_windows=5))


def test_search_cuts_where_the_budget_is_first_met():
    """Two linears of 40 x 40, whose ranks cost 80 each of 1600: a share of s is a rank of 20 s."""
    budget = RankTarget({"a": (40, 40), "b": (40, 40)}, keep=0.7)
    candidates = [
        Candidate("a", 16, 1.0),
        Candidate("a", 8, 2.0),
        Candidate("b", 16, 3.0),
        Candidate("b", 8, 4.0),
    ]
    # Dense b and a of rank 8 meet 0.7 exactly: no candidate too many, none too few.
    assert search(candidates, budget) == {"a": 8, "b": 20}
    # Just below, b goes to 16, and what is left goes back to b as far as it lasts.
    lower = search(candidates, dataclasses.replace(budget, keep=0.69))
    assert lower == {"a": 8, "b": 19}
    assert search(candidates, dataclasses.replace(budget, keep=1)) == {"a": 20, "b": 20}
    assert search(candidates, dataclasses.replace(budget, keep=0.4)) == {"a": 8, "b": 8}


def test_a_loss_that_is_not_finite_is_the_worst():
    decoder = FakeDecoder({"a": 1.0, "d": math.nan})
    found = plan(decoder, Options(keep=0.7, search="strs"))
    assert found["d"].rank > found["a"].rank


def test_a_zero_matrix_goes_first():
    decoder = FakeDecoder({"a": 1.0, "d": 1.0})
    decoder.weights["d"] = torch.zeros(20, 24, dtype=torch.float64)
    found = plan(decoder, Options(keep=0.7, search="spectrum"))
    assert found["d"].rank < found["a"].rank


def test_needs():
    assert Options(keep=0.5).needs == frozenset()
    assert Options(keep=0.5, search="strs").needs == {"windows"}
    assert Options(keep=0.5, search="spectrum").needs == frozenset()
    assert Options(keep=0.5, allocation={"by": "sensitivity"}).needs == {"moments"}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3, "search": "strs"}, "give 'keep', not 'rank'"),
        ({"keep": 0.3, "search": "strs"}, "cannot reach a keep of 0.3"),
        ({"keep": 0.5, "search": "strs", "allocation": {"by": "sensitivity"}}, "both choose the ranks"),
        ({"keep": 0.5, "grid": [0.5, 1.5]}, "above 0 and below 1"),
        ({"keep": 0.5, "grid": []}, "at least 1 item"),
        ({"keep": 0.5, "alpha": -1}, "greater than or equal to 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValidationError, match=message):
        Options(**options)
