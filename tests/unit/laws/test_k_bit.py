from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coppice.laws import k_bit
from coppice.laws.engine.points import Points
from coppice.laws.k_bit.curves import interpolate
from coppice.laws.stage import fit_law

OPTIONS = k_bit.Options(bootstrap=400)


def options(**chosen: object) -> k_bit.Options:
    return OPTIONS.model_copy(update=chosen)


OFFSETS = {3: -0.04, 4: 0.03, 5: 0.02, 8: 0.0, 16: -0.05}
SIZES = 2.0 ** np.arange(20, 34, 0.5)


def points(values: dict[int, np.ndarray], sizes: np.ndarray = SIZES, stderr: float = 0.0) -> Points:
    """Points of precisions k -> values [n] of models of `sizes` [n] parameters at k bits each."""
    k = np.repeat(list(values), len(sizes)).astype(float)
    return {
        "run": np.array([f"{number}" for number in range(len(k))]),
        "model": np.tile([f"m{size:g}" for size in sizes], len(values)),
        "k": k,
        "bits": k * np.tile(sizes, len(values)),
        "value": np.concatenate(list(values.values())),
        "stderr": np.full(len(k), stderr),
    }


def accuracy(bits: np.ndarray) -> np.ndarray:
    """A smooth rising curve of log2 bits."""
    return 0.25 + 0.5 / (1 + np.exp(-(np.log2(bits) - 28) / 4))


def parallel(stderr: float = 0.0) -> Points:
    return points({k: accuracy(k * SIZES) + offset for k, offset in OFFSETS.items()}, stderr=stderr)


def test_bits_of_a_parameter() -> None:
    # T-C2
    assert k_bit.bits_per_parameter(4, 64) == 4.25
    assert k_bit.bits_per_parameter(4, 1024) == 4.015625
    assert k_bit.bits_per_parameter(4, 64, 0.02) == pytest.approx(4.49, abs=1e-15)
    assert k_bit.bits_per_parameter(3, 64) == 3.25


def test_parallel_curves_give_back_their_offsets_and_the_best_precision() -> None:
    # T-C1; offsets are relative to the mean of the curves.
    report = k_bit.report(parallel(), options(metric="task_acc"))
    found = report["details"]["offsets"]
    centre = np.mean(list(OFFSETS.values()))
    for k, offset in OFFSETS.items():
        assert found[str(k)]["value"] == pytest.approx(offset - centre, abs=1e-3)
        assert found[str(k)]["deviation"] < 1e-3
        assert report["parameters"][f"offset_{k}"]["value"] == found[str(k)]["value"]
    reached = [entry for entry in report["details"]["best"] if 4 * SIZES[0] <= entry["bits"] <= 4 * SIZES[-1]]
    assert len(reached) > 50
    assert {entry["k"] for entry in reached} == {4}
    assert not any(entry["alone"] for entry in reached)
    assert report["held_out"]["interior_size"]["k-bit"]["rmse"] < 5e-3
    assert "probabilities are unknown" in " ".join(report["notes"])


def test_neighbouring_budgets_share_a_sentence() -> None:
    entries = k_bit.report(parallel(stderr=0.001), options(metric="task_acc"))["recommendation"]
    assert [(entry["k"], entry["alone"]) for entry in entries] == [
        (3, True),
        (4, False),
        (5, False),
        (8, False),
        (16, True),
    ]
    assert entries[0]["sentence"] == "Between 3.15e+06 and 4.19e+06 total bits, 3-bit models alone were measured."
    assert entries[1]["sentence"].startswith("Between 4.19e+06 and 4.86e+10 total bits, 4-bit models are best (prob")
    assert entries[1]["probability"] > 0.95
    assert [entry["high"] for entry in entries[:-1]] == [entry["low"] for entry in entries[1:]]


def test_losses_are_better_below() -> None:
    falling = parallel() | {"value": -parallel()["value"]}
    up = k_bit.report(parallel(), options(metric="task_acc"))["details"]["best"]
    for metric in (None, "perplexity_text", "loss_text", "task_answer_loss"):
        assert [entry["k"] for entry in k_bit.report(falling, options(metric=metric))["details"]["best"]] == [
            entry["k"] for entry in up
        ]


def test_curves_that_cross_split_the_budgets_there() -> None:
    # m_4 = x - 20 and m_8 = 2 (x - 20) - 3 cross at x = 23.
    sizes = 2.0 ** np.array([19, 21, 23])
    lines = {4: np.log2(4 * sizes) - 20, 8: 2 * (np.log2(8 * sizes) - 20) - 3}
    report = k_bit.report(points(lines, sizes), options(metric="task_acc"))
    middle = [entry for entry in report["recommendation"] if not entry["alone"]]
    assert [entry["k"] for entry in middle] == [4, 8]
    assert middle[0]["high"] == pytest.approx(2.0**23)
    assert (middle[0]["low"], middle[1]["high"]) == (2.0**22, 2.0**25)
    # On [22, 25] the gap of m_8 to the mean is (x - 23) / 2: mean 1/4, deviation 3 / 2 / sqrt(12).
    offset = report["details"]["offsets"]["8"]
    assert offset["value"] == pytest.approx(0.25)
    assert offset["deviation"] == pytest.approx(1.5 / np.sqrt(12))
    assert offset["parallelism"] == pytest.approx(6 / np.sqrt(12))


def test_parallelism_of_curves_that_approach_each_other() -> None:
    # T-C3
    sizes = 2.0 ** np.arange(20, 30)
    values = {k: 0.8 - 20 * sizes**-0.3 * (1 - np.exp(-k / 2.5)) ** -0.3 for k in (3, 4, 8)}
    offsets = k_bit.report(points(values, sizes), options(metric="task_acc"))["details"]["offsets"]
    x = np.linspace(np.log2(8 * sizes[0]), np.log2(3 * sizes[-1]), 100_001)
    heights = np.array([np.interp(x, np.log2(k * sizes), value) for k, value in values.items()])
    for k, gap in zip(values, heights - heights.mean(axis=0), strict=True):
        assert offsets[str(k)]["value"] == pytest.approx(gap.mean(), abs=1e-5)
        assert offsets[str(k)]["parallelism"] == pytest.approx(gap.std() / abs(gap.mean()), rel=1e-3)


def test_probability_falls_with_the_standard_error() -> None:
    # Two curves at a constant gap of one standard error of a difference between single values.
    sizes = 2.0 ** np.arange(20, 23)
    flat = {4: np.full(3, 0.5), 8: np.full(3, 0.4)}
    wide = k_bit.report(points(flat, sizes, stderr=0.1 / np.sqrt(2)), options(bootstrap=20000, metric="t_acc"))
    best = [entry for entry in wide["details"]["best"] if not entry["alone"]]
    assert {entry["k"] for entry in best} == {4}
    for entry in best:
        assert sum(entry["probabilities"].values()) == pytest.approx(1)
        # Halfway between knots two independent errors are averaged: P(z < sqrt 2) = 0.921.
        assert entry["probability"] == pytest.approx(0.921, abs=0.01)
    low, high = (wide["parameters"]["offset_4"][end] for end in ("low", "high"))
    assert low < 0.05 < high
    again = k_bit.report(points(flat, sizes, stderr=0.1 / np.sqrt(2)), options(bootstrap=20000, metric="t_acc"))
    assert again == wide


def test_designs_that_cannot_be_compared_have_a_sentence() -> None:
    single = points({4: np.array([0.4, 0.5]), 8: np.array([0.4, 0.5])}, 2.0 ** np.array([20, 22]))
    single["k"][2:] = [8, 16]
    report = k_bit.report(single, OPTIONS)
    assert "There is one size of 8-bit models, so that they have no curve." in report["notes"]
    assert "There is one size of 16-bit models, so that they have no curve." in report["notes"]
    assert any("fewer than two precisions" in note for note in report["notes"])
    assert [entry["sentence"] for entry in report["recommendation"]] == [
        "Between 4.19e+06 and 1.68e+07 total bits, 4-bit models alone were measured."
    ]
    assert "no precision has three sizes" in report["held_out"]["interior_size"]["k-bit"]["reason"]
    apart = points({4: np.array([0.4, 0.5]), 16: np.array([0.6, 0.7])}, 2.0 ** np.array([20, 20.5]))
    report = k_bit.report(apart, OPTIONS)
    assert any("share no range" in note for note in report["notes"])
    assert report["details"]["offsets"] == {}
    assert [entry["k"] for entry in report["details"]["best"]] == [4, None, 16]
    assert [entry["k"] for entry in report["recommendation"]] == [4, 16]
    nothing = k_bit.report({name: column[:0] for name, column in apart.items()}, OPTIONS)
    assert nothing["recommendation"] == []
    assert nothing["details"]["curves"] == {}
    json.dumps([report, nothing], allow_nan=False)


def test_a_size_left_out_is_predicted_by_its_neighbours() -> None:
    bent = points({4: np.array([0.2, 0.4, 0.4, 0.8]), 8: np.array([0.1, 0.9, 0.9, 0.9])}, 2.0 ** np.arange(20, 24))
    bent["bits"][4:6] = bent["bits"][4]  # the 8-bit nodes have three knots, at 23, 25 and 26: 0.5, 0.9, 0.9
    error = k_bit.report(bent, OPTIONS)["held_out"]["interior_size"]["k-bit"]
    differences = np.array([0.3 - 0.4, 0.6 - 0.4, 0.5 + 0.8 / 3 - 0.9])
    assert error["rmse"] == pytest.approx(np.sqrt(np.mean(differences**2)))
    assert error["relative"] == pytest.approx(np.abs(differences).mean() / (1.7 / 3))
    others = np.array([1.4 / 3 - 0.4, 1.4 / 3 - 0.4, 0.7 - 0.9])
    assert error["naive"] == pytest.approx(np.sqrt(np.mean(others**2)))


def test_nodes_of_nearly_the_same_bits_meet_in_their_mean() -> None:
    pair = points({4: np.array([0.4, 0.6, 0.9])}, np.array([1e6, 1.01e6, 1e8]), stderr=0.1)
    found, notes = interpolate(pair)
    assert found[4].value.tolist() == [0.5, 0.9]
    assert found[4].stderr == pytest.approx([0.1 / np.sqrt(2), 0.1])
    assert "At 1 knots" in notes[0]


def tables() -> dict[str, pd.DataFrame]:
    """Two dense models, their quantized nodes by two methods, and nodes that are no points by default."""

    def quantized(model: str, step: str, method: str, options: dict, bits: float, parent: str | None = None) -> dict:
        parent = parent or model
        return {
            "node": f"{parent}/{step}",
            "parent": parent,
            "model": model,
            "method": method,
            "options": json.dumps(options),
            "traits": ["quantized"],
            "stored_bits": bits,
            "bits_per_weight": bits / 1e6,
        }

    dense = [
        {"node": name, "parent": None, "model": name, "traits": [], "stored_bits": bits, "bits_per_weight": 16.01}
        for name, bits in (("s", 16e6), ("m", 64e6))
    ]
    rows = [
        *dense,
        quantized("s", "rtn-4", "rtn", {"bits": 4}, 5e6),
        quantized("m", "gptq-4", "gptq", {"bits": 4}, 20e6),
        quantized("m", "qpruner", "qpruner", {"bits_average": 5.8}, 25e6),
        quantized("m", "flat", "flattenquant", {"bits": "auto"}, 25e6),
        quantized("m", "rtn-3", "rtn", {"bits": 3}, 15e6, parent="m/wanda-50"),
        quantized("m", "full", "full", {"learning_rate": 1e-3}, 20e6, parent="m/gptq-4"),
        quantized("m", "wanda-50", "wanda", {}, 64e6) | {"traits": ["masked"]},
        quantized("s", "round-8", "activation-quant", {"bits": 8}, 16e6) | {"traits": ["quantized-activations"]},
    ]
    nodes = pd.DataFrame(rows)
    metrics = pd.DataFrame(
        {
            "node": nodes["node"],
            "evaluation": "quality",
            "metric": "perplexity_text",
            "unit": "perplexity",
            "value": np.e,
            "stderr": [np.nan if node == "s" else 0.1 * np.e for node in nodes["node"]],
        }
    )
    metrics.loc[metrics["node"] == "m/gptq-4", "value"] = np.nan
    return {"nodes": nodes.sample(frac=1, random_state=0), "metrics": metrics}


def test_points_are_dense_models_and_their_quantizations() -> None:
    found = k_bit.points(tables(), OPTIONS)
    assert dict(zip(found["run"].tolist(), found["k"].tolist(), strict=True)) == {
        "s/rtn-4": 4,
        "m/gptq-4": 4,
        "m/qpruner": 6,
        "s": 16,
        "m": 16,
    }
    row = found["run"].tolist().index("s/rtn-4")
    assert (found["bits"][row], found["value"][row]) == (5e6, pytest.approx(1))
    assert found["stderr"][row] == pytest.approx(0.1)
    assert found["stderr"][found["run"].tolist().index("s")] == 0
    # Its value is no number, which the fit leaves out with a sentence.
    assert np.isnan(found["value"][found["run"].tolist().index("m/gptq-4")])
    assert set(found) == set(k_bit.LAW.columns)


def test_the_stage_leaves_out_what_is_no_number(tmp_path: Path) -> None:
    for name, frame in tables().items():
        frame.to_parquet(tmp_path / f"{name}.parquet")
    report = fit_law("k-bit", tmp_path, {}, tmp_path / "fit")
    assert "1 of 5 points hold a value that is not finite and were left out." in report["notes"]
    assert "There is one size of 4-bit models, so that they have no curve." in report["notes"]
    assert list(report["details"]["curves"]) == ["16"]
    assert json.loads((tmp_path / "fit" / "fit.json").read_text()) == report


def test_options_choose_the_quantizer_and_the_nodes() -> None:
    assert set(k_bit.points(tables(), options(method="rtn"))["run"]) == {"s", "m", "s/rtn-4"}
    deeper = k_bit.points(tables(), OPTIONS.model_copy(update={"nodes": ["m", "m/*"]}))
    assert dict(zip(deeper["run"].tolist(), deeper["k"].tolist(), strict=True)) == {
        "m/wanda-50/rtn-3": 3,
        "m/gptq-4": 4,
        "m/gptq-4/full": 4,
        "m/qpruner": 6,
        "m": 16,
    }
