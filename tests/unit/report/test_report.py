from __future__ import annotations

import base64
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
from fake_results import fake_study, log
from plotly.offline import get_plotlyjs

from coppice.errors import UserError
from coppice.report import law_sections, sections
from coppice.report.stage import write_report
from coppice.results import collection as tables


@pytest.fixture(scope="module")
def page(kept: Path) -> str:
    return page_of(kept)


def page_of(results: Path, study=None) -> str:
    write_report(study or fake_study(), results, results / "report")
    return (results / "report" / "index.html").read_text(encoding="utf-8")


def without_scripts(page: str) -> str:
    """The page as it is read where no script runs."""
    return re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.DOTALL)


class Balance(HTMLParser):
    """Collects text, and fails on tags that do not close."""

    VOID = frozenset({"meta", "br", "input", "hr", "img", "wbr"})

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text = ""

    def handle_starttag(self, tag: str, attributes: list) -> None:
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attributes: list) -> None:
        """A tag that closes itself."""

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_page_stands_alone(page: str) -> None:
    shown = without_scripts(page)
    parser = Balance()
    parser.feed(shown)
    assert parser.open == []
    assert len(re.findall("<script", page.replace(get_plotlyjs(), ""))) == 3  # the data, the library and the page's own
    assert not re.search(r"<script[^>]* src=", page)
    assert not re.search(r"<link|@import|url\((?!#)|https?://", shown)
    assert set(re.findall(r'<img[^>]* src="(.{19})', shown)) == {"data:image/svg+xml;"}
    assert get_plotlyjs() in page
    for text in (
        "10 of 12 nodes from small, medium", "2 nodes failed", "gptq-4", "6.05 \u00b1 0.59", "71%", "0.0400",
        "0.40% of the loss", "rmse 0.0100 nats per token", "Huber's loss (delta 0.001) of logarithmic residuals",
        "train on 1.4M tokens", "gamma is not identified", "decode_latency, s/token (cpu)",
        "no such thing", "2.13.0", "shipped", "pairs compared, Holm-adjusted", "0.749 \u00b1 0.039 ~",
    ):  # fmt: skip
        assert text in parser.text, text


def test_text_is_escaped(results: Path) -> None:
    hostile = "</svg><script>alert('x')</script>&"
    log(results, "compress", "small/broken-9", f"error: {hostile}\n")
    path = results / "evaluations/small/quality/metrics.json"
    content = json.loads(path.read_text())
    content["metrics"][0]["metric"] = f"perplexity_{hostile}"
    path.write_text(json.dumps(content))
    path = results / "laws/p2/fit.json"
    path.write_text(path.read_text().replace("There is one pruning rate", hostile.replace("/", "\\/")))
    tables.write_tables(fake_study(), results, results / "tables", partial=True)
    page = page_of(results)
    assert "<script>alert" not in page
    assert page.count("</script>") == 3
    assert page.count("&lt;script&gt;") >= 3
    ElementTree.parse(results / "report/frontier.svg")


def test_a_study_without_results_to_draw(results: Path) -> None:
    study = fake_study().model_copy(update={"recipes": [], "evaluations": {}, "laws": {}})
    (results / "laws/p2/fit.json").unlink()
    tables.write_tables(study, results, results / "tables")
    page = page_of(results, study)
    assert re.findall("<summary><h3>(.*?)</h3>", page) == ["Nodes", "Roofline", "Provenance"]
    assert "2 of 2 nodes" in page
    for name, message in (
        ("frontier", "No perplexity was measured."),
        ("curves", "No recovery was run."),
        ("layers", "No step compressed linears."),
    ):
        assert message in (results / f"report/{name}.svg").read_text()


def test_a_fit_of_nothing_and_a_single_node(results: Path) -> None:
    path = results / "laws/p2/fit.json"
    fit = json.loads(path.read_text())
    fit["parameters"] = {
        name: entry | {"value": None, "identified": False} for name, entry in fit["parameters"].items()
    }
    fit |= {"metrics": dict.fromkeys(fit["metrics"]), "recommendation": [], "profiles": {}, "points": 0, "runs": 0}
    fit["passes"] = {"ok": False, "reasons": ["No held-out test of it could be made."]}
    fit["units"] = {name: entry | {"scale": None} for name, entry in fit["units"].items()}
    path.write_text(json.dumps(fit))
    study = fake_study()
    study = study.model_copy(update={"recipes": [], "models": {"small": study.models["small"]}})
    tables.write_tables(study, results, results / "tables")
    assert "1 of 1 nodes" in page_of(results, study)


def section(page: str, title: str) -> str:
    return page.partition(f"<summary><h3>{title}</h3></summary>")[2].partition('<details class="section"')[0]


def cells_of(text: str) -> tuple[list[str], list[list[str]]]:
    """The titles and the rows of the first table in a text."""
    table = text.partition("<table>")[2].partition("</table>")[0]
    header, *rows = re.findall("<tr.*?</tr>", table, flags=re.DOTALL)
    titles = re.findall(r"<th(?: .*?)?>(.*?)</th>", header.replace("<wbr>", ""))
    return titles, [re.findall(r"<td(?: .*?)?>(.*?)</td>", row) for row in rows]


def test_lower_bounds_stand_beside_measured_times(page: str) -> None:
    roofline = section(page, "Roofline")
    titles, rows = cells_of(roofline)
    assert titles[:2] == ["node", "cost: cpu"]
    assert {"H200", "A6000"} <= set(titles[2:])
    cells = {row[0]: row[1:] for row in rows}
    assert cells["small"][0] == "11.0"
    assert cells["medium"][0] == ""
    assert all(cells["medium"][1:])
    assert re.search(r"[.;] (?:[^;]*, )?H200(?:, [^;:]*)?: ", roofline), "the source of a device's figures"


def test_decisions_show_the_held_out_error_of_their_law(page: str) -> None:
    decisions = section(page, "Decisions")
    assert "train on 1.4M tokens [900k, 2M]" in decisions
    assert decisions.count("Held-out error of law p2, later tokens: rmse 0.0120 [0.0100, 0.0200]") == 2
    assert "<td class=text>small/laco-25/full-1m/gptq-4</td>" in decisions
    assert "The predicted loss of small/laco-25 after 1M tokens" in decisions
    assert [f"{place}. " in decisions for place in (1, 2, 3, 4)] == [True, True, True, False]


def test_a_law_that_fails_its_test_recommends_nothing(results: Path) -> None:
    path = results / "laws/p2/fit.json"
    fit = json.loads(path.read_text())
    fit["passes"] = {"ok": False, "reasons": ["Its error in the held-out test 'later tokens' is 12.0%."]}
    path.write_text(json.dumps(fit))
    page = page_of(results)
    assert "fails its own test. Its error in the held-out test" in section(page, "Decisions")
    assert "nothing is recommended from it. Its error in the held-out test" in section(page, "Law: p2")
    assert "train on" not in page
    assert "Best at each size" in page


def test_a_law_shows_its_rivals_from_the_best_and_its_profile(page: str) -> None:
    law = section(page, "Law: p2")
    assert "The law passes its own tests" in law
    titles, rows = cells_of(law)
    assert titles[:3] == ["parameter", "value", "standard error"]
    assert ["D_C", "0.05000", "0.00500", "0.0400", "0.0600", "yes"] in rows
    titles, rows = cells_of(law.partition("Held out: later tokens")[2])
    assert titles[1] == "rmse, nats per token"
    assert rows == [
        ["p2 (this law)", "0.0120", "0.0100", "0.0200", "0.40%", "0", "0", "0", "93%"],
        ["without delta", "0.0200", "", "", "0.80%", "0.00800", "-0.00100", "0.0150", "7%"],
        ["the mean of the points fitted", "0.300", *[""] * 7],
    ]
    beyond = law.partition("Held out: larger model")[2]
    assert "p2 (this law): It needs three dense sizes." in beyond
    assert "without delta: Same." in beyond
    (profile,) = re.findall('src="data:image/svg.xml;base64,(.*?)"', law)
    assert "Profile of " in base64.b64decode(profile).decode()


def test_details_of_a_law_become_tables() -> None:
    details = {
        "best": [
            {"k": 4, "alone": False, "bits": 2e6, "probabilities": {"4": 0.75, "8": 0.25}, "stop": None},
            {"k": None, "alone": True, "bits": 0.5, "probabilities": None, "stop": None},
        ],
        "offsets": {"4": {"value": 1.5, "curve": [1, 2]}},
        "shares": {"a": 0.25, "b": 1},
        "tokens": 300,
        "base": "a sentence",
        "curves": {"4": [[1, 2]]},
        "many": [{"run": f"run {place}"} for place in range(45)],
    }
    numbers, best, offsets, shares, many = re.split("<h4>", "".join(law_sections._details(details)))
    assert cells_of(numbers)[1] == [["tokens", "300"]]
    assert cells_of(best) == (
        ["k", "alone", "bits", "probabilities 4", "probabilities 8"],
        [["4", "no", "2.00e+06", "0.750", "0.250"], ["", "yes", "0.500", "", ""]],
    )
    assert cells_of(offsets) == (["", "value"], [["4", "1.50"]])
    assert cells_of(shares)[1] == [["a", "0.250"], ["b", "1"]]
    assert len(cells_of(many)[1]) == 40
    assert "5 more are in fit.json" in many
    assert "<details><summary>40 rows" in many


def test_a_parameter_at_its_bound_is_not_called_identified_and_has_no_interval(results: Path) -> None:
    path = results / "laws/p2/fit.json"
    fit = json.loads(path.read_text())
    fit["parameters"]["E"] |= {"value": 0.0, "low": 0.0, "high": 0.0, "stderr": 0.0, "at_bound": True}
    fit["parameters"]["D_C"] |= {"at_bound": False}
    path.write_text(json.dumps(fit))
    rows = cells_of(section(page_of(results), "Law: p2"))[1]
    assert ["E", "0", "", "", "", "at its bound"] in rows
    assert ["D_C", "0.05000", "0.00500", "0.0400", "0.0600", "yes"] in rows


def test_a_measured_cost_stands_with_half_the_interquartile_range_of_its_repeats(page: str) -> None:
    costs = section(page, "Costs")
    titles, rows = cells_of(costs)
    assert titles == ["node", "decode_latency, s/token (cpu)"]
    assert {row[1] for row in rows} == {"0.0110 \u00b1 5.0e-04"}  # the spread is 0.001
    assert "\u00b1 is half the interquartile range of the repeats, not half a 95% interval." in costs


def test_comparisons(page: str) -> None:
    comparisons = section(page, "Comparisons")
    titles, rows = cells_of(comparisons)
    assert titles == ["evaluation", "task", "measure", "pairs compared", "significantly different"]
    # By hand: 5 nodes a model, of which the chain makes 2 pairs with a parent that is not dense. All answer alike.
    assert [row[2] for row in rows] == ["accuracy", "log_probability", "loss"]
    assert {row[4] for row in rows[:2]} == {"0"}
    assert int(rows[2][4]) > 0
    alike = comparisons.partition("<details>")[2]
    assert "pairs of neighbours in rank that are not significantly different" in alike
    titles, rows = cells_of(alike)
    assert titles[5:] == ["difference", "95% low", "high", "p", "Holm-adjusted p"]
    assert {row[2] for row in rows} >= {"accuracy"}
    assert all(float(row[8]) <= float(row[9]) for row in rows)
    assert "an interval that excludes 0 can still be non-significant" in alike
    flips = cells_of(comparisons.partition("flipped")[2])
    assert flips[0][2:4] == ["right \u2192 wrong", "wrong \u2192 right"]
    assert [row[0] for row in flips[1]] == sorted(row[0] for row in flips[1])
    assert len(flips[1]) == 8  # all nodes but the dense ones
    assert {tuple(row[2:5]) for row in flips[1]} == {("0", "0", "0.0%")}


def test_measures_of_a_task_and_of_states_stand_side_by_side(results: Path) -> None:
    for path in results.glob("evaluations/**/quality/metrics.json"):
        content = json.loads(path.read_text())
        perplexity = content["metrics"][0]["value"]
        content["metrics"] += [
            {"metric": "biographies_choice_probability", "value": 0.8, "stderr": 0.01, "unit": "probability"},
            {"metric": "biographies_brier", "value": 0.3, "stderr": 0.01, "unit": "squared error"},
            {"metric": "matrix_entropy_stories", "value": 1 - perplexity / 100, "stderr": 0.01, "unit": "ratio"},
        ]
        path.write_text(json.dumps(content))
    tables.write_tables(fake_study(), results, results / "tables", partial=True)
    page = page_of(results)
    titles, rows = cells_of(section(page, "From probabilities to accuracy"))
    assert titles == ["node", "accuracy", "choice probability", "Brier score"]
    assert {row[0]: row[2:] for row in rows}["small"] == ["0.800 \u00b1 0.020", "0.300 \u00b1 0.020"]
    titles, rows = cells_of(section(page, "Hidden states"))
    assert titles[:3] == ["node", "perplexity", "matrix entropy"]
    cells = {row[0]: row for row in rows}
    # By hand: 1 - e^1.8 / 100, and the same with 1.35 times the perplexity.
    assert cells["small"][2] == "0.940"
    assert cells["small/wanda-50"][2] == "0.918 (-0.021)"
    titles, rows = cells_of(section(page, "Signals"))
    assert ["validation_loss_monotonicity", "1", "1.00"] in [row[1:4] for row in rows]


def test_connectivity() -> None:
    details = json.dumps({"regime": "II-B", "regime_meaning": "connected, similar outputs", "task": "stories"})
    rows = [
        {"node": "small/wanda-50/full@1", "evaluation": "basins", "metric": f"{name}_stories", "value": value}
        | {"details": details}
        for name, value in (("mode_connectivity", -0.01), ("barrier_loss", 0.02), ("cka", 0.99))
    ]
    titles, cells = cells_of(sections._connectivity_table(rows))
    assert titles[3:] == ["mode connectivity", "barrier, nats/token", "CKA"]
    regime = "II-B: connected, similar outputs"
    assert cells == [["small/wanda-50/full@1", "stories", regime, "-0.0100", "0.0200", "0.990"]]


def test_same_tables_give_the_same_page(kept: Path, page: str) -> None:
    assert page == page_of(kept)


def test_tables_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        write_report(fake_study(), tmp_path, tmp_path / "report")
    assert not (tmp_path / "report").exists()
