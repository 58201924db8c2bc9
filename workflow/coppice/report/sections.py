"""The page's tables of nodes, metrics and comparisons, as HTML, and the order of all sections."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape

from coppice.decisions import Answer
from coppice.formatting import human_count, number
from coppice.records.fit import FitRecord
from coppice.report import markup
from coppice.report.cost_sections import costs_table, roofline_table
from coppice.report.law_sections import decisions, law_section
from coppice.report.view import comparisons_note, format_metric, indistinct_from_next, names_of, perplexities, scores
from coppice.results.schemas import Row
from coppice.study.schema import Study
from coppice.study.tree import nodes

# Metrics of a task, from probabilities to counts: end of the metric's name -> title.
_LADDER = {
    "acc": "accuracy",
    "choice_probability": "choice probability",
    "brier": "Brier score",
    "log_probability": "log probability, nats",
}
_INTRINSIC = {
    "matrix_entropy": "matrix entropy",
    "effective_rank": "effective rank",
    "diff_effective_rank": "difference of effective ranks",
    "matrix_nuclear_norm": "matrix nuclear norm",
}
_CONNECTIVITY = {
    "mode_connectivity": "mode connectivity",
    "barrier_loss": "barrier, nats/token",
    "cka": "CKA",
}
_ALONE = (
    "Intervals and raw p-values are per pair; the Holm-adjusted p decides significance, so an interval that excludes 0 "
    "can still be non-significant."
)


def sections_of(
    study: Study, tables: dict[str, list[Row]], fits: Mapping[str, FitRecord], answers: list[Answer]
) -> str:
    """The sections that the study has rows for, each folded under its heading, as HTML.

    tables: rows by table; fits: the fit of each law; answers: the recommendations.
    """
    rows, metrics, comparisons = tables["nodes"], tables["metrics"], tables["comparisons"]
    sections = [
        ("Nodes", _nodes_table(rows, metrics, comparisons)),
        ("From probabilities to accuracy", _ladder_tables(metrics)),
        ("Hidden states", _intrinsic_tables(rows, metrics)),
        ("Connectivity", _connectivity_table(metrics)),
        ("Comparisons", _comparisons(comparisons)),
        ("Signals", _signals_table(tables["signals"])),
        *((f"Law: {name}", law_section(fit)) for name, fit in fits.items()),
        ("Decisions", decisions(answers)),
        ("Costs", costs_table(tables["costs"])),
        ("Roofline", roofline_table(tables["costs"])),
        ("Failures", _failures_table(tables["failures"])),
        ("Provenance", _provenance(study, rows)),
    ]
    return "\n".join(markup.section(title, content) for title, content in sections if content)


def lead(study: Study, tables: Mapping[str, list[Row]]) -> str:
    """How much of the study is complete."""
    planned, complete = len(nodes(study)), len(tables["nodes"])
    failed = len({row["node"] for row in tables["failures"] if row["node"]})
    models = ", ".join(study.models)
    sentence = f"{complete} of {planned} nodes from {models}; {len(tables['metrics'])} measurements"
    if failed:
        sentence += f"; {failed} nodes failed, and the nodes downstream of them are missing"
    return f"{sentence}."


def _metric(row: Row | None) -> str:
    return format_metric(row).replace("+-", "\u00b1")


def _nodes_table(rows: list[Row], metrics: list[Row], comparisons: list[Row]) -> str:
    pairs = perplexities(metrics) + scores(metrics)
    cells = {(row["node"], row["evaluation"], row["metric"]): row for row in metrics}
    alike = indistinct_from_next(comparisons)
    several = len({evaluation for evaluation, _ in pairs}) > 1
    titles = ["node", "state", "MB", "bits/weight", "removed"]
    titles += [f"{evaluation}: {metric}" if several else metric for evaluation, metric in pairs]
    titles += ["recovery tokens", "recovered", "minutes"]
    table = []
    for row in sorted(rows, key=lambda row: row["node"].split("/")):
        share = "" if row["recovered_share"] is None else f"{row['recovered_share']:.0%}"
        table.append(
            [
                "\u2003" * row["depth"] + row["node"].rpartition("/")[2],
                ", ".join(row["traits"]) or ("dense" if row["depth"] == 0 else ""),
                number(row["stored_bytes"] / 1e6),
                f"{row['bits_per_weight']:.2f}",
                f"{row['rho']:.1%}",
                *(
                    _metric(cells.get((row["node"], *pair))) + (" ~" if (row["node"], *pair) in alike else "")
                    for pair in pairs
                ),
                "" if row["recovery_tokens"] is None else human_count(row["recovery_tokens"]),
                share,
                "" if row["wall_seconds"] is None else f"{row['wall_seconds'] / 60:.1f}",
            ]
        )
    legend = f" {comparisons_note(comparisons)}" if alike else ""
    note = markup.note(
        "removed: share of all parameters that is removed; zeros of a mask are stored and do not count. recovered: "
        "share of the increase in validation loss that recovery regained. \u00b1 is half a 95% interval; an asymmetric "
        "one has its ends in brackets." + legend
    )
    return markup.table(titles, table, texts=2) + note


def _ladder_tables(metrics: list[Row]) -> str:
    """Of each task with continuous scores: accuracy, and the probabilities that it is computed from."""
    end = "_choice_probability"
    parts = []
    for evaluation, metric in names_of(metrics, suffix=end):
        task = metric.removesuffix(end)
        titles = {f"{task}_{rung}": title for rung, title in _LADDER.items()}
        parts += [f"<h4>{escape(f'{task} ({evaluation})')}</h4>", _metrics_table(metrics, evaluation, titles)]
    if not parts:
        return ""
    return "\n".join(parts) + markup.note(
        "choice probability: of the right answer among those offered. Brier score: squared error of these "
        "probabilities, between 0 and 2. log probability: of the right answer's text."
    )


def _metrics_table(metrics: list[Row], evaluation: str, titles_of_metrics: dict[str, str]) -> str:
    """Nodes by metrics of one evaluation; `titles_of_metrics`: metric -> title."""
    cells = {(row["node"], row["metric"]): row for row in metrics if row["evaluation"] == evaluation}
    present = {metric: title for metric, title in titles_of_metrics.items() if any(name == metric for _, name in cells)}
    rows = [
        [node, *(_metric(cells.get((node, metric))) for metric in present)]
        for node in markup.by_path(node for node, metric in cells if metric in present)
    ]
    return markup.foldable(["node", *present.values()], rows)


def _intrinsic_tables(rows: list[Row], metrics: list[Row]) -> str:
    """Of each protocol: intrinsic-dimension metrics next to the perplexity, with the change from the dense model."""
    parts, model = [], {row["node"]: row["model"] for row in rows}
    for evaluation, entropy in names_of(metrics, prefix="matrix_entropy_"):
        protocol = entropy.removeprefix("matrix_entropy_")
        cells = {(row["node"], row["metric"]): row for row in metrics if row["evaluation"] == evaluation}
        titles = {f"{name}_{protocol}": title for name, title in _INTRINSIC.items()}
        table = [
            [
                node,
                _metric(cells.get((node, f"perplexity_{protocol}"))),
                *(_with_change(cells.get((node, name)), cells.get((model.get(node), name))) for name in titles),
            ]
            for node in markup.by_path(node for node, metric in cells if metric == entropy)
        ]
        titles_shown = ["node", "perplexity", *titles.values()]
        parts += [f"<h4>{escape(f'{protocol} ({evaluation})')}</h4>", markup.foldable(titles_shown, table)]
    if not parts:
        return ""
    return "\n".join(parts) + markup.note(
        "In brackets: the change from the dense model. A collapsed model has low values too, so read them together "
        "with the perplexity."
    )


def _with_change(row: Row | None, dense: Row | None) -> str:
    if row is None or row["value"] is None:
        return ""
    if dense is None or dense["value"] is None or dense["node"] == row["node"]:
        return number(row["value"])
    return f"{number(row['value'])} ({_format_signed(row['value'] - dense['value'])})"


def _format_signed(value: float, digits: int = 2) -> str:
    return f"{'+' if value > 0 else ''}{number(value, digits)}"


def _connectivity_table(metrics: list[Row]) -> str:
    """The regime of each node and the same node of another seed."""
    cells = {(row["node"], row["evaluation"], row["metric"]): row for row in metrics}
    table = []
    for evaluation, connectivity in names_of(metrics, prefix="mode_connectivity_"):
        protocol = connectivity.removeprefix("mode_connectivity_")
        for node in markup.by_path(node for node, *pair in cells if pair == [evaluation, connectivity]):
            details = json.loads(cells[node, evaluation, connectivity]["details"])
            values = [
                number(row["value"]) if (row := cells.get((node, evaluation, f"{name}_{protocol}"))) else ""
                for name in _CONNECTIVITY
            ]
            regime = f"{details['regime']}: {details['regime_meaning']}"
            table.append([node, protocol, regime, *values])
    if not table:
        return ""
    return markup.foldable(["node", "text", "regime", *_CONNECTIVITY.values()], table, texts=3) + markup.note(
        "Each node and the same node of another seed, along the line between their weights. Mode connectivity below 0 "
        "means a loss barrier; CKA is the similarity of their outputs."
    )


def _comparisons(comparisons: list[Row]) -> str:
    """How many pairs differ significantly on each measure, which neighbours do not, and which answers flipped."""
    if not comparisons:
        return ""
    parts = [_measures_table(comparisons)]
    alike = [row for row in comparisons if row["relation"] == "next" and not row["distinguishable"]]
    if alike:
        titles = [
            *("evaluation", "task", "measure", "node", "next better node", "difference"),
            *("95% low", "high", "p", "Holm-adjusted p"),
        ]
        rows = [
            [
                *(row[name] for name in ("evaluation", "task", "measure", "node", "other")),
                _format_signed(row["difference"], 3),
                *(number(row[name]) for name in ("low", "high", "p_value", "p_adjusted")),
            ]
            for row in alike
        ]
        table = markup.table(titles, rows, texts=5) + markup.note(_ALONE)
        pairs = "1 pair" if len(alike) == 1 else f"{len(alike)} pairs"
        parts.append(markup.fold(f"{pairs} of neighbours in rank that are not significantly different", table))
    parts.append(_flips_table(comparisons))
    return "\n".join(parts)


def _measures_table(comparisons: list[Row]) -> str:
    measures: dict[tuple[str, str, str], dict[frozenset[str], bool]] = {}
    for row in comparisons:
        pairs = measures.setdefault((row["evaluation"], row["task"], row["measure"]), {})
        pairs[frozenset((row["node"], row["other"]))] = row["distinguishable"]
    rows = [[*measure, str(len(pairs)), str(sum(pairs.values()))] for measure, pairs in sorted(measures.items())]
    return markup.table(
        ["evaluation", "task", "measure", "pairs compared", "significantly different"], rows, texts=3
    ) + markup.note(
        "Each node with its dense model, its parent and the next better node of its dense model, by a paired bootstrap "
        "of the items. Significantly different: p < 0.05 after Holm's adjustment for all pairs of the measure and, if "
        "both have several seeds, a difference larger than the variation over seeds."
    )


def _flips_table(comparisons: list[Row]) -> str:
    """The answers that compression changed, of each node against its dense model."""
    rows = [
        [
            row["node"],
            f"{row['task']} ({row['evaluation']})",
            str(row["right_to_wrong"]),
            str(row["wrong_to_right"]),
            f"{row['flip_rate']:.1%}",
            number(row["mcnemar_p"], 2),
        ]
        for row in sorted(comparisons, key=lambda row: row["node"].split("/"))
        if row["relation"] == "dense" and row["measure"] == "accuracy"
    ]
    if not rows:
        return ""
    titles = ["node", "task", "right \u2192 wrong", "wrong \u2192 right", "flipped", "McNemar's p"]
    return "<h4>Answers that flipped against the dense model</h4>" + markup.foldable(titles, rows, texts=2)


def _signals_table(signals: list[Row]) -> str:
    """The variation over seeds of recovery, and how steadily recovery lowers the loss."""
    if not signals:
        return ""
    rows = [
        [
            row["group"],
            f"{row['metric']} ({row['evaluation']})" if row["evaluation"] else row["metric"],
            str(row["seeds"]),
            *(number(row[name]) for name in ("mean", "std", "low", "high", "snr", "item_stderr")),
            row["unit"],
        ]
        for row in signals
    ]
    titles = ["nodes", "metric", "seeds", "mean", "deviation", "95% low", "high", "SNR", "stderr over items", "unit"]
    return markup.foldable(titles, rows, texts=2) + markup.note(
        "deviation: standard deviation over seeds of recovery, with its interval. SNR: mean divided by deviation. "
        "validation_loss_monotonicity: Kendall's tau, 1 if the loss only falls with the tokens."
    )


def _failures_table(failures: list[Row]) -> str:
    if not failures:
        return ""
    rows = [[row["node"] or "", row["stage"], row["error"], row["log"]] for row in failures]
    return markup.table(["node", "stage", "error", "log"], rows, texts=4)


def _provenance(study: Study, rows: list[Row]) -> str:
    sources = [
        [row["model"], row["source_kind"] or "", row["source"] or "", row["source_revision"] or ""]
        for row in rows
        if row["depth"] == 0
    ]
    versions: dict[str, set[str]] = {}
    for row in rows:
        for name, version in json.loads(row["versions"]).items():
            versions.setdefault(name, set()).add(version)
    software = [[name, ", ".join(sorted(each))] for name, each in sorted(versions.items())]
    identities = [
        [
            row["node"],
            str(row["seed"]),
            row["fingerprint"],
            row["calibration"] or "",
            (row["calibration_fingerprint"] or "")[:12],
        ]
        for row in rows
    ]
    return "\n".join(
        [
            f"<p>Seed of the study: {study.seed}.</p>",
            markup.table(["model", "kind", "source", "revision"], sources, texts=4),
            markup.table(["software", "version"], software, texts=2),
            "<details><summary>Fingerprints of all nodes</summary>",
            markup.table(["node", "seed", "weights", "calibration", "its tokens"], identities, texts=5),
            "</details>",
        ]
    )
