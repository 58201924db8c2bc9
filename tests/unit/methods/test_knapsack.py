from __future__ import annotations

from itertools import pairwise, product

import numpy
import pytest

from coppice.methods.solvers.knapsack import knapsack


def summed(rows, chosen):
    return sum(row[level] for row, level in zip(rows, chosen, strict=True))


def brute_force(costs, losses, capacity):
    """The least loss of every choice that fits."""
    choices = product(*(range(len(row)) for row in costs))
    return min(summed(losses, chosen) for chosen in choices if summed(costs, chosen) <= capacity)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("room", [0.0, 0.2, 0.5, 0.9, 1.0])
def test_is_the_best_of_all_choices(seed, room):
    draw = numpy.random.default_rng(seed)
    costs = draw.integers(3, 40, (5, 4)).tolist()
    losses = draw.random((5, 4)).tolist()
    least, most = (sum(end(row) for row in costs) for end in (min, max))
    capacity = least + int(room * (most - least))
    chosen = knapsack(costs, losses, capacity)
    assert summed(costs, chosen) <= capacity
    assert summed(losses, chosen) == pytest.approx(brute_force(costs, losses, capacity), rel=1e-12)


def test_items_may_have_different_numbers_of_levels():
    costs, losses = [[2, 4, 8], [3], [5, 9]], [[9.0, 4.0, 1.0], [2.0], [7.0, 0.0]]
    assert knapsack(costs, losses, 16) == [1, 0, 1]
    assert knapsack(costs, losses, 15) == [0, 0, 1]
    assert knapsack(costs, losses, 10) == [0, 0, 0]


def test_more_capacity_is_never_worse():
    draw = numpy.random.default_rng(0)
    costs, losses = draw.integers(1, 60, (6, 5)).tolist(), draw.random((6, 5)).tolist()
    found = [summed(losses, knapsack(costs, losses, capacity)) for capacity in range(sum(map(min, costs)), 400)]
    assert all(later <= earlier for earlier, later in pairwise(found))
    assert found[-1] == pytest.approx(sum(map(min, losses)), rel=1e-12)


def test_equal_losses_take_the_cheaper_level():
    assert knapsack([[7, 2, 5]], [[1.0, 1.0, 1.0]], 100) == [1]


def test_common_divisors_keep_large_costs_exact():
    sizes = [4096 * 4096, 4096 * 11008, 4096 * 1024]
    costs = [[size * bits for bits in (2, 3, 4, 8)] for size in sizes]
    losses = [[9.0, 5.0, 2.0, 0.1], [20.0, 9.0, 5.0, 1.0], [8.0, 3.0, 1.0, 0.0]]
    capacity = 4 * sum(sizes)
    chosen = knapsack(costs, losses, capacity, columns=200)
    assert summed(losses, chosen) == pytest.approx(brute_force(costs, losses, capacity), rel=1e-12)


def test_coarse_columns_never_cost_more_than_the_capacity():
    draw = numpy.random.default_rng(3)
    costs, losses = draw.integers(1, 10**5, (8, 6)).tolist(), draw.random((8, 6)).tolist()
    capacity = sum(map(min, costs)) + 10**5
    fine, coarse = knapsack(costs, losses, capacity, 10**5), knapsack(costs, losses, capacity, 50)
    assert summed(costs, coarse) <= capacity
    assert summed(losses, coarse) >= summed(losses, fine)
