"""A real study in MLflow: followed while it runs, whole when it is over, and compared in MLflow's own pages.

The study is the demo cut small. With COPPICE_DEMO=results/demo the pages are tested on the whole demo's runs too.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import psutil
import pytest
import yaml

from coppice import tracking
from coppice.cli import main
from coppice.files import read_json
from coppice.results.reading import read_table
from coppice.study.loading import load_study
from coppice.study.tree import nodes
from coppice.tracking.server import runs_of
from tests.demo import cut_demo
from tests.servers import mlflow_server

RECOVERY = "large/width-25/full"  # its job is stopped twice, so that the server can be asked what it shows of it
PATIENCE = 600  # seconds until what must come is given up, on a machine with much to do
LINE = re.compile(r"^([\d,]+) of .* tokens: (?:train loss ([\d.]+))?(?:, )?(?:held-out loss ([\d.]+))?", re.MULTILINE)
SIZE, QUALITY = "stored_mb", "perplexity_biographies"

Curve = dict[str, dict[int, float]]  # name of the loss -> tokens -> nats per token


@dataclass(frozen=True)
class Look:
    """What the server showed while the job of RECOVERY stood still, and what the job's log said then."""

    statuses: dict[str, str]
    run: str
    curve: Curve
    printed: Curve


@dataclass(frozen=True)
class Followed:
    """The cut demo after its end: its folder, its server, what was seen on the way, and how the watcher ended."""

    folder: Path
    server: str
    looks: list[Look]
    watcher: int

    @property
    def results(self) -> Path:
        return self.folder / "results" / "demo"

    def runs(self) -> dict[str, Any]:
        """The only run of every node, and of the study as "."."""
        found = visible(all_runs(self.server))
        by_node = {node_of(run): run for run in found}
        assert len(by_node) == len(found)
        return by_node


def all_runs(server: str) -> list[Any]:
    """Every run of the demo, those in the trash included."""
    client = tracking.connect(server)
    experiment = client.get_experiment_by_name("demo")
    return runs_of(client, experiment.experiment_id) if experiment else []


def visible(runs: list[Any]) -> list[Any]:
    return [run for run in runs if run.info.lifecycle_stage == "active"]


def node_of(run: Any) -> str:
    return run.data.tags["coppice.node"]


def table(results: Path, name: str) -> pd.DataFrame:
    return read_table(results / "tables", name).to_pandas()


def shown_curve(server: str, run: str) -> Curve:
    client = tracking.connect(server)
    return {
        loss: {point.step: point.value for point in client.get_metric_history(run, loss)}
        for loss in ("train_loss", "validation_loss")
    }


def printed_curve(log: Path) -> Curve:
    """The losses that a recovery has printed."""
    found: Curve = {"train_loss": {}, "validation_loss": {}}
    for tokens, *losses in LINE.findall(log.read_text() if log.exists() else ""):
        for loss, value in zip(found.values(), losses, strict=True):
            loss |= {int(tokens.replace(",", "")): float(value)} if value else {}
    return found


def points(curve: Curve) -> int:
    return sum(map(len, curve.values()))


@contextmanager
def stopped(log: Path) -> Iterator[None]:
    """The job that writes the log stands still until the block ends."""
    files = {process: process.info["open_files"] or () for process in psutil.process_iter(["open_files"])}
    job = [process for process, opened in files.items() if any(file.path == str(log) for file in opened)]
    assert job
    try:
        for process in job:
            process.suspend()
        yield
    finally:
        for process in job:
            process.resume()


def wait_until(reached: Callable[[], bool], pause: float, running: list[subprocess.Popen]) -> None:
    """Asks again and again, with a pause in seconds; the processes must not end before."""
    deadline = time.monotonic() + PATIENCE
    while not reached():
        assert all(process.poll() is None for process in running)
        assert time.monotonic() < deadline
        time.sleep(pause)


def look(server: str, log: Path, running: list[subprocess.Popen]) -> Look:
    """Waits until the server shows all that the log says of RECOVERY; the study is not over by then."""
    printed, active = printed_curve(log), {}

    def reached() -> bool:
        active.update({node_of(run): run for run in visible(all_runs(server))})
        return RECOVERY in active and shown_curve(server, active[RECOVERY].info.run_id) == printed

    wait_until(reached, 0.5, running)
    run = active[RECOVERY].info.run_id
    statuses = {node: found.info.status for node, found in active.items()}
    return Look(statuses, run, shown_curve(server, run), printed)


@pytest.fixture(scope="module")
def followed(
    snakemake_command: Callable[..., dict[str, Any]], forks: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Followed]:
    folder = tmp_path_factory.mktemp("followed").resolve()
    with mlflow_server(folder, f"sqlite:///{folder}/server.db") as server:
        study = cut_demo() | {"tracking": {"uri": server}}
        (folder / "study.yaml").write_text(yaml.safe_dump(study, sort_keys=False))
        watch = ["-m", "coppice", "track", "--study", "study.yaml", "--results", "results/demo", "--watch"]
        watch += ["--every", "2", "--output", "watched.json"]
        run = snakemake_command(folder, "--configfile", str(folder / "study.yaml"), environment=forks)
        running = [subprocess.Popen([sys.executable, *watch], cwd=folder), subprocess.Popen(**run | {"stdout": None})]
        try:
            looks = two_looks(server, folder / "results/demo/logs/recover" / f"{RECOVERY}.log", running)
            watcher, workflow = (process.wait(PATIENCE) for process in running)
        finally:
            for process in running:
                process.terminate()
                process.wait()
        assert workflow == 0
        yield Followed(folder, server, looks, watcher)


def two_looks(server: str, log: Path, running: list[subprocess.Popen]) -> list[Look]:
    """What the server shows of RECOVERY early, and when it has come further."""
    looks, before = [], 2
    for _ in range(2):
        wait_until(lambda before=before: points(printed_curve(log)) > before, 0.02, running)
        with stopped(log):
            looks.append(look(server, log, running))
        before = points(looks[-1].printed)
    return looks


def test_nodes_appear_while_the_study_runs(followed: Followed):
    for seen in followed.looks:
        assert seen.statuses["large/width-25"] == "FINISHED"
        assert seen.statuses[RECOVERY] == "RUNNING"
        assert "." not in seen.statuses  # the study's own run comes at its end
        assert len(seen.statuses) < len(followed.runs())


def test_the_curve_of_a_recovery_under_way_grows(followed: Followed):
    first, second = followed.looks
    assert first.run == second.run
    assert first.curve == first.printed
    assert second.curve == second.printed
    for loss, values in first.curve.items():
        assert values.items() <= second.curve[loss].items()
    assert len(first.curve["train_loss"]) < len(second.curve["train_loss"])


def test_the_watcher_ends_by_itself_with_one_run_a_node(followed: Followed):
    assert followed.watcher == 0
    runs = followed.runs()
    assert runs.keys() == {".", *nodes(load_study(followed.folder / "study.yaml"))}
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert not any("coppice.live" in run.data.tags for run in runs.values())
    ids = {node: run.info.run_id for node, run in runs.items()}
    assert read_json(followed.folder / "watched.json") == ids
    assert read_json(followed.results / "tracking/runs.json") == ids


def test_runs_say_what_the_tables_say(followed: Followed):
    runs = followed.runs()
    for row in table(followed.results, "metrics").itertuples():
        assert runs[row.node].data.metrics[row.metric] == pytest.approx(row.value, rel=1e-12)
    for row in table(followed.results, "nodes").itertuples():
        assert runs[row.node].data.metrics[SIZE] == pytest.approx(row.stored_bytes / 1e6, rel=1e-12)
    curves = table(followed.results, "curves")
    for node, rows in curves.groupby("node"):
        wanted = {f"{split}_loss": dict(zip(of.tokens, of.loss, strict=True)) for split, of in rows.groupby("split")}
        assert shown_curve(followed.server, runs[node].info.run_id) == wanted


def test_tracking_again_changes_nothing(followed: Followed):
    def listed() -> str:
        return json.dumps(sorted((run.to_dictionary() for run in all_runs(followed.server)), key=str))

    before, again = listed(), followed.folder / "again.json"
    words = ["track", "--study", str(followed.results / "study.yaml"), "--results", str(followed.results)]
    assert main([*words, "--output", str(again)]) == 0
    assert listed() == before
    assert read_json(again) == read_json(followed.folder / "watched.json")


# MLflow's pages


@dataclass(frozen=True)
class Pages:
    """A server of a demo's runs, the demo's experiment there, its runs by node, and the folder of its results."""

    server: str
    experiment: str
    runs: dict[str, str]
    results: Path


@pytest.fixture(scope="module")
def ui(chromium: object) -> ModuleType:
    return import_module("tests.browser.mlflow_ui")


@pytest.fixture(scope="module", params=["cut", "whole"])
def pages(chromium: object, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator:
    if request.param == "cut":
        cut = request.getfixturevalue("followed")
        yield pages_of(cut.server, cut.results)
    elif "COPPICE_DEMO" in os.environ:
        results, folder = Path(os.environ["COPPICE_DEMO"]), tmp_path_factory.mktemp("whole")
        shutil.copyfile(results.parent / "mlflow.db", folder / "mlflow.db")
        with mlflow_server(folder, f"sqlite:///{folder}/mlflow.db") as server:
            yield pages_of(server, results)
    else:
        pytest.skip("needs the results of `make demo`: COPPICE_DEMO=results/demo")


def pages_of(server: str, results: Path) -> Pages:
    experiment = tracking.connect(server).get_experiment_by_name("demo").experiment_id
    return Pages(server, experiment, read_json(results / "tracking/runs.json"), results)


@pytest.fixture
def page(chromium: Any, ui: ModuleType) -> Iterator:
    page = chromium.new_page(viewport={"width": 1400, "height": 2000})  # rows out of sight are not in the page
    page.set_default_timeout(ui.SLOW)
    yield page
    page.close()


def test_all_runs_are_chosen_and_compared(page, ui: ModuleType, pages: Pages):
    ui.open_runs(page, pages.server, pages.experiment)
    ui.expand_models(page)
    assert ui.run_names(page).count() == len(pages.runs)
    ui.select_all(page)
    ui.compare(page)
    ui.expect(page.get_by_text(f"Comparing {len(pages.runs)} Runs from 1 Experiment")).to_be_visible()

    stored, metrics = table(pages.results, "nodes").set_index("node").stored_bytes, table(pages.results, "metrics")
    qualities = metrics[metrics.metric == QUALITY]
    measured = sorted(zip(stored[qualities.node] / 1e6, qualities.value, strict=True))
    ui.parallel_coordinates(page, ["prune.method", "quantize.bits"], [SIZE, "bits_per_weight", QUALITY])
    (drawn,) = ui.wait_for_traces(page, "parcoords", dimensions=5)
    assert {len(values) for values in drawn["dimensions"].values()} == {len(pages.runs)}
    # What a run lacks is drawn at the end of an axis.
    assert set(measured) <= set(zip(drawn["dimensions"][SIZE], drawn["dimensions"][QUALITY], strict=True))

    ui.scatter(page, SIZE, QUALITY)
    (drawn,) = ui.wait_for_traces(page, "scatter", points=len(measured))
    assert sorted(map(tuple, drawn["points"])) == measured


def test_a_run_links_to_its_parent(page, ui: ModuleType, pages: Pages):
    node, parent = "medium/gptq-3/eora-4", "medium/gptq-3"
    page.goto(f"{pages.server}/#/experiments/{pages.experiment}/runs/{pages.runs[node]}")
    link = page.get_by_role("link", name=parent, exact=True).first
    ui.expect(link).to_have_attribute("href", f"#/experiments/{pages.experiment}/runs/{pages.runs[parent]}")
    with page.expect_popup() as opened:
        link.click()
    ui.expect(opened.value.get_by_role("heading", name=parent, exact=True).first).to_be_visible()


def test_recovery_curves_are_drawn_along_tokens(page, ui: ModuleType, pages: Pages):
    curves = table(pages.results, "curves")
    held_out = curves[curves.split == "validation"]
    wanted = {node: sorted(zip(rows.tokens, rows.loss, strict=True)) for node, rows in held_out.groupby("node")}
    ui.curves(page, pages.server, pages.experiment, "validation_loss")
    drawn = ui.wait_for_traces(page, "scatter", points=max(map(len, wanted.values())))
    found = {trace["name"]: sorted(map(tuple, trace["points"])) for trace in drawn if trace["points"]}
    assert found == wanted
