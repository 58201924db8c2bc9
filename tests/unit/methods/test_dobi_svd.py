from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.decompose import svd_llm
from coppice.methods.decompose.dobi_svd import (
    Options,
    RankCosts,
    compress,
    learn,
    objective,
    plan,
    soft_truncation,
    traits,
)
from coppice.methods.solvers.codebook import dequantize, dynamic_table
from coppice.methods.solvers.ranks import PlannedRank, RankTarget
from coppice.models.contracts import Linear
from coppice.models.replacements import Unchanged

# Read by tests/rows.py.
ROWS = [{"keep": 0.6, "steps": 2}, {"keep": 0.6, "remap": False, "learn": False}]


def product(factors):
    return factors.second @ factors.first


def outputs(rows=16, columns=8):
    """[t, m] with singular values 8, 7, .. 1."""
    generator = torch.Generator().manual_seed(2)
    left, _ = torch.linalg.qr(torch.randn(rows, 8, generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, 8, generator=generator, dtype=torch.float64))
    return left * torch.arange(8, 0, -1, dtype=torch.float64) @ right.T


class FakeDecoder:
    """y = W_b relu(W_a x) with squared errors; most power of W_a lies in few directions."""

    seed = 3

    def __init__(self, windows=6, tokens=20, broken=False):
        generator = torch.Generator().manual_seed(4)

        def random(*shape):
            return torch.randn(*shape, generator=generator, dtype=torch.float64)

        self.windows, self.broken = windows, broken
        self.names = ["a", "b"]
        decaying = torch.linalg.qr(random(16, 16)).Q * torch.logspace(0, -3, 16, dtype=torch.float64)
        self.weights = {"a": decaying @ torch.linalg.qr(random(16, 16)).Q, "b": random(20, 16)}
        self.inputs = random(windows, tokens, 16)
        self.asked = []

    def linear(self, name):
        return Linear(self.weights[name], name=name)

    def loss(self, windows=None, weights=None, outputs=None):
        self.asked += windows
        total = 0.0
        for window in windows:
            x = self.inputs[window]
            exact = torch.relu(x @ self.weights["a"].T) @ self.weights["b"].T
            hidden = torch.relu(outputs("a", x @ self.weights["a"].T))
            y = outputs("b", hidden @ self.weights["b"].T)
            total = total + (y - exact).square().mean()
        return total * (math.nan if self.broken else 1)

    @property
    def shapes(self):
        return {name: tuple(weight.shape) for name, weight in self.weights.items()}


def test_a_steep_gate_is_the_hard_truncation():
    y = outputs()
    left, values, right = torch.linalg.svd(y, full_matrices=False)
    for position in (2.3, 2.7):
        position = torch.tensor(position, dtype=torch.float64)
        expected = left[:, :2] * values[:2] @ right[:2]
        torch.testing.assert_close(soft_truncation(y, position, 1e6, 8), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("beta", [0.5, 3.0])
@pytest.mark.parametrize("position", [2.4, 5.0, 7.9])
def test_gradient_of_the_position_is_that_of_finite_differences(beta, position):
    y, target = outputs(), torch.linspace(-1, 1, 128, dtype=torch.float64).view(16, 8)
    value = torch.tensor(position, dtype=torch.float64, requires_grad=True)
    mixing = torch.linspace(-1, 2, 64, dtype=torch.float64).view(8, 8) + torch.eye(8, dtype=torch.float64)

    def loss(value):
        # The second truncation sees the position through the first as well.
        return (
            (soft_truncation(soft_truncation(y, value, beta, 8) @ mixing, value / 2, beta, 8) - target).square().sum()
        )

    (gradient,) = torch.autograd.grad(loss(value), [value])
    expected = (loss(value.detach() + 1e-6) - loss(value.detach() - 1e-6)) / 2e-6
    assert gradient.item() == pytest.approx(expected.item(), rel=1e-5, abs=1e-7)


def test_outputs_keep_their_type():
    assert soft_truncation(outputs().bfloat16(), torch.tensor(3.0), 10, 8).dtype == torch.bfloat16


@pytest.mark.parametrize("remap", [False, True])
def test_objective(remap):
    decoder = FakeDecoder()
    budget = RankTarget(decoder.shapes, 0.5, remapped=remap)
    costs = RankCosts.of(budget, torch.device("cpu"))
    uniform = costs.uniform(0.5)
    torch.testing.assert_close(costs.total_share(uniform), torch.tensor(0.5, dtype=torch.float64))
    expected = [0.5, 0.5] if remap else [0.5 * 16 / 32, 0.5 * 20 / 36]
    assert uniform.tolist() == pytest.approx(expected)
    options = Options(keep=0.5, remap=remap, penalty=0)
    without = objective(decoder, 0, 1.1 * uniform, costs, options)
    more = objective(decoder, 0, 1.1 * uniform, costs, options.model_copy(update={"penalty": 3.0}))
    assert (more - without).item() == pytest.approx(3 * 0.05)
    perplexity = objective(decoder, 0, 1.1 * uniform, costs, options.model_copy(update={"loss": "perplexity"}))
    assert perplexity.item() == pytest.approx(math.exp(without.item()))
    # One position below 0 costs its square: -0.25 of 16.
    low = objective(decoder, 0, torch.tensor([-0.25, 1.0]), costs, options)
    clamped = objective(decoder, 0, torch.tensor([-1e-9, 1.0]), costs, options)
    assert (low - clamped).item() == pytest.approx(16, rel=1e-3)


@pytest.mark.parametrize("tokens", [5, 12, 40])
def test_windows_shorter_than_the_width_have_a_real_ratio(tokens):
    """The published ratio int(min(m, n) / t) is 0 wherever the width is below the window's length."""
    decoder = FakeDecoder(tokens=tokens)
    costs = RankCosts.of(RankTarget(decoder.shapes, 0.5, remapped=True), torch.device("cpu"))
    seen = []
    inner = decoder.loss

    def loss(windows, outputs):
        def observed(name, y):
            truncated = outputs(name, y)
            seen.append((name, torch.linalg.matrix_rank(truncated).item()))
            return truncated

        return inner(windows, outputs=observed)

    decoder.loss = loss
    shares = torch.tensor([0.51, 0.51], dtype=torch.float64)
    objective(decoder, 0, shares, costs, Options(keep=0.5, beta=1e9))
    count = min(tokens, 16)
    assert seen == [("a", int(0.51 * count)), ("b", int(0.51 * count))]


def test_learning_moves_rank_to_where_the_loss_feels_it():
    decoder = FakeDecoder()
    options = Options(keep=0.5, steps=48, learning_rate=0.04, beta=2.0, penalty=0.5)
    budget = RankTarget(decoder.shapes, 0.5, remapped=True)
    ranks = learn(decoder, budget, options)
    assert ranks[0] < 7.5 and ranks[1] > 8.5
    assert len(decoder.asked) == 48 and set(decoder.asked) == set(range(6))
    few = options.model_copy(update={"steps": 3})
    assert torch.equal(learn(decoder, budget, few), learn(decoder, budget, few))


@pytest.mark.parametrize("remap", [False, True])
@pytest.mark.parametrize("keep", [0.3, 0.6])
def test_plan_meets_the_budget_within_one_rank(remap, keep):
    decoder = FakeDecoder()
    found = plan(decoder, Options(keep=keep, remap=remap, steps=4))
    budget = RankTarget(decoder.shapes, keep, remapped=remap)
    used = budget.total({name: each.rank for name, each in found.items()})
    assert 0 <= keep * (256 + 320) - used < 36
    assert found["a"].record["rank_learned"] > 0
    assert found["a"].record["planned_bytes" if remap else "planned_parameters"] == pytest.approx(used / 576)
    assert len(decoder.asked) == 4


def test_no_learning_plans_nothing():
    decoder = FakeDecoder()
    assert plan(decoder, Options(keep=0.5, learn=False)) == {}
    assert not decoder.asked


def test_a_loss_that_is_not_finite():
    with pytest.raises(UserError, match="not finite in pass 1 of learning ranks"):
        plan(FakeDecoder(broken=True), Options(keep=0.5))


@pytest.mark.parametrize("transposed", [False, True])
def test_weight_is_that_of_svd_llm(linear, inputs, statistics_with, transposed):
    wide = dataclasses.replace(linear, weight=linear.weight.T.contiguous()) if transposed else linear
    seen = inputs[:, : wide.weight.shape[1]]
    statistics = statistics_with(seen.T @ seen / len(seen))
    ours = compress(wide, statistics, Options(rank=6, learn=False, remap=False))
    other = svd_llm.compress(wide, statistics, svd_llm.Options(rank=6))
    torch.testing.assert_close(product(ours), product(other), rtol=1e-9, atol=1e-9)
    assert ours.record["truncation_error"] == pytest.approx(other.record["truncation_error"], rel=1e-9)


def test_plain_factors_stay_dense_from_break_even(linear, statistics):
    assert isinstance(compress(linear, statistics, Options(rank=10, learn=False, remap=False)), Unchanged)


def test_the_plan_decides(linear, statistics):
    planned = dataclasses.replace(linear, plan=PlannedRank(7, {"rank_learned": 7.4}))
    for remap in (False, True):
        record = compress(planned, statistics, Options(keep=0.3, remap=remap)).record
        assert record["rank"] == 7 and record["rank_learned"] == 7.4


@pytest.mark.parametrize("shape", [(20, 24), (24, 20), (24, 24)])
@pytest.mark.parametrize("rank", [1, 6, 20])
def test_remapping(inputs, statistics_with, shape, rank):
    rows, columns = shape
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(9), dtype=torch.float64)
    seen = inputs[:, :columns]
    statistics = statistics_with(seen.T @ seen / len(seen))
    linear = Linear(weight, storage=torch.float16)
    factors = compress(linear, statistics, Options(rank=rank, learn=False))
    exact = product(svd_llm.compress(linear, statistics, svd_llm.Options(rank=rank))) if rank < 10 else None
    first, second = factors.first, factors.second
    assert not first.transposed and second.transposed
    short, long = min(shape), max(shape)
    # 8-bit codes, and what is left of the longer side, and scales, at two bytes a number.
    floats = sum(0 if part.outlier_weight is None else part.outlier_weight.numel() for part in (first, second))
    scales = first.absmax.numel() + second.absmax.numel()
    assert first.codes.shape == second.codes.shape == (rank, short)
    assert first.codes.numel() + second.codes.numel() + 2 * floats + 2 * scales == 2 * rank * long + 2 * 2 * rank
    assert factors.record["keep_bytes"] == pytest.approx(rank / short)
    assert factors.record["rank"] == rank
    assert factors.record["keep"] == pytest.approx(rank * (rows + columns) / (rows * columns))
    product_of_codes = coded(second).T @ coded(first)
    if exact is not None:
        left, values, right = torch.linalg.svd(exact, full_matrices=False)
        left, values, right = left[:, :rank].T, values[:rank], right[:rank]
        for part, vectors, scaled in ((first, right, columns > rows), (second, left, rows >= columns)):
            vectors = values[:, None] * vectors if scaled else vectors
            signs = (coded(part) * vectors).sum(1, keepdim=True).sign()
            error = (signs * coded(part) - vectors).abs()
            # The widest cell of the table, -1 that it does not hold, and 16 bits of scale.
            table = dynamic_table(8)
            widest = max((table.diff().max() / 2).item(), 1 + table[0].item()) + 2**-11
            largest = vectors[:, :short].abs().amax(1, keepdim=True)
            assert (error[:, :short] <= widest * largest * 1.001).all()
            assert (error[:, short:] <= 1e-9).all()
    whole = weight if rank == short else exact
    if whole is not None:
        assert (product_of_codes - whole).norm() < 0.02 * whole.norm()


def coded(codebook):
    """[k, w] the vectors that a codebook stands for."""
    return dequantize(dataclasses.replace(codebook, transposed=False))


def test_remapped_ranks_are_shares_of_bytes(linear, statistics):
    record = compress(linear, statistics, Options(keep=0.5, learn=False)).record
    assert record["rank"] == 10 and record["keep_bytes"] == 0.5 and record["keep_bytes_asked"] == 0.5
    assert compress(linear, statistics, Options(keep=1, learn=False)).record["rank"] == 20
    assert compress(linear, statistics, Options(keep=0.001, learn=False)).record["rank"] == 1
    record = compress(linear, statistics, Options(rank=50, learn=False)).record
    assert record["rank"] == 20 and record["rank_asked"] == 50


def test_a_zero_matrix(statistics):
    factors = compress(Linear(torch.zeros(20, 24)), statistics, Options(rank=3, learn=False))
    assert not coded(factors.first).any() or not coded(factors.second).any()
    assert torch.isfinite(coded(factors.first)).all() and torch.isfinite(coded(factors.second)).all()


def test_unfit_statistics(linear, statistics):
    damaged = dataclasses.replace(statistics, second_moment=statistics.second_moment * float("nan"))
    with pytest.raises(UserError, match="not finite"):
        compress(linear, damaged, Options(rank=3, learn=False))


def test_marks():
    parent = frozenset({"smaller"})
    assert traits(parent, Options(keep=0.5)) == {"smaller", "factorized", "quantized"}
    assert traits(parent, Options(keep=0.5, remap=False)) == {"smaller", "factorized"}


def test_needs():
    assert Options(keep=0.5).needs == {"windows"}
    assert Options(keep=0.5, learn=False).needs == frozenset()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 3}, "give 'keep' instead of 'rank', or set 'learn: false'"),
        ({"keep": 0.5, "allocation": {"by": "sensitivity"}}, "does not go with this method"),
        ({"keep": 0.5, "steps": 0}, "greater than or equal to 1"),
        ({"keep": 0.5, "beta": 0}, "greater than 0"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValidationError, match=message):
        Options(**options)
