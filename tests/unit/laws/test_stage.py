from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from coppice.errors import UserError
from coppice.laws import registry
from coppice.laws.points.quality import join_quality
from coppice.laws.stage import fit_law, judge

QUICK = {"starts": 3, "bootstrap": 0}
TRUTH = {"A": 0.9, "B": 1.4, "E": 1.8, "alpha": 0.35, "beta": 0.4}


def points_of_training(noise: float = 0.002) -> pd.DataFrame:
    """Losses of five sizes along their training, in a file whose columns have names of their own."""
    generator = np.random.default_rng(0)
    rows = [
        {"name": f"m{size:g}", "size": size * 1e9, "seen": tokens * 1e9}
        for size in (0.1, 0.3, 1, 3, 9)
        for tokens in (1, 3, 10, 30, 100)
    ]
    frame = pd.DataFrame(rows)
    exact = (
        TRUTH["E"]
        + TRUTH["A"] * (frame["size"] / 1e9) ** -TRUTH["alpha"]
        + TRUTH["B"] * (frame["seen"] / 1e9) ** -TRUTH["beta"]
    )
    return frame.assign(final=exact * np.exp(noise * generator.standard_normal(len(frame))))


COLUMNS = {"run": "name", "parameters": "size", "tokens": "seen", "loss": "final"}


def fitted(folder: Path, frame: pd.DataFrame, suffix: str = ".jsonl", **options: Any) -> dict[str, Any]:
    path = folder / f"points{suffix}"
    writers = {
        ".parquet": frame.to_parquet,
        ".csv": lambda file: frame.to_csv(file, index=False),
        ".jsonl": lambda file: frame.to_json(file, orient="records", lines=True),
    }
    writers[suffix](path)
    return fit_law("chinchilla", None, QUICK | {"file": str(path), "columns": COLUMNS} | options, folder / "out")


@pytest.mark.parametrize("suffix", [".parquet", ".jsonl", ".csv"])
def test_points_come_from_a_file_in_the_place_of_the_tables(tmp_path: Path, suffix: str) -> None:
    report = fitted(tmp_path, points_of_training(noise=0), suffix)
    assert {name: entry["value"] for name, entry in report["parameters"].items()} == pytest.approx(TRUTH, rel=1e-3)
    assert (report["points"], report["runs"]) == (25, 5)
    assert report["passes"] == {"ok": True, "reasons": []}


def test_rows_that_cannot_be_fitted_are_counted(tmp_path: Path) -> None:
    frame = points_of_training()
    exact = fitted(tmp_path, frame)["parameters"]
    broken = pd.concat([frame, frame.iloc[[3, 3, 7]], frame.iloc[[0]].assign(final=-1.0)])
    broken.loc[len(broken)] = {"name": "m0.1", "size": 1e8, "seen": np.nan, "final": 3.0}
    broken.loc[len(broken)] = {"name": "m0.1", "size": 0.0, "seen": 1e9, "final": 3.0}
    report = fitted(tmp_path, broken)
    assert report["points"] == 25
    assert report["notes"][:4] == [
        "1 of 31 points hold a value that is not finite and were left out.",
        "1 of 31 points have no parameters or tokens and were left out.",
        "3 of 31 points repeat another one and were left out.",
        "1 of 31 points have no logarithm and were left out.",
    ]
    assert report["parameters"] == exact


def test_designs_that_say_little_have_their_sentences(tmp_path: Path) -> None:
    frame = points_of_training()
    one_size = fitted(tmp_path, frame[frame["size"] == 1e9])
    assert any(note.startswith("There is one size") for note in one_size["notes"])
    assert not one_size["parameters"]["alpha"]["identified"]
    assert one_size["held_out"]["larger_model"]["chinchilla"]["reason"].startswith("This test needs three sizes")
    few = fitted(tmp_path, frame.iloc[[0, 12, 24]], starts=1)
    assert any("5 free parameters for 3 points" in note for note in few["notes"])
    assert not few["passes"]["ok"]
    constant = fitted(tmp_path, frame[frame["size"] == 1e9].assign(final=2.5), starts=1)
    assert "All 5 points have the same loss, so the law has nothing to explain." in constant["notes"]
    assert constant["metrics"]["r2"] is None
    nothing = fitted(tmp_path, frame.assign(final=np.nan))
    assert nothing["points"] == 0
    assert nothing["passes"]["reasons"] == [
        "The search for its parameters did not converge.",
        "It rests on 0 runs, and what differs between runs shows in 4 or more.",
        "No held-out test of it was possible.",
    ]


def test_a_profile_is_lowest_at_the_optimum(tmp_path: Path) -> None:
    report = fitted(tmp_path, points_of_training(), profile=["E", "e"], bootstrap=10)
    profile = report["profiles"]["E"]
    lowest = profile["values"][int(np.argmin(profile["objective"]))]
    assert lowest == pytest.approx(report["parameters"]["E"]["value"], abs=np.ptp(profile["values"]) / 40)
    assert min(profile["objective"]) >= report["objective"] * (1 - 1e-9)
    assert profile["objective"][0] > 2 * report["objective"] < profile["objective"][-1]
    assert "The law has no parameter 'e' to profile." in report["notes"]


def test_bad_files_are_refused_with_a_sentence(tmp_path: Path) -> None:
    frame = points_of_training()
    with pytest.raises(UserError, match=r"points.csv has no column 'final'\. .*option `columns`"):
        fitted(tmp_path, frame.drop(columns="final"), ".csv")
    with pytest.raises(UserError, match=r"'seen' of .*points.jsonl holds values that are not numbers"):
        fitted(tmp_path, frame.assign(seen="many"))
    with pytest.raises(UserError, match=r"nowhere.jsonl does not exist"):
        fit_law("chinchilla", None, {"file": str(tmp_path / "nowhere.jsonl")}, tmp_path / "out")
    (tmp_path / "torn.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"torn.parquet cannot be read"):
        fit_law("chinchilla", None, {"file": str(tmp_path / "torn.parquet")}, tmp_path / "out")
    with pytest.raises(UserError, match=r"must be one of .parquet, .jsonl, .csv"):
        fit_law("chinchilla", None, {"file": "points.xlsx"}, tmp_path / "out")
    with pytest.raises(UserError, match="pass --tables"):
        fit_law("chinchilla", None, {}, tmp_path / "out")


def test_tables_of_an_older_format_are_refused_with_a_sentence(tmp_path: Path) -> None:
    pd.DataFrame({"node": ["a"]}).to_parquet(tmp_path / "nodes.parquet")
    with pytest.raises(UserError, match=r"nodes.parquet has no column '\w+': it was written by another version"):
        fit_law("p2", tmp_path, {}, tmp_path / "out")


def test_repeated_rows_of_tables_count_once_and_different_ones_are_refused(tmp_path: Path) -> None:
    law = registry.load("p2")
    nodes = pd.DataFrame({column: ["a"] for column in law.needs["nodes"]}).assign(traits=[["masked"]])
    curves = pd.DataFrame({column: ["a"] for column in law.needs["curves"]}).assign(tokens=5, loss=2.0, split="train")
    for name, table in (("nodes", nodes), ("curves", curves)):
        pd.concat([table, table]).to_parquet(tmp_path / f"{name}.parquet")
    assert fit_law("p2", tmp_path, QUICK, tmp_path / "out")["points"] == 0
    pd.concat([curves, curves.assign(loss=3.0)]).to_parquet(tmp_path / "curves.parquet")
    with pytest.raises(UserError, match=r"curves.parquet holds two different rows of node a, tokens 5, split train"):
        fit_law("p2", tmp_path, QUICK, tmp_path / "out")


def test_measurements_in_different_units_are_not_mixed() -> None:
    nodes = pd.DataFrame({"node": ["a", "b"], "model": ["a", "b"]})
    metrics = pd.DataFrame(
        {
            "node": ["a", "b"],
            "evaluation": "quality",
            "metric": "task_acc",
            "value": [0.5, 60.0],
            "stderr": [0.1, 1.0],
            "unit": ["accuracy", "percent"],
        }
    )
    with pytest.raises(UserError, match=r"task_acc has several units \(accuracy, percent\)"):
        join_quality({"nodes": nodes, "metrics": metrics}, None, None, None, "accuracy")
    same = join_quality({"nodes": nodes, "metrics": metrics.assign(unit="accuracy")}, None, None, None, "accuracy")
    assert same["value"].tolist() == [0.5, 60.0]


def test_a_law_recommends_only_where_it_passes_its_own_tests() -> None:
    good = {"rmse": 0.1, "relative": 0.02, "naive": 0.5}
    held_out = {"later_tokens": {"law": good}, "larger_model": {"law": {"reason": "Too few sizes."}}}
    assert judge("law", {"converged": True, "runs": 4, "held_out": held_out}, 0.1)["ok"]
    for entry, reason in (
        (good | {"relative": 0.2}, "later tokens' is 20.0% of the value, more than the 10.0%"),
        (good | {"rmse": 0.5}, "0.500, is no less than that of a prediction without any law, 0.500"),
        ({"reason": "No."}, "No held-out test of it was possible."),
    ):
        found = judge("law", {"converged": True, "runs": 4, "held_out": {"later_tokens": {"law": entry}}}, 0.1)
        assert not found["ok"]
        assert reason in found["reasons"][0]
    assert judge("law", {"converged": False, "runs": 4, "held_out": held_out}, 0.1)["reasons"] == [
        "The search for its parameters did not converge."
    ]
