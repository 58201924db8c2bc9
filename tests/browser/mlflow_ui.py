"""What a person does in MLflow's pages, as steps in a browser: for the test of the UI and for the pictures of docs.

The steps follow MLflow 3.17; they name what a person sees wherever the page has a name for it.
"""

from __future__ import annotations

from playwright.sync_api import Locator, Page, expect

SLOW = 60_000  # milliseconds: the pages load their parts one by one
expect.set_options(timeout=SLOW)


def open_runs(page: Page, server: str, experiment: str) -> None:
    """The table of an experiment's runs, without the assistant's panel."""
    page.goto(f"{server}/#/experiments/{experiment}/runs")
    expect(page.get_by_text("matching runs")).to_be_visible()
    expect(page.locator(".ag-row").first).to_be_visible()
    close_assistant(page)


def close_assistant(page: Page) -> None:
    """Closes the panel that MLflow opens at the right."""
    close = page.locator("[data-component-id='mlflow.assistant.chat_panel.close']")
    if close.count():
        close.click()


def expand_models(page: Page) -> None:
    """Opens the dense models' rows, so that the nodes made from them show."""
    closed = run_names(page).filter(has=page.locator("button svg path[d^='M7.25 7.25V4.5']"))  # a plus in a square
    while closed.count():
        closed.first.get_by_role("button").first.click()
        page.wait_for_timeout(500)


def run_names(page: Page) -> Locator:
    return page.locator(".ag-row [col-id*='Run Name']")


def select_all(page: Page) -> None:
    page.get_by_label("Select all runs").click(force=True)


def compare(page: Page) -> None:
    """The page that compares the runs that are selected."""
    page.get_by_role("button", name="Compare", exact=True).click()
    expect(page.get_by_text("Comparing", exact=False).first).to_be_visible()


def choose(page: Page, field: str, names: list[str]) -> None:
    """Adds names to a field of several values of the parallel coordinates: `Parameters:` or `Metrics:`."""
    box = page.get_by_text(field, exact=True).locator("xpath=following::input[1]")
    for name in names:
        box.click(force=True)
        page.keyboard.type(name)
        page.locator(f".du-bois-light-select-item-option[title='{name}']:visible").click()
        page.keyboard.press("Escape")


def parallel_coordinates(page: Page, parameters: list[str], metrics: list[str]) -> None:
    """The chart of parallel coordinates with these axes instead of those that the page chose."""
    page.get_by_role("tab", name="Parallel Coordinates Plot").click()
    page.get_by_role("button", name="Clear All").click()
    choose(page, "Parameters:", parameters)
    choose(page, "Metrics:", metrics)


def scatter(page: Page, across: str, up: str) -> None:
    """The scatter of one number of the runs against another."""
    page.get_by_role("tab", name="Scatter Plot").click()
    for axis, name in (("x", across), ("y", up)):
        page.locator(f"#{axis}-axis-selector").click()
        page.get_by_role("option", name=name, exact=True).last.click()


def traces(page: Page) -> list[dict]:
    """What the chart that shows draws, by traces: name, type, points as pairs (x, y), values of each dimension."""
    chart = page.locator(".js-plotly-plot:visible").last  # a dialog's stands behind the page's
    expect(chart).to_be_visible()
    return chart.evaluate(
        """chart => (chart.data || []).map(trace => ({
            name: trace.name,
            type: trace.type,
            points: Array.from(trace.x || [], (across, place) => [Number(across), Number(trace.y[place])])
                .filter(point => point.every(Number.isFinite)),
            dimensions: Object.fromEntries(
                (trace.dimensions || []).map(each => [each.label, Array.from(each.values)])),
        }))"""
    )


def wait_for_traces(page: Page, kind: str, points: int = 0, dimensions: int = 0) -> list[dict]:
    """The traces of the chart that shows, once one of them is of this kind and holds as much."""
    for _ in range(SLOW // 500):
        drawn = [trace for trace in traces(page) if trace["type"].startswith(kind)]
        if any(len(trace["points"]) >= points and len(trace["dimensions"]) >= dimensions for trace in drawn):
            return drawn
        page.wait_for_timeout(500)
    raise AssertionError(f"no {kind} with {points} points and {dimensions} dimensions, but {traces(page)}")


def show_columns(page: Page, names: list[str], instead_of: list[str]) -> None:
    """The table's columns: those with these names instead of the others."""
    page.get_by_role("button", name="Columns").click()
    search = page.get_by_placeholder("Search columns")
    for name in [*instead_of, *names]:
        search.fill(name)
        page.locator(".du-bois-light-tree-title").get_by_text(name, exact=True).first.click()
    page.keyboard.press("Escape")


def filter_runs(page: Page, condition: str) -> None:
    """Only the runs that meet a condition of MLflow's search."""
    field = page.get_by_placeholder("metrics.rmse", exact=False)
    field.fill(condition)
    field.press("Enter")


def curves(page: Page, server: str, experiment: str, metric: str) -> None:
    """The chart of one metric along its steps, for all runs, as large as the window."""
    open_runs(page, server, experiment)
    expand_models(page)  # rows that are closed have no curves
    page.goto(f"{server}/#/experiments/{experiment}/runs?compareRunsMode=CHART")
    page.get_by_placeholder("Search metric charts").fill(metric)
    page.get_by_label("Toggle visibility of runs").first.click()
    page.get_by_role("menuitemradio", name="Show all runs").click()
    page.locator("[data-component-id='fullscreen_button_chartcard']").first.click()
    expect(page.get_by_role("dialog").locator(".js-plotly-plot")).to_be_visible()
