from __future__ import annotations

import json

import numpy as np
import pandas as pd
import pytest
from law_points import mesh, spread

from coppice.errors import UserError
from coppice.laws import registry, task_stratified
from coppice.laws.engine.points import Points, select
from coppice.laws.engine.search import fit_form

TRUTH = {"A": 0.9, "alpha": -0.36, "beta": -1.07, "gamma": -0.2, "delta": 0.09}
OPTIONS = registry.validate_options("task-stratified", {})


def grid(sizes=(0.6, 1.7, 4, 14), bits=(3, 4, 8), calibrations=(16, 128), groups=(32, 128), noise=0.0) -> Points:
    """-ln Acc_adj of the true law, N in billions, with relative noise."""
    points = mesh(parameters=sizes, bits=bits, calibration_size=calibrations, group_size=groups)
    return points | {"negative_log_accuracy": task_stratified.predict(TRUTH, points) * spread(points, noise)}


def least_squares(points: Points) -> list[float]:
    """A and the exponents by ordinary least squares on the logarithms."""
    regressors = np.log(
        [
            np.full(len(points["run"]), np.e),
            points["parameters"],
            np.log2(points["bits"]),
            np.log2(points["calibration_size"]),
            points["group_size"],
        ]
    )
    logarithm, *exponents = np.linalg.lstsq(regressors.T, np.log(points["negative_log_accuracy"]), rcond=None)[0]
    return [np.exp(logarithm), *exponents]


def test_accuracies_give_back_the_exponents() -> None:
    # T-F2
    assert fit_form(task_stratified.FORM, grid()).parameters == pytest.approx(TRUTH, rel=1e-6)
    assert fit_form(task_stratified.FORM, grid(noise=0.005)).parameters == pytest.approx(TRUTH, rel=0.1)


def test_the_fit_is_ordinary_least_squares_on_the_logarithms() -> None:
    points = grid(noise=0.1)
    fit = fit_form(task_stratified.FORM, points)
    assert list(fit.parameters.values()) == pytest.approx(least_squares(points), rel=1e-6)
    assert fit.converged


def test_the_form_and_its_rivals_by_hand() -> None:
    points = select(grid(), slice(4, 5))
    expected = 0.9 * 0.6**-0.36 * 2**-1.07 * 4**-0.2 * 32**0.09
    assert task_stratified.predict(TRUTH, points) == pytest.approx(expected)
    rivals = {name: rival.predict(TRUTH, points) for name, rival in task_stratified.RIVALS.items()}
    assert rivals["without_group"] == pytest.approx(expected / 32**0.09)
    assert rivals["without_size"] == pytest.approx(expected / 0.6**-0.36)


@pytest.mark.parametrize(
    ("column", "exponent", "what"),
    [
        ("sizes", "alpha", "one model size"),
        ("bits", "beta", "one number of bits"),
        ("calibrations", "gamma", "one calibration size, or none is given"),
        ("groups", "delta", "one group size"),
    ],
)
def test_a_factor_that_is_the_same_everywhere_is_absorbed(column: str, exponent: str, what: str) -> None:
    points = grid(**{column: (4,)})
    fit = fit_form(task_stratified.FORM, points, starts=4)
    assert fit.fixed == {exponent: 0.0}
    assert fit.notes == [
        f"There is {what}, so {exponent} is not identified: it is fixed at 0 and A absorbs its factor."
    ]
    assert fit.unidentified == ()
    kept = {name: value for name, value in TRUTH.items() if name not in ("A", exponent)}
    assert {name: fit.parameters[name] for name in kept} == pytest.approx(kept)
    if exponent == "delta":
        assert fit_form(task_stratified.RIVALS["without_group"], points, starts=4).fixed == {}


def test_accuracy_above_chance() -> None:
    found = task_stratified.negative_log_accuracy(np.array([0.25, 0.2, 1.0, 0.625]), 0.25)
    assert np.isnan(found[:3]).all()
    assert found[3] == pytest.approx(np.log(2))


def test_the_largest_model_is_held_out() -> None:
    points = grid()
    assert (task_stratified.LAW.held_out["larger_model"](points) == (points["parameters"] == 14)).all()
    assert task_stratified.LAW.scales({"parameters": np.array([2e6, 3e7])}) == {"parameters": 1e6}


# Points from tables


def node(name: str, family: str | None, marks: list[str], calibration: str | None = None, **options: object) -> dict:
    return {
        "node": name,
        "parent": name.rpartition("/")[0] or None,
        "model": name.split("/")[0],
        "method": name.rpartition("/")[2].split("-")[0] if family else None,
        "family": family,
        "options": json.dumps(options) if family else None,
        "traits": marks,
        "calibration": calibration,
        "parameters": 1000,
    }


NODES = [
    node("m", None, []),
    node("m/gptq-4", "quantize", ["quantized"], "wide", bits=4, group_size=64),
    node("m/gptq-4/kv_cache-8", "quantize", ["quantized", "quantized-cache"], bits=8, group_size=32),
    node("m/gptq-4/full", "recover", ["quantized"]),
    node("m/rotate", "quantize", ["rotated"]),
    node("m/rotate/rtn-3", "quantize", ["quantized", "rotated"], bits=3, group_size=-1),
    node("m/gptq-2", "quantize", ["quantized"], "wide", bits=2, group_size=64),
    node("m/k_bit-4", "quantize", ["quantized"], bits=4, block=64),
    node("m/wanda", "prune", ["masked"]),
    node("m/wanda/gptq-4", "quantize", ["masked", "quantized"], "wide", bits=4, group_size=64),
    node("m/gptq-8", "quantize", ["quantized"], "narrow", bits=8, group_size=64),
]


def tables(metric: str = "arc_acc") -> dict[str, pd.DataFrame]:
    """Accuracy 0.6 of every node; three items of task `arc`, of 2, 4 and 4 choices."""
    nodes = pd.DataFrame(NODES)
    metrics = pd.DataFrame(
        {"node": nodes["node"], "evaluation": "quality", "metric": metric, "unit": "accuracy", "value": 0.6}
    )
    choices = [(item, choice) for item, number in {"1": 2, "2": 4, "3": 4}.items() for choice in range(number)]
    items = pd.DataFrame(choices, columns=["item", "choice"]).assign(evaluation="quality", task="arc")
    other = pd.DataFrame({"item": ["1"], "choice": 0, "evaluation": "quality", "task": "arc_long"})
    return {"nodes": nodes, "metrics": metrics.assign(stderr=0.01), "items": pd.concat([items, other])}


def test_points_are_models_whose_weights_were_quantized_in_groups() -> None:
    points = task_stratified.points(tables(), OPTIONS)
    assert list(points) == list(task_stratified.LAW.columns)
    assert points["run"].tolist() == ["m/gptq-4", "m/rotate/rtn-3", "m/gptq-8"]
    assert points["method"].tolist() == ["gptq", "rtn", "gptq"]
    assert points["bits"].tolist() == [4, 3, 8]
    assert points["group_size"] == pytest.approx([64, np.nan, 64], nan_ok=True)
    assert points["parameters"].tolist() == [1000] * 3
    # Chance is the mean of 1/2, 1/4 and 1/4.
    assert points["negative_log_accuracy"] == pytest.approx(-np.log((0.6 - 1 / 3) / (1 - 1 / 3)))


def test_options_choose_the_points() -> None:
    def found(**options: object) -> Points:
        return task_stratified.points(tables(), registry.validate_options("task-stratified", options))

    assert found(method="rtn")["run"].tolist() == ["m/rotate/rtn-3"]
    assert found(nodes=["m/gptq*"])["run"].tolist() == ["m/gptq-4", "m/gptq-8"]
    assert found(fewest_bits=2)["bits"].tolist() == [4, 3, 2, 8]
    assert found(row=512)["group_size"].tolist() == [64, 512, 64]
    assert found(chance=0.2)["negative_log_accuracy"] == pytest.approx(np.log(2))
    assert len(found(nodes=["nothing"])["run"]) == 0
    sizes = found(calibration_sizes={"wide": 128, "narrow": 16})["calibration_size"]
    assert sizes == pytest.approx([128, np.nan, 16], nan_ok=True)


def test_without_calibration_sizes_the_law_goes_without_them() -> None:
    points = task_stratified.points(tables(), OPTIONS)
    assert task_stratified.predict(TRUTH, points) == pytest.approx(
        task_stratified.predict(TRUTH | {"gamma": 5.0}, points), nan_ok=True
    )


def test_bad_options_have_their_sentence() -> None:
    with pytest.raises(UserError, match=r"no items of 'winogrande'.*option `chance`"):
        task_stratified.points(tables("winogrande_acc"), OPTIONS)
    with pytest.raises(UserError, match="calibration_sizes"):
        registry.validate_options("task-stratified", {"calibration_sizes": {"wide": 1}})
    with pytest.raises(UserError, match="chance"):
        registry.validate_options("task-stratified", {"chance": 1.0})
