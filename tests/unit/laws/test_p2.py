from __future__ import annotations

import json
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow.parquet as pq
import pytest
from law_points import mesh

from coppice.errors import UserError
from coppice.laws import p2
from coppice.laws.engine.inference import bootstrap
from coppice.laws.engine.points import Points
from coppice.laws.engine.search import fit_form
from coppice.laws.stage import fit_law

TRUTH = {"N_C": 0.30, "D_C": 0.90, "E": 0.55, "alpha": 0.45, "beta": 0.40, "gamma": -1.1, "delta": 0.25}
DENSE_LOSS = {0.5: 2.6, 1: 2.45, 1.5: 2.4, 3: 2.2, 5: 2.1, 8: 2.0}
QUICK = {"starts": 4, "bootstrap": 12}
OPTIONS = p2.Options()


def grid(sizes=(1, 3, 8), ratios=(0.15, 0.25, 0.35), tokens: int = 50, noise: float = 0.0) -> Points:
    """Points of the true law, with N0 and D in units of 1e9."""
    points = mesh(dense_parameters=sizes, rho=ratios, tokens=np.linspace(0.02, 1, tokens))
    size = points["dense_parameters"]
    points |= {
        "run": np.array([f"{a}-{b}" for a, b in zip(size, points["rho"], strict=True)]),
        "model": np.array([f"m{a:g}" for a in size]),
        "dense_loss": np.array([DENSE_LOSS[a] for a in size]),
    }
    return points | {"loss": p2.predict(TRUTH, points) + noise * np.random.default_rng(0).standard_normal(len(size))}


def tables(points: Points, folder: Path, scale: float = 1e9) -> Path:
    """Tables that hold the points, and beside them rows that are no points of the law."""
    nodes = pd.DataFrame(
        {
            "node": points["run"],
            "parent": [f"{run}/parent" for run in points["run"]],
            "model": points["model"],
            "method": "full",
            "family": "recover",
            "parameters": points["dense_parameters"] * scale * (1 - points["rho"]),
            "rho": points["rho"],
            "rho_blocks": points["rho"],
            "rho_nonzero": points["rho"],
            "linear_parameters": points["dense_parameters"] * scale / 2 * (1 - points["rho"]),
            "nonzero_parameters": points["dense_parameters"] * scale * (1 - points["rho"]),
        }
    ).drop_duplicates("node")
    parents = nodes.assign(node=nodes["parent"], parent=nodes["model"], method="laco", family="prune")
    sizes = dict(zip(points["model"], points["dense_parameters"] * scale, strict=True))
    dense = pd.DataFrame({"node": sizes.keys(), "model": sizes.keys(), "parameters": sizes.values(), "rho": 0.0})
    dense[["rho_blocks", "rho_nonzero"]] = 0.0
    dense["linear_parameters"] = dense["parameters"] / 2
    curves = pd.DataFrame(
        {
            "node": points["run"],
            "tokens": np.round(points["tokens"] * scale),
            "split": "validation",
            "loss": points["loss"],
            "dense_loss": points["dense_loss"],
        }
    )
    folder.mkdir(exist_ok=True)
    pd.concat([nodes, parents, dense]).to_parquet(folder / "nodes.parquet")
    unrecovered = curves.drop_duplicates("node").assign(tokens=0, loss=9.0)
    train = curves.assign(split="train", loss=7.0, dense_loss=np.nan)
    pd.concat([unrecovered, curves, train]).to_parquet(folder / "curves.parquet")
    return folder


def select(points: Points, rows: np.ndarray | slice) -> Points:
    return {name: column[rows] for name, column in points.items()}


def test_exact_losses_give_back_all_seven_parameters() -> None:
    # T-A1
    fit = fit_form(p2.FORM, grid(), starts=20)
    assert fit.parameters == pytest.approx(TRUTH, rel=1e-6)
    assert fit.converged
    assert fit.unidentified == ()


def test_noisy_losses() -> None:
    # T-A2; three sizes tell alpha poorly: this noise moves it by 31%.
    fit = fit_form(p2.FORM, grid(noise=0.005), starts=20)
    for name in ("D_C", "beta", "gamma", "delta"):
        assert fit.parameters[name] == pytest.approx(TRUTH[name], rel=0.02)
    for name in ("N_C", "alpha", "E"):
        assert fit.parameters[name] == pytest.approx(TRUTH[name], rel=0.35)
    unseen = grid(sizes=(5,))
    assert np.sqrt(np.mean((p2.predict(fit.parameters, unseen) - unseen["loss"]) ** 2)) < 1e-3
    samples, _ = bootstrap(fit, 40, 0)
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    covered = (low <= list(TRUTH.values())) & (list(TRUTH.values()) <= high)
    assert covered.sum() >= 5


def test_two_sizes_do_not_identify_what_only_the_size_tells() -> None:
    # T-A3
    fit = fit_form(p2.FORM, grid(sizes=(0.5, 1.5)), starts=20)
    assert set(fit.unidentified) == {"N_C", "alpha", "E"}
    for name in ("D_C", "beta", "gamma", "delta"):
        assert fit.parameters[name] == pytest.approx(TRUTH[name], rel=1e-6)
    spread = dict(zip(fit.parameters, np.ptp(fit.starts, axis=0), strict=True))
    assert spread["alpha"] > 0.1 > 1e-3 > spread["beta"]


def test_one_pruning_rate_fixes_gamma_and_predicts_the_same_under_any() -> None:
    # T-A4
    points = grid(ratios=(0.5,), tokens=20)
    fit = fit_form(p2.FORM, points)
    assert fit.fixed == {"gamma": 0.0}
    assert "one pruning rate" in fit.notes[0]
    assert fit.unidentified == ()
    absorbed = fit_form(p2.FORM, points, fixed={"gamma": -1.1})
    assert absorbed.parameters == pytest.approx(TRUTH, rel=1e-6)
    assert p2.predict(absorbed.parameters, points) == pytest.approx(p2.predict(fit.parameters, points), abs=1e-9)
    assert fit.parameters["D_C"] == pytest.approx(0.9 * 0.5**1.1, rel=1e-6)


def test_one_size_leaves_the_nested_form() -> None:
    points = grid(sizes=(3,))
    fit = fit_form(p2.FORM, points)
    assert fit.fixed == {"delta": 0.0, "N_C": 0.0, "alpha": 1.0}
    assert fit.unidentified == ()
    assert fit.parameters["D_C"] == pytest.approx(0.9 * 3**-0.25, rel=1e-6)
    assert fit.parameters["E"] == pytest.approx(3**-0.25 * (0.3 * 3**-0.45 + 0.55), rel=1e-6)
    assert fit.parameters["gamma"] == pytest.approx(-1.1, rel=1e-6)


def test_a_law_without_a_size_term_does_not_claim_its_exponent() -> None:
    points = grid()
    points["loss"] = p2.predict(TRUTH | {"N_C": 0.0}, points)
    fit = fit_form(p2.FORM, points, starts=8)
    assert p2.predict(fit.parameters, points) == pytest.approx(points["loss"], abs=1e-6)
    assert "alpha" in fit.unidentified


def test_the_law_has_the_trends_it_is_built_for() -> None:
    points = grid(sizes=(1, 8), ratios=(0.15, 0.35))
    loss = p2.predict(TRUTH, points).reshape(2, 2, 50)
    slope = np.diff(loss)
    assert (slope < 0).all()
    assert (np.diff(slope) > 0).all()
    assert (np.abs(slope[1]) < np.abs(slope[0])).all()
    assert (loss[:, 1] > loss[:, 0]).all()
    unpruned = points | {"rho": np.full(200, 1e-12)}
    assert p2.predict(TRUTH, unpruned) == pytest.approx(points["dense_loss"], abs=1e-9)


def test_each_rival_predicts_by_its_formula() -> None:
    points = select(grid(), slice(7, 8))
    size, rho, tokens = points["dense_parameters"], points["rho"], points["tokens"]
    inner = 0.3 * size**-0.45 + 0.9 * tokens**-0.4 + 0.55
    shared = {name: value for name, value in TRUTH.items() if name != "delta"}
    assert p2.RIVALS["without_delta"].predict(shared, points) == pytest.approx(points["dense_loss"] + rho**1.1 * inner)
    assert p2.RIVALS["without_dense_loss"].predict(shared, points) == pytest.approx(rho**1.1 * inner)
    chinchilla = {"E": 1.0, "A": 0.3, "B": 0.9, "alpha": 0.45, "beta": 0.4}
    assert p2.RIVALS["chinchilla_on_pruned_size"].predict(chinchilla, points) == pytest.approx(
        1 + 0.3 * ((1 - rho) * size) ** -0.45 + 0.9 * tokens**-0.4
    )


def test_points_come_from_recoveries_of_structurally_pruned_models(tmp_path: Path) -> None:
    expected = grid(sizes=(1, 3), ratios=(0.15, 0.25), tokens=3)
    folder = tables(expected, tmp_path)
    nodes, curves = (pd.read_parquet(folder / f"{name}.parquet") for name in ("nodes", "curves"))
    run = nodes[nodes["node"] == "1.0-0.15"]
    masked = {"node": "m1/wanda-50", "parent": "m1", "model": "m1", "family": "prune", "method": "wanda", "rho": 0.0}
    strangers = pd.concat(
        [
            run.assign(node="m1/full", parent="m1"),
            run.assign(node="m1/lora", method="lora"),
            run.assign(node="m1/again", parent="1.0-0.15"),
            run.assign(node="m1/wanda-50/full", parent="m1/wanda-50"),
        ]
    )
    nodes = pd.concat([nodes, pd.DataFrame([masked]), strangers])
    more = [curves[curves["node"] == "1.0-0.15"].assign(node=node) for node in strangers["node"]]
    frames = {"nodes": nodes, "curves": pd.concat([curves, *more]).sample(frac=1, random_state=0)}
    points = p2.points(frames, OPTIONS)
    for name in ("dense_parameters", "tokens"):
        assert points[name] == pytest.approx(1e9 * expected[name])
    for name in ("rho", "loss", "dense_loss"):
        assert points[name] == pytest.approx(expected[name])
    assert points["run"].tolist() == expected["run"].tolist()
    assert points["model"].tolist() == expected["model"].tolist()
    assert set(p2.points(frames, OPTIONS.model_copy(update={"method": "lora"}))["run"]) == {"m1/lora"}
    assert set(p2.points(frames, OPTIONS.model_copy(update={"nodes": ["1.0-*"]}))["run"]) == {"1.0-0.15", "1.0-0.25"}


def test_the_ratio_of_a_mask_is_of_the_linears_weights(tmp_path: Path) -> None:
    folder = tables(grid(sizes=(1,), ratios=(0.25,), tokens=4), tmp_path / "tables")
    needed = p2.LAW.needs
    read = {name: pd.read_parquet(folder / f"{name}.parquet", columns=list(needed[name])) for name in needed}
    assert p2.points(read, OPTIONS.model_copy(update={"ratio": "rho_linears"}))["rho"] == pytest.approx([0.25] * 4)
    nodes = read["nodes"].set_index("node")
    pruned = nodes.index.str.endswith("/parent")
    # Half of the weights of the linears become zeros: they stay stored, and rho is 0 of what is stored.
    nodes.loc[pruned, ["linear_parameters", "parameters", "nonzero_parameters"]] = [5e8, 1e9, 7.5e8]
    nodes.loc[pruned, ["rho", "rho_blocks", "rho_nonzero"]] = [0, 0, 0.25]
    masked = read | {"nodes": nodes.reset_index()}
    assert p2.points(masked, OPTIONS.model_copy(update={"ratio": "rho_linears"}))["rho"] == pytest.approx([0.5] * 4)
    assert p2.points(masked, OPTIONS.model_copy(update={"ratio": "rho_nonzero"}))["rho"] == pytest.approx([0.25] * 4)
    assert len(p2.points(masked, OPTIONS)["rho"]) == 0


def test_units_are_powers_of_a_thousand_below_the_largest_value() -> None:
    points = {"dense_parameters": np.array([1000.0, 260e3]), "tokens": np.array([1.0, 1e6])}
    assert p2.scales(points) == {"dense_parameters": 1e3, "tokens": 1e6}


def test_the_stage_writes_what_it_measured(tmp_path: Path) -> None:
    points = grid(tokens=8, noise=0.002)
    output = tmp_path / "laws" / "p2"
    report = fit_law("p2", tables(points, tmp_path / "tables"), QUICK | {"bootstrap": 24}, output)
    assert sorted(path.name for path in output.iterdir()) == [
        "fit.json",
        "fit.svg",
        "points.parquet",
        "samples.parquet",
    ]
    assert json.loads((output / "fit.json").read_text()) == report
    assert list(report) == [
        "law",
        "source",
        "options",
        "units",
        "parameters",
        "metrics",
        "objective",
        "held_out",
        "ranking",
        "profiles",
        "points",
        "runs",
        "recommendation",
        "notes",
        "converged",
        "starts_within_tolerance",
        "target",
        "passes",
    ]
    assert report["passes"] == {"ok": True, "reasons": []}
    assert report["ranking"]["higher_ratio"][0]["form"] == "p2"
    samples = pq.read_table(output / "samples.parquet").to_pandas()
    assert (list(samples), len(samples)) == (list(p2.PARAMETERS), 24)
    assert report["parameters"]["beta"]["low"] == pytest.approx(np.quantile(samples["beta"], 0.025))
    assert report["units"]["dense_parameters"] == {"unit": "parameters", "scale": 1e9}
    assert report["units"]["asd"] == {"unit": "nats per token per 1e+09 tokens", "scale": 1.0}
    assert (report["points"], report["runs"], report["converged"]) == (72, 9, True)
    for name, parameter in report["parameters"].items():
        assert parameter["identified"], name
        assert parameter["low"] < parameter["value"] < parameter["high"]
    assert report["metrics"]["r2"] > 0.999
    table = pq.read_table(output / "points.parquet").to_pandas()
    residuals = table["predicted"] - table["loss"]
    assert np.sqrt(np.mean(residuals**2)) == pytest.approx(report["metrics"]["rmse"])
    assert report["metrics"]["rmse"] == pytest.approx(0.002, rel=0.3)
    for test in ("later_tokens", "larger_model", "higher_ratio"):
        errors = report["held_out"][test]
        assert list(errors) == ["p2", "without_delta", "without_dense_loss", "chinchilla_on_pruned_size"]
        assert all(errors["p2"]["rmse"] < errors[rival]["rmse"] for rival in p2.RIVALS)
        assert all(error["low"] < error["high"] for error in errors.values())
    assert any("'larger model'" in note and "N_C" in note for note in report["notes"])
    text = "".join(ElementTree.parse(output / "fit.svg").getroot().itertext())
    assert "recovery tokens" in text
    assert "1.0-0.15" in text


def test_the_stage_gives_the_same_bytes_again(tmp_path: Path) -> None:
    folder = tables(grid(sizes=(1,), tokens=5, noise=0.01), tmp_path / "tables")
    for output in ("first", "second"):
        fit_law("p2", folder, QUICK, tmp_path / output)
    for name in ("fit.json", "points.parquet", "fit.svg"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_recommended_tokens_gain_the_stated_loss_by_doubling() -> None:
    points = grid(tokens=12, noise=0.0005)
    fit = fit_form(p2.FORM, points, starts=8)
    drawn = bootstrap(fit, 40, 0)[0]
    samples = {name: drawn[:, [place]] for place, name in enumerate(fit.parameters)}
    units = {"dense_parameters": 1e9, "tokens": 1e9}
    entries, notes = p2.recommend(fit, samples, points, units, p2.Options(gain=0.03))
    assert notes == []
    assert [(entry["model"], entry["rho"]) for entry in entries] == [
        (model, rho) for model in ("m1", "m3", "m8") for rho in (0.15, 0.25, 0.35)
    ]
    for entry in entries:
        case = {
            "dense_parameters": entry["dense_parameters"] / 1e9,
            "rho": entry["rho"],
            "dense_loss": 0,
            "tokens": entry["tokens"] / 1e9 * np.array([1, 2]),
        }
        assert -np.diff(p2.predict(fit.parameters, case)) == pytest.approx(0.03)
        assert entry["low"] < entry["tokens"] < entry["high"]
        assert entry["low"] > 0.9 * entry["tokens"]
        assert (entry["smallest_tokens"], entry["largest_tokens"]) == (0.02e9, 1e9)
        assert ("beyond" in (entry["note"] or "")) == (entry["tokens"] > 1e9)
    assert {entry["note"] is None for entry in entries} == {True, False}
    assert "before the first" in p2.recommend(fit, samples, points, units, p2.Options(gain=3.0))[0][0]["note"]
    without = {name: column[:0] for name, column in samples.items()}
    assert p2.recommend(fit, without, points, units, p2.Options(gain=0.03))[0][0]["low"] is None


def test_no_points(tmp_path: Path) -> None:
    folder = tables(grid(tokens=3), tmp_path / "tables")
    report = fit_law("p2", folder, {"method": "lora"}, tmp_path / "out")
    assert report["points"] == 0
    assert report["notes"][0].startswith("There are no points to fit")
    assert report["held_out"]["later_tokens"]["p2"] == {"reason": "There are no points."}
    table = pq.read_table(tmp_path / "out" / "points.parquet")
    assert table.column_names == [*p2.COLUMNS, "predicted"]
    assert table.num_rows == 0
    assert str(table.schema.field("run").type) == "string"
    assert "no points" in (tmp_path / "out" / "fit.svg").read_text()


@pytest.mark.parametrize(
    ("case", "unidentified"),
    [
        ("one rate and size", {"gamma", "delta", "N_C", "alpha"}),
        ("one run", {"gamma", "delta", "N_C", "alpha"}),
        ("two points of one run", set(p2.PARAMETERS)),
        ("three points of three sizes", set(p2.PARAMETERS)),
        ("duplicates of one point", set(p2.PARAMETERS)),
        ("flat", None),
        ("below the dense loss", None),
        ("a diverged run", set()),
    ],
)
def test_no_data_break_the_stage(tmp_path: Path, case: str, unidentified: set[str] | None) -> None:
    points = grid(tokens=6, noise=0.002)
    few = grid(sizes=(1, 8), ratios=(0.15, 0.35), tokens=6, noise=0.002)
    one = grid(sizes=(3,), ratios=(0.25,), tokens=12, noise=0.002)
    points = {
        "one rate and size": one | {"run": np.repeat([f"seed-{seed}" for seed in range(6)], 2)},
        "one run": one,
        "two points of one run": select(one, [0, 11]),
        "three points of three sizes": select(points, [0, 25, 53]),
        "duplicates of one point": select(one, np.zeros(9, int)),
        "flat": few | {"loss": few["dense_loss"] + 0.1},
        "below the dense loss": few | {"loss": few["loss"] - 1},
        "a diverged run": points | {"loss": np.where(points["run"] == "1.0-0.25", np.nan, points["loss"])},
    }[case]
    report = fit_law("p2", tables(points, tmp_path / "tables"), QUICK, tmp_path / "out")
    named = {name for name, parameter in report["parameters"].items() if not parameter["identified"]}
    assert unidentified is None or named == unidentified
    assert all(report["parameters"][name]["low"] is None for name in named)
    said = " ".join(report["notes"])
    expected = {
        "one rate and size": "gamma is not identified",
        "one run": "the points have 1.",
        "two points of one run": "3 free parameters for 2 points",
        "three points of three sizes": "7 free parameters for 3 points",
        "duplicates of one point": "No token count is recommended",
        "flat": "bound of",
        "below the dense loss": "points lie below the loss of the dense model",
        "a diverged run": "6 of 54 points hold a value that is not finite",
    }[case]
    assert expected in said


def test_an_unknown_option_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"Law 'p2': there is no option 'gian'\. Did you mean 'gain'\?"):
        fit_law("p2", tmp_path, {"gian": 0.1}, tmp_path)
