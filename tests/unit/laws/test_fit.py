from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from scipy.optimize import minimize

from coppice import laws
from coppice.errors import UserError
from coppice.laws.fit import (
    Form,
    Objective,
    Parameter,
    Points,
    average_slope_difference,
    bootstrap,
    count,
    fit_form,
    fitted_parameters,
    gradient_ratio,
    jacobian,
    levels,
    metrics,
    objective,
    profile,
    select,
    unidentified,
)
from coppice.laws.held_out import held_out_error, held_out_test, highest_of_each, largest, later_tokens, leave_one_out


def power(parameters, points: Points) -> np.ndarray:
    return parameters["floor"] + parameters["scale"] * points["tokens"] ** -parameters["exponent"]


POWER = Form(
    {
        "floor": Parameter(bounds=(0, 10), start=(0, 3)),
        "scale": Parameter(bounds=(1e-6, 1e6), start=(0.1, 10), logarithmic=True),
        "exponent": Parameter(bounds=(0.01, 3), start=(0.1, 2), logarithmic=True),
    },
    power,
)
TRUTH = {"floor": 1.5, "scale": 2.0, "exponent": 0.5}


def curve(runs: int = 1, tokens=(1.0, 2.0, 4.0, 8.0, 16.0), noise: float = 0.0, shift: float = 0.0) -> Points:
    generator = np.random.default_rng(0)
    points = {
        "run": np.repeat([f"run-{number}" for number in range(runs)], len(tokens)),
        "tokens": np.tile(np.asarray(tokens, float), runs),
    }
    shifts = np.repeat(shift * generator.standard_normal(runs), len(tokens))
    return points | {"loss": power(TRUTH, points) + shifts + noise * generator.standard_normal(len(shifts))}


def test_laws_are_found_by_name() -> None:
    assert "p2" in laws.names()
    assert "fit" not in laws.names()
    assert laws.load("p2").source["arxiv"] == "2411.10272"
    with pytest.raises(UserError, match=r"no law named 'p3'. Did you mean 'p2'\?$"):
        laws.load("p3")


def test_an_unknown_law_lists_each_law_once() -> None:
    with pytest.raises(UserError) as refused:
        laws.load("zz")
    assert str(refused.value).count("chinchilla") == 1


def test_jacobian_is_exact() -> None:
    points = curve()
    tokens = points["tokens"]
    expected = [np.ones(5), tokens**-0.5, -2.0 * tokens**-0.5 * np.log(tokens)]
    columns = jacobian(POWER, TRUTH, points, tuple(TRUTH))
    assert np.allclose(columns, np.transpose(expected), rtol=1e-15, atol=1e-15)


def test_every_start_finds_the_truth() -> None:
    fit = fit_form(POWER, curve())
    assert fit.parameters == pytest.approx(TRUTH, rel=1e-10)
    assert fit.converged
    assert fit.unidentified == ()
    assert fit.starts.shape == (32, 3)
    assert np.ptp(fit.starts, axis=0).max() < 1e-3


def test_many_searches_at_once_agree_with_the_polished_optimum() -> None:
    fit = fit_form(POWER, curve(4, noise=0.01))
    assert np.allclose(fit.starts, list(fit.parameters.values()), rtol=1e-3)


def test_a_bound_holds_and_the_fit_still_counts_as_converged() -> None:
    points = curve() | {"loss": power({"floor": -0.5, "scale": 2.0, "exponent": 0.5}, curve())}
    fit = fit_form(POWER, points)
    assert fit.parameters["floor"] == pytest.approx(0, abs=1e-6)
    assert fit.converged


def test_parameters_at_a_bound_of_the_search_say_so() -> None:
    below = curve(4) | {"loss": power(TRUTH | {"floor": -0.5}, curve(4))}
    fit = fit_form(POWER, below, starts=4)
    samples, _ = bootstrap(POWER, below, fit, 20, seed=0)
    entries = fitted_parameters(fit, samples)
    assert {name: entry["at_bound"] for name, entry in entries.items()} == {
        "floor": True,
        "scale": False,
        "exponent": False,
    }
    assert entries["floor"]["identified"]
    steep = curve() | {"loss": power(TRUTH | {"exponent": 3.5}, curve())}
    assert fit_form(POWER, steep, starts=4).at_bound == ("exponent",)
    assert fit_form(POWER, curve(), starts=4).at_bound == ()
    # What the points cannot tell, or what was not fitted, lies where it lies.
    assert fit_form(POWER, below, starts=4, fixed={"floor": 0.0}).at_bound == ()
    unused = {"unused": Parameter(bounds=(0, 1), start=(0, 0))}
    fit = fit_form(replace(POWER, parameters=POWER.parameters | unused), curve(), starts=4)
    assert fit.parameters["unused"] == pytest.approx(0, abs=1e-6)
    assert (fit.unidentified, fit.at_bound) == (("unused",), ())


def test_parameters_short_of_the_optimum_are_refused() -> None:
    # What stopping on a loose tolerance gives: near the optimum in loss, with a gradient that has not vanished.
    points = curve(3, noise=0.01)
    fit = fit_form(POWER, points)
    assert gradient_ratio(POWER, fit.parameters, points, fit.free) < 1e-7
    early = fit.parameters | {"exponent": fit.parameters["exponent"] * 1.001}
    assert gradient_ratio(POWER, early, points, fit.free) > 1e-3


def test_rank_names_the_parameters_with_a_part_in_the_null_space() -> None:
    generator = np.random.default_rng(0)
    free, shared = generator.standard_normal((20, 2)), generator.standard_normal((20, 1))
    columns = np.hstack([free * [1e5, 1e-1], shared, -1e4 * shared])
    assert unidentified(columns, ("a", "b", "c", "d")) == ("c", "d")
    assert unidentified(columns[:, :3], ("a", "b", "c")) == ()
    assert unidentified(columns[:1, :2], ("a", "b")) == ("a", "b")
    assert unidentified(np.hstack([free, np.zeros((20, 1))]), ("a", "b", "zero")) == ("zero",)
    assert unidentified(np.hstack([free, 1e-12 * shared]), ("a", "b", "vanished")) == ("vanished",)
    assert unidentified(columns[:0, :2], ("a", "b")) == ("a", "b")


@pytest.mark.parametrize("tokens", [(4.0,), (1.0, 4.0), (2.0, 2.0, 2.0, 2.0)])
def test_too_few_distinct_points_are_named_not_fatal(tokens: tuple[float, ...]) -> None:
    fit = fit_form(POWER, curve(tokens=tokens), starts=4)
    assert set(fit.unidentified) == {"floor", "scale", "exponent"}
    assert power(fit.parameters, curve(tokens=tokens)) == pytest.approx(curve(tokens=tokens)["loss"])


def test_intervals_follow_the_spread_between_runs_not_between_points() -> None:
    shifted = curve(12, tokens=np.geomspace(1, 100, 8), shift=0.1)
    fit = fit_form(POWER, shifted, starts=4)
    samples, counts = bootstrap(POWER, shifted, fit, 120, seed=0)
    assert samples[:, 0].std() == pytest.approx(0.1 / np.sqrt(12), rel=0.4)
    assert np.array_equal(counts[:, ::8].sum(axis=1), np.full(120, 12))
    again, _ = bootstrap(POWER, shifted, fit, 120, seed=0)
    assert np.array_equal(samples, again)


def test_intervals_cover_the_truth() -> None:
    covered = 0
    for seed in range(20):
        points = curve(12)
        points["loss"] += 0.02 * np.random.default_rng(seed).standard_normal(len(points["loss"]))
        fit = fit_form(POWER, points, starts=3)
        low, high = np.quantile(bootstrap(POWER, points, fit, 40, seed)[0], [0.025, 0.975], axis=0)
        covered += np.sum((low <= list(TRUTH.values())) & (list(TRUTH.values()) <= high))
    assert 0.8 <= covered / 60 <= 1


def test_no_interval_without_four_runs_or_spare_points() -> None:
    three, tight = curve(3, noise=0.01), curve(4, tokens=(1.0,), noise=0.01)
    assert len(bootstrap(POWER, three, fit_form(POWER, three), 50, 0)[0]) == 0
    tight = {name: column[:3] for name, column in tight.items()}
    assert len(bootstrap(POWER, tight, fit_form(POWER, tight), 50, 0)[0]) == 0


def test_a_draw_never_identifies_less_than_the_points() -> None:
    # Only the last run has a second and third token count, so that each draw must hold it.
    points = {
        "run": np.array(["a", "b", "c", "d", "d", "d", "d"]),
        "tokens": np.array([1.0, 1.0, 1.0, 1.0, 2.0, 4.0, 8.0]),
    }
    points["loss"] = power(TRUTH, points) + 0.01 * np.random.default_rng(0).standard_normal(7)
    _, counts = bootstrap(POWER, points, fit_form(POWER, points), 100, 0)
    assert counts[:, 3].min() == 1


def test_slope_difference() -> None:
    # T-A5
    points = curve(3, noise=0.05)
    loss = points["loss"]
    assert average_slope_difference(points, loss) == (0, 0)
    predicted = power(TRUTH, points)
    difference, relative = average_slope_difference(points, predicted)
    assert average_slope_difference(points, predicted + 3)[0] == pytest.approx(difference, rel=1e-9)
    rescaled = average_slope_difference(points | {"tokens": 1000 * points["tokens"]}, predicted)
    assert rescaled == pytest.approx((difference / 1000, relative))
    two = {"run": np.array(["a", "a", "a"]), "tokens": np.array([3.0, 1.0, 2.0]), "loss": np.array([4.0, 9.0, 6.0])}
    # Slopes -3 and -2 against -1 and -1.
    assert average_slope_difference(two, np.array([7.0, 9.0, 8.0])) == pytest.approx((1.5, 0.6))


def test_slope_difference_where_there_is_no_slope() -> None:
    single = curve(2, tokens=(4.0, 4.0))
    assert average_slope_difference(single, single["loss"]) == (None, None)
    flat = curve() | {"loss": np.ones(5)}
    assert average_slope_difference(flat, np.ones(5)) == (0, None)


def test_metrics_by_hand() -> None:
    points = {"run": np.array(["a", "a"]), "tokens": np.array([1.0, 2.0]), "loss": np.array([3.0, 1.0])}
    values = metrics(points, np.array([3.0005, 1.5]))
    assert values["r2"] == pytest.approx(1 - (0.5**2 + 0.0005**2) / 2)
    assert values["huber"] == pytest.approx((0.0005**2 / 2 + 1e-3 * (0.5 - 5e-4)) / 2)
    assert values["rmse"] == pytest.approx(np.sqrt((0.5**2 + 0.0005**2) / 2))
    assert metrics(points | {"loss": np.ones(2)}, np.ones(2))["r2"] is None


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
    options = {"starts": 8, "seed": 0, "bootstrap": 50}
    points = curve(6, noise=0.01)
    held_out = later_tokens(points)
    error = held_out_error(POWER, points, held_out, options)
    seen = {name: column[~held_out] for name, column in points.items()}
    unseen = {name: column[held_out] for name, column in points.items()}
    residuals = power(fit_form(POWER, seen).parameters, unseen) - unseen["loss"]
    assert error["rmse"] == pytest.approx(np.sqrt(np.mean(residuals**2)), rel=1e-6)
    assert error["relative"] == pytest.approx(np.abs(residuals).sum() / unseen["loss"].sum(), rel=1e-6)
    assert error["low"] < error["rmse"] < error["high"]
    spoiled = points | {"loss": np.where(held_out, points["loss"] + 1, points["loss"])}
    assert held_out_error(POWER, spoiled, held_out, options)["rmse"] == pytest.approx(1, abs=0.1)


def test_held_out_error_says_why_it_cannot_be_measured() -> None:
    options = {"starts": 4, "seed": 0, "bootstrap": 50}
    points = curve(1, tokens=(1.0, 2.0, 4.0))
    error = held_out_error(POWER, points, later_tokens(points), options)
    assert error == {"reason": "The 2 points left to fit are too few for the 3 parameters of this law."}
    assert held_out_error(POWER, points, "No.", options) == {"reason": "No."}


# Huber's loss and logarithmic residuals

HUBER = replace(POWER, objective=Objective("logarithmic", huber=1e-3))


def heavy_tailed(runs: int = 60) -> Points:
    points = curve(runs)
    noise = 0.01 * np.random.default_rng(1).standard_t(2, count(points))
    return points | {"loss": points["loss"] * np.exp(noise)}


def test_objective_is_hubers_loss_of_the_log_residuals() -> None:
    points = curve()
    off = points | {"loss": power(TRUTH, points) * np.exp([0.0, 5e-4, -5e-4, 2e-3, -1e-2])}
    within, beyond = 5e-4**2, 1e-3 * (2e-3 - 5e-4) + 1e-3 * (1e-2 - 5e-4)
    assert objective(HUBER, TRUTH, off) == pytest.approx(within + beyond, rel=1e-9)
    assert objective(POWER, TRUTH, off | {"loss": off["loss"]}) == pytest.approx(
        np.sum((power(TRUTH, points) - off["loss"]) ** 2) / 2
    )


def test_hubers_minimum_is_no_higher_than_that_of_another_search() -> None:
    points = heavy_tailed(20)
    fit = fit_form(HUBER, points, starts=8)
    assert fit.converged
    assert gradient_ratio(HUBER, fit.parameters, points, fit.free) < 1e-8

    def value(searched: np.ndarray) -> float:
        return 1e3 * objective(HUBER, dict(zip(TRUTH, np.exp(searched), strict=True)), points)

    other = minimize(value, np.log(list(TRUTH.values())), method="Nelder-Mead", options={"xatol": 1e-9, "fatol": 1e-13})
    assert value(np.log(list(fit.parameters.values()))) <= other.fun * (1 + 1e-9)
    assert np.exp(other.x) == pytest.approx(list(fit.parameters.values()), rel=1e-3)


def test_huber_is_not_led_by_an_outlier() -> None:
    points = curve(4, tokens=(1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0))
    points["loss"] = points["loss"].copy()
    points["loss"][5] *= 2
    assert fit_form(HUBER, points).parameters == pytest.approx(TRUTH, rel=5e-3)
    assert abs(fit_form(POWER, points).parameters["floor"] - TRUTH["floor"]) > 0.05


def test_a_bootstrap_does_not_depend_on_the_number_of_threads() -> None:
    points = heavy_tailed(8)
    fit = fit_form(HUBER, points, starts=4)
    seen = []
    one, _ = bootstrap(HUBER, points, fit, 140, 0, progress=seen.append)  # more than one array of searches
    three, _ = bootstrap(HUBER, points, fit, 140, 0, threads=3)
    assert np.array_equal(one, three)
    assert sum(seen) == 140
    assert not np.array_equal(one[:5], bootstrap(HUBER, points, fit, 5, 1)[0])


def test_given_slopes_replace_the_complex_step() -> None:
    def slopes(parameters, points: Points) -> dict[str, np.ndarray]:
        falling = points["tokens"] ** -parameters["exponent"]
        return {
            "floor": np.ones_like(falling),
            "scale": falling,
            "exponent": -parameters["scale"] * falling * np.log(points["tokens"]),
        }

    points = heavy_tailed(12)
    for form in (POWER, HUBER):
        given = jacobian(replace(form, slopes=slopes), TRUTH, points, tuple(TRUTH))
        assert given == pytest.approx(jacobian(form, TRUTH, points, tuple(TRUTH)), rel=1e-12)
    assert fit_form(replace(HUBER, slopes=slopes), points, starts=4).parameters == pytest.approx(
        fit_form(HUBER, points, starts=4).parameters, rel=1e-6
    )


def test_a_prediction_without_a_logarithm_is_never_a_minimum() -> None:
    form = replace(POWER, parameters=POWER.parameters | {"floor": Parameter(bounds=(-10, 10), start=(-10, 5))})
    points = curve(4)
    assert fit_form(replace(form, objective=Objective("logarithmic")), points).parameters == pytest.approx(TRUTH)


def test_profile_is_the_best_objective_at_each_value() -> None:
    points = curve(4, noise=0.01)
    fit = fit_form(POWER, points)
    values = np.array([1.2, 1.4, fit.parameters["floor"], 1.6])
    found = profile(POWER, points, fit, "floor", values)
    for value, lowest in zip(values, found, strict=True):
        refit = fit_form(POWER, points, fixed={"floor": value})
        assert lowest == pytest.approx(float(objective(POWER, refit.parameters, points)), rel=1e-6)
    assert found.argmin() == 2


# Held-out protocols


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
    errors, ranking = held_out_test({"power": POWER}, points, folds, {"starts": 8, "bootstrap": 20, "seed": 0})
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
    options = {"starts": 8, "bootstrap": 40, "seed": 0}
    errors, ranking = held_out_test({"line": straight, "power": POWER}, points, later_tokens(points), options)
    assert [entry["form"] for entry in ranking] == ["power", "line"]
    assert ranking[1]["behind"] == pytest.approx(errors["line"]["rmse"] - errors["power"]["rmse"])
    assert ranking[1]["low"] > 0
    assert (ranking[0]["first"], ranking[1]["first"]) == (1, 0)
    # The mean of what came before is a worse guess than the law, and the line is worse still.
    assert errors["power"]["rmse"] < errors["power"]["naive"] < errors["line"]["rmse"]


def test_a_fine_scale_of_values_is_many_levels() -> None:
    assert levels(np.geomspace(1, 10, 50)).max() > 20
    assert levels(np.array([0.5, 0.51, 0.52, 0.53])).tolist() == [0, 0, 0, 1]


def test_the_naive_prediction_knows_no_law() -> None:
    points = curve(2, tokens=(1.0, 2.0, 4.0, 8.0, 16.0)) | {"dense": np.repeat([1.0, 3.0], 5)}
    points["loss"] = points["loss"] + np.repeat([0.0, 2.0], 5)
    options = {"starts": 4, "bootstrap": 0, "seed": 0}

    def naive(held_out: np.ndarray, **given: str) -> float:
        return held_out_test({"power": POWER}, points, held_out, options, **given)[0]["power"]["naive"]

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
    options = {"starts": 4, "bootstrap": 10, "seed": 0}
    _, ranking = held_out_test({"power": POWER, "twin": POWER}, points, later_tokens(points), options)
    assert [entry["first"] for entry in ranking] == [0.5, 0.5]


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
def test_points_where_the_formula_has_no_value_are_refused() -> None:
    points = curve(4) | {"tokens": np.full(20, -1.0)}
    with pytest.raises(UserError, match="no finite value at these points"):
        fit_form(POWER, points)
