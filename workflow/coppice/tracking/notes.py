"""Descriptions in Markdown, which MLflow shows on the page of a run or an experiment."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from coppice.formatting import human_count, join_words, number, shorten
from coppice.records.layout import ResultsLayout
from coppice.results.schemas import Row
from coppice.study.schema import Study
from coppice.uncertainty import mean_interval

OPTIONS = 400  # characters of a step's options at most
_LINK = re.compile(r"\[([^\]]+)\]\(node:([^)\s]+)\)")


def link_nodes(note: str, experiment: str, runs: Mapping[str, str]) -> str:
    """The note with its links to nodes as links to their runs in the UI; plain names where a node has no run."""

    def link(match: re.Match[str]) -> str:
        text, node = match.groups()
        return f"[{text}](#/experiments/{experiment}/runs/{runs[node]})" if node in runs else text

    return _LINK.sub(link, note)


def node_note(study: Study, row: Row, path: list[Row], metrics: list[Row], failed: list[Row]) -> str:
    """Of a node: what failed, the recipe step by step, sizes, qualities with intervals, how to reproduce it.

    path: the rows of the nodes on its path, the dense model first.
    """
    origin = f", computed from {_link(row['parent'])}" if row["parent"] else ""
    blocks = [
        f"**{row['node']}**: {composition(path)}{origin}.",
        _failures(failed),
        _table(("step", "method", "options"), [_step(step) for step in path]),
        _table(("size", ""), _sizes(row)),
        _table(("quality", "value", "95% interval"), [_quality(metric) for metric in metrics]),
        reproduction(study, row["node"]),
    ]
    return "\n\n".join(block for block in blocks if block)


def failed_note(study: Study, node: str, parent: str | None, failed: list[Row]) -> str:
    """Of a node that failed."""
    origin = f", to be computed from {_link(parent)}" if parent else ""
    return "\n\n".join([f"**{node}**{origin}: failed.", _failures(failed), reproduction(study, node)])


def live_note(study: Study, node: str, parent: str | None) -> str:
    """Of a node under way."""
    origin = f", computed from {_link(parent)}" if parent else ""
    return f"**{node}**{origin}: under way. Another run replaces this one when the node is complete."


def study_note(study: Study, rows: list[Row], failures: list[Row]) -> str:
    """Of the study's own run."""
    return (
        f"The study **{study.study}** itself: {len(rows)} complete nodes, {len(failures)} failed outputs. Its tables, "
        "laws and report are under Artifacts; `report/index.html` opens in a browser, `study.yaml` is the whole config."
    )


def experiment_note(study: Study) -> str:
    """Of the experiment: what is in it, and how to compare."""
    models = join_words([f"`{model}`" for model in study.models])
    evaluations = [f"`{name}` ({evaluation.kind})" for name, evaluation in study.evaluations.items()]
    measured = f" Measured by {join_words(evaluations)}." if evaluations else ""
    return (
        f"The study **{study.study}**: {models} cut back, regrown and measured; one run a node, nested under its dense "
        f"model, and one run for the study itself.{measured}\n\n"
        "To compare: choose runs and press Compare. The axes of a chart are metrics, whose names end in their unit: "
        "`stored_mb`, `bits_per_weight`, `rho` and `sparsity` are sizes, `perplexity_*` and `*_acc` are qualities; "
        "losses are in nats per token, with tokens as steps. Parameters such as `prune.sparsity` are the options of "
        "the recipe. Group and filter by tags:\n\n"
        '- ``tags.`coppice.family` = "prune"`` (the last step), ``tags.`coppice.composition` = "prune > recover"``\n'
        '- ``tags.`coppice.model` = "..."``, ``tags.`coppice.method` = "..."``, ``tags.`coppice.budget` = "..."`` '
        "(tokens of recovery)\n"
        '- ``tags.`coppice.pareto` = "yes"``: no other node is both smaller and better on some quality'
    )


def composition(path: list[Row]) -> str:
    """The families of a path: "prune > recover"; "dense" for a dense model."""
    return " > ".join(step["family"] for step in path if step["step"]) or "dense"


def reproduction(study: Study, node: str) -> str:
    target = ResultsLayout(Path("results") / study.study).manifest(node)
    return (
        "To reproduce it (`study.yaml` is an artifact of the study's own run):\n\n"
        f"```\nsnakemake --cores all --configfile study.yaml --force {target}\n```"
    )


def _link(node: str) -> str:
    return f"[{node}](node:{node})"


def _failures(failed: list[Row]) -> str:
    return "\n\n".join(f"**Failed** at {row['stage']}: {row['error']}" for row in failed)


def _step(row: Row) -> tuple[str, ...]:
    name = f"[{row['step'] or row['node']}](node:{row['node']})"
    if not row["step"]:
        return name, "dense model", f"{row['source_kind'] or ''} {row['source'] or ''}".strip()
    options = {key: value for key, value in json.loads(row["options"]).items() if value is not None}
    text = ", ".join(f"{key} {_plain(value)}" for key, value in options.items())
    return name, f"{row['method']} ({row['family']})", shorten(text, OPTIONS)


def _plain(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _sizes(row: Row) -> list[tuple[str, ...]]:
    sizes: list[tuple[str, ...]] = [
        ("stored", f"{number(row['stored_bytes'] / 1e6)} MB"),
        ("bits per weight of the dense model", number(row["bits_per_weight"])),
        ("parameters", f"{human_count(row['parameters'])} of {human_count(row['dense_parameters'])}"),
        ("removed (rho)", f"{row['rho']:.1%}"),
        ("removed, zeros counted", f"{row['rho_nonzero']:.1%}"),
    ]
    if row["path_recovery_tokens"]:
        sizes.append(("recovery", f"{human_count(row['path_recovery_tokens'])} tokens"))
    return sizes


def _quality(row: Row) -> tuple[str, ...]:
    return f"{row['metric']} ({row['evaluation']})", number(row["value"], 4), interval(row)


def interval(row: Row) -> str:
    """The 95% interval of a metric: its own, or the normal one of its standard error; blank where it has neither."""
    ends = (row["low"], row["high"])
    if None in ends:
        if row["stderr"] is None or row["value"] is None:
            return ""
        ends = mean_interval(row["value"], row["stderr"])
    return f"{number(ends[0], 4)} to {number(ends[1], 4)}"


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join(f"| {' | '.join(cell.replace('|', '&#124;') for cell in line)} |" for line in lines)
