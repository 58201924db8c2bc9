"""`coppice show`: a node's lineage, sizes and metrics in a terminal, from its manifest, evaluations and tables."""

from __future__ import annotations

import argparse
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from pydantic import JsonValue

from coppice import storage
from coppice.errors import UserError
from coppice.formatting import (
    INTERVALS,
    format_table,
    human_count,
    join_first,
    join_words,
    number,
    reproduce_command,
    wrap_lines,
)
from coppice.records.layout import ResultsLayout
from coppice.records.manifest import Manifest
from coppice.records.metrics import Metrics
from coppice.records.node_name import NodeName
from coppice.report.view import format_metric
from coppice.results.failures import failed_jobs, final_error
from coppice.results.lookup import known_nodes, match_node
from coppice.results.measurements import Measurements, rows_of
from coppice.results.nodes import curve_rows, recovery_losses
from coppice.results.reading import read_table
from coppice.results.schemas import Row

REQUESTED = ("_requested", "_asked")  # of a layer's record: what the step's options request; the older suffix is _asked
HIGHER_IS_WORSE = ("error", "weight_error", "truncation_error")
POINTS = 6  # of a recovery's curve
LOG_LINES = 8


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("node", help="the node, or the end of its name where that is enough")
    parser.add_argument(
        "--results", type=Path, default=Path("results/demo"), help="folder of the results (default: results/demo)"
    )


def run(arguments: argparse.Namespace) -> None:
    print(show(arguments.results, arguments.node))


def show(results: Path, pattern: str) -> str:
    """A node as plain text of at most 120 columns. Raises UserError where no node or several match the pattern."""
    results = Path(results)
    if not results.is_dir():
        raise UserError(f"{results} is not a folder; give the folder of a study's results with --results.")
    layout = ResultsLayout(results)
    complete, missing = layout.nodes, list(failed_jobs(layout))
    name = NodeName(match_node(pattern.strip("/"), known_nodes(complete, missing)))
    lines = [str(name), *failure_lines([(stage, log) for node, stage, log in missing if node == name])]
    if name in complete:
        manifests = {node: Manifest.read(layout.manifest(node)) for node in name.lineage}
        above = [name.parent, NodeName(name.model)] if name.parent else []
        columns = list(dict.fromkeys([name, *above]))
        sections = (
            recipe_lines(manifests),
            size_lines(manifests, columns),
            quality_lines(results, columns),
            comparison_lines(results, name),
            recovery_lines(results, name, manifests[name]),
            layer_lines(manifests[name]),
            cost_lines(results, name, manifests[name]),
        )
        for section in filter(None, sections):
            lines += ["", *section]
    lines += ["", *place_lines(results, name, complete)]
    return "\n".join(line.rstrip() for line in lines)


# Sections


def failure_lines(missing: list[tuple[str, Path]]) -> list[str]:
    """Jobs that failed or are running, and the last lines of their logs."""
    lines: list[str] = []
    for stage, log in missing:
        lines += ["", *wrap_lines(f"MISSING: {stage} ({final_error(log)}), by {log}:")]
        text = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        for line in text[-LOG_LINES:]:
            lines += wrap_lines(line, "  ")
    return lines


def recipe_lines(manifests: Mapping[NodeName, Manifest]) -> list[str]:
    """Each step with its options."""
    lines = ["Recipe"]
    for name, manifest in manifests.items():
        step = manifest.step
        if step is None:
            source = ", ".join(
                f"{key} {value}" for key, value in manifest.source.model_dump().items() if value is not None
            )
            lines += wrap_lines(f"{name}: dense ({source})", "  ")
            continue
        options = format_options(step.options)
        seed = f", seed {manifest.seed}"
        lines += wrap_lines(f"{name.last_part}: {step.family} by {step.method} ({options or 'no options'}{seed})", "  ")
    return lines


def format_options(options: Mapping[str, JsonValue]) -> str:
    """Options and their values in words; without those that are null."""
    return ", ".join(f"{key} {format_setting(value)}" for key, value in options.items() if value is not None)


def format_setting(value: JsonValue) -> str:
    """The value of an option in words."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, dict):
        return f"{{{format_options(value)}}}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def size_lines(manifests: Mapping[NodeName, Manifest], nodes: list[NodeName]) -> list[str]:
    """The sizes of the node, its parent and its dense model."""
    columns = [manifests[name] for name in nodes]
    rows = {
        "parameters": [human_count(entry.parameters.total) for entry in columns],
        "of which nonzero": [human_count(entry.parameters.nonzero) for entry in columns],
        "removed": [f"{entry.rho:.1%}" for entry in columns],
        "stored MB": [number(entry.stored_bytes / 1e6) for entry in columns],
        "bits per weight": [f"{entry.bits_per_weight:.2f}" for entry in columns],
        "bits per weight of the linears": [f"{entry.bits_per_linear_weight:.2f}" for entry in columns],
    }
    return format_table([["Size", *titles(nodes)], *([title, *cells] for title, cells in rows.items())])


def titles(nodes: Sequence[str]) -> list[str]:
    """The titles of the columns: the node, its parent, its dense model."""
    names = ["this node", "its parent", "dense"]
    return names[: len(nodes)] if len(nodes) != 2 else ["this node", "dense"]


def metrics_of(results: Path, node: str) -> dict[tuple[str, str], Row]:
    """The metrics of a node, by evaluation and metric."""
    rows = [row for path in evaluations_of(results, node) for row in _measurements(node, path).metrics]
    return {(row["evaluation"], row["metric"]): row for row in rows}


def evaluations_of(results: Path, node: str) -> list[Path]:
    """The folders of a node's evaluations."""
    return [path.parent for path in ResultsLayout(results).metrics_of(node)]


def _measurements(node: str, folder: Path) -> Measurements:
    return rows_of(Metrics.read(folder / "metrics.json"), node, folder.name)


def quality_lines(results: Path, nodes: Sequence[str]) -> list[str]:
    """Each metric with its interval, of the node, its parent and its dense model."""
    metrics = [metrics_of(results, name) for name in nodes]
    if not metrics[0]:
        return []
    table = [["Quality", *titles(nodes), "unit"]]
    for key, row in metrics[0].items():
        cells = [format_metric(each.get(key)) or "-" for each in metrics]
        table.append([f"{row['metric'].replace('_', ' ')} ({row['evaluation']})", *cells, row["unit"]])
    return [*format_table(table), INTERVALS, "-: not measured."]


def comparison_lines(results: Path, name: str) -> list[str]:
    """The paired tests against the parent and the dense model; empty before the tables are written."""
    layout = ResultsLayout(results)
    if not layout.table("comparisons").exists():
        return []
    rows = [
        row
        for row in read_table(layout.tables, "comparisons").to_pylist()
        # The dense model may be the parent, whose tests are printed once.
        if row["node"] == name and row["relation"] == ("dense" if row["other"] == NodeName(name).model else "parent")
    ]
    title = (
        "Paired tests (bootstrap of the items): intervals and raw p-values are per pair; the Holm-adjusted p decides "
        "significance."
    )
    lines = wrap_lines(title) if rows else []
    for row in rows:
        pairs = "1 pair" if row["family"] == 1 else f"{row['family']} pairs"
        verdict = "significantly different" if row["distinguishable"] else "not significantly different"
        against = {"parent": "its parent", "dense": "the dense model"}[row["relation"]]
        flips = (
            f"; {row['right_to_wrong']} right answers became wrong, {row['wrong_to_right']} wrong ones right"
            if row["right_to_wrong"] is not None
            else ""
        )
        lines += wrap_lines(
            f"{row['measure'].replace('_', ' ')} of {row['task']} minus that of {against}: {number(row['difference'])} "
            f"[{number(row['low'])}, {number(row['high'])}] {row['unit']} over {row['n']} items, "
            f"{p_value(row['p_value'])}, adjusted for {pairs} {p_value(row['p_adjusted'])}: {verdict}{flips}.",
            "  ",
        )
    return lines


def p_value(p: float) -> str:
    """A p-value; below a thousandth only the bound, since the bootstrap does not resolve smaller ones."""
    return "p < 0.001" if p < 1e-3 else f"p {number(p, 2)}"


def recovery_lines(results: Path, name: str, manifest: Manifest) -> list[str]:
    """Tokens, the recovered share of the loss, and the held-out loss along them."""
    curve = storage.ensure_local(ResultsLayout(results).curve(name))
    recovery = manifest.recovery
    if recovery is None or not curve.exists():
        return []
    rows = [row for row in curve_rows(name, curve) if row["split"] == "validation"]
    losses = recovery_losses(rows)
    share = losses["recovered_share"]
    regained = "" if share is None else f", {share:.0%} of the loss increase regained"
    early = ", stopped early" if recovery.stopped_early else ""
    text = (
        f"Recovery: {human_count(recovery.tokens)} tokens ({recovery.epochs:.2g} epochs) in "
        f"{recovery.steps} steps{early}, {number(recovery.seconds)} s{regained}."
    )
    points = rows[:: -(-len(rows) // POINTS)]
    points = points if points[-1] is rows[-1] else [*points, rows[-1]]
    table = [
        ["  tokens", *(human_count(row["tokens"]) for row in points), "dense"],
        ["  held-out loss, nats/token", *(number(row["loss"], 4) for row in points), number(losses["dense_loss"], 4)],
    ]
    return [*wrap_lines(text), *format_table(table)]


def layer_lines(manifest: Manifest) -> list[str]:
    """Minimum, median and maximum of the step's per-layer records, and the layers with the largest error."""
    layers = {name: numbers_of(entry) for name, entry in manifest.layers.items()}
    columns = dict.fromkeys(key for entry in layers.values() for key in entry)
    if not columns:
        return achieved_lines(manifest)
    table = [[f"Layers: {len(layers)} linears", "min", "median", "max"]]
    constant = []
    for key in columns:
        values = [entry[key] for entry in layers.values() if key in entry]
        ends = [format_value(value) for value in (min(values), median(values), max(values))]
        if len(values) == len(layers) and min(values) == max(values):
            constant.append(f"{key.replace('_', ' ')} {ends[0]}")
        else:
            table.append([key.replace("_", " "), *ends])
    lines = format_table(table) if len(table) > 1 else [table[0][0]]
    lines += wrap_lines(f"The same in each: {', '.join(constant)}.") if constant else []
    for key in HIGHER_IS_WORSE:
        if key in columns:
            worst = sorted(layers, key=lambda name: layers[name].get(key, 0), reverse=True)[:3]
            values_of = [f"{name.removeprefix('model.')} ({number(layers[name].get(key))})" for name in worst]
            return [*lines, *wrap_lines(f"Largest {key.replace('_', ' ')}: {join_words(values_of)}.")]
    return lines


def numbers_of(record: Mapping[str, JsonValue]) -> dict[str, float]:
    """The numbers of a layer's record that the step achieved, by their key."""
    return {
        key: value
        for key, value in record.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not key.endswith(REQUESTED)
    }


def format_value(value: float) -> str:
    """A number; integers, such as bits and ranks, without a decimal point."""
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else number(value)


def achieved_lines(manifest: Manifest) -> list[str]:
    """Units that a step removed from the whole model."""
    units = manifest.achieved.get("units", {})
    cut = [
        _removed_units(kind, entry)
        for kind, entry in (units.items() if isinstance(units, dict) else ())
        if isinstance(entry, dict) and entry["share"]
    ]
    return wrap_lines(f"Removed: {join_words(cut)}.") if cut else []


def _removed_units(kind: str, entry: Mapping[str, Any]) -> str:
    """How many units of a kind a step removed; the record holds lists where blocks differ."""
    removed, of, name = entry["removed"], entry["of"], kind.replace("_", " ")
    if isinstance(removed, list):
        return f"{sum(removed)} of all {sum(of)} {name}"
    return f"{removed} of {of} {name}{'' if kind == 'blocks' else ' of each block'}"


def cost_lines(results: Path, name: str, manifest: Manifest) -> list[str]:
    """The time and memory of computing the node, and its measured costs."""
    memory = manifest.peak_memory_bytes
    peak = "" if memory is None else f", peak memory {number(memory / 1e9)} GB"
    lines = wrap_lines(f"Computed in {number(manifest.wall_seconds)} s{peak}.")
    rows = [row for path in evaluations_of(results, name) for row in _measurements(name, path).costs]
    for row in rows:
        megabytes = row["unit"] == "bytes"
        scale, unit = (1e6, "MB") if megabytes else (1, row["unit"])
        spread = "" if row["spread"] is None else f" +- {number(row['spread'] / scale / 2, 2)}"
        simulated = ", simulated" if row["simulated"] else ""
        words = f"{row['metric'].replace('_', ' ')}: {number(row['value'] / scale)}{spread} {unit}"
        lines += wrap_lines(f"{words} ({row['device']}{simulated})", "  ")
    if any(row["spread"] is not None for row in rows):
        lines.append("  +- is half the interquartile range of the repeats.")
    return lines


def place_lines(results: Path, name: str, complete: list[str]) -> list[str]:
    """Its files, the nodes downstream of it, and the command that recomputes it."""
    folder = ResultsLayout(results).checkpoint(name)
    below = [node.removeprefix(f"{name}/") for node in complete if NodeName(node).is_below(name)]
    logs = list(_logs(results, name))
    lines = wrap_lines(f"Files:       {folder}") if name in complete else []
    lines += wrap_lines(f"Logs:        {', '.join(logs)}") if logs else []
    lines += wrap_lines(f"Downstream:  {join_first(below)}") if below else []
    # A command is not wrap_lines, so that it can be copied.
    return [*lines, f"Recompute:   {reproduce_command(results, name)}"]


def _logs(results: Path, name: str) -> Iterator[str]:
    """The logs of the node and of its evaluations."""
    layout = ResultsLayout(results)
    for stage in ("root", "compress", "recover"):
        log = layout.log(stage, name)
        if log.exists():
            yield str(log)
    for folder in evaluations_of(results, name):
        log = layout.log("evaluate", f"{name}/{folder.name}")
        if log.exists():
            yield str(log)
