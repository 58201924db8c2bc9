"""`coppice show`: one node's story in a terminal, from its manifest, its measurements and the tables, if any."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from statistics import median
from typing import Any

from coppice import storage
from coppice.errors import UserError, did_you_mean
from coppice.formatting import (
    INTERVALS,
    command_anew,
    format_table,
    human_count,
    join_first,
    join_words,
    number,
    wrapped,
)
from coppice.records.layout import ResultsLayout
from coppice.records.manifest import Manifest
from coppice.records.metrics import Metrics
from coppice.records.node_name import NodeName
from coppice.report.summary import measured
from coppice.results.failures import FailedJob, failed_jobs, final_error
from coppice.results.measurements import Measurements, rows_of
from coppice.results.nodes import curve_rows, recovery_losses
from coppice.results.reading import read_table
from coppice.results.schemas import Row

# Of a layer's record: what is asked of it is told by the step's options; strings and flags have no middle.
ASKED = "_asked"
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


def show(results: Path, asked: str) -> str:
    """The story of a node as plain text of at most 120 columns. Raises UserError where no node is so named."""
    results = Path(results)
    if not results.is_dir():
        raise UserError(f"{results} is no folder; name the folder of a study's results with --results.")
    made, missing = ResultsLayout(results).nodes, list(failed_jobs(ResultsLayout(results)))
    name = named(asked.strip("/"), known_nodes(made, missing))
    lines = [name, *failure_lines([(stage, log) for node, stage, log in missing if node == name])]
    if name in made:
        manifests = {node: Manifest.read(ResultsLayout(results).manifest(node)) for node in NodeName(name).lineage}
        beside = [
            name,
            *dict.fromkeys(node for node in (NodeName(name).parent, NodeName(name).model) if node not in (None, name)),
        ]
        sections = (
            recipe_lines(manifests),
            size_lines(manifests, beside),
            quality_lines(results, beside),
            comparison_lines(results, name),
            recovery_lines(results, name, manifests[name]),
            layer_lines(manifests[name]),
            cost_lines(results, name, manifests[name]),
        )
        for section in filter(None, sections):
            lines += ["", *section]
    lines += ["", *place_lines(results, name, made)]
    return "\n".join(line.rstrip() for line in lines)


# Names


def known_nodes(made: list[str], missing: list[FailedJob]) -> list[str]:
    """The nodes that have a checkpoint or a log of a job that left nothing."""
    return sorted({*made, *(node for node, _, _ in missing)})


def made_node(results: Path, asked: str) -> str:
    """The node that is meant (see `named`). Raises UserError where it has no checkpoint, with what failed."""
    made, missing = ResultsLayout(results).nodes, list(failed_jobs(ResultsLayout(results)))
    name = named(asked.strip("/"), known_nodes(made, missing))
    if name in made:
        return name
    failed = [f"{stage} ({final_error(log)}), by {log}" for node, stage, log in missing if node == name]
    raise UserError(f"The node {name!r} was not made: {join_words(failed)}. Run the study again once that is mended.")


def named(asked: str, known: list[str]) -> str:
    """The node that is meant: of that name, or the only one whose name ends so, or else begins so.

    Raises UserError with those that it may be.
    """
    if not known:
        raise UserError("There is no node yet; run the study, or name another folder with --results.")
    if asked in known:
        return asked
    for found in (
        [name for name in known if name.endswith(f"/{asked}")],
        [name for name in known if name.startswith(asked)],
    ):
        if len(found) == 1:
            return found[0]
        if found:
            raise UserError(f"{asked!r} may be {join_first(found)}; write more of its name.")
    close = did_you_mean(asked, known)
    hint = close if "Did you mean" in close else f" Known: {join_first(known)}."
    raise UserError(f"There is no node {asked!r}.{hint}")


# Sections


def failure_lines(missing: list[tuple[str, Path]]) -> list[str]:
    """What failed or is under way, and the last lines of its log."""
    lines: list[str] = []
    for stage, log in missing:
        lines += ["", *wrapped(f"NOT THERE: {stage} ({final_error(log)}), by {log}:")]
        text = log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        for line in text[-LOG_LINES:]:
            lines += wrapped(line, "  ")
    return lines


def recipe_lines(manifests: dict[str, Manifest]) -> list[str]:
    """Each step with its options."""
    lines = ["Recipe"]
    for name, manifest in manifests.items():
        step = manifest.step
        if step is None:
            source = ", ".join(
                f"{key} {value}" for key, value in manifest.source.model_dump().items() if value is not None
            )
            lines += wrapped(f"{name}: dense ({source})", "  ")
            continue
        options = ", ".join(f"{key} {said(value)}" for key, value in step.options.items() if value is not None)
        seed = f", seed {manifest.seed}"
        own = NodeName(name).last_part
        lines += wrapped(f"{own}: {step.family} by {step.method} ({options or 'no options'}{seed})", "  ")
    return lines


def said(value: Any) -> str:
    """A setting as words."""
    if isinstance(value, bool) or value is None:
        return {True: "yes", False: "no", None: "none"}[value]
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {said(entry)}" for key, entry in value.items() if entry is not None) + "}"
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def size_lines(manifests: dict[str, Manifest], beside: list[str]) -> list[str]:
    """What the node weighs, beside its parent and its dense model."""
    shown = [manifests[name] for name in beside]
    rows = {
        "parameters": [human_count(entry.parameters.total) for entry in shown],
        "of them not zero": [human_count(entry.parameters.nonzero) for entry in shown],
        "removed of all": [f"{entry.rho:.1%}" for entry in shown],
        "stored MB": [number(entry.stored_bytes / 1e6) for entry in shown],
        "bits a weight of the dense model": [f"{entry.bits_per_weight:.2f}" for entry in shown],
        "bits a weight of the dense model's linears": [f"{entry.bits_per_linear_weight:.2f}" for entry in shown],
    }
    return format_table([["Size", *titles(beside)], *([title, *cells] for title, cells in rows.items())])


def titles(beside: list[str]) -> list[str]:
    """Of the columns: the node itself, its parent, its dense model."""
    names = ["this node", "its parent", "dense"]
    return names[: len(beside)] if len(beside) != 2 else ["this node", "dense"]


def metrics_of(results: Path, node: str) -> dict[tuple[str, str], Row]:
    """What was measured of a node, by evaluation and metric."""
    rows = [row for path in evaluations_of(results, node) for row in _measurements(node, path).metrics]
    return {(row["evaluation"], row["metric"]): row for row in rows}


def evaluations_of(results: Path, node: str) -> list[Path]:
    """The folders of a node's evaluations."""
    return [path.parent for path in ResultsLayout(results).metrics_of(node)]


def _measurements(node: str, folder: Path) -> Measurements:
    return rows_of(Metrics.read(folder / "metrics.json"), node, folder.name)


def quality_lines(results: Path, beside: list[str]) -> list[str]:
    """Each metric with its interval, beside that of the parent and of the dense model."""
    found = [metrics_of(results, name) for name in beside]
    if not found[0]:
        return []
    table = [["Quality", *titles(beside), "unit"]]
    for key, row in found[0].items():
        cells = [measured(each.get(key)) or "-" for each in found]
        table.append([f"{row['metric'].replace('_', ' ')} ({row['evaluation']})", *cells, row["unit"]])
    return [*format_table(table), INTERVALS, "- was not measured."]


def comparison_lines(results: Path, name: str) -> list[str]:
    """The paired tests against the parent and the dense model; nothing before there are tables."""
    layout = ResultsLayout(results)
    if not layout.table("comparisons").exists():
        return []
    rows = [
        row
        for row in read_table(layout.tables, "comparisons").to_pylist()
        # The dense model may be the parent: its tests are told once.
        if row["node"] == name and row["relation"] == ("dense" if row["other"] == NodeName(name).model else "parent")
    ]
    title = (
        "Paired tests (bootstrap of the items): the interval and the first p are of the pair alone; the second p is "
        "adjusted for all pairs of the measure by Holm's method, and is what tells two nodes apart."
    )
    lines = wrapped(title) if rows else []
    for row in rows:
        pairs = "1 pair" if row["family"] == 1 else f"{row['family']} pairs"
        apart = "told apart" if row["distinguishable"] else "not told apart"
        against = {"parent": "its parent", "dense": "the dense model"}[row["relation"]]
        flips = (
            f"; {row['right_to_wrong']} right ones became wrong, {row['wrong_to_right']} wrong ones right"
            if row["right_to_wrong"] is not None
            else ""
        )
        lines += wrapped(
            f"{row['measure'].replace('_', ' ')} of {row['task']} less that of {against}: {number(row['difference'])} "
            f"[{number(row['low'])}, {number(row['high'])}] {row['unit']} over {row['n']} items, "
            f"{chance(row['p_value'])}, adjusted for {pairs} {chance(row['p_adjusted'])}: {apart}{flips}.",
            "  ",
        )
    return lines


def chance(p: float) -> str:
    """A p value; how far below a thousandth it lies, the interval's shape does not tell."""
    return "p < 0.001" if p < 1e-3 else f"p {number(p, 2)}"


def recovery_lines(results: Path, name: str, manifest: Manifest) -> list[str]:
    """Tokens, what they won back, and the held-out loss along them."""
    curve = storage.ensure_local(ResultsLayout(results).curve(name))
    recovery = manifest.recovery
    if recovery is None or not curve.exists():
        return []
    rows = [row for row in curve_rows(name, curve) if row["split"] == "validation"]
    losses = recovery_losses(rows)
    share = losses["recovered_share"]
    won = "" if share is None else f", {share:.0%} of the loss that compression cost won back"
    early = ", ended early" if recovery.stopped_early else ""
    text = (
        f"Recovery: {human_count(recovery.tokens)} tokens ({recovery.epochs:.2g} times through them) in "
        f"{recovery.steps} steps{early}, {number(recovery.seconds)} s{won}."
    )
    kept = rows[:: -(-len(rows) // POINTS)]
    kept = kept if kept[-1] is rows[-1] else [*kept, rows[-1]]
    table = [
        ["  tokens", *(human_count(row["tokens"]) for row in kept), "dense"],
        ["  held-out loss, nats/token", *(number(row["loss"], 4) for row in kept), number(losses["dense_loss"], 4)],
    ]
    return [*wrapped(text), *format_table(table)]


def layer_lines(manifest: Manifest) -> list[str]:
    """The least, middle and largest of what the step did layer by layer, and where it was worst."""
    layers = manifest.layers
    columns = dict.fromkeys(
        key
        for entry in layers.values()
        for key, value in entry.items()
        if isinstance(value, int | float) and not isinstance(value, bool) and not key.endswith(ASKED)
    )
    if not columns:
        return achieved_lines(manifest)
    table = [[f"Layers: {len(layers)} linears", "least", "middle", "most"]]
    alike = []
    for key in columns:
        values = [entry[key] for entry in layers.values() if isinstance(entry.get(key), int | float)]
        ends = [said_number(value) for value in (min(values), median(values), max(values))]
        if len(values) == len(layers) and min(values) == max(values):
            alike.append(f"{key.replace('_', ' ')} {ends[0]}")
        else:
            table.append([key.replace("_", " "), *ends])
    lines = format_table(table) if len(table) > 1 else [table[0][0]]
    lines += wrapped(f"The same in each: {', '.join(alike)}.") if alike else []
    for key in HIGHER_IS_WORSE:
        if key in columns:
            worst = sorted(layers, key=lambda name: layers[name].get(key, 0), reverse=True)[:3]
            named_layers = [f"{name.removeprefix('model.')} ({number(layers[name].get(key))})" for name in worst]
            return [*lines, *wrapped(f"Largest {key.replace('_', ' ')}: {join_words(named_layers)}.")]
    return lines


def said_number(value: float) -> str:
    """A number; a whole one, as of bits or ranks, without a point."""
    return f"{value:.0f}" if value == int(value) and abs(value) < 1e6 else number(value)


def achieved_lines(manifest: Manifest) -> list[str]:
    """Units that a step removed of the whole model."""
    units = manifest.achieved.get("units", {})
    cut = [
        f"{entry['removed']} of {entry['of']} {kind.replace('_', ' ')}{'' if kind == 'blocks' else ' of each block'}"
        for kind, entry in units.items()
        if entry["removed"]
    ]
    return wrapped(f"Removed: {join_words(cut)}.") if cut else []


def cost_lines(results: Path, name: str, manifest: Manifest) -> list[str]:
    """What making it took, and what running it takes where that was measured."""
    memory = manifest.peak_memory_bytes
    peak = "" if memory is None else f" with {number(memory / 1e9)} GB at most"
    lines = wrapped(f"Made in {number(manifest.wall_seconds)} s{peak}.")
    rows = [row for path in evaluations_of(results, name) for row in _measurements(name, path).costs]
    for row in rows:
        megabytes = row["unit"] == "bytes"
        scale, unit = (1e6, "MB") if megabytes else (1, row["unit"])
        spread = "" if row["spread"] is None else f" +- {number(row['spread'] / scale / 2, 2)}"
        simulated = ", simulated" if row["simulated"] else ""
        words = f"{row['metric'].replace('_', ' ')}: {number(row['value'] / scale)}{spread} {unit}"
        lines += wrapped(f"{words} ({row['device']}{simulated})", "  ")
    if any(row["spread"] is not None for row in rows):
        lines.append("  +- is half the interquartile range of the repeats.")
    return lines


def place_lines(results: Path, name: str, made: list[str]) -> list[str]:
    """Its files, what was made of it, and the command that makes it anew."""
    folder = ResultsLayout(results).checkpoint(name)
    below = [node.removeprefix(f"{name}/") for node in made if NodeName(node).is_below(name)]
    logs = list(_logs(results, name))
    lines = wrapped(f"Files:        {folder}") if name in made else []
    lines += wrapped(f"Logs:         {', '.join(logs)}") if logs else []
    lines += wrapped(f"Made of it:   {join_first(below)}") if below else []
    # A command is not wrapped: it is there to be copied.
    return [*lines, f"Make it anew: {command_anew(results, name)}"]


def _logs(results: Path, name: str) -> Iterator[str]:
    """The log of what made it, and those of its evaluations."""
    layout = ResultsLayout(results)
    for stage in ("root", "compress", "recover"):
        log = layout.log(stage, name)
        if log.exists():
            yield str(log)
    for folder in evaluations_of(results, name):
        log = layout.log("evaluate", f"{name}/{folder.name}")
        if log.exists():
            yield str(log)
