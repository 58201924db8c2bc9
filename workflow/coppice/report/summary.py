"""A study's results in a terminal: what every node weighs and can do, and what the laws say."""

from __future__ import annotations

import argparse
from pathlib import Path

from coppice.decisions.fitted import refusal
from coppice.decisions.stage import answer_lines, overview
from coppice.formatting import INTERVALS, format_table, number, with_interval, wrapped
from coppice.records.fit import FitRecord
from coppice.records.layout import ResultsLayout
from coppice.results.reading import read_table
from coppice.results.schemas import Row
from coppice.uncertainty import interval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", required=True, type=Path, help="folder of the study's results")


def run(arguments: argparse.Namespace) -> None:
    print(summary(arguments.results))


def summary(results: Path) -> str:
    """The results as plain text of at most 120 columns. Raises UserError when the tables are missing."""
    results = Path(results)
    wanted = ("nodes", "metrics", "comparisons", "failures")
    tables = {name: read_table(ResultsLayout(results).tables, name).to_pylist() for name in wanted}
    lines = [_heading(results, tables), "", *_node_lines(tables["nodes"], tables["metrics"], tables["comparisons"])]
    for row in tables["failures"]:
        lines += ["", *wrapped(f"FAILED {row['node'] or row['stage']}: {row['error']} (log: {results / row['log']})")]
    for name, path in ResultsLayout(results).fits.items():
        lines += ["", *law_lines(name, FitRecord.read(path))]
    lines += decision_lines(results, tables)
    report = ResultsLayout(results).page
    lines += [
        "",
        *([f"Report:  {report}"] if report.exists() else []),
        "Compare: make ui  (MLflow, all runs with their files)",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _heading(results: Path, tables: dict[str, list[Row]]) -> str:
    failed = len(tables["failures"])
    said = [_number_of(len(tables["nodes"]), "node"), *([_number_of(failed, "failure")] if failed else [])]
    return f"Study {results.resolve().name}: {', '.join(said)}"


def _number_of(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def names_of(metrics: list[Row], prefix: str = "", suffix: str = "") -> list[tuple[str, str]]:
    """The pairs (evaluation, metric) whose metric begins and ends so, in order."""
    found = {(row["evaluation"], row["metric"]) for row in metrics}
    return sorted(pair for pair in found if pair[1].startswith(prefix) and pair[1].endswith(suffix))


def perplexities(metrics: list[Row]) -> list[tuple[str, str]]:
    """The pairs (evaluation, metric) that are perplexities, one a protocol."""
    return names_of(metrics, prefix="perplexity_")


def scores(metrics: list[Row]) -> list[tuple[str, str]]:
    """The pairs (evaluation, metric) that are accuracies of benchmark tasks."""
    return names_of(metrics, suffix="_acc")


def measured(row: Row | None, digits: int = 3) -> str:
    """A metric with its 95% interval, blank where it was not measured."""
    return "" if row is None or row["value"] is None else with_interval(row["value"], interval(row), digits)


def undistinguished(comparisons: list[Row]) -> set[tuple[str, str, str]]:
    """(node, evaluation, metric) where a node is not told apart from the next better one of its dense model."""
    metric = {"accuracy": "{}_acc", "loss": "perplexity_{}"}
    return {
        (row["node"], row["evaluation"], metric[row["measure"]].format(row["task"]))
        for row in comparisons
        if row["relation"] == "next" and row["measure"] in metric and not row["distinguishable"]
    }


def comparisons_note(comparisons: list[Row]) -> str:
    """What the mark of `undistinguished` means, and how many pairs were compared."""
    families = {(row["evaluation"], row["task"], row["measure"]): row["family"] for row in comparisons}
    return (
        "~ is not told apart from the next better node of its dense model, by a paired bootstrap of the items at 5%: "
        f"{sum(families.values())} pairs compared; Holm's adjustment within each of {len(families)} measures."
    )


def _node_lines(nodes: list[Row], metrics: list[Row], comparisons: list[Row]) -> list[str]:
    """The tree of nodes as a table: size, bits, the first perplexity, the first score, what recovery won back."""
    perplexity, score = (pairs[0] if pairs else None for pairs in (perplexities(metrics), scores(metrics)))
    cells = {(row["node"], row["evaluation"], row["metric"]): row for row in metrics}
    alike = undistinguished(comparisons)
    titles = [
        "node",
        "MB",
        "bits/weight",
        *(pair[1].replace("_", " ") for pair in (perplexity, score) if pair),
        "recovered",
    ]
    table = [titles]
    for node in sorted(nodes, key=lambda row: row["node"].split("/")):
        name = "  " * node["depth"] + node["node"].rpartition("/")[2]
        measurements = [
            measured(cells.get((node["node"], *pair))) + (" ~" if (node["node"], *pair) in alike else "")
            for pair in (perplexity, score)
            if pair
        ]
        share = "" if node["recovered_share"] is None else f"{node['recovered_share']:.0%}"
        size = number(node["stored_bytes"] / 1e6)
        table.append([name, size, f"{node['bits_per_weight']:.2f}", *measurements, share])
    notes = []
    if any(node["recovered_share"] is not None for node in nodes):
        notes += ["recovered: share won back of the validation loss that compression cost."]
    if perplexity or score:
        notes += [INTERVALS]
    if alike:
        notes += wrapped(comparisons_note(comparisons))
    return format_table(table) + ([""] if notes else []) + notes


def law_lines(name: str, fit: FitRecord) -> list[str]:
    """What a law says: its formula, the parameters that the points identify, its errors, and its advice."""
    target, unit = fit.target_and_unit
    rmse = fit.metrics.get("rmse")
    r2 = fit.metrics.get("r2")
    facts = [f"{fit.points} points of {fit.runs} runs"]
    facts += [] if r2 is None else [f"R2 {r2:.4f}"]
    facts += [] if rmse is None else [f"rmse {number(rmse)} {unit}".rstrip()]
    facts += ["passes its own tests"] if fit.passes is not None and fit.passes.ok else []
    lines = [*wrapped(f"Law {name}: {', '.join(facts)}"), *wrapped(fit.source["equation"], "  ")]
    known = {key: value for key, value in fit.parameters.items() if value.identified}
    for key, value in known.items():
        between = "" if value.low is None else f"   [{number(value.low)}, {number(value.high)}]"
        # There the interval is one of the bounds of the search.
        between = "   at its bound" if value.at_bound else between
        lines.append(f"  {key:<8}{number(value.value):>10}{between}")
    if unknown := [key for key in fit.parameters if key not in known]:
        lines += wrapped(f"Not identified by these points: {', '.join(unknown)}.", "  ")
    for test, error in fit.own_errors.items():
        sentence = error.sentence(target, unit)
        lines += wrapped(f"Held out, {test.replace('_', ' ')}: {sentence}{_best_form(fit, test)}", "  ")
    reason = refusal(name, fit)
    for sentence in [str(entry["sentence"]) for entry in fit.recommendation] if reason is None else [reason]:
        lines += wrapped(sentence, "  ")
    for note in fit.notes:
        lines += wrapped(note, "  ")
    return lines


def _best_form(fit: FitRecord, test: str) -> str:
    """Which of the rival forms has the lowest error in a test; nothing where there was no rival."""
    ranks = fit.ranking.get(test, [])
    if len(ranks) < 2:
        return ""
    best = ranks[0].form
    if best == fit.law:
        return f" Best of {len(ranks)} forms."
    return f" Best of {len(ranks)} forms: {best.replace('_', ' ')}, rmse {number(ranks[0].rmse)}."


def decision_lines(results: Path, tables: dict[str, list[Row]]) -> list[str]:
    """The best nodes by size, and the next run; what laws recommend stands with them, the rest in `recommend`."""
    answers = [answer for answer in overview(results, tables, top=1) if "recommendation" not in answer]
    lines = []
    for answer in answers:
        lines += ["", *answer_lines(answer if "law" in answer else answer | {"sentences": []})]
    return lines
