"""What docs/ prints of the studies is what their tables, or the real points, give."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coppice.laws import chinchilla, registry
from coppice.laws.engine.metrics import metrics
from coppice.laws.engine.search import Fit, fit_form
from coppice.laws.points.reading import read_points

DOCS = Path(__file__).parents[3] / "docs"


def printed(page: str, row: str) -> list[str]:
    """The cells of the row of a page's table that begins with `row`."""
    text = (DOCS / page).read_text(encoding="utf-8")
    found = re.search(rf"^\| {re.escape(row)} \| (.*) \|$", text, re.MULTILINE)
    assert found, f"{page} has no row {row}"
    return found[1].split(" | ")


def fitted(name: str, folder: str, **options: object) -> tuple[Fit, dict[str, float | None]]:
    """The law fitted to the documented tables, without resamples."""
    law = registry.load(name)
    chosen = law.options(**options)
    raw, _ = read_points(law, DOCS / "measured" / folder, chosen)
    points = raw | {column: raw[column] / scale for column, scale in law.scales(raw).items()}
    form = replace(law.form, objective=chosen.objective())
    fit = fit_form(form, points)
    return fit, metrics(points, fit.predict(points), form.target)


@pytest.mark.parametrize(
    ("column", "nodes"), enumerate((["*/depth-*/full*"], ["*/width-*/full*"], ["*/semi-structured/full*"]))
)
def test_the_p2_study(column: int, nodes: list[str]) -> None:
    fit, goodness = fitted("p2", "recovery", nodes=nodes, ratio="rho_linears")
    assert fit.converged
    for name in ("D_C", "beta", "gamma", "delta", "E", "N_C"):
        cell = printed("recovery.md", name)[column]
        if cell == "fixed at 0":
            assert fit.fixed[name] == 0
        else:
            assert fit.parameters[name] == pytest.approx(float(cell.split()[0]), rel=5e-3, abs=5e-4), name
    assert "alpha" in fit.unidentified or column == 1
    assert goodness["r2"] == pytest.approx(float(printed("recovery.md", "R²")[column]), abs=1e-4)


def test_the_law_of_knowledge() -> None:
    fit, goodness = fitted("knowledge", "knowledge")
    for name, value in fit.parameters.items():
        # Digits as printed; c and p are identified only together, so that c is printed to its power of ten.
        assert value == pytest.approx(float(printed("knowledge.md", name)[0]), rel=0.02), name
    assert goodness["r2"] == pytest.approx(float(printed("knowledge.md", "R²")[0]), abs=1e-3)


@pytest.mark.parametrize(("column", "file"), enumerate(("hot", "cool_end")))
def test_the_gemstones(shared_data: Path, column: int, file: str) -> None:
    frame = pd.read_json(shared_data / "scaling_gemstones" / f"wandb_df_for_fitting_{file}.jsonl", lines=True)
    points = {
        "run": frame["run_name"].to_numpy(dtype=str),
        "parameters": frame["params_active_precise"].to_numpy(dtype=float) / 1e9,
        "tokens": frame["tokens"].to_numpy(dtype=float) / 1e9,
        "loss": frame["final_loss"].to_numpy(dtype=float),
    }
    fit = fit_form(chinchilla.FORM, points)
    assert fit.converged
    assert fit.unidentified == ()
    for name, value in fit.parameters.items():
        assert value == pytest.approx(float(printed("gemstones.md", name)[column].split()[0]), abs=6e-4), name
    ends = [fit_form(chinchilla.FORM, points, starts=8, seed=seed).parameters["E"] for seed in (1, 2)]
    assert np.ptp([*ends, fit.parameters["E"]]) < 1e-3
