from __future__ import annotations

import dataclasses
import math
from itertools import product

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.quantize import gptq, qpruner, rtn
from coppice.methods.quantize.qpruner import Options, by_information, compress, mutual_information, plan, repair_levels
from coppice.methods.registry import method
from coppice.methods.solvers import demand
from coppice.methods.solvers.grid import GridOptions, dequantize
from coppice.models.contracts import Linear, LinearStatistics

# Read by tests/rows.py.
ROWS = [
    {"bits_average": 5, "group_size": -1},
    {"bits_average": 5, "search": "knapsack", "quantizer": "gptq", "group_size": -1},
]
BLIND_ROWS = [0]

NAMES = [f"model.layers.{block}.mlp.{kind}" for block in range(2) for kind in ("up_proj", "down_proj")]


class FakeDecoder:
    """x += down(tanh(up(x))), twice, then logits over 11 tokens; the linears differ in size and in power."""

    def __init__(self, windows=3, length=40):
        draw = torch.Generator().manual_seed(0)
        shapes = [(24, 16), (16, 24)] * 2
        self.names, self.windows, self.seed = list(NAMES), windows, 5
        self.weights = {
            name: torch.randn(*shape, generator=draw, dtype=torch.float64) * scale
            for name, shape, scale in zip(NAMES, shapes, (0.3, 1.0, 0.05, 0.4), strict=True)
        }
        self.head = torch.randn(11, 16, generator=draw, dtype=torch.float64)
        self.inputs = torch.randn(windows, length, 16, generator=draw, dtype=torch.float64)
        self.tokens = torch.randint(11, (windows, length), generator=draw)
        self.losses = []

    def linear(self, name):
        return Linear(self.weights[name], name=name)

    def _forward(self, window, weights, outputs=None):
        seen = {}
        x = self.inputs[window]

        def apply(name, x):
            seen[name] = x
            y = x @ weights[name].T
            return y if outputs is None else outputs(name, y)

        for up, down in zip(NAMES[::2], NAMES[1::2], strict=True):
            x = x + apply(down, torch.tanh(apply(up, x)))
        return (x @ self.head.T)[:-1], seen

    def statistics(self, name):
        x = torch.cat([self._forward(window, self.weights)[1][name] for window in range(self.windows)])
        return LinearStatistics(x.T @ x / len(x), x.mean(0), x.abs().mean(0), x.abs().amax(0), len(x))

    def logits(self, window, outputs=None):
        return self._forward(window, self.weights, outputs)[0]

    def loss(self, windows=None, weights=None, outputs=None):
        used = self.weights | dict(weights or {})
        logits = torch.cat([self._forward(window, used)[0] for window in range(self.windows)])
        loss = torch.nn.functional.cross_entropy(logits, self.tokens[:, 1:].flatten())
        self.losses.append(loss.item())
        return loss


def options(**given):
    return Options(**{"bits_average": 5, "candidates": [3, 8], "group_size": 8} | given)


def average(decoder, planned):
    sizes = {name: decoder.weights[name].numel() for name in decoder.names}
    return sum(planned[name]["bits"] * size for name, size in sizes.items()) / sum(sizes.values())


def error_table(decoder):
    """The error of each linear at each number of bits."""
    return {
        name: dict(
            zip(
                range(2, 9),
                demand.rounding_losses(
                    decoder.linear(name),
                    decoder.statistics(name).second_moment,
                    GridOptions(bits=2, group_size=8),
                    range(2, 9),
                ),
                strict=True,
            )
        )
        for name in decoder.names
    }


def summed_error(table, planned):
    return sum(table[name][each["bits"]] for name, each in planned.items())


SEARCHES = ["mutual-information", "knapsack", "bayesian"]


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("budget", [3, 3.7, 5.5, 7.9])
def test_the_budget_is_respected(search, budget):
    decoder = FakeDecoder()
    planned = plan(decoder, options(bits_average=budget, search=search, trials=3))
    assert average(decoder, planned) <= budget
    assert list(planned) == NAMES and {each["bits"] for each in planned.values()} <= {3, 8}
    assert planned[NAMES[0]]["record"]["bits_average"] == average(decoder, planned)


@pytest.mark.parametrize("search", SEARCHES)
def test_a_budget_of_eight_gives_all_eight(search):
    planned = plan(FakeDecoder(), options(bits_average=8, search=search, trials=3))
    assert {each["bits"] for each in planned.values()} == {8}


@pytest.mark.parametrize("search", SEARCHES)
def test_a_budget_of_the_least_candidate_gives_it_to_all(search):
    planned = plan(FakeDecoder(), options(bits_average=3, search=search, trials=3))
    assert {each["bits"] for each in planned.values()} == {3}


def test_the_knapsack_is_the_best_of_all_assignments():
    decoder = FakeDecoder()
    planned = plan(decoder, options(search="knapsack", candidates=[2, 4, 8]))
    every = [dict(zip(NAMES, ({"bits": b} for b in bits), strict=True)) for bits in product([2, 4, 8], repeat=4)]
    table = error_table(decoder)
    best = min(summed_error(table, each) for each in every if average(decoder, each) <= 5)
    assert summed_error(table, planned) == pytest.approx(best, rel=1e-12)


def test_a_larger_budget_never_raises_the_error():
    decoder = FakeDecoder()
    budgets = [3, 4, 5, 6.5, 8]
    table = error_table(decoder)
    errors = [summed_error(table, plan(decoder, options(search="knapsack", bits_average=b))) for b in budgets]
    assert errors == sorted(errors, reverse=True)


def test_the_bayesian_search_is_never_worse_than_its_starts():
    decoder = FakeDecoder()
    planned = plan(decoder, options(search="bayesian", trials=6, candidates=[2, 4, 8]))
    record = planned[NAMES[0]]["record"]
    assert record["loss"] <= min(record["loss_mutual_information"], record["loss_knapsack"])
    assert record["loss"] == min(decoder.losses) and len(decoder.losses) <= 6 and record["trials"] == 6
    weights = {
        name: dequantize(rtn.compress(decoder.linear(name), None, rtn.Options(bits=each["bits"], group_size=8)))
        for name, each in planned.items()
    }
    assert decoder.loss(weights=weights).item() == record["loss"]


def test_the_bayesian_search_starts_from_the_two_assignments():
    decoder = FakeDecoder()
    plan(decoder, options(search="bayesian", trials=2))
    measured = list(decoder.losses)
    expected = []
    for search in ("mutual-information", "knapsack"):
        planned = plan(decoder, options(search=search))
        weights = {
            name: dequantize(rtn.compress(decoder.linear(name), None, rtn.Options(bits=each["bits"], group_size=8)))
            for name, each in planned.items()
        }
        expected.append(decoder.loss(weights=weights).item())
    assert measured == list(dict.fromkeys(expected))


@pytest.mark.parametrize("search", SEARCHES)
def test_deterministic(search):
    chosen = options(search=search, trials=3)
    assert plan(FakeDecoder(), chosen) == plan(FakeDecoder(), chosen)


def test_most_bits_go_to_the_most_information():
    decoder = FakeDecoder()
    planned = plan(decoder, options(bits_average=4.3))
    records = {name: each["record"] for name, each in planned.items()}
    order = sorted(NAMES, key=lambda name: -records[name]["mutual_information"])
    # All linears have equally many weights; a quarter of them may have 8 bits.
    assert [planned[name]["bits"] for name in order] == [8, 3, 3, 3]
    assert all(record["tokens"] == 3 * 39 and record["bins"] == 16 for record in records.values())


def test_by_information_leaves_the_others_their_lowest():
    costs = [[4, 8], [40, 80], [4, 6, 8]]
    assert by_information([0.1, 0.9, 0.5], costs, 92) == [0, 1, 2]
    assert by_information([0.1, 0.9, 0.5], costs, 50) == [0, 0, 1]
    assert by_information([0.1, 0.9, 0.5], costs, 90) == [0, 1, 1]
    assert by_information([0.1, 0.9, 0.5], costs, 48) == [0, 0, 0]


def test_information_of_a_variable_about_itself_is_its_entropy():
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    # Equally full bins: log 16, and the correction of one entropy.
    assert mutual_information(x, x, 16) == pytest.approx(math.log(16) + 15 / 8000, rel=1e-12)
    assert mutual_information(x, -3 * x + 1, 16) == pytest.approx(math.log(16), abs=0.02)


def test_information_of_independent_draws_is_near_zero():
    draw = torch.Generator().manual_seed(0)
    found = [mutual_information(*torch.randn(2, 2000, generator=draw, dtype=torch.float64), 16) for _ in range(40)]
    # Without the correction the mean would be 15^2 / 4000 = 0.056.
    assert abs(sum(found) / 40) < 0.005


def test_information_of_a_correlated_pair():
    draw = torch.Generator().manual_seed(0)
    x, noise = torch.randn(2, 200_000, generator=draw, dtype=torch.float64)
    y = 0.8 * x + 0.6 * noise
    # -log(1 - r^2) / 2 = 0.511; bins lose a little.
    assert 0.47 < mutual_information(x, y, 32) < 0.512


def test_information_about_a_constant_is_zero():
    x = torch.randn(100, dtype=torch.float64)
    assert mutual_information(x, torch.ones(100, dtype=torch.float64), 8) == pytest.approx(0, abs=1e-12)


def test_repair_gives_up_what_costs_least_and_spends_the_rest():
    costs, errors = [[2, 4, 8], [2, 4, 8]], [[9.0, 3.0, 0.0], [5.0, 4.0, 0.0]]
    assert repair_levels([2, 2], costs, errors, 16) == [2, 2]
    assert repair_levels([0, 0], costs, errors, 16) == [2, 2]
    assert repair_levels([2, 2], costs, errors, 12) == [1, 2]
    assert repair_levels([1, 1], costs, errors, 6) == [1, 0]
    assert repair_levels([0, 0], costs, errors, 7) == [1, 0]
    assert repair_levels([2, 2], costs, errors, 4) == [0, 0]


def planned_linear(linear, bits):
    return dataclasses.replace(linear, plan={"bits": bits, "record": {"search": "knapsack"}})


@pytest.mark.parametrize("bits", [4, 8])
def test_quantizes_as_its_quantizer_does(linear, statistics, bits):
    nearest = compress(planned_linear(linear, bits), statistics, options(symmetric=True))
    expected = rtn.compress(linear, None, rtn.Options(bits=bits, group_size=8, symmetric=True))
    assert torch.equal(dequantize(nearest), dequantize(expected)) and nearest.bits == bits
    swept = compress(planned_linear(linear, bits), statistics, options(quantizer="gptq", act_order=True, damping=0.1))
    expected = gptq.compress(linear, statistics, gptq.Options(bits=bits, group_size=8, act_order=True, damping=0.1))
    assert torch.equal(dequantize(swept), dequantize(expected))
    assert swept.record == expected.record | {"search": "knapsack"}


@pytest.mark.parametrize("quantizer", ["rtn", "gptq"])
def test_pruned_weights_stay_zero(linear, statistics, quantizer):
    mask = torch.rand(20, 24, generator=torch.Generator().manual_seed(0)) > 0.5
    masked = planned_linear(Linear(linear.weight.masked_fill(~mask, 0), mask), 3)
    assert (dequantize(compress(masked, statistics, options(quantizer=quantizer)))[~mask] == 0).all()


def test_no_tokens_to_learn_from():
    with pytest.raises(UserError, match="two tokens"):
        plan(FakeDecoder(windows=0), options())
    with pytest.raises(UserError, match="two tokens"):
        plan(FakeDecoder(length=1), options())


def test_outputs_that_are_not_finite():
    decoder = FakeDecoder()
    decoder.weights[NAMES[1]][0, 0] = math.inf
    with pytest.raises(UserError, match="not finite"):
        plan(decoder, options())
    with pytest.raises(UserError, match=rf"^{NAMES[1]}: .*not finite"):
        plan(decoder, options(search="knapsack"))


def test_losses_that_are_not_finite():
    decoder = FakeDecoder()
    decoder.head[0, 0] = math.nan
    with pytest.raises(UserError, match="not finite"):
        plan(decoder, options(search="bayesian", trials=2))


@pytest.mark.parametrize(
    ("given", "sentence"),
    [
        ({"bits_average": 3.5, "candidates": [4, 8]}, "cannot be 3.5"),
        ({"candidates": []}, "one or more different integers"),
        ({"candidates": [4, 4]}, "one or more different integers"),
        ({"candidates": [4, 16]}, "from 2 to 8"),
        ({"bits_average": 9}, "less than or equal to 8"),
        ({"group_size": 0}, "a group size is a positive number"),
    ],
)
def test_options_that_are_not_possible(given, sentence):
    with pytest.raises(ValidationError, match=sentence):
        options(**given)


def test_what_it_needs():
    found = method("qpruner")
    assert found.declaration is qpruner.METHOD and found.contract == "layer"
    assert found.needs(options(search="knapsack")) == {"moments"}
    assert found.needs(options(search="bayesian")) == found.needs(options()) == {"moments", "windows"}
