"""A study in MLflow's own pages: every node is a row, and the charts that compare the rows hold all of their points."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from fake_results import fake_study, write_results

from coppice import tables, tracking
from coppice.tables import read_table
from tests.servers import mlflow_server

ui = pytest.importorskip("tests.browser.mlflow_ui", reason="needs the package playwright")

SIZE, QUALITY = "stored_mb", "perplexity_stories"


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, str]]:
    """The folder of results, and the id of each node's run in the database beside it."""
    folder = tmp_path_factory.mktemp("study")
    results = write_results(folder / "results" / "demo")
    study = fake_study()
    tables.write_tables(study, results, results / "tables", partial=True)
    return results, tracking.track(study, results, None)


@pytest.fixture(scope="module")
def server(chromium: object, nodes: tuple[Path, dict[str, str]], tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    database = nodes[0].parent / "mlflow.db"
    with mlflow_server(tmp_path_factory.mktemp("server"), f"sqlite:///{database}") as address:
        yield address


@pytest.fixture
def page(chromium: object) -> Iterator:
    page = chromium.new_page(viewport={"width": 1400, "height": 900})
    page.set_default_timeout(ui.SLOW)
    yield page
    page.close()


def test_all_runs_are_chosen_and_compared(page, server: str, nodes: tuple[Path, dict[str, str]]):
    results, runs = nodes
    ui.open_runs(page, server, "1")
    ui.expand_models(page)
    assert ui.run_names(page).count() == len(runs)
    ui.select_all(page)
    ui.compare(page)
    ui.expect(page.get_by_text(f"Comparing {len(runs)} Runs from 1 Experiment")).to_be_visible()

    ui.parallel_coordinates(page, ["prune.method", "quantize.bits"], [SIZE, "bits_per_weight", QUALITY])
    (drawn,) = ui.wait_for_traces(page, "parcoords", dimensions=5)
    assert drawn["dimensions"] == {
        "prune.method": len(runs), "quantize.bits": len(runs),
        SIZE: len(runs), "bits_per_weight": len(runs), QUALITY: len(runs),
    }  # fmt: skip

    ui.scatter(page, SIZE, QUALITY)
    measured = {
        row["node"]
        for row in read_table(results / "tables", "metrics").to_pylist()
        if row["metric"] == QUALITY and row["value"] is not None and math.isfinite(row["value"])
    }
    (drawn,) = ui.wait_for_traces(page, "scatter", points=len(measured))
    assert drawn["points"] == len(measured) > 5


def test_a_run_tells_its_recipe_and_links_to_its_parent(page, server: str, nodes: tuple[Path, dict[str, str]]):
    runs = nodes[1]
    page.goto(f"{server}/#/experiments/1/runs/{runs['small/laco-25/full-1m/gptq-4']}")
    parent = page.get_by_role("link", name="small/laco-25/full-1m", exact=True).first
    ui.expect(parent).to_have_attribute("href", f"#/experiments/1/runs/{runs['small/laco-25/full-1m']}")
    with page.expect_popup() as opened:
        parent.click()
    ui.expect(opened.value.get_by_role("heading", name="small/laco-25/full-1m", exact=True).first).to_be_visible()


def test_recovery_curves_are_drawn_along_tokens(page, server: str):
    ui.curves(page, server, "1", "validation_loss")
    drawn = [trace for trace in ui.wait_for_traces(page, "scatter", points=2) if trace["points"]]
    assert {trace["name"] for trace in drawn} == {"small/laco-25/full-1m", "medium/laco-25/full-1m"}
    assert {trace["last"] for trace in drawn} == {1_000_000}
