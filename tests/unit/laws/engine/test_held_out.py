"""Held-out protocols, errors and ranks."""

from __future__ import annotations

import numpy as np
import pytest
from law_points import POWER, curve, power

from coppice.laws.engine.forms import Form, Parameter
from coppice.laws.engine.held_out import held_out_test, highest_of_each, largest, later_tokens, leave_one_out
from coppice.laws.engine.points import Points, levels, select
from coppice.laws.engine.search import Effort, fit_form


def test_later_tokens_holds_out_the_last_fifth_of_each_run() -> None:
    points = curve(2, tokens=(16.0, 1.0, 8.0, 2.0, 4.0))
    assert points["tokens"][later_tokens(points)].tolist() == [16.0, 16.0]
    six = later_tokens(curve(1, tokens=(1.0, 2.0, 3.0, 4.0, 5.0, 6.0)))
    assert six.tolist() == [False] * 4 + [True] * 2
    assert "No run has two points" in later_tokens(curve(3, tokens=(4.0,)))


def test_largest_needs_two_levels_to_extend() -> None:
    points = {"rho": np.array([0.35, 0.15, 0.2503, 0.2498, 0.35])}
    assert largest(points, "rho", "pruning rate").tolist() == [True, False, False, False, True]
    reason = largest({"rho": np.array([0.2503, 0.2498, 0.35])}, "rho", "pruning rate")
    assert reason == ("This test needs three pruning rates, two to fit and one to predict, and the points have 2.")
    assert levels(np.array([0.26, 0.25, 0.5])).tolist() == [0, 0, 1]


def test_held_out_error_is_that_of_a_fit_that_has_not_seen_the_points() -> None:
    effort = Effort(starts=8, bootstrap=50)
    points = curve(6, noise=0.01)
    held_out = later_tokens(points)
    error = held_out_test({"form": POWER}, points, held_out, effort)[0]["form"]
    seen = {name: column[~held_out] for name, column in points.items()}
    unseen = {name: column[held_out] for name, column in points.items()}
    residuals = power(fit_form(POWER, seen).parameters, unseen) - unseen["loss"]
    assert error["rmse"] == pytest.approx(np.sqrt(np.mean(residuals**2)), rel=1e-6)
    assert error["relative"] == pytest.approx(np.abs(residuals).sum() / unseen["loss"].sum(), rel=1e-6)
    assert error["low"] < error["rmse"] < error["high"]
    spoiled = points | {"loss": np.where(held_out, points["loss"] + 1, points["loss"])}
    assert held_out_test({"form": POWER}, spoiled, held_out, effort)[0]["form"]["rmse"] == pytest.approx(1, abs=0.1)


def test_held_out_error_says_why_it_cannot_be_measured() -> None:
    effort = Effort(starts=4, bootstrap=50)
    points = curve(1, tokens=(1.0, 2.0, 4.0))
    error = held_out_test({"form": POWER}, points, later_tokens(points), effort)[0]["form"]
    assert error == {"reason": "The 2 points left to fit are too few for the 3 parameters of this law."}
    assert held_out_test({"form": POWER}, points, "No.", effort)[0]["form"] == {"reason": "No."}


def test_highest_of_each_group() -> None:
    points = {
        "run": np.array(list("abcdef")),
        "model": np.array(["m", "m", "m", "n", "n", "o"]),
        "rho": np.array([0.25, 0.5, 0.75, 0.3, 0.6, 0.9]),
    }
    assert highest_of_each(points, "rho", "rate", "model").tolist() == [False, False, True, False, True, False]
    two = select(points, [0, 1])
    assert highest_of_each(two, "rho", "rate", "model") == (
        "This test needs three rates, two to fit and one to predict, and the points have fewer."
    )


def test_leaving_one_out_in_turn() -> None:
    points = curve(4, noise=0.01)
    folds = leave_one_out(points, "run", "run")
    assert folds.shape == (4, 20)
    assert folds.sum(axis=0).tolist() == [1] * 20
    assert leave_one_out(select(points, points["run"] < "run-2"), "run", "run").endswith("and the points have 2.")
    errors, ranking = held_out_test({"power": POWER}, points, folds, Effort(starts=8, bootstrap=20))
    by_hand = [
        power(fit_form(POWER, select(points, ~fold)).parameters, select(points, fold)) - points["loss"][fold]
        for fold in folds
    ]
    assert errors["power"]["rmse"] == pytest.approx(np.sqrt(np.mean(np.concatenate(by_hand) ** 2)), rel=1e-6)
    assert ranking == [
        {"form": "power", "rmse": errors["power"]["rmse"], "behind": 0.0, "low": 0.0, "high": 0.0, "first": 1.0}
    ]


def test_rivals_are_ranked_with_their_uncertainty() -> None:
    def line(parameters, points: Points) -> np.ndarray:
        return parameters["start"] + parameters["slope"] * points["tokens"]

    straight = Form({name: Parameter(bounds=(-10, 10), start=(-1, 1)) for name in ("start", "slope")}, line)
    points = curve(6, tokens=tuple(np.geomspace(1, 64, 10)), noise=0.005)
    effort = Effort(starts=8, bootstrap=40)
    errors, ranking = held_out_test({"line": straight, "power": POWER}, points, later_tokens(points), effort)
    assert [entry["form"] for entry in ranking] == ["power", "line"]
    assert ranking[1]["behind"] == pytest.approx(errors["line"]["rmse"] - errors["power"]["rmse"])
    assert ranking[1]["low"] > 0
    assert (ranking[0]["first"], ranking[1]["first"]) == (1, 0)
    # The mean of what came before is a worse guess than the law, and the line is worse still.
    assert errors["power"]["rmse"] < errors["power"]["naive"] < errors["line"]["rmse"]


def test_the_naive_prediction_knows_no_law() -> None:
    points = curve(2, tokens=(1.0, 2.0, 4.0, 8.0, 16.0)) | {"dense": np.repeat([1.0, 3.0], 5)}
    points["loss"] = points["loss"] + np.repeat([0.0, 2.0], 5)
    effort = Effort(starts=4, bootstrap=0)

    def naive(held_out: np.ndarray, **given: str) -> float:
        return held_out_test({"power": POWER}, points, held_out, effort, **given)[0]["power"]["naive"]

    # Of a run that was seen: that nothing changes.
    last = points["tokens"] == 16
    unchanged = points["loss"][points["tokens"] == 8] - points["loss"][last]
    assert naive(last, axis="tokens") == pytest.approx(np.sqrt(np.mean(unchanged**2)))
    # Of one that was not: what the others lie above their dense model.
    second = points["run"] == "run-1"
    mean = 3 + np.mean(points["loss"][~second] - 1) - points["loss"][second]
    assert naive(second, axis="tokens", base="dense") == pytest.approx(np.sqrt(np.mean(mean**2)))
    assert naive(second) > naive(second, base="dense")


def test_forms_that_are_one_law_share_the_first_place() -> None:
    points = curve(5, noise=0.01)
    effort = Effort(starts=4, bootstrap=10)
    _, ranking = held_out_test({"power": POWER, "twin": POWER}, points, later_tokens(points), effort)
    assert [entry["first"] for entry in ranking] == [0.5, 0.5]
