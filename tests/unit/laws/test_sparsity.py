from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from law_points import mesh, spread

from coppice.laws import registry, sparsity
from coppice.laws.engine.points import Points, select
from coppice.laws.engine.search import fit_form

TRUTH = {"a_S": 0.6, "b_S": 0.7, "c_S": 1.2, "b_N": 0.35, "a_D": 0.02, "b_D": 0.4, "c": 0.7}
OPTIONS = sparsity.Options()


def options(**chosen: object) -> sparsity.Options:
    return OPTIONS.model_copy(update=chosen)


SIZES = (1.0, 3.0, 10.0, 30.0, 100.0)
LEVELS = (0.0, 0.5, 0.75, 0.875)


def grid(
    sizes: tuple[float, ...] = SIZES, shares: tuple[float, ...] = LEVELS, tokens: int = 12, noise: float = 0.0
) -> Points:
    """Recoveries of dense sizes with a share of zeros; N and D in units of 1e9."""
    points = mesh(parameters=sizes, sparsity=shares, tokens=np.geomspace(0.02, 10, tokens))
    size, share = points["parameters"], points["sparsity"]
    points |= {
        "run": np.array([f"{a:g}-{b:g}" for a, b in zip(size, share, strict=True)]),
        "model": np.array([f"m{a:g}" for a in size]),
        "parameters": size * (1 - share),
    }
    return points | {"loss": sparsity.predict(TRUTH, points) * spread(points, noise)}


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-4), (0.005, 0.1)])
def test_losses_give_back_all_seven_parameters(noise: float, tolerance: float) -> None:
    # T-F2
    found = fit_form(sparsity.FORM, grid(noise=noise), 4)
    assert found.converged
    assert found.unidentified == ()
    assert found.parameters == pytest.approx(TRUTH, rel=tolerance)


def test_a_formula_by_hand() -> None:
    point = {"parameters": np.array([4.0]), "sparsity": np.array([0.75]), "tokens": np.array([0.5])}
    expected = (0.6 * 0.25**0.7 + 1.2) * 4**-0.35 + (0.02 / 0.5) ** 0.4 + 0.7
    assert sparsity.predict(TRUTH, point) == pytest.approx(expected)
    rival = sparsity.RIVALS["chinchilla_on_nonzero_parameters"]
    given = {"A": 1.2, "B": 0.02**0.4, "E": 0.7, "alpha": 0.35, "beta": 0.4}
    assert rival.predict(given, point) == pytest.approx(sparsity.predict(TRUTH | {"a_S": 0.0}, point))


def test_more_connections_at_one_sparsity_and_fewer_zeros_at_one_size() -> None:
    points = grid(sizes=(1.0, 10.0), tokens=1)
    loss = points["loss"].reshape(2, 4)
    assert (loss[1] < loss[0]).all()
    assert (np.diff(loss) > 0).all()


@pytest.mark.parametrize(
    ("points", "fixed", "sentence"),
    [
        (grid(shares=(0.5,)), {"a_S": 0.0, "b_S": 1.0}, "one sparsity"),
        (grid(tokens=1), {"a_D": 0.0, "b_D": 1.0}, "one number of tokens"),
    ],
)
def test_a_design_that_cannot_tell(points: Points, fixed: dict[str, float], sentence: str) -> None:
    found = fit_form(sparsity.FORM, points, 4)
    assert found.fixed == fixed
    assert len(found.notes) == 1
    assert sentence in found.notes[0]
    assert found.unidentified == ()
    assert sparsity.predict(found.parameters, points) == pytest.approx(points["loss"], rel=1e-5)


def test_one_number_of_nonzero_parameters() -> None:
    points = grid()
    alike = points | {"parameters": np.full(240, 2.0)}
    alike["loss"] = sparsity.predict(TRUTH, alike)
    found = fit_form(sparsity.FORM, alike, 4)
    assert found.fixed == {"b_N": 1.0, "c_S": 0.0}
    assert found.unidentified == ()
    assert found.parameters["b_S"] == pytest.approx(0.7, rel=1e-4)
    assert found.parameters["c"] == pytest.approx(0.7 + 1.2 * 2**-0.35, rel=1e-4)


def test_one_dense_size_does_not_tell_zeros_from_size() -> None:
    fixed, notes = sparsity.reduce(grid(sizes=(10.0,)))
    assert fixed == {"a_S": 0.0, "b_S": 1.0}
    assert "one dense size" in notes[0]
    fixed, notes = sparsity.reduce(grid(sizes=(10.0,), shares=(0.5,)))
    assert fixed == {"a_S": 0.0, "b_S": 1.0, "b_N": 1.0, "c_S": 0.0}
    assert len(notes) == 2


def test_too_few_points_are_named() -> None:
    points = select(grid(), np.array([0, 61, 122, 183]))
    assert fit_form(sparsity.FORM, points, 4).unidentified


def test_what_is_held_out() -> None:
    points = grid()
    larger = sparsity.HELD_OUT["larger_model"](points)
    assert set(points["model"][larger]) == {"m100"}
    assert larger.sum() == 48
    higher = sparsity.HELD_OUT["higher_sparsity"](points)
    assert set(points["sparsity"][higher]) == {0.875}
    assert "three dense sizes" in sparsity.HELD_OUT["larger_model"](grid(sizes=(1.0, 3.0)))
    assert "three sparsity levels" in sparsity.HELD_OUT["higher_sparsity"](grid(shares=(0.0, 0.5)))


def tables() -> dict[str, pd.DataFrame]:
    rows = [
        ("a", None, "a", None, None, [], 100, 0.0),
        ("a/full", "a", "a", "full", "recover", [], 100, 0.0),
        ("a/wanda", "a", "a", "wanda", "prune", ["masked"], 60, 0.4),
        ("a/wanda/full", "a/wanda", "a", "full", "recover", ["masked"], 60, 0.4),
        ("a/wanda/full/full", "a/wanda/full", "a", "full", "recover", ["masked"], 60, 0.4),
        ("a/wanda/lora", "a/wanda", "a", "lora", "recover", ["compensated", "masked"], 60, 0.4),
        ("a/cut", "a", "a", "shortgpt", "prune", ["smaller"], 70, 0.3),
        ("a/cut/full", "a/cut", "a", "full", "recover", ["smaller"], 70, 0.3),
        ("a/svd", "a", "a", "svd", "decompose", ["factorized"], 70, 0.3),
        ("a/svd/full", "a/svd", "a", "full", "recover", ["factorized"], 70, 0.3),
        ("a/rotate", "a", "a", "rotate", "quantize", ["rotated"], 100, 0.0),
        ("a/rotate/full", "a/rotate", "a", "full", "recover", ["rotated"], 100, 0.0),
    ]
    names = ["node", "parent", "model", "method", "family", "traits", "nonzero_parameters", "rho_nonzero"]
    nodes = pd.DataFrame(rows, columns=names)
    curves = pd.DataFrame(
        [
            (node, tokens, "validation", 5 - tokens / 10)
            for node in nodes.loc[nodes["family"] == "recover", "node"]
            for tokens in (20, 0, 10)
        ]
        + [("a/full", 10, "train", 1.0)],
        columns=["node", "tokens", "split", "loss"],
    ).assign(dense_loss=2.0)
    return {"nodes": nodes, "curves": curves}


def test_points_are_recoveries_of_masked_and_of_dense_models() -> None:
    found = sparsity.points(tables(), OPTIONS)
    assert list(found) == list(sparsity.COLUMNS)
    assert found["run"].tolist() == ["a/full"] * 2 + ["a/wanda/full"] * 2
    assert found["model"].tolist() == ["a"] * 4
    assert found["parameters"].tolist() == [100, 100, 60, 60]
    assert found["sparsity"].tolist() == [0, 0, 0.4, 0.4]
    assert found["tokens"].tolist() == [10, 20, 10, 20]
    assert found["loss"].tolist() == [4, 3, 4, 3]
    assert set(sparsity.points(tables(), options(nodes=["a/wanda/*"]))["run"]) == {"a/wanda/full"}
    assert sparsity.points(tables(), options(method="heal"))["loss"].shape == (0,)


def test_the_law_is_found_by_name() -> None:
    assert registry.load("sparsity").form is sparsity.FORM
    assert registry.validate_options("sparsity", {}).method == "full"
