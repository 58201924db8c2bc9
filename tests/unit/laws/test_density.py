from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest

from coppice.errors import UserError
from coppice.laws import density
from coppice.laws.density.family import LOSS_FORM, SCORE_FORM, effective_parameters, score_form
from coppice.laws.density.nodes import node_densities
from coppice.laws.engine.points import Points
from coppice.laws.engine.search import fit_form

LOSS = {"a": 40.0, "alpha": 0.25, "b": 600.0, "beta": 0.32}
SCORE = {"c": 0.65, "gamma": -9.0, "l": 0.75, "d": 0.25}
TRUTH = LOSS | SCORE
SIZES = np.array([5.25e6, 31.5e6, 106e6, 245e6, 477e6, 828e6])
OPTIONS = density.Options(starts=3, bootstrap=0)


def family(sizes: np.ndarray, tokens: np.ndarray, parameters: dict[str, float] = TRUTH, stderr: float = 0.01) -> Points:
    """Reference models of each size and number of tokens, exactly on both laws."""
    size, count = (column.ravel() for column in np.meshgrid(sizes, tokens, indexing="ij"))
    count = count * size if np.max(tokens) < 1e3 else count
    points = {
        "run": np.array([f"m{number:02d}" for number in range(len(size))]),
        "parent": np.full(len(size), ""),
        "model": np.array([f"m{number:02d}" for number in range(len(size))]),
        "reference": np.ones(len(size)),
        "parameters": size,
        "stored_bits": 16 * size,
        "tokens": count,
        "stderr": np.full(len(size), stderr),
        "chance": np.full(len(size), 0.25),
    }
    points["answer_loss"] = LOSS_FORM.predict(parameters, points)
    return points | {"score": SCORE_FORM.predict(parameters, points)}


def with_node(points: Points, **row: object) -> Points:
    """The points and one compressed node after them, like the last of them where `row` says nothing."""
    added = {"run": "node", "parent": points["run"][-1], "reference": 0.0} | row
    return {name: np.append(column, added.get(name, column[-1])) for name, column in points.items()}


def grid() -> Points:
    """The six sizes and six tokens per parameter of the reference runs."""
    return family(SIZES, np.array([10, 15, 20, 30, 40, 60]))


def test_the_loss_law_from_its_design_points() -> None:
    # T-D1
    fit = fit_form(LOSS_FORM, grid(), starts=30)
    assert {name: fit.parameters[name] for name in LOSS} == pytest.approx(LOSS, rel=1e-9)
    assert fit.converged
    assert fit.unidentified == ()


def test_noisy_losses_give_back_the_loss_law() -> None:
    points = grid()
    points["answer_loss"] = points["answer_loss"] * np.exp(0.005 * np.random.default_rng(0).standard_normal(36))
    fit = fit_form(LOSS_FORM, points, starts=8)
    assert fit.parameters["alpha"] == pytest.approx(LOSS["alpha"], rel=0.1)
    assert fit.parameters["beta"] == pytest.approx(LOSS["beta"], rel=0.1)
    unseen = family(np.array([2e9]), np.array([50]))
    assert LOSS_FORM.predict(fit.parameters, unseen) == pytest.approx(unseen["answer_loss"], rel=0.02)


def test_the_score_law_from_exact_and_noisy_scores() -> None:
    points = family(np.geomspace(1e7, 1e11, 12), np.array([1e11, 1e13]))
    fit = fit_form(SCORE_FORM, points, starts=16)
    assert fit.parameters == pytest.approx(SCORE, rel=1e-6)
    points["score"] = points["score"] * np.exp(0.005 * np.random.default_rng(0).standard_normal(24))
    assert fit_form(SCORE_FORM, points, starts=16).parameters == pytest.approx(SCORE, rel=0.1)


def test_losses_of_long_answers_are_fitted_too() -> None:
    # L is a sum over the answer's tokens, so that its size is that of the text.
    points = family(np.geomspace(1e7, 1e11, 10), np.array([1e12]))
    points["answer_loss"] = 100 * points["answer_loss"]
    fit = fit_form(score_form(points), points, starts=16)
    assert fit.parameters == pytest.approx(SCORE | {"gamma": -0.09, "l": 75.0}, rel=1e-6)


def test_a_model_of_the_family_has_density_one() -> None:
    # T-D2
    points = family(np.array([1e9, 7e9, 7e10]), np.array([1e12]))
    assert points["score"] == pytest.approx([0.8877, 0.8943, 0.8967], abs=5e-5)
    rows = node_densities(points, TRUTH, 1e12)
    for row, size in zip(rows, (1e9, 7e9, 7e10), strict=True):
        assert row["density"] == pytest.approx(1, rel=1e-9)
        assert row["density_by_bits"] == pytest.approx(1, rel=1e-9)
        assert row["effective_parameters"] == pytest.approx(size, rel=1e-9)
    # Near the ceiling one point of score is an order of magnitude of size: the interval has no upper end.
    assert rows[0]["density_low"] < 0.25
    assert all(row["density_high"] is None and "no upper end" in row["reason"] for row in rows)


def test_a_density_and_its_interval_are_the_inverse_of_both_steps() -> None:
    points = family(np.array([2e7]), np.array([1e12]), stderr=0.004)
    row = node_densities(points, TRUTH, 1e12)[0]
    assert row["reason"] is None
    for end, sign in (("density_low", -1), ("density_high", 1)):
        size = {"parameters": np.array([row[end] * 2e7]), "tokens": np.array([1e12])}
        loss = LOSS_FORM.predict(TRUTH, size)
        score = SCORE_FORM.predict(TRUTH, {"answer_loss": loss})
        assert score - points["score"] == pytest.approx(sign * 1.959964 * 0.004, rel=1e-5)
    exact = node_densities(points | {"stderr": np.zeros(1)}, TRUTH, 1e12)[0]
    assert (exact["density_low"], exact["density_high"], exact["reason"]) == (None, None, None)
    # Down to chance: the interval begins at 0.
    wide = node_densities(points | {"stderr": np.array([0.4])}, TRUTH, 1e12)[0]
    assert wide["density_low"] == 0


@pytest.mark.parametrize(
    ("score", "reason"),
    [(0.25, "that of guessing"), (0.2, "that of guessing"), (0.9, "sigmoid ends"), (0.8985, "of any size reaches")],
)
def test_scores_outside_the_laws_have_no_density(score: float, reason: str) -> None:
    points = with_node(family(np.array([1e9]), np.array([1e12])), score=score)
    row = node_densities(points, TRUTH, 1e12)[1]
    assert reason in row["reason"]
    assert [row[name] for name in ("density", "density_low", "density_high", "relative_to_parent")] == [None] * 4
    assert np.isnan(effective_parameters([score], TRUTH, 1e12)[0])


def test_the_report_of_a_family_and_a_compressed_node() -> None:
    family_points = family(np.geomspace(1e7, 1e10, 4), np.array([1e11, 1e13]))
    # As good as a model of half its parent's parameters, in a quarter of its bits.
    half = family(np.array([5e9]), np.array([1e13]))
    points = with_node(family_points, score=half["score"][0], stored_bits=4e10)
    report = density.report(points, OPTIONS.model_copy(update={"bootstrap": 10}))
    for name, value in TRUTH.items():
        assert report["parameters"][name]["value"] == pytest.approx(value, rel=1e-4)
        assert report["parameters"][name]["low"] == pytest.approx(value, rel=1e-3)
    row = report["details"]["nodes"][-1]
    assert report["details"]["reference_tokens"] == 1e13
    assert row["density"] == pytest.approx(0.5, rel=1e-3)
    assert row["relative_to_parent"] == pytest.approx(0.5, rel=1e-3)
    assert row["density_by_bits"] == pytest.approx(2, rel=1e-3)
    assert "1 of 1 compressed nodes are less dense than their parents, by parameters." in report["notes"]
    assert report["held_out"]["leave_one_reference_out"]["density"]["rmse"] < 1e-5
    assert report["held_out"]["leave_one_reference_out"]["density"]["naive"] > 0.01
    assert report["predicted"][:-1] == pytest.approx(family_points["score"], rel=1e-6)
    assert [entry["node"] for entry in report["recommendation"]] == ["node"]
    assert report["recommendation"][0]["low"] < 2
    assert "'node' holds the most for its bits: density by bits 2.00 (" in report["recommendation"][0]["sentence"]
    assert report["metrics"]["loss_r2"] == pytest.approx(1)
    assert report["converged"]
    json.dumps({name: entry for name, entry in report.items() if name != "predicted"}, allow_nan=False)


def test_three_models_fix_the_range_and_leave_out_the_tokens() -> None:
    truth = TRUTH | {"b": 0.0, "c": 0.75}
    points = with_node(family(np.array([1e7, 1e8, 1e9]), np.array([1.0]), truth))
    report = density.report(points, OPTIONS)
    found = {name: entry["value"] for name, entry in report["parameters"].items()}
    assert found == pytest.approx(truth | {"beta": 1.0}, rel=1e-6)
    assert not report["parameters"]["b"]["identified"]
    assert report["details"]["reference_tokens"] is None
    assert not report["parameters"]["c"]["identified"]
    said = " ".join(report["notes"])
    assert "the term b D^-beta is left out" in said
    assert "since 3 reference models are too few for the four parameters of the sigmoid: d at chance, 0.25" in said
    assert report["details"]["nodes"][-1]["density"] == pytest.approx(1, rel=1e-6)
    assert report["held_out"]["leave_one_reference_out"]["density"]["rmse"] < 1e-6
    capped = density.report(points, OPTIONS.model_copy(update={"ceiling": 0.99}))
    assert capped["parameters"]["c"]["value"] == pytest.approx(0.74)
    assert "as the law's options say" in " ".join(capped["notes"])


def test_designs_that_tell_no_density_have_a_sentence() -> None:
    one_size = density.report(family(np.array([1e8]), np.array([1e11, 1e12, 1e13])), OPTIONS)
    said = " ".join(one_size["notes"])
    assert "one size, so alpha is not identified" in said
    assert "No density is reported, since the reference models do not identify" in said
    assert all(row["density"] is None and "alpha" in row["reason"] for row in one_size["details"]["nodes"])
    single = density.report(with_node(family(np.array([1e8]), np.array([1e12]))), OPTIONS)
    assert single["notes"] == ["There is 1 reference model, and a family needs two of different sizes for a density."]
    assert [row["density"] for row in single["details"]["nodes"]] == [None, None]
    few = density.report(family(np.array([1e8, 1e9]), np.array([1e11, 1e12]), stderr=0.0), OPTIONS)
    assert "There are 4 reference models, too few for the four parameters of the loss law" in " ".join(few["notes"])
    assert "4 of 4 scores have no standard error" in " ".join(few["notes"])
    assert len(one_size.pop("predicted")) == 3
    json.dumps([one_size, single], allow_nan=False)


def tables() -> dict[str, pd.DataFrame]:
    """Two dense models, a quantized node and one trained from scratch, measured on two tasks and a text."""
    nodes = pd.DataFrame(
        [
            {"node": "s", "parent": None, "model": "s", "method": None, "parameters": 1e6, "stored_bits": 16e6},
            {"node": "m", "parent": None, "model": "m", "method": None, "parameters": 4e6, "stored_bits": 64e6},
            {"node": "m/q", "parent": "m", "model": "m", "method": "rtn", "parameters": 4e6, "stored_bits": 20e6},
            {"node": "m/c", "parent": "m", "model": "m", "method": "scratch", "parameters": 2e6, "stored_bits": 32e6},
        ]
    )
    nodes["recovery_tokens"] = [np.nan, np.nan, np.nan, 3e7]
    rows = [
        {"node": node, "evaluation": "bench", "metric": f"{task}_{metric}", "value": value, "stderr": stderr}
        for node in nodes["node"]
        for task in ("quiz", "exam")
        for metric, value, stderr in (("acc", 0.6, 0.02), ("acc_norm", 0.7, 0.02), ("log_probability", -0.9, 0.03))
    ]
    metrics = pd.DataFrame(rows).assign(unit="see metric")
    metrics.loc[(metrics["node"] == "s") & (metrics["metric"] == "quiz_acc"), "stderr"] = np.nan
    items = pd.DataFrame(
        [
            {"node": node, "evaluation": "bench", "task": "quiz", "item": item, "choice": choice}
            for node in nodes["node"]
            for item, choices in (("0", 2), ("1", 4))
            for choice in range(choices)
        ]
    )
    return {"nodes": nodes, "metrics": metrics, "items": items}


def test_points_are_nodes_with_a_score_and_a_loss_of_the_right_answers() -> None:
    chosen = OPTIONS.model_copy(update={"task": "quiz", "pretraining_tokens": {"s": 1e8, "m": 2e8}})
    found = density.points(tables(), chosen)
    assert found["run"].tolist() == ["m", "m/c", "m/q", "s"]
    assert found["parent"].tolist() == ["", "m", "m", ""]
    assert found["reference"].tolist() == [1, 1, 0, 1]
    assert found["tokens"].tolist() == [2e8, 3e7, 2e8, 1e8]
    assert found["answer_loss"].tolist() == [0.9] * 4
    assert found["score"].tolist() == [0.6] * 4
    assert found["stderr"].tolist() == [0.02, 0.02, 0.02, 0]
    assert found["chance"].tolist() == [0.375] * 4
    assert set(found) == set(density.LAW.columns)
    assert density.points(tables(), chosen.model_copy(update={"pretraining_tokens": {}}))["tokens"].tolist() == [1] * 4
    assert density.points(tables(), chosen.model_copy(update={"nodes": ["m*"]}))["run"].tolist() == ["m", "m/c", "m/q"]


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "several tasks that the law could be about (bench: exam, bench: quiz)"),
        ({"task": "essay"}, "no accuracy with a log probability of the right answers of essay"),
        ({"task": "exam"}, "The tables hold no items of 'exam'"),
        ({"task": "quiz", "pretraining_tokens": {"s": 1e8}}, "does not name m;"),
        ({"task": "quiz", "ceiling": 0.3}, "`ceiling` is 0.3, but guessing scores 0.375"),
    ],
)
def test_what_the_tables_do_not_tell_is_asked_for(options: dict, sentence: str) -> None:
    with pytest.raises(UserError) as error:
        density.points(tables(), OPTIONS.model_copy(update=options))
    assert sentence in str(error.value)
