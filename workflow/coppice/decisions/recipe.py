"""The best node within limits, and at each size, with the probability that it is the best, from measurements alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coppice.decisions import Answer
from coppice.decisions.limits import Limit
from coppice.errors import UserError, did_you_mean
from coppice.formatting import human_count, join_first, join_words, number, with_interval
from coppice.results.comparisons import Scores, node_scores
from coppice.results.reading import pareto_front
from coppice.results.schemas import Row
from coppice.uncertainty import interval, resampled_sums

DRAWS = 4000
_VALUE = ("value", "stderr", "low", "high")  # columns of a measurement in the table `metrics`
COVERED = 0.95  # runners-up are listed until the probability of the best is covered so far


# Which values, and how sure


def choose_metric(metrics: Sequence[Row], metric: str | None, evaluation: str | None) -> tuple[str, str]:
    """The requested pair (evaluation, metric), or the one perplexity. Raises UserError where it is unclear."""
    pairs = {(row["evaluation"], row["metric"]) for row in metrics}
    names = {name for _, name in pairs}
    if metric is not None and metric not in names:
        raise UserError(f"--metric {metric}: the tables hold no such metric.{did_you_mean(metric, names)}")
    known = {name for name, _ in pairs}
    if evaluation is not None and evaluation not in known:
        raise UserError(f"--evaluation {evaluation}: it measured no metric.{did_you_mean(evaluation, known)}")
    fitting = sorted(
        pair
        for pair in pairs
        if (pair[1] == metric if metric is not None else pair[1].startswith("perplexity_"))
        and evaluation in (None, pair[0])
    )
    if len(fitting) == 1:
        return fitting[0]
    if metric is not None and fitting:
        raise UserError(
            f"--metric {metric}: several evaluations measured it ({join_words([pair[0] for pair in fitting])}); choose "
            "one by --evaluation."
        )
    if metric is not None:
        raise UserError(f"--metric {metric}: the evaluation {evaluation!r} did not measure it.")
    raise UserError(f"Choose what is to be best by --metric; the tables hold: {', '.join(sorted(names))}.")


def lower_is_better(metric: str, unit: str, prefer: str | None = None) -> bool:
    """Whether less of a metric is better. Raises UserError where neither its name, its unit nor `prefer` implies it."""
    if prefer is not None:
        return prefer == "lower"
    if metric.startswith(("perplexity_", "loss_")):
        return True
    if unit == "accuracy" or metric.startswith("knowledge_"):
        return False
    raise UserError(
        f"--metric {metric}: its name does not imply which direction is better; add --prefer lower or --prefer higher."
    )


@dataclass(frozen=True)
class Compared:
    """Nodes with a finite value of one metric: rows of `nodes` with value and stderr, joint draws [k, rows]."""

    evaluation: str
    metric: str
    lower: bool
    rows: list[Row]
    draws: np.ndarray
    unmeasured: list[str]

    def notes(self) -> list[str]:
        """Sentences on what could not be compared, or not fairly."""
        exact = [row["node"] for row in self.rows if not _is_finite(row["stderr"])]
        notes = ["Probabilities are over the items measured, not over the seeds of training."]
        if self.unmeasured:
            notes.append(f"Not compared, since they have no finite {self.metric}: {join_first(self.unmeasured)}.")
        if exact:
            notes.append(f"Taken as exact, since their {self.metric} has no standard error: {join_first(exact)}.")
        return notes


def compare(
    nodes: Sequence[Row],
    metrics: Sequence[Row],
    items: pa.Table,
    pair: tuple[str, str],
    lower: bool,
    draws: int = DRAWS,
    seed: int = 0,
) -> Compared:
    """The nodes that `pair` (evaluation, metric) measured, with joint draws of their values; the others are named."""
    values = {row["node"]: row for row in metrics if (row["evaluation"], row["metric"]) == pair}
    rows = [
        node | {key: values[node["node"]][key] for key in _VALUE}
        for node in nodes
        if node["node"] in values and _is_finite(values[node["node"]]["value"])
    ]
    with_value = {row["node"] for row in rows}
    link = np.exp if pair[1].startswith("perplexity_") else np.asarray
    drawn = draw_jointly(rows, scores_of(items, *pair), link, draws, seed)
    return Compared(*pair, lower, rows, drawn, [row["node"] for row in nodes if row["node"] not in with_value])


def draw_jointly(
    rows: Sequence[Row], scores: Mapping[str, Scores], link: Callable[[Any], Any], draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Draws of the values of `rows` (node, value, stderr): [draws, rows]; value = link(mean of the node's scores).

    Nodes measured on the same items are drawn together, the same items drawn for all of them, so that what is hard for
    all cancels in their comparison. Nodes whose items do not give their value are drawn by normal(value, stderr), each
    for itself; without a standard error a value counts as exact.
    """
    values = np.array([row["value"] for row in rows])
    spread = np.array([row["stderr"] if _is_finite(row["stderr"]) else 0.0 for row in rows])
    drawn = values + spread * np.random.default_rng(seed).standard_normal((draws, len(rows)))
    groups: dict[bytes, list[int]] = {}
    for place, row in enumerate(rows):
        of_node = scores.get(row["node"])
        if of_node is None or len(of_node.values) < 2:
            continue
        if math.isclose(link(of_node.mean), row["value"], rel_tol=1e-6):
            groups.setdefault(of_node.items, []).append(place)
    for group, places in enumerate(groups.values()):
        shared = [scores[rows[place]["node"]] for place in places]
        columns = np.column_stack([*(each.values for each in shared), shared[0].weights])
        sums = resampled_sums(columns, draws, seed + 1 + group)
        drawn[:, places] = link(sums[:, :-1] / sums[:, -1:])
    return drawn


def scores_of(items: pa.Table, evaluation: str, metric: str) -> dict[str, Scores]:
    """Of each node the scores behind a metric: losses of documents, or rightness of answers."""
    documents = metric.startswith(("perplexity_", "loss_"))
    task = metric.partition("_")[2] if documents else metric.removesuffix("_acc").removesuffix("_exact_match")
    rows = items.filter((pc.field("evaluation") == evaluation) & (pc.field("task") == task))
    owners = np.asarray(rows["node"].to_pylist(), dtype=str)
    measure, protocols = ("loss", {task}) if documents else ("accuracy", set())
    # The table is sorted by node.
    ends = np.append(np.flatnonzero(owners[1:] != owners[:-1]) + 1, len(owners))
    starts = np.append(0, ends[:-1])
    return {
        node: scores
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        for node, (*_, kind), scores in node_scores(rows.slice(start, end - start), {evaluation: protocols})
        if kind == measure
    }


def _is_finite(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# Answers


class ComparedNode(TypedDict):
    """A node with its value, its interval, its size, and the probability that it is the best."""

    node: str
    value: float
    stderr: float | None
    low: float | None
    high: float | None
    stored_bytes: int
    probability: float


class RankedNode(ComparedNode):
    """A node within the limits."""

    path_recovery_tokens: int


class SizeStep(ComparedNode):
    """A node that no smaller one beats, and how many nodes are as small as it or smaller."""

    compared: int


def best_within(compared: Compared, bounds: Sequence[Limit]) -> Answer:
    """The node of the best value within the limits, with its probability to be the best, and the rivals that cover 95%.

    Raises UserError where no node is within them.
    """
    within = [place for place, row in enumerate(compared.rows) if all(bound.admits(row["node"]) for bound in bounds)]
    if not within:
        raise UserError(_nothing_within(compared, bounds))
    probabilities = probabilities_of_best(compared.draws[:, within], compared.lower)
    values = np.array([compared.rows[place]["value"] for place in within]) * (1 if compared.lower else -1)
    sizes = np.array([compared.rows[place]["stored_bytes"] for place in within])
    trained = np.array([compared.rows[place]["path_recovery_tokens"] for place in within])
    # The best is so by its value: nodes that are nearly the same share the draws in which they are the best. Of equal
    # values the cheapest goes first, whatever the draws' chance makes of them.
    order = np.lexsort((trained, sizes, values))
    tied = int(np.sum(values == values[order[0]]))
    likeliest = order[np.argsort(-probabilities[order], kind="stable")]
    covering = int(np.searchsorted(np.cumsum(probabilities[likeliest]), COVERED - 1e-9)) + 1
    table_places = [place for place in order if place == order[0] or place in likeliest[:covering]]
    nodes: list[RankedNode] = [
        {
            **_describe(compared.rows[within[place]], float(probabilities[place])),
            "path_recovery_tokens": compared.rows[within[place]]["path_recovery_tokens"],
        }
        for place in table_places
    ]
    best = nodes[0]
    those = "1 node" if len(within) == 1 else f"{len(within)} nodes"
    words = f" with {join_words([bound.text for bound in bounds])}" if bounds else ""
    sentences = [
        f"Best of {those}{words}: {best['node']}, {compared.metric} {number(best['value'])}, with a probability of "
        f"{best['probability']:.0%} that it is the best.",
        *([f"{tied} nodes tie; the smallest is {best['node']}, {_megabytes(best)} MB."] if tied > 1 else []),
        *compared.notes(),
    ]
    unknown = sorted(
        row["node"] for row in compared.rows if any(bound.values.get(row["node"]) is None for bound in bounds)
    )
    if unknown:
        sentences.append(f"Not compared, since what the limits bound is unknown for them: {join_first(unknown)}.")
    return {
        "title": f"Best {compared.metric} ({compared.evaluation})",
        "nodes": nodes,
        "compared": len(within),
        "tied": tied,
        "unmeasured": compared.unmeasured,
        "unknown": unknown,
        "sentences": sentences,
        "table": [
            ["node", "value", "probability", "MB", "recovery tokens"],
            *(
                [
                    row["node"],
                    _with_error(row),
                    f"{row['probability']:.1%}",
                    _megabytes(row),
                    human_count(row["path_recovery_tokens"]),
                ]
                for row in nodes
            ),
        ],
    }


def best_at_each_size(compared: Compared) -> Answer:
    """The nodes that no smaller one beats: each the best at or below its size, with the probability that it is so."""
    sizes = np.array([row["stored_bytes"] for row in compared.rows])
    sign = 1 if compared.lower else -1
    steps: list[SizeStep] = []
    for place in pareto_front([(row["stored_bytes"], sign * row["value"]) for row in compared.rows]):
        smaller = np.flatnonzero(sizes <= sizes[place])
        probabilities = probabilities_of_best(compared.draws[:, smaller], compared.lower)
        row = compared.rows[place]
        steps.append(
            {
                **_describe(row, float(probabilities[np.flatnonzero(smaller == place)[0]])),
                "compared": len(smaller),
            }
        )
    return {
        "title": f"Best at each size: {compared.metric} ({compared.evaluation})",
        "nodes": steps,
        "unmeasured": compared.unmeasured,
        "sentences": compared.notes(),
        "table": [
            ["node", "MB", "value", "best up to here", "of nodes"],
            *(
                [
                    step["node"],
                    _megabytes(step),
                    _with_error(step),
                    f"{step['probability']:.0%}",
                    str(step["compared"]),
                ]
                for step in steps
            ),
        ],
    }


def probabilities_of_best(draws: np.ndarray, lower: bool) -> np.ndarray:
    """Part of the `draws` [k, n] in which each of n values is the best, ties shared: [n], with sum 1."""
    values = draws if lower else -draws
    best = values == values.min(axis=1, keepdims=True)
    return (best / best.sum(axis=1, keepdims=True)).mean(axis=0)


def _describe(row: Row, probability: float) -> ComparedNode:
    return {
        "node": row["node"],
        "value": row["value"],
        "stderr": row["stderr"],
        "low": row["low"],
        "high": row["high"],
        "stored_bytes": row["stored_bytes"],
        "probability": probability,
    }


def _with_error(row: Mapping[str, Any]) -> str:
    return with_interval(row["value"], interval(row))


def _megabytes(row: Mapping[str, Any]) -> str:
    return number(row["stored_bytes"] / 1e6)


def _nothing_within(compared: Compared, bounds: Sequence[Limit]) -> str:
    """That no node is within the limits, and how near to each of them one comes."""
    if not compared.rows:
        return f"No node has a finite {compared.metric} ({compared.evaluation})."
    least = []
    for bound in bounds:
        known = [value for row in compared.rows if (value := bound.values.get(row["node"])) is not None]
        least += [bound.format(min(known))] if known else []
    nearest = f": the least that one has is {join_words(least)}" if least else ""
    alone = ", each limit taken alone" if len(least) > 1 else ""
    limited = join_words([bound.text for bound in bounds])
    return f"No node whose {compared.metric} was measured has {limited}{nearest}{alone}. Raise a limit."
