"""The pictures of docs/mlflow.md: MLflow's own pages of a study, photographed by a headless Chromium.

python -m docs.mlflow_pictures --results results/demo --output docs/mlflow
"""

from __future__ import annotations

import argparse
import shutil
import sys
import tempfile
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, sync_playwright

from coppice.files import read_json
from tests.browser import mlflow_ui as ui
from tests.servers import mlflow_server

WIDTH, HEIGHT = 1300, 800
COLORS = 128  # of a picture: flat pages need no more, and take a third of the bytes
SETTLE = 2500  # milliseconds until a chart stands still
SIZE, BITS, QUALITY, SCORE = "stored_mb", "bits_per_weight", "perplexity_biographies", "biographies_acc"


def photograph(results: Path, output: Path) -> None:
    """Writes one picture for each way to compare; ends with a sentence where something is missing."""
    program, database = shutil.which("chromium"), results.parent / "mlflow.db"
    if program is None:
        sys.exit("This needs the program chromium (apt-get install chromium).")
    if not database.exists():
        sys.exit(f"There is no {database}: run `make demo` first, or name another study with --results.")
    output.mkdir(parents=True, exist_ok=True)
    runs = read_json(results / "tracking" / "runs.json")
    with tempfile.TemporaryDirectory() as folder, sync_playwright() as started:
        browser = started.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu"])
        with mlflow_server(Path(folder), f"sqlite:///{database.resolve()}") as server:
            for name, show in (("table", table), ("compare", parallel), ("scatter", scatter), ("curves", curves)):
                page = browser.new_page(viewport={"width": WIDTH, "height": HEIGHT})
                page.set_default_timeout(ui.SLOW)
                show(page, server, "1")
                save(page, output / f"{name}.png")
            page.goto(f"{server}/#/experiments/1/runs/{runs['medium/width-ffn-50/full/gptq-3']}")
            page.get_by_text("Show more").first.click()
            ui.close_assistant(page)
            save(page, output / "run.png")
        browser.close()


def table(page: Page, server: str, experiment: str) -> None:
    ui.open_runs(page, server, experiment)
    ui.show_columns(page, [SIZE, BITS, QUALITY, SCORE], instead_of=["Dataset", "Source", "Models"])
    ui.filter_runs(page, "tags.`coppice.composition` LIKE '%quantize%'")
    page.wait_for_timeout(SETTLE)
    ui.expand_models(page)


def compared(page: Page, server: str, experiment: str) -> None:
    """The nodes whose quality was measured: a chart would draw the others at the end of its axis."""
    ui.open_runs(page, server, experiment)
    ui.filter_runs(page, f"metrics.{QUALITY} > 0")
    page.wait_for_timeout(SETTLE)
    ui.expand_models(page)
    ui.select_all(page)
    ui.compare(page)


def parallel(page: Page, server: str, experiment: str) -> None:
    compared(page, server, experiment)
    ui.parallel_coordinates(page, ["model", "family"], [SIZE, BITS, QUALITY])
    ui.wait_for_traces(page, "parcoords", dimensions=5)


def scatter(page: Page, server: str, experiment: str) -> None:
    compared(page, server, experiment)
    ui.scatter(page, SIZE, QUALITY)
    ui.wait_for_traces(page, "scatter", points=2)


def curves(page: Page, server: str, experiment: str) -> None:
    ui.curves(page, server, experiment, "validation_loss")
    ui.wait_for_traces(page, "scatter", points=2)


def save(page: Page, path: Path) -> None:
    page.wait_for_timeout(SETTLE)
    page.screenshot(path=path)
    Image.open(path).convert("RGB").quantize(COLORS).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=Path("results/demo"))
    parser.add_argument("--output", type=Path, default=Path("docs/mlflow"))
    arguments = parser.parse_args()
    photograph(arguments.results, arguments.output)


if __name__ == "__main__":
    main()
