"""The static figures, by the artists that they hold."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from fake_results import BUDGETS
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coppice.formatting.plotting import svg
from coppice.records.fit import FitRecord, Parameter
from coppice.report.figures import curves_figure, frontier_figure, layers_figure, profile_figure
from coppice.report.law_lines import law_lines
from coppice.results.reading import read_table

RUN = "small/laco-25/full-1m"


def rows_of(results: Path, table: str) -> list[dict[str, Any]]:
    return read_table(results / "tables", table).to_pylist()


@pytest.fixture(scope="module")
def frontier(kept: Path) -> Axes:
    (axes,) = frontier_figure(*(rows_of(kept, name) for name in ("nodes", "metrics", "comparisons"))).axes
    return axes


def lines(axes: Axes, **settings: Any) -> list[np.ndarray]:
    """The points [n, 2] of the lines that have these settings and any points."""
    return [
        np.column_stack(line.get_data())
        for line in axes.get_lines()
        if len(line.get_xdata()) and all(getattr(line, f"get_{name}")() == value for name, value in settings.items())
    ]


def test_frontier_has_every_node_and_fills_what_was_recovered(kept: Path, frontier: Axes) -> None:
    size = {row["node"]: row["stored_bytes"] / 1e6 for row in rows_of(kept, "nodes")}
    value = {row["node"]: row["value"] for row in rows_of(kept, "metrics") if row["metric"] == "perplexity_stories"}
    nodes = {gid: np.concatenate(lines(frontier, gid=gid)).tolist() for gid in (
        "small, recovered", "small, not recovered", "medium, recovered", "medium, not recovered",
    )}  # fmt: skip
    for model in ("small", "medium"):
        recovered = [f"{model}/laco-25/full-1m", f"{model}/laco-25/full-1m/gptq-4"]
        others = [model, f"{model}/laco-25", f"{model}/wanda-50"]
        assert sorted(nodes[f"{model}, recovered"]) == sorted([size[node], value[node]] for node in recovered)
        assert sorted(nodes[f"{model}, not recovered"]) == sorted([size[node], value[node]] for node in others)
    assert frontier.get_xscale() == frontier.get_yscale() == "log"


def test_the_front_is_dashed_and_named(kept: Path, frontier: Axes) -> None:
    assert {text.get_text() for text in frontier.texts} >= {"laco-25/full-1m/gptq-4", "small (dense)", "medium (dense)"}
    assert "laco-25" not in {text.get_text() for text in frontier.texts}
    (front,) = lines(frontier, linestyle="--")
    heights = front[:, 1].tolist()
    assert front[:, 0].tolist() == sorted(front[:, 0].tolist())
    assert heights == sorted(heights, reverse=True), "each larger node of the front is better"
    value = {row["node"]: row["value"] for row in rows_of(kept, "metrics") if row["metric"] == "perplexity_stories"}
    assert value["small"] in heights
    assert value["small/wanda-50"] not in heights


def test_neighbours_that_do_not_differ_significantly_are_joined(kept: Path, frontier: Axes) -> None:
    joined = {line.get_gid() for line in frontier.get_lines() if " = " in (line.get_gid() or "")}
    assert joined == {
        f"{row['node']} = {row['other']}"
        for row in rows_of(kept, "comparisons")
        if (row["relation"], row["measure"], row["distinguishable"]) == ("next", "loss", False)
    }


def test_curves_have_the_measured_points_and_the_fitted_law(kept: Path) -> None:
    fit = FitRecord.read(kept / "laws/p2/fit.json")
    runs = {row["node"] for row in rows_of(kept, "curves")}
    figure = curves_figure(rows_of(kept, "nodes"), rows_of(kept, "curves"), law_lines(fit, kept / "laws/p2", runs))
    assert [axes.get_title(loc="left") for axes in figure.axes] == ["Recovery of medium", "Recovery of small"]
    for axes in figure.axes:
        (budgets,) = lines(axes, marker="o", markersize=6)
        assert budgets[:, 0].tolist() == list(BUDGETS)
        (between,) = lines(axes, marker="o", markersize=3)  # one loss before the first budget
        assert len(between) == 1
        (within,), (beyond,) = lines(axes, linestyle="--"), lines(axes, linestyle=":")
        assert within[-1].tolist() == beyond[0].tolist()
        assert within[-1, 0] == BUDGETS[-1]
        assert np.all(np.diff(np.concatenate([within, beyond[1:]])[:, 1]) < 0), "the law's loss falls with tokens"
        assert len(axes.collections) == 1, "the band"
        assert "dense" in [text.get_text() for text in axes.get_legend().get_texts()]


def test_layers_are_the_mean_errors_of_blocks() -> None:
    modules = ["layers.0.up", "layers.0.down", "layers.1.up"]
    figure = layers_figure(
        {
            "small/gptq-4": {"modules": modules, "columns": {"bits": [4, 4, 4], "error": [0.01, 0.03, 0.2]}},
            "small/wanda-50": {"modules": modules, "columns": {"weight error": [0.1, None, 0.4]}},
            "small/width-50": {"modules": ["layers.0"], "columns": {"neurons kept": [96]}},
        }
    )
    (axes,) = figure.axes
    assert [label.get_text() for label in axes.get_yticklabels()] == ["small/gptq-4", "small/wanda-50 (weights)"]
    assert axes.images[0].get_array().tolist() == [[pytest.approx(0.02), 0.2], [0.1, 0.4]]
    assert [text.get_text() for text in axes.texts] == ["0.020", "0.20", "0.10", "0.40"]


def test_a_profile_has_its_lowest_objective_at_the_fitted_value() -> None:
    parameter = Parameter(value=2.0, low=1.5, high=9.0, identified=True)
    (axes,) = profile_figure("beta", {"values": [1, 2, 3], "objective": [3, 1, 2]}, parameter).axes
    curve, fitted = (line.get_xydata() for line in axes.get_lines())
    assert curve.tolist() == [[1, 3], [2, 1], [3, 2]]
    assert fitted[0, 0] == 2.0
    assert axes.get_xlim()[1] < 4, "an interval beyond the profile does not stretch it"


def test_the_same_figure_is_the_same_text() -> None:
    def drawn() -> Figure:
        parameter = Parameter(value=1, low=None, high=None, identified=True)
        return profile_figure("a<b", {"values": [1, 2], "objective": [1, 2]}, parameter)

    assert svg(drawn(), "beta") == svg(drawn(), "beta")
    assert "Profile of a&lt;b" in svg(drawn(), "beta")
