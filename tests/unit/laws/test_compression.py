from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from law_points import mesh, spread

from coppice.laws import compression, registry
from coppice.laws.engine.points import Points, select
from coppice.laws.engine.search import fit_form

TRUTH = {"alpha": 1.05, "beta": 0.9, "gamma": 0.35}
DENSE_LOSS = {1: 2.9, 3: 2.5, 8: 2.1}


def grid(sizes=(1, 3, 8), ratios=(0.1, 0.3, 0.6), tokens=(0.5, 1, 2, 5, 10, 25), noise: float = 0.0) -> Points:
    """Losses of the true law, D in millions of tokens, with relative noise."""
    points = mesh(dense_parameters=sizes, rho=ratios, tokens=tokens)
    size = points["dense_parameters"]
    points |= {
        "run": np.array([f"{a}-{b}" for a, b in zip(size, points["rho"], strict=True)]),
        "model": np.array([f"m{a:g}" for a in size]),
        "dense_loss": np.array([DENSE_LOSS[a] for a in size]),
    }
    return points | {"loss": compression.predict(TRUTH, points) * spread(points, noise)}


def least_squares(points: Points) -> np.ndarray:
    """The exponents by ordinary least squares on the logarithms."""
    logarithms = [points["dense_loss"], 1 + points["rho"], 1 + 1 / (points["tokens"] + 1)]
    return np.linalg.lstsq(np.log(logarithms).T, np.log(points["loss"]), rcond=None)[0]


def test_losses_give_back_the_exponents() -> None:
    # T-F2
    assert fit_form(compression.FORM, grid()).parameters == pytest.approx(TRUTH, rel=1e-6)
    assert fit_form(compression.FORM, grid(noise=0.005)).parameters == pytest.approx(TRUTH, rel=0.05)


def test_the_fit_is_ordinary_least_squares_on_the_logarithms() -> None:
    points = grid(noise=0.1)
    fit = fit_form(compression.FORM, points)
    assert list(fit.parameters.values()) == pytest.approx(least_squares(points), rel=1e-6)
    assert fit.converged


def test_the_form_by_hand() -> None:
    points = select(grid(), slice(1, 2))
    expected = 2.9**1.05 * 1.1**0.9 * 1.5**0.35
    assert compression.predict(TRUTH, points) == pytest.approx(expected)
    assert compression.RIVALS["without_recovery"].predict(TRUTH, points) == pytest.approx(expected / 1.5**0.35)


def test_a_factor_that_is_the_same_everywhere_tells_one_constant() -> None:
    points = grid(sizes=(3,), ratios=(0.3,))
    fit = fit_form(compression.FORM, points)
    assert fit.fixed == {"beta": 0.0}
    assert fit.parameters["gamma"] == pytest.approx(0.35)
    assert 2.5 ** fit.parameters["alpha"] == pytest.approx(2.5**1.05 * 1.3**0.9)
    assert fit.unidentified == ()
    assert fit.notes[0].startswith("There is one dense model, so alpha is the size of a constant factor")
    assert fit.notes[1] == "There is one pruning rate, so beta is not identified: it is fixed at 0."
    assert fit_form(compression.FORM, grid(sizes=(3,))).parameters == pytest.approx(TRUTH)
    rival = fit_form(compression.RIVALS["without_recovery"], grid(sizes=(3,), ratios=(0.3,), tokens=(1,)))
    assert rival.fixed == {"beta": 0.0}


def test_recovery_tokens_count_in_millions() -> None:
    assert compression.LAW.scales(grid()) == {"tokens": 1e6}
    assert registry.validate_options("compression", {}).residuals == "logarithmic"


def test_held_out_tests() -> None:
    points = grid(tokens=(1, 2, 3, 4, 5))
    masks = {name: test(points) for name, test in compression.LAW.held_out.items()}
    assert (masks["later_tokens"] == (points["tokens"] == 5)).all()
    assert (masks["larger_model"] == (points["dense_parameters"] == 8)).all()
    assert (masks["higher_ratio"] == (points["rho"] == 0.6)).all()


def test_points_are_losses_of_recoveries_with_the_ratio_of_the_pruned_model() -> None:
    shared = {"model": "m", "parameters": 75.0, "rho_blocks": 0.3, "rho_nonzero": 0.25}
    nodes = pd.DataFrame(
        [
            {"node": "m", "parent": None, "method": None, "family": None, "rho": 0.0} | shared | {"parameters": 100.0},
            {"node": "m/laco", "parent": "m", "method": "laco", "family": "prune", "rho": 0.25} | shared,
            {"node": "m/laco/full", "parent": "m/laco", "method": "full", "family": "recover", "rho": 0.25} | shared,
        ]
    )
    curves = pd.DataFrame(
        {"node": "m/laco/full", "tokens": [0, 1e6, 2e6], "loss": [9.0, 3.0, 2.8], "dense_loss": 2.5}
    ).assign(split="validation")
    options = registry.validate_options("compression", {"ratio": "rho_blocks"})
    points = compression.LAW.points({"nodes": nodes, "curves": curves}, options)
    assert list(points) == list(compression.LAW.columns)
    assert points["tokens"].tolist() == [1e6, 2e6]
    assert points["loss"].tolist() == [3.0, 2.8]
    assert points["rho"].tolist() == [0.3, 0.3]
    assert points["dense_parameters"].tolist() == [100, 100]
