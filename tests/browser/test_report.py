"""The page of a study in a real browser: charts, switches, paired tests, keyboard, print and phone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from fake_results import fake_study, write_results

from coppice.report.stage import write_report
from coppice.results import collection as tables
from coppice.results.reading import read_table

A, B = "small/laco-25/full-1m", "small/laco-25"
ANSWERS = "quality/biographies_acc"
DOCUMENTS = np.arange(10, 74)  # tokens of each
QUESTIONS = 120
CHART = "document.getElementById('frontier-chart')"


def scatter_items(results: Path) -> None:
    """Gives every node items that differ at random."""
    generator = np.random.default_rng(0)
    hardness = generator.normal(size=len(DOCUMENTS))
    for place, path in enumerate(sorted(results.glob("evaluations/**/quality/items.parquet"))):
        node = str(path.parent.parent.relative_to(results / "evaluations"))
        level = 1.5 + 0.05 * place
        loss = DOCUMENTS * (level + 0.3 * hardness + 0.1 * generator.normal(size=len(DOCUMENTS)))
        right = generator.random(QUESTIONS) < 0.9 - 0.05 * place
        pq.write_table(_items(node, loss, right), path)


def _items(node: str, loss: np.ndarray, right: np.ndarray) -> pa.Table:
    questions, documents = len(right), len(loss)
    rows = 2 * questions + documents
    return pa.table(
        {
            "node": [node] * rows,
            "task": ["biographies"] * (2 * questions) + ["stories"] * documents,
            "item": [str(place // 2) for place in range(2 * questions)] + [str(place) for place in range(documents)],
            "choice": [0, 1] * questions + [0] * documents,
            "log_likelihood": [-1.5, -2.5] * questions + (-loss).tolist(),
            "length": [7] * (2 * questions) + DOCUMENTS.tolist(),
            "correct": np.repeat(right, 2).tolist() + [None] * documents,
            "answer": [bool(one) == first for one in right for first in (True, False)] + [None] * documents,
        }
    )


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """The page's file, and the results that it shows."""
    results = write_results(tmp_path_factory.mktemp("study") / "demo")
    scatter_items(results)
    tables.write_tables(fake_study(), results, results / "tables", partial=True)
    write_report(fake_study(), results, results / "report")
    return results / "report" / "index.html", results


@pytest.fixture(scope="module")
def opened(chromium, study) -> Iterator:
    """One page for all tests; whatever the browser complained about or asked for is in `page.said`."""
    page = chromium.new_page(viewport={"width": 1280, "height": 900}, color_scheme="light")
    page.set_default_timeout(30_000)
    page.set_default_navigation_timeout(90_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(f"{message.type}: {message.text}"))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("request", lambda request: said.append(request.url))
    page.goto(study[0].as_uri())
    page.said = said
    yield page
    page.close()


@pytest.fixture
def page(opened):
    """The page in its first state, after which it must have said nothing and asked for nothing but itself."""
    opened.set_viewport_size({"width": 1280, "height": 900})
    opened.emulate_media(media="screen", color_scheme="light")
    view(opened, "")
    yield opened
    assert [line for line in opened.said if not re.match(r"file://.*/index\.html", line)] == []


def view(page, state: str) -> None:
    """Shows the state that the address would name."""
    page.evaluate("state => { location.hash = state; }", state)
    painted(page)


def painted(page) -> None:
    page.evaluate(
        "() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(() => setTimeout(done))))"
    )


def shown(page) -> set[str]:
    """The nodes whose markers are in the chart."""
    return set(page.evaluate(f"{CHART}.data.flatMap(trace => trace.customdata ?? [])"))


def place(page, node: str) -> dict[str, float]:
    """The middle of a node's marker in the window, in pixels."""
    return page.evaluate(
        """node => {
        const chart = document.getElementById('frontier-chart');
        const trace = chart.data.find(({customdata}) => customdata?.includes(node));
        const point = trace.customdata.indexOf(node);
        const [box, {xaxis, yaxis}] = [chart.getBoundingClientRect(), chart._fullLayout];
        return {
            x: box.x + xaxis._offset + xaxis.d2p(trace.x[point]),
            y: box.y + yaxis._offset + yaxis.d2p(trace.y[point]),
        };
    }""",
        node,
    )


def title(page, axis: str) -> str:
    return page.evaluate(f"{CHART}.layout.{axis}axis.title.text")


def switch(page, group: str, value: str):
    return page.locator(f"#frontier input[data-group={group}][value='{value}']")


def numbers(text: str) -> list[float]:
    return [float(found) for found in re.findall(r"-?\d+\.?\d*(?:e-?\d+)?", text.replace("\u2212", "-"))]


def test_the_page_draws_every_node_and_asks_for_nothing(page) -> None:
    assert len(shown(page)) == 10
    assert page.locator("h1").inner_text() == "demo"
    assert "10 of 10 nodes shown" in page.locator("#frontier .status").inner_text()
    assert page.locator("#failures li").count() == 2
    assert page.locator("[data-title^='Zoom']").count() > 0
    assert page.locator("[data-title^='Share']").count() == 0, "no button sends a chart away"
    assert "no such thing" in page.locator("#failures").inner_text()
    names = page.evaluate("Object.keys(window).filter(name => /^(study|state|nodes|draw|frontier)/.test(name))")
    assert set(names) <= {"study", "frontier", "nodes"}, "only the elements' ids may stand in the window"


def test_switches_hide_and_show(page) -> None:
    switch(page, "model", "small").uncheck()
    painted(page)
    assert shown(page) == {node for node in shown(page) if node.startswith("medium")}
    assert len(shown(page)) == 5
    switch(page, "family", "recover").uncheck()
    painted(page)
    assert len(shown(page)) == 4
    page.get_by_role("button", name="Last step: none").click()
    painted(page)
    assert shown(page) == set()
    assert "0 of 10 nodes shown" in page.locator("#frontier .status").inner_text()
    switch(page, "model", "small").check()
    page.get_by_role("button", name="Last step: all").click()
    painted(page)
    assert len(shown(page)) == 10
    switch(page, "budget", "0").uncheck()
    painted(page)
    assert shown(page) == {f"{model}/laco-25/full-1m{end}" for model in ("small", "medium") for end in ("", "/gptq-4")}


def test_front_only(page) -> None:
    page.get_by_label("Pareto front only").check()
    painted(page)
    places = sorted((mark["x"], mark["y"]) for mark in (place(page, node) for node in shown(page)))
    assert 0 < len(places) < 10
    assert [y for _, y in places] == sorted(y for _, y in places), "each larger one stands lower, which is better"


def test_axes_and_scale_change(page) -> None:
    page.get_by_label("Horizontal axis", exact=True).select_option("bits_per_weight")
    page.get_by_label("Vertical axis", exact=True).select_option(ANSWERS)
    painted(page)
    assert "bits per weight" in title(page, "x")
    assert "accuracy, biographies, higher is better" in title(page, "y")
    kind = f"{CHART}.layout.xaxis.type"
    assert page.evaluate(kind) == "log"
    page.get_by_label("Log horizontal axis").uncheck()
    painted(page)
    assert page.evaluate(kind) == "linear"


def test_intervals_can_be_left_out(page) -> None:
    bars = "document.querySelectorAll('#frontier-chart .yerror').length"
    assert page.evaluate(bars) == 10
    page.get_by_label("95% intervals").uncheck()
    painted(page)
    assert page.evaluate(bars) == 0


def row_of(study: tuple[Path, Path], measure: str, node: str, other: str) -> dict:
    """The row of the table of comparisons."""
    rows = read_table(study[1] / "tables", "comparisons").to_pylist()
    return next(row for row in rows if (row["measure"], row["node"], row["other"]) == (measure, node, other))


def pair_rows(page) -> dict[str, list[str]]:
    """The cells of the paired tests by quality."""
    rows = page.locator("#pair table").first.locator("tbody tr").all()
    return {cells[0]: cells[1:] for cells in (row.locator("td").all_inner_texts() for row in rows)}


def test_a_pair_shows_the_tests_of_the_table_in_both_directions(page, study) -> None:
    row = row_of(study, "loss", A, B)
    view(page, f"a={A}&b={B}")
    verdict, difference, ends, p_value, adjusted = pair_rows(page)["perplexity, stories"]
    assert verdict == ("B is better" if row["difference"] > 0 else "A is better") if row["distinguishable"] else verdict
    assert numbers(difference)[0] == pytest.approx(row["difference"], rel=6e-3)
    assert numbers(ends)[:2] == pytest.approx([row["low"], row["high"]], rel=6e-3)
    assert numbers(p_value)[-1] <= numbers(adjusted)[-1]
    view(page, f"a={B}&b={A}")
    turned = pair_rows(page)["perplexity, stories"]
    assert numbers(turned[1])[0] == -numbers(difference)[0]
    assert numbers(turned[2])[:2] == [-end for end in reversed(numbers(ends)[:2])]
    assert "an interval that excludes 0 can still be non-significant" in page.locator("#pair .note").last.inner_text()


def test_flips_are_those_of_the_table(page, study) -> None:
    row = row_of(study, "accuracy", A, "small")
    view(page, f"a={A}&b=small")
    sentence = page.locator("#pair .note", has_text="McNemar").inner_text()
    lost, gained = row["right_to_wrong"], row["wrong_to_right"]
    assert numbers(sentence)[:3] == [lost + gained, lost, gained]
    assert lost + gained > 0
    view(page, f"a=small&b={A}")
    sentence = page.locator("#pair .note", has_text="McNemar").inner_text()
    assert numbers(sentence)[:3] == [lost + gained, gained, lost]
    assert numbers(pair_rows(page)["accuracy, biographies"][1])[0] == pytest.approx(-100 * row["difference"], rel=6e-3)


def test_a_pair_that_the_table_lacks_is_said_to_be_untested(page) -> None:
    view(page, f"a={A}&b=medium/wanda-50")
    assert (
        "tables/comparisons.parquet holds each node against its dense model" in page.locator("#pair .note").inner_text()
    )
    assert page.locator("#pair td", has_text="(").count() >= 4, "both values stand with their intervals"


def test_two_clicks_choose_a_pair(page) -> None:
    def click(node: str) -> None:
        page.locator("#frontier-chart").scroll_into_view_if_needed()
        at = place(page, node)
        page.mouse.move(at["x"], at["y"])
        page.wait_for_function(
            "node => document.querySelector('#frontier-chart .hoverlayer tspan')?.textContent === node", arg=node
        )
        page.mouse.click(at["x"], at["y"])
        page.wait_for_function("node => document.querySelector('#node h3')?.textContent === node", arg=node)

    click(B)
    click(A)
    assert [page.get_by_label(side, exact=True).input_value() for side in ("A", "B")] == [A, B]
    assert len(pair_rows(page)) == 2
    assert "manifest.json" in page.locator("#node .command code").first.inner_text()


def test_keyboard_alone(page) -> None:
    page.evaluate("document.activeElement.blur(); scrollTo(0, 0)")
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.className") == "skip"
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "frontier"
    for _ in range(30):
        page.keyboard.press("Tab")
        if page.evaluate("document.activeElement.dataset.group"):
            break
    first = page.evaluate("document.activeElement.value")
    page.keyboard.press("Space")
    painted(page)
    assert shown(page) == {node for node in shown(page) if not node.startswith(first)} != set()
    page.keyboard.press("Enter")
    painted(page)
    assert len(shown(page)) == 10
    ring = page.evaluate("getComputedStyle(document.activeElement.closest('label')).outlineStyle")
    assert ring == "solid"
    page.locator("#node-list").focus()
    for key in ("Home", "ArrowDown", "ArrowDown", "ArrowUp", "Enter"):
        page.keyboard.press(key)
    painted(page)
    assert page.locator("#node h3").inner_text() == page.locator("#node-list [role=option]").nth(1).get_attribute(
        "title"
    )
    assert page.locator("#node-list [aria-selected=true]").count() == 1


def test_every_control_has_a_name(page) -> None:
    view(page, f"a={A}&b={B}")
    nameless = page.evaluate("""() => [...document.querySelectorAll('button, input, select, [tabindex="0"]')]
        .filter(one => !(one.getAttribute('aria-label') || one.labels?.[0]?.textContent || one.textContent.trim()))
        .map(one => one.outerHTML)""")
    assert nameless == []


def test_the_charts_have_tables(page) -> None:
    page.get_by_text("These points as a table").click()
    page.get_by_text("These curves as a table").click()
    assert page.locator("#frontier details tbody tr").count() == 10
    assert page.locator("#frontier .listed tbody tr").count() == 5, "the front has its own"
    assert page.locator("#recovery tbody tr").count() == 12
    for part in ("frontier", "recovery"):
        page.locator(f"#{part} summary", has_text="as a table").click()


def test_recovery_runs_and_extrapolation(page) -> None:
    page.locator("#recovery-chart").scroll_into_view_if_needed()
    page.wait_for_selector("#recovery-chart .points path")  # it is drawn when it comes near
    data = "document.getElementById('recovery-chart').data.map(trace => trace.name)"
    names = page.evaluate(data)
    assert {f"{A}: p2", f"{A}: band", A} <= set(names)
    dashes = page.evaluate(
        f"document.getElementById('recovery-chart').data.filter(t => t.name === '{A}: p2').map(t => t.line.dash)"
    )
    assert dashes == ["solid", "6px,4px"]
    assert page.evaluate("document.getElementById('recovery-chart').layout.shapes[0].x0") == 1_000_000
    page.locator(f"#recovery input[value='{A}']").uncheck()
    painted(page)
    assert A not in page.evaluate(data)


def test_dark(page) -> None:
    colors = """() => [getComputedStyle(document.body).backgroundColor,
        getComputedStyle(document.querySelector('#frontier-chart .xtitle')).fill]"""
    light = page.evaluate(colors)
    page.emulate_media(color_scheme="dark")
    painted(page)
    dark = page.evaluate(colors)
    assert all(one != other for one, other in zip(light, dark, strict=True))
    page.locator("#theme").click()
    painted(page)
    assert page.evaluate(colors) == light, "the button turns it back"


def test_narrow(page) -> None:
    page.set_viewport_size({"width": 360, "height": 740})
    view(page, f"a={A}&b={B}")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("document.getElementById('frontier-chart').offsetWidth") <= 360


WIDER = """id => [...document.querySelectorAll(`#${id} .wide`)]
    .filter(table => table.offsetParent && table.scrollWidth > table.clientWidth)
    .map(table => `${table.getAttribute('aria-label')}: ${table.scrollWidth} of ${table.clientWidth}`)"""


def test_on_a_phone_nothing_is_wider_than_the_page_and_the_tables_of_nodes_need_no_scrolling(page) -> None:
    page.set_viewport_size({"width": 375, "height": 740})
    view(page, f"a={A}/gptq-4&b=medium/laco-25/full-1m/gptq-4")
    for part in ("frontier", "recovery", "node", "pair", "reproduce", "tables"):
        right = page.evaluate(f"document.getElementById('{part}').getBoundingClientRect().right")
        assert right <= 375, part
    for part in ("frontier", "node", "pair"):
        assert page.evaluate(WIDER, part) == []
    right = page.evaluate("""() => [...document.querySelectorAll('#pair th')]
        .map(cell => cell.getBoundingClientRect().right).at(-1)""")
    assert right <= 375, "B stands in sight"


def test_a_table_that_goes_on_beyond_its_edge_shows_a_shadow_there(page) -> None:
    page.set_viewport_size({"width": 375, "height": 740})
    view(page, "")
    page.locator("#section-nodes > summary").click()
    nodes = page.locator("#section-nodes .wide")
    assert nodes.evaluate("table => table.scrollWidth > table.clientWidth")
    nodes.evaluate("table => { table.scrollLeft = 0; }")
    assert darkest_at_the_right_edge(nodes) < 200
    nodes.evaluate("table => { table.scrollLeft = table.scrollWidth; }")
    assert darkest_at_the_right_edge(nodes) > 230, "nothing is left beyond it"
    page.locator("#section-nodes > summary").click()


def darkest_at_the_right_edge(table) -> int:
    """The grey at the right end of the empty line above the text: 0 black to 255 white."""
    script = """async (element, bytes) => {
        const image = await createImageBitmap(new Blob([new Uint8Array(bytes)], {type: "image/png"}));
        const context = new OffscreenCanvas(image.width, image.height).getContext("2d");
        context.drawImage(image, 0, 0);
        const pixels = context.getImageData(image.width - 2, 2, 1, 4).data;
        return Math.min(...pixels.filter((_, place) => place % 4 === 0));
    }"""
    return table.evaluate(script, list(table.screenshot()))


def test_costs_stand_with_half_the_interquartile_range_of_their_repeats(page) -> None:
    view(page, f"a={A}&b={B}")
    page.locator("#pair summary", has_text="Costs, measured").click()
    cells = page.locator("#pair details:last-child tr", has_text="decode latency, cpu").first.inner_text()
    # The fake latency is 11 ms with an interquartile range of 1 ms.
    assert cells.replace("\u00a0", " ").split("\t")[1:] == ["11.0 ms/token \u00b1 500 \u00b5s/token"] * 2
    assert "\u00b1 is half the interquartile range" in page.locator("#pair details .note").last.inner_text()
    page.locator("#node summary", has_text="Costs, measured").click()
    # The table is made when it is opened.
    page.locator("#node details th", has_text="half the interquartile range of the repeats").wait_for()
    assert "95% interval" not in page.locator("#node details th").all_inner_texts()


def test_print_has_the_key_of_the_runs_and_no_gap_behind_the_chart(page) -> None:
    page.locator("#recovery-chart").scroll_into_view_if_needed()
    page.wait_for_selector("#recovery-chart .points path")
    page.locator("#recovery input[value='medium/laco-25/full-1m']").uncheck()
    painted(page)
    page.emulate_media(media="print")
    painted(page)
    keys = [chip.inner_text() for chip in page.locator("#recovery .runs .chip").all() if chip.is_visible()]
    assert keys == [A]
    assert not page.get_by_label("Runs: all").is_visible()
    chart = "document.getElementById('recovery-chart')"
    assert page.evaluate(f"{chart}.offsetHeight") == page.evaluate(f"{chart}.layout.height")


def test_print_has_the_tables_that_are_open(page) -> None:
    page.emulate_media(media="print")
    painted(page)
    assert not page.locator("#tables").is_visible(), "none is open"
    page.emulate_media(media="screen")
    page.locator("#section-costs > summary").click()
    page.emulate_media(media="print")
    painted(page)
    assert page.locator("#section-costs td").first.is_visible()
    assert not page.locator("#section-nodes").is_visible()
    page.emulate_media(media="screen")
    page.locator("#section-costs > summary").click()


def test_print_is_light_and_without_switches(page) -> None:
    view(page, "theme=dark")
    page.emulate_media(media="print", color_scheme="dark")
    painted(page)
    assert not page.locator(".controls").first.is_visible()
    assert not page.get_by_label("Last step: all").is_visible()
    assert switch(page, "model", "small").is_visible(), "the models and steps stay, as the legend"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert page.evaluate("document.getElementById('frontier-chart').layout.width") <= 700
    assert len(shown(page)) == 10


def test_the_address_restores_the_view(page, study) -> None:
    switch(page, "model", "small").uncheck()
    page.get_by_label("Vertical axis", exact=True).select_option(ANSWERS)
    page.get_by_label("Names").uncheck()
    painted(page)
    page.wait_for_url("**names=0**no-model=small**")  # it is written after the frame
    address = page.url
    view(page, "")
    assert len(shown(page)) == 10
    page.goto(study[0].as_uri() + "#no-model=nobody&y=nothing&a=small")
    page.goto(address)
    painted(page)
    assert len(shown(page)) == 5
    assert "accuracy" in title(page, "y")
    assert not page.get_by_label("Names").is_checked()


def test_without_script_the_figures_and_tables_are_there(chromium, study) -> None:
    context = chromium.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(study[0].as_uri())
    assert page.locator("noscript img").count() == 3
    assert page.locator("#tables details").count() >= 5
    assert not page.locator("#interactive").is_visible()
    context.close()
