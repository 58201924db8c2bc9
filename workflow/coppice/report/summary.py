"""`coppice summary`: a study's results in a terminal: sizes, qualities, laws and recommendations."""

from __future__ import annotations

import argparse
from pathlib import Path

from coppice.decisions.fitted import refusal
from coppice.decisions.stage import answer_lines, overview
from coppice.formatting import INTERVALS, format_table, number, wrap_lines
from coppice.records.fit import FitRecord
from coppice.records.layout import ResultsLayout
from coppice.report.view import comparisons_note, format_metric, indistinct_from_next, perplexities, scores
from coppice.results.reading import read_table
from coppice.results.schemas import Row


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--results", required=True, type=Path, help="folder of the study's results")


def run(arguments: argparse.Namespace) -> None:
    print(summary(arguments.results))


def summary(results: Path) -> str:
    """The results as plain text of at most 120 columns. Raises UserError when the tables are missing."""
    layout = ResultsLayout(Path(results))
    names = ("nodes", "metrics", "comparisons", "failures")
    tables = {name: read_table(layout.tables, name).to_pylist() for name in names}
    lines = [_heading(results, tables), "", *_node_lines(tables["nodes"], tables["metrics"], tables["comparisons"])]
    for row in tables["failures"]:
        lines += [
            "",
            *wrap_lines(f"FAILED {row['node'] or row['stage']}: {row['error']} (log: {results / row['log']})"),
        ]
    for name, path in layout.fits.items():
        lines += ["", *law_lines(name, FitRecord.read(path))]
    lines += decision_lines(results, tables)
    lines += [
        "",
        *([f"Report:  {layout.page}"] if layout.page.exists() else []),
        "Compare: make ui  (MLflow, all runs with their files)",
    ]
    return "\n".join(line.rstrip() for line in lines)


def _heading(results: Path, tables: dict[str, list[Row]]) -> str:
    failed = len(tables["failures"])
    counts = [_number_of(len(tables["nodes"]), "node"), *([_number_of(failed, "failure")] if failed else [])]
    return f"Study {results.resolve().name}: {', '.join(counts)}"


def _number_of(count: int, what: str) -> str:
    return f"{count} {what}" if count == 1 else f"{count} {what}s"


def _node_lines(nodes: list[Row], metrics: list[Row], comparisons: list[Row]) -> list[str]:
    """The tree of nodes as a table: size, bits, the first perplexity, the first score, the recovered share."""
    perplexity, score = (pairs[0] if pairs else None for pairs in (perplexities(metrics), scores(metrics)))
    cells = {(row["node"], row["evaluation"], row["metric"]): row for row in metrics}
    alike = indistinct_from_next(comparisons)
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
            format_metric(cells.get((node["node"], *pair))) + (" ~" if (node["node"], *pair) in alike else "")
            for pair in (perplexity, score)
            if pair
        ]
        share = "" if node["recovered_share"] is None else f"{node['recovered_share']:.0%}"
        size = number(node["stored_bytes"] / 1e6)
        table.append([name, size, f"{node['bits_per_weight']:.2f}", *measurements, share])
    notes = []
    if any(node["recovered_share"] is not None for node in nodes):
        notes += ["recovered: share of the increase in validation loss that recovery regained."]
    if perplexity or score:
        notes += [INTERVALS]
    if alike:
        notes += wrap_lines(comparisons_note(comparisons))
    return format_table(table) + ([""] if notes else []) + notes


def law_lines(name: str, fit: FitRecord) -> list[str]:
    """A law: its formula, the parameters that the points identify, its errors, and its recommendations."""
    target, unit = fit.target_and_unit
    rmse = fit.metrics.get("rmse")
    r2 = fit.metrics.get("r2")
    facts = [f"{fit.points} points of {fit.runs} runs"]
    facts += [] if r2 is None else [f"R2 {r2:.4f}"]
    facts += [] if rmse is None else [f"rmse {number(rmse)} {unit}".rstrip()]
    facts += ["passes its own tests"] if fit.passes is not None and fit.passes.ok else []
    lines = [*wrap_lines(f"Law {name}: {', '.join(facts)}"), *wrap_lines(fit.source["equation"], "  ")]
    known = {key: value for key, value in fit.parameters.items() if value.identified}
    for key, value in known.items():
        between = "" if value.low is None else f"   [{number(value.low)}, {number(value.high)}]"
        # At a bound the interval is that of the search.
        between = "   at its bound" if value.at_bound else between
        lines.append(f"  {key:<8}{number(value.value):>10}{between}")
    if unknown := [key for key in fit.parameters if key not in known]:
        lines += wrap_lines(f"Not identified by these points: {', '.join(unknown)}.", "  ")
    for test, error in fit.own_errors.items():
        sentence = error.sentence(target, unit)
        lines += wrap_lines(f"Held out, {test.replace('_', ' ')}: {sentence}{_best_form(fit, test)}", "  ")
    reason = refusal(name, fit)
    for sentence in [str(entry["sentence"]) for entry in fit.recommendation] if reason is None else [reason]:
        lines += wrap_lines(sentence, "  ")
    for note in fit.notes:
        lines += wrap_lines(note, "  ")
    return lines


def _best_form(fit: FitRecord, test: str) -> str:
    """The form with the lowest error in a test; empty without rivals."""
    ranks = fit.ranking.get(test, [])
    if len(ranks) < 2:
        return ""
    best = ranks[0].form
    if best == fit.law:
        return f" Best of {len(ranks)} forms."
    return f" Best of {len(ranks)} forms: {best.replace('_', ' ')}, rmse {number(ranks[0].rmse)}."


def decision_lines(results: Path, tables: dict[str, list[Row]]) -> list[str]:
    """The best nodes by size and the next run. Recommendations of laws are printed with the laws."""
    answers = [answer for answer in overview(results, tables, top=1) if "recommendation" not in answer]
    lines = []
    for answer in answers:
        lines += ["", *answer_lines(answer if "law" in answer else answer | {"sentences": []})]
    return lines
