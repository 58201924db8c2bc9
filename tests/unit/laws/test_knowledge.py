from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from law_points import mesh, spread

from coppice.laws import knowledge
from coppice.laws.engine.points import Points
from coppice.laws.engine.search import fit_form
from coppice.laws.knowledge import FORM, capacity, predict
from coppice.laws.stage import fit_law

TRUTH = {"R": 1.8, "s": 4.0, "c": 40.0, "p": 1.5, "gamma": 0.72}
OPTIONS = knowledge.Options()
PEOPLE, PER_PERSON = 1200, 60.0
DEFAULT_SIZES = (2e4, 5e4, 1.2e5)
DEFAULT_WIDTHS = (0.0, 8.0, 4.0, 3.0, 2.0)


def grid(sizes=DEFAULT_SIZES, widths=DEFAULT_WIDTHS, noise: float = 0.0, world: float = PEOPLE * PER_PERSON) -> Points:
    """Models of several sizes, dense in 32 bits and quantized to several widths with half a bit of scales."""
    points = mesh(parameters=sizes, width=widths)
    size, width = points["parameters"], points["width"]
    points |= {
        "run": np.array([f"m{value:g}" for value in size]),
        "method": np.where(width == 0, "dense", "gptq"),
        "bits": np.where(width == 0, 32.0, width + 0.5),
        "world": np.full(len(size), world),
    }
    points["node"] = np.array(
        [run + (f"/gptq-{width:g}" if width else "") for run, width in zip(points["run"], width, strict=True)]
    )
    # A quarter of the parameters are embeddings, which stay in 32 bits.
    points["stored_bits"] = size * (0.75 * points["bits"] + 0.25 * 32)
    share = predict(TRUTH, points) * spread(points, noise)
    return completed(points, share)


def completed(points: Points, share: np.ndarray) -> Points:
    held = share * points["world"]
    return points | {
        "share": share,
        "knowledge": held,
        "bits_per_parameter": held / points["parameters"],
        "bits_per_stored_bit": held / points["stored_bits"],
    }


def tables(points: Points) -> dict[str, pd.DataFrame]:
    """Tables that hold the points."""
    dense = points["width"] == 0
    nodes = pd.DataFrame(
        {
            "node": points["node"],
            "parent": np.where(dense, None, points["run"]),
            "model": points["run"],
            "method": np.where(dense, None, points["method"]),
            "family": np.where(dense, None, "quantize"),
            "options": [json.dumps({"bits": int(width)}) if width else None for width in points["width"]],
            "traits": [["quantized"] if width else [] for width in points["width"]],
            "parameters": points["parameters"].astype(int),
            "linear_parameters": (0.75 * points["parameters"]).astype(int),
            "stored_bits": points["stored_bits"],
            "linear_bits": 0.75 * points["parameters"] * points["bits"],
        }
    )
    measured = {
        "knowledge_bits_per_person": points["knowledge"] / PEOPLE,
        "knowledge_bits_per_parameter": points["bits_per_parameter"],
        "knowledge_bits_per_parameter_max": points["world"] / points["parameters"],
    }
    metrics = pd.concat(
        pd.DataFrame({"node": points["node"], "metric": name, "value": value}) for name, value in measured.items()
    ).assign(evaluation="quality", stderr=0.1, unit="bits")
    return {"nodes": nodes, "metrics": metrics}


def test_a_node_never_holds_more_than_the_world_or_its_capacity() -> None:
    # T-E5
    generator = np.random.default_rng(0)
    for _ in range(50):
        parameters = {
            name: parameter.start[0] * (parameter.start[1] / parameter.start[0]) ** generator.random()
            for name, parameter in knowledge.PARAMETERS.items()
        }
        points = grid(sizes=tuple(10 ** generator.uniform(2, 8, 4)))
        held = knowledge.knowledge(parameters, points)
        assert np.all(held <= points["world"])
        assert np.all(held <= capacity(parameters, points) * (1 + 1e-12))
        assert np.all(held >= 0)


def test_limits_of_the_form() -> None:
    points = grid(sizes=(1e2, 1e9), widths=(0.0,))
    held = knowledge.knowledge(TRUTH, points)
    assert held[0] == pytest.approx(TRUTH["R"] * 1e2, rel=1e-6)
    assert held[1] == pytest.approx(PEOPLE * PER_PERSON, rel=1e-6)
    # Where both limits are one, the bend lies 2^(1/s) below them.
    even = grid(sizes=(PEOPLE * PER_PERSON / TRUTH["R"],), widths=(0.0,))
    assert predict(TRUTH, even) == pytest.approx(2 ** (-1 / TRUTH["s"]))


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-4), (0.005, 0.1)])
def test_round_trip(noise: float, tolerance: float) -> None:
    # T-F2
    fit = fit_form(FORM, grid(noise=noise), starts=8)
    assert fit.parameters == pytest.approx(TRUTH, rel=tolerance)
    assert fit.unidentified == ()
    assert fit.converged


def test_one_precision_leaves_the_damage_untold() -> None:
    fit = fit_form(FORM, grid(widths=(0.0,)), starts=8)
    assert set(fit.fixed) == {"c", "p", "gamma"}
    assert fit.parameters["R"] == pytest.approx(TRUTH["R"], rel=1e-4)
    assert any("stored at one precision" in note for note in fit.notes)
    assert knowledge.recommend(fit, {}, grid(), {}, OPTIONS)[1] == [
        "No precision is recommended, since the points do not identify c, p and gamma."
    ]


def test_one_size_leaves_p_untold() -> None:
    fit = fit_form(FORM, grid(sizes=(5e4,)), starts=8)
    assert set(fit.fixed) == {"p"}
    assert any("one size for their world" in note for note in fit.notes)
    assert fit.parameters["gamma"] == pytest.approx(TRUTH["gamma"], rel=1e-4)


def test_damage_as_the_variance_of_rounding_falls_fourfold_with_each_bit() -> None:
    points = grid(sizes=(5e4,), widths=(4.0, 3.0))
    four, three = knowledge.damage(TRUTH | {"gamma": 1 / np.log(4)}, points)
    assert three / four == pytest.approx(4)
    twice = knowledge.damage(TRUTH, points | {"world": 2 * points["world"]}) / knowledge.damage(TRUTH, points)
    assert twice == pytest.approx(2 ** TRUTH["p"])


def test_a_world_that_all_models_hold_leaves_their_capacity_untold() -> None:
    notes = knowledge.reduce(grid(sizes=(1e6, 2e6, 4e6)))[1]
    assert any("holds at least 95% of its world, so R is not identified" in note for note in notes)
    assert knowledge.reduce(grid()) == ({}, [])


def test_sizes_far_below_the_world_leave_the_bend_untold() -> None:
    fit = fit_form(FORM, grid(sizes=(30.0, 50.0), widths=(0.0, 32.5)), starts=8)
    assert "s" in fit.unidentified


def test_findings_of_the_paper_are_checked_by_method() -> None:
    points = grid(sizes=(1e5,), widths=(0.0, 8.0, 4.0))
    confirmed = knowledge.notes(completed(points, np.array([0.9, 0.89, 0.4])))
    assert confirmed == [
        "gptq at 8 bits keeps 98.9% (m100000/gptq-8) of the dense model's knowledge. The paper reports of GPTQ that 8 "
        "bits change next to nothing: so it is for 1 of 1 nodes here.",
        "gptq at 4 bits keeps 44.4% (m100000/gptq-4) of the dense model's knowledge. The paper reports of GPTQ that 4 "
        "bits lose more than a factor of two: so it is for 1 of 1 nodes here.",
    ]
    otherwise = knowledge.notes(completed(points, np.array([0.9, 0.7, 0.8])))
    assert [note.endswith("for 0 of 1 nodes here.") for note in otherwise] == [True, True]
    without_dense = {name: column[1:] for name, column in points.items()}
    assert knowledge.notes(without_dense) == []


def test_more_than_a_bit_a_bit_is_impossible() -> None:
    points = grid(sizes=(1e3,), widths=(0.0, 2.0))
    sentences = knowledge.notes(completed(points, np.array([0.5, 0.4])))
    assert "m1000/gptq-2 seems to hold 2.92 bits of knowledge for each bit that it stores" in sentences[0]
    assert sentences[1].startswith("2 of 2 nodes hold more than 2 bits a parameter")


def test_recommended_storage_keeps_what_is_asked() -> None:
    points = grid()
    fit = fit_form(FORM, points, starts=8)
    samples = {name: np.full((3, 1), value) for name, value in fit.parameters.items()}
    entries, notes = knowledge.recommend(fit, samples, points, {}, OPTIONS.model_copy(update={"keep": 0.9}))
    assert notes == []
    assert [entry["model"] for entry in entries] == ["m20000", "m50000", "m120000"]
    dense = {name: column[points["width"] == 0] for name, column in points.items()}
    at_those = dense | {"bits": np.array([entry["bits"] for entry in entries])}
    assert predict(TRUTH, at_those) == pytest.approx(0.9 * dense["share"], rel=1e-4)
    assert entries[0]["low"] == pytest.approx(entries[0]["bits"]) == entries[0]["high"]


def test_points_from_tables() -> None:
    expected = grid()
    order = np.argsort(expected["node"])
    found = knowledge.points(tables(expected), OPTIONS)
    for name in knowledge.COLUMNS:
        if knowledge.COLUMNS[name] is str:
            assert found[name].tolist() == expected[name][order].tolist()
        else:
            assert found[name] == pytest.approx(expected[name][order]), name


def test_only_quantized_weights_are_points_unless_nodes_are_named() -> None:
    given = tables(grid(sizes=(5e4,)))
    nodes = given["nodes"]
    nodes.loc[nodes["node"] == "m50000/gptq-4", "family"] = "prune"
    marked = nodes.index[nodes["node"] == "m50000/gptq-3"][0]
    nodes.at[marked, "traits"] = ["quantized", "quantized-activations"]
    found = knowledge.points(given, OPTIONS)
    assert found["node"].tolist() == ["m50000", "m50000/gptq-2", "m50000/gptq-8"]
    named = knowledge.points(given, OPTIONS.model_copy(update={"nodes": ["*/gptq-4"]}))
    assert named["node"].tolist() == ["m50000/gptq-4"]
    given["metrics"] = given["metrics"][given["metrics"]["metric"] == "knowledge_bits_per_person"]
    assert len(knowledge.points(given, OPTIONS)["run"]) == 0


def test_fit_json(tmp_path: Path) -> None:
    for name, table in tables(grid()).items():
        table.to_parquet(tmp_path / f"{name}.parquet")
    said = fit_law("knowledge", tmp_path, {"bootstrap": 4, "starts": 4}, tmp_path / "fit")
    assert {name: entry["value"] for name, entry in said["parameters"].items()} == pytest.approx(TRUTH, rel=1e-3)
    ranks = said["ranking"]["larger_model"]
    assert ranks[0]["form"] == "knowledge"
    assert {rank["form"] for rank in ranks} == set(knowledge.RIVALS) | {"knowledge"}
    assert any(note.startswith("gptq at 4 bits keeps") for note in said["notes"])
    assert len(said["recommendation"]) == 3
