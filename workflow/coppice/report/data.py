"""The data of the page's script: a study's tables, laws and records as JSON."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypedDict, cast

from coppice import __version__
from coppice.decisions.recipe import lower_is_better
from coppice.errors import UserError
from coppice.formatting import reproduce_command
from coppice.records.base import Json
from coppice.records.fit import FitRecord
from coppice.records.layout import ResultsLayout
from coppice.report.law_lines import Line
from coppice.report.law_sections import verdict
from coppice.report.layer_records import LayerTable, layer_records
from coppice.report.sections import lead
from coppice.report.view import perplexities, scores
from coppice.results.schemas import Row
from coppice.study.schema import Study
from coppice.uncertainty import interval

_DIGITS = 6  # significant ones of every number on the page

# Sizes of a node in its row: column of the page's nodes -> title, unit.
_SIZES = {
    "stored_mb": ("stored size", "MB"),
    "bits_per_weight": ("bits per weight", ""),
    "bits_per_linear_weight": ("bits per weight of the linears", ""),
    "parameters": ("parameters", "parameters"),
}
_IN_NODES = {"stored_bytes", "bits_per_weight", "bits_per_linear_weight", "parameters"}  # costs that these repeat

# Readable titles: the end or the whole of a metric's name -> title; a task's name follows a comma.
_OF_TASKS = {
    "_choice_probability": "probability of the right choice",
    "_log_probability": "log probability of the right choice",
    "_exact_match": "exact match",
    "_acc_norm": "accuracy by length",
    "_brier": "Brier score",
    "_acc": "accuracy",
}
_TITLES = {
    "kv_cache_bytes": "key/value cache",
    "nonzero_parameters": "nonzero parameters",
    "cka": "CKA",
    "barrier_loss": "loss barrier",
}

# The metric of each measure of comparisons, and the better direction by unit of metrics whose names do not imply it.
_METRIC_OF = {"accuracy": "{}_acc", "loss": "perplexity_{}", "log_probability": "{}_log_probability"}
_BETTER = {"squared error": "lower", "probability": "higher", "nats": "higher", "tokens/s": "higher"}


Ends = list[float | None]  # a value, and the ends of its interval


class PageData(TypedDict):
    """What the page's script reads: the scripts in `report/page` use these keys."""

    study: str
    lead: str
    seed: int
    version: str
    models: list[str]
    nodes: list[Json]
    qualities: list[Json]
    sizes: list[Json]
    values: dict[str, dict[str, Ends]]
    alike: dict[str, list[list[Any]]]
    pairs: dict[str, list[Json]]
    layers: dict[str, LayerTable]
    recoveries: list[Json]
    laws: dict[str, Json]
    failures: list[Row]
    config: str
    reproduce: list[str]
    versions: dict[str, str]


def page_data(
    study: Study,
    layout: ResultsLayout,
    tables: Mapping[str, list[Row]],
    fits: Mapping[str, FitRecord],
    lines: Mapping[str, Mapping[str, Line]],
) -> PageData:
    """All that the page shows, as plain values without NaN.

    tables: rows by table; fits: the fit of each law; lines: of each law its line along each run.
    """
    rows, metrics, costs = tables["nodes"], tables["metrics"], tables["costs"]
    measured = _rows_by_quality(metrics)
    data: PageData = {
        "study": study.study,
        "lead": lead(study, tables),
        "seed": study.seed,
        "version": f"coppice {__version__}",
        "models": list(study.models),
        "nodes": _nodes(study, rows),
        "qualities": [_quality(rows_of[0], measured) for rows_of in measured.values()],
        "sizes": _sizes(costs),
        "values": {
            **{name: {row["node"]: _with_interval(row) for row in rows_of} for name, rows_of in measured.items()},
            **_cost_values(costs),
        },
        "alike": _alike(tables["comparisons"]),
        "pairs": _pairs(tables["comparisons"]),
        "layers": layer_records(rows, layout),
        "recoveries": _recoveries(rows, tables["curves"]),
        "laws": {name: _law(fits[name], runs) for name, runs in lines.items()},
        "failures": [{name: row[name] for name in ("node", "stage", "error", "log")} for row in tables["failures"]],
        "config": _without_passwords(layout.study.read_text(encoding="utf-8")),
        "reproduce": [
            f"cp results/{study.study}/study.yaml study.yaml",
            "snakemake --cores all --configfile study.yaml",
        ],
        "versions": _versions(rows),
    }
    return cast(PageData, _plain(data))


def as_json(data: PageData) -> str:
    """JSON for an HTML page's script element: nothing in it closes a tag."""
    return json.dumps(data, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")


def _without_passwords(text: str) -> str:
    """The text with the password of every address masked, because pages are shared."""
    return re.sub(r"(://[^/\s:@]*):[^/\s@]+@", r"\1:...@", text)


def _plain(value: Any) -> Any:
    """The value with its floats rounded, and with None for NaN and infinity."""
    if isinstance(value, dict):
        return {name: _plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(each) for each in value]
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}") if math.isfinite(value) else None
    return value


# Nodes


def _nodes(study: Study, rows: list[Row]) -> list[Json]:
    by_name = {row["node"]: row for row in rows}
    return [_node(study, row, by_name) for row in sorted(rows, key=lambda row: row["node"].split("/"))]


def _node(study: Study, row: Row, by_name: dict[str, Row]) -> Json:
    parts = row["node"].split("/")
    names = ["/".join(parts[: length + 1]) for length in range(1, len(parts))]
    path = [by_name[name] for name in names if name in by_name]
    same = ("node", "parent", "model", "recipe", "depth", "step", "method", "seed", "traits", "fingerprint")
    numbers = ("bits_per_weight", "bits_per_linear_weight", "rho", "rho_nonzero", "parameters")
    return {
        **{name: row[name] for name in same},
        "family": row["family"] or "dense",
        "composition": " > ".join(step["family"] for step in path) or "dense",
        "budget": row["path_recovery_tokens"] or 0,
        "stored_mb": row["stored_bytes"] / 1e6,
        **{name: row[name] for name in (*numbers, "recovered_share", "wall_seconds")},
        "path": [
            {**{name: step[name] for name in ("step", "method", "family")}, "options": json.loads(step["options"])}
            for step in path
        ],
        "command": reproduce_command(Path("results") / study.study, row["node"]),
    }


def _versions(rows: list[Row]) -> dict[str, str]:
    """The software that computed the nodes, with all its versions."""
    versions: dict[str, set[str]] = {}
    for row in rows:
        for name, version in json.loads(row["versions"]).items():
            versions.setdefault(name, set()).add(version)
    return {name: ", ".join(sorted(each)) for name, each in sorted(versions.items())}


# Qualities and sizes


def _rows_by_quality(metrics: list[Row]) -> dict[str, list[Row]]:
    """The rows of each quality by `<evaluation>/<metric>`: perplexities first, then accuracies, then the others."""
    first = perplexities(metrics) + scores(metrics)
    rest = sorted({(row["evaluation"], row["metric"]) for row in metrics} - set(first))
    by_quality: dict[str, list[Row]] = {f"{evaluation}/{metric}": [] for evaluation, metric in first + rest}
    for row in metrics:
        by_quality[f"{row['evaluation']}/{row['metric']}"].append(row)
    return by_quality


def _quality(row: Row, measured: Mapping[str, list[Row]]) -> Json:
    evaluation, metric, unit = row["evaluation"], row["metric"], row["unit"]
    title = _title(metric)
    if len({name.partition("/")[0] for name in measured}) > 1:
        title += f" ({evaluation})"
    return {
        "id": f"{evaluation}/{metric}",
        "evaluation": evaluation,
        "metric": metric,
        "title": title,
        "unit": "" if unit in ("perplexity", "accuracy", "probability", "squared error") else unit,
        "better": _better(metric, unit),
        "log": metric.startswith("perplexity_"),
    }


def _title(metric: str) -> str:
    """A metric's readable name: 'accuracy, biographies'."""
    for start in ("perplexity", "loss"):
        if metric.startswith(f"{start}_"):
            return f"{start}, {metric.removeprefix(f'{start}_')}"
    for end, title in _OF_TASKS.items():
        if metric.endswith(end):
            return f"{title}, {metric.removesuffix(end)}"
    return _TITLES.get(metric, metric.replace("_", " "))


def _better(metric: str, unit: str) -> str | None:
    """The better direction of a metric; None where neither its name nor its unit implies it."""
    try:
        return "lower" if lower_is_better(metric, unit) else "higher"
    except UserError:
        return _BETTER.get(unit)


def _with_interval(row: Row) -> Ends:
    low, high = interval(row) or (None, None) if row["value"] is not None else (None, None)
    return [row["value"], low, high]


def _sizes(costs: list[Row]) -> list[Json]:
    sizes: list[Json] = [
        {"id": name, "title": title, "unit": unit, "log": True, "better": "lower", "simulated": False}
        for name, (title, unit) in _SIZES.items()
    ]
    kinds = {_cost_id(row): row for row in costs if row["metric"] not in _IN_NODES}
    several = len({row["evaluation"] for row in kinds.values() if row["evaluation"]}) > 1
    for name, row in sorted(kinds.items(), key=lambda pair: (pair[1]["evaluation"] is None, pair[0])):
        sizes.append(
            {
                "id": name,
                "title": _cost_title(row, several),
                "unit": row["unit"],
                "log": True,
                "better": _BETTER.get(row["unit"], "lower"),
                "simulated": row["simulated"],
            }
        )
    return sizes


def _cost_id(row: Row) -> str:
    source = row["evaluation"] or ("roofline" if row["simulated"] else "stored")
    return "/".join(filter(None, (source, row["metric"], row["device"])))


def _cost_title(row: Row, several: bool) -> str:
    """The metric and its device: 'decode latency, H200, simulated'; with the evaluation where several did."""
    device = (row["device"] or "").removesuffix(" (roofline)")
    title = ", ".join(filter(None, (_title(row["metric"]), device)))
    if several and row["evaluation"]:
        title += f" ({row['evaluation']})"
    return f"{title}, simulated" if row["simulated"] else title


def _cost_values(costs: list[Row]) -> dict[str, dict[str, Ends]]:
    """Of each cost that is not in the nodes' rows: the value, and the value minus and plus half its spread.

    A spread is the interquartile range of the repeats; the ends are not a 95% interval.
    """
    values: dict[str, dict[str, Ends]] = {}
    for row in costs:
        if row["metric"] not in _IN_NODES:
            value, spread = row["value"], row["spread"]
            ends = [None, None] if spread is None or value is None else [value - spread / 2, value + spread / 2]
            values.setdefault(_cost_id(row), {})[row["node"]] = [value, *ends]
    return values


# Pairs of nodes


def _quality_of(row: Row) -> str:
    return f"{row['evaluation']}/{_METRIC_OF[row['measure']].format(row['task'])}"


def _alike(comparisons: list[Row]) -> dict[str, list[list[Any]]]:
    """Neighbours in rank that do not differ significantly: [node, the next better one, adjusted p] of each quality."""
    alike: dict[str, list[list[Any]]] = {}
    for row in comparisons:
        if row["relation"] == "next" and not row["distinguishable"]:
            alike.setdefault(_quality_of(row), []).append([row["node"], row["other"], row["p_adjusted"]])
    return alike


def _pairs(comparisons: list[Row]) -> dict[str, list[Json]]:
    """Every comparison once, by quality."""
    by_quality: dict[str, dict[tuple[str, str], Json]] = {}
    for row in comparisons:
        pair = {
            "a": row["node"],
            "b": row["other"],
            "p": row["p_value"],
            "items": row["n"],
            **{name: row[name] for name in ("difference", "low", "high", "p_adjusted", "distinguishable", "unit")},
            "flips": _flips(row),
        }
        by_quality.setdefault(_quality_of(row), {})[row["node"], row["other"]] = pair
    return {name: list(pairs.values()) for name, pairs in by_quality.items()}


def _flips(row: Row) -> dict[str, float] | None:
    """How many answers only the other node has right (lost) and only the node (gained), and McNemar's p."""
    if row["right_to_wrong"] is None:
        return None
    return {"lost": row["right_to_wrong"], "gained": row["wrong_to_right"], "p": row["mcnemar_p"]}


# Recoveries and laws


def _recoveries(rows: list[Row], curves: list[Row]) -> list[Json]:
    model = {row["node"]: row["model"] for row in rows}
    runs: dict[str, list[Row]] = {}
    for row in sorted(curves, key=lambda row: (row["node"].split("/"), row["tokens"])):
        if row["split"] == "validation":
            runs.setdefault(row["node"], []).append(row)
    return [
        {
            "node": node,
            "model": model[node],
            **{name: [point[name] for point in points] for name in ("tokens", "loss", "budget")},
            "dense_loss": points[-1]["dense_loss"],
        }
        for node, points in runs.items()
    ]


def _law(fit: FitRecord, runs: Mapping[str, Line]) -> Json:
    return {
        "law": fit.law,
        "passes": fit.passes.ok if fit.passes else None,
        "sentence": verdict(fit),
        "runs": {
            node: {
                "tokens": line.tokens.tolist(),
                "loss": line.loss.tolist(),
                "low": None if line.low is None else line.low.tolist(),
                "high": None if line.high is None else line.high.tolist(),
                "fitted_to": line.fitted_to,
            }
            for node, line in runs.items()
        },
    }
