from __future__ import annotations

import pytest

from coppice.methods.solvers.ranks import RankTarget

SHAPES = {"q": (64, 64), "k": (16, 64), "up": (176, 64), "down": (64, 176), "q2": (64, 64), "k2": (16, 64)}


@pytest.mark.parametrize("remapped", [False, True])
@pytest.mark.parametrize("keep", [0.1, 0.37, 0.5, 0.83])
@pytest.mark.parametrize("sizes", ["equal", "uneven"])
def test_scaled_ranks_meet_the_budget_within_one_rank(remapped, keep, sizes):
    budget = RankTarget(SHAPES, keep, remapped=remapped)
    wanted = {name: 5.5 if sizes == "equal" else 1.5 + 7.3 * place for place, name in enumerate(SHAPES)}
    ranks = budget.in_proportion(wanted)
    spare = budget.capacity - budget.total(ranks)
    assert 0 <= spare < min(budget.quantum(name) for name in SHAPES if ranks[name] < budget.largest(name))
    record = budget.plans(ranks)["q"].record
    what = "bytes" if remapped else "parameters"
    assert record[f"planned_{what}_asked"] == keep
    assert record[f"planned_{what}"] == pytest.approx(keep, abs=240 / sum(m * n for m, n in SHAPES.values()))


def test_scaled_ranks_are_in_proportion():
    budget = RankTarget({"a": (1000, 1000), "b": (1000, 1000)}, 0.3, remapped=True)
    assert budget.in_proportion({"a": 2.0, "b": 1.0}) == {"a": 400, "b": 200}
    plain = RankTarget({"a": (1000, 1000), "b": (1000, 1000)}, 0.3)
    assert plain.in_proportion({"a": 0.02, "b": 0.01}) == {"a": 200, "b": 100}


def test_a_linear_can_stay_whole_while_others_shrink():
    budget = RankTarget({"a": (40, 40), "b": (40, 40)}, 0.6)
    assert budget.in_proportion({"a": 100.0, "b": 1.0}) == {"a": 20, "b": 4}


@pytest.mark.parametrize("remapped", [False, True])
def test_everything_kept(remapped):
    budget = RankTarget(SHAPES, 1.0, remapped=remapped)
    ranks = budget.in_proportion(dict.fromkeys(SHAPES, 3.3))
    assert ranks == {name: budget.largest(name) for name in SHAPES}
    assert budget.total(ranks) == budget.capacity


def test_one_rank_is_the_least():
    budget = RankTarget(SHAPES, 0.001)
    assert budget.in_proportion(dict.fromkeys(SHAPES, 3.3)) == dict.fromkeys(SHAPES, 1)


def test_alignment():
    budget = RankTarget(SHAPES, 0.5, align=8, remapped=True)
    ranks = budget.in_proportion({name: 5.0 + place for place, name in enumerate(SHAPES)})
    assert all(rank % 8 == 0 or rank < 8 for rank in ranks.values())
    assert 0 <= budget.capacity - budget.total(ranks) < 8 * 176


def test_filling_goes_in_turns():
    budget = RankTarget({"a": (10, 10), "b": (10, 10)}, 0.5, remapped=True)
    assert budget.fill({"a": 1, "b": 4}, ["a", "b"]) == {"a": 4, "b": 6}
    assert budget.fill({"a": 1, "b": 4}, ["a"]) == {"a": 6, "b": 4}
