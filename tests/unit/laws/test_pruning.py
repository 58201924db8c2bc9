from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from law_points import spread

from coppice.errors import UserError
from coppice.laws import pruning, registry
from coppice.laws.engine.points import Points, select
from coppice.laws.engine.search import fit_form

TRUTH = {"P0": 0.96, "alpha": 0.73}
RATIOS = np.arange(1, 10) / 10
OPTIONS = registry.validate_options("pruning", {})


def options(**chosen: object) -> pruning.Options:
    return OPTIONS.model_copy(update=chosen)


DENSE = {"small": 0.31, "middle": 0.37, "large": 0.42}


def grid(ratios=RATIOS, models=tuple(DENSE), noise: float = 0.0) -> Points:
    """Scores of the true law, of every model pruned by two methods, with relative noise."""
    mesh = [(model, method, ratio) for model in models for method in ("wanda", "shortgpt") for ratio in ratios]
    model, method, ratio = (np.array(column) for column in zip(*mesh, strict=True))
    points = {
        "run": np.char.add(np.char.add(model, " "), method),
        "model": model,
        "method": method,
        "ratio": ratio,
        "dense_score": np.array([DENSE[name] for name in model]),
    }
    return points | {"score": pruning.predict(TRUTH, points) * spread(points, noise)}


def test_the_factor_of_the_ratio() -> None:
    # T-F3
    points = {"dense_score": np.ones(4), "ratio": np.array([0.1, 0.3, 0.5, 0.7])}
    scores = pruning.predict({"P0": 1.0, "alpha": 0.22}, points)
    assert scores == pytest.approx([0.977, 0.925, 0.859, 0.767], abs=5e-4)


def test_scores_give_back_both_parameters() -> None:
    # T-F2
    assert fit_form(pruning.FORM, grid()).parameters == pytest.approx(TRUTH, rel=1e-6)
    assert fit_form(pruning.FORM, grid(noise=0.005)).parameters == pytest.approx(TRUTH, rel=0.02)


def test_one_ratio_fixes_the_factor_at_one() -> None:
    points = grid(ratios=(0.4996, 0.5))
    points["score"] = points["dense_score"] * (1 - points["ratio"]) ** 1.3
    fit = fit_form(pruning.FORM, points)
    assert fit.fixed == {"P0": 1.0}
    assert fit.parameters["alpha"] == pytest.approx(1.3)
    assert fit.unidentified == ()
    assert fit.notes[0].startswith("There is one pruning ratio, so P0 is not identified: it is fixed at 1")


def test_each_rival_predicts_by_its_formula() -> None:
    points = select(grid(), slice(3, 4))
    assert pruning.RIVALS["exponential"].predict({"k": 2.0}, points) == pytest.approx(0.31 * np.exp(-0.8))
    assert pruning.RIVALS["linear"].predict({"k": 2.0}, points) == pytest.approx(0.31 * 0.2)


def test_held_out_tests() -> None:
    points = grid()
    assert (pruning.LAW.held_out["higher_ratio"](points) == (points["ratio"] == 0.9)).all()
    folds = pruning.LAW.held_out["unseen_model"](points)
    assert folds.shape == (3, len(points["run"]))
    assert [set(points["model"][fold]) for fold in folds] == [{"large"}, {"middle"}, {"small"}]
    assert "three pruning ratios" in pruning.LAW.held_out["higher_ratio"](grid(ratios=(0.1, 0.2)))
    assert "three models" in pruning.LAW.held_out["unseen_model"](grid(models=("small", "large")))


def test_the_ratio_that_keeps_a_part_of_the_score() -> None:
    points = grid()
    fit = fit_form(pruning.FORM, points)
    nothing_drawn = {name: np.empty((0, 1)) for name in TRUTH}
    (entry,), advice = pruning.recommend(fit, nothing_drawn, points, {}, options(keep=0.8))
    assert 0.96 * (1 - entry["ratio"]) ** 0.73 == pytest.approx(0.8)
    assert entry["low"] is None
    assert entry["sentence"] == "Pruning a ratio of 0.221 leaves 0.8 of the dense score."
    assert advice == []
    drawn = {"P0": np.array([[0.95], [0.96], [0.97]]), "alpha": np.array([[0.8], [0.73], [0.7]])}
    (entry,), _ = pruning.recommend(fit, drawn, points, {}, options(keep=0.94))
    assert 0 < entry["low"] < entry["ratio"] < entry["high"]
    assert entry["sentence"].endswith("This lies outside the ratios measured, so it is an extrapolation.")


def test_a_score_that_does_not_fall_recommends_no_ratio() -> None:
    points = grid()
    nothing_drawn = {name: np.empty((0, 1)) for name in TRUTH}
    for flat in ({"P0": 1.0, "alpha": -0.2}, {"P0": 0.7, "alpha": 0.5}):
        points["score"] = pruning.predict(flat, points)
        entries, advice = pruning.recommend(fit_form(pruning.FORM, points), nothing_drawn, points, {}, OPTIONS)
        assert entries == []
        assert advice == ["No ratio is recommended, since the fitted score does not fall to 0.9 of the dense one."]
    # A draw in which the score does not fall keeps it at any ratio.
    assert pruning._ratio_that_keeps({"P0": 1.0, "alpha": -0.2}, 0.9) == 1
    assert pruning._ratio_that_keeps({"P0": 0.7, "alpha": 0.5}, 0.9) == 0


# Points from tables


def node(name: str, method: str | None = None, family: str | None = None, ratio: float = 0.0) -> dict:
    parent = name.rpartition("/")[0] or None
    ratios = {"rho": ratio / 2, "rho_blocks": ratio, "rho_nonzero": ratio}
    return {"node": name, "parent": parent, "model": name.split("/")[0], "method": method, "family": family} | ratios


NODES = [
    node("m"),
    node("m/wanda-50", "wanda", "prune", 0.5),
    node("m/wanda-50/full", "full", "recover", 0.5),
    node("m/laco-25", "laco", "prune", 0.25),
    node("m/laco-25/wanda-50", "wanda", "prune", 0.6),
    node("m/svd", "svd", "decompose", 0.3),
    node("m/rtn", "rtn", "quantize", 0.0),
    node("unmeasured/wanda-50", "wanda", "prune", 0.5),
    node("unmeasured"),
]


def tables(metric: str, values: dict[str, float]) -> dict[str, pd.DataFrame]:
    metrics = pd.DataFrame({"node": values.keys(), "metric": metric, "unit": "", "value": values.values()})
    return {"nodes": pd.DataFrame(NODES), "metrics": metrics.assign(evaluation="quality", stderr=0.01)}


ACCURACIES = {each["node"]: 0.9 - 0.1 * place for place, each in enumerate(NODES[:-1])}


def test_points_are_models_that_were_pruned_and_nothing_else() -> None:
    points = pruning.points(tables("blimp_acc", ACCURACIES), options(kind="accuracy"))
    assert list(points) == list(pruning.LAW.columns)
    assert points["run"].tolist() == ["m wanda", "m laco", "m laco+wanda", "unmeasured wanda"]
    assert points["ratio"].tolist() == [0.5, 0.25, 0.6, 0.5]
    assert points["score"] == pytest.approx([0.8, 0.6, 0.5, 0.2])
    assert points["dense_score"] == pytest.approx([0.9, 0.9, 0.9, np.nan], nan_ok=True)
    assert set(points["model"][:3]) == {"m"}


def test_options_choose_the_points() -> None:
    given = tables("blimp_acc", ACCURACIES)
    assert pruning.points(given, options(kind="accuracy", method="wanda"))["run"].tolist() == [
        "m wanda",
        "unmeasured wanda",
    ]
    assert pruning.points(given, options(kind="accuracy", ratio="rho"))["ratio"].tolist() == [
        0.25,
        0.125,
        0.3,
        0.25,
    ]
    named = pruning.points(given, options(kind="accuracy", nodes=["m/svd", "m/rtn", "m/laco-25"]))
    assert named["run"].tolist() == ["m laco", "m svd"]
    assert named["dense_score"].tolist() == [0.9, 0.9]
    assert len(pruning.points(given, options(kind="accuracy", nodes=["nothing"]))["run"]) == 0


def test_the_score_of_a_perplexity_is_one_over_its_logarithm() -> None:
    perplexities = {"m": np.e**2, "m/wanda-50": np.e**4}
    points = pruning.points(tables("perplexity_paper", perplexities), OPTIONS)
    assert (points["dense_score"].tolist(), points["score"].tolist()) == ([0.5], [0.25])
    losses = tables("loss_paper", {"m": 2.0, "m/wanda-50": 4.0})
    points = pruning.points(losses, options(metric="loss_paper"))
    assert (points["dense_score"].tolist(), points["score"].tolist()) == ([0.5], [0.25])
    with pytest.raises(UserError, match="no measurement of an accuracy"):
        pruning.points(losses, options(kind="accuracy"))
