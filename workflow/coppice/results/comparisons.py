"""Which nodes differ: pairs of nodes item by item, and nodes that differ in the seed of their recovery only.

Two nodes are significantly different on a measure by a paired bootstrap over the items that they share,
adjusted by Holm for all pairs compared on that measure. Where both were recovered with three seeds or more, their
difference must also be more than 2 sqrt(variance of one over its seeds + that of the other) (Madaan et al., arXiv
2406.10229).

A table of flips and McNemar's exact test count right answers that became wrong ones: an unchanged accuracy can hide
many (Eureka, arXiv 2409.10566).
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coppice.records.node_name import NodeName
from coppice.results.schemas import Row
from coppice.uncertainty import (
    deviation_interval,
    flip_table,
    holm,
    mcnemar,
    monotonicity,
    paired_bootstrap,
    seed_deviation,
    signal_to_noise,
)

Pair = tuple[str, str]
Measure = tuple[str, str, str]  # evaluation, task or protocol, name

LEVEL = 0.05  # share of the measures on which some pair that does not differ is called different by chance
RESAMPLES = 2000

# Of each measure: its unit, and 1 where more is better, else -1.
MEASURES = {"accuracy": ("accuracy", 1), "log_probability": ("nats", 1), "loss": ("nats/token", -1)}


@dataclass(frozen=True)
class Scores:
    """One node's scores of n items, in the order of their names.

    items: the names, and for documents their tokens, as bytes; values: [n]; weights: [n], what their sum is divided by.
    """

    items: bytes
    values: np.ndarray
    weights: np.ndarray

    @property
    def mean(self) -> float:
        return float(self.values.sum() / self.weights.sum())


def compare(nodes: Iterable[Row], items: Iterable[pa.Table], protocols: Mapping[str, Collection[str]]) -> list[Row]:
    """The rows of comparisons: every node with its dense model, its parent, and the next better node of its model.

    `nodes` are rows of nodes; `items` hold the rows of items of one node and evaluation each; `protocols` names the
    protocols of perplexity of each evaluation. Nodes that were measured on different items are not compared.
    """
    measured: dict[Measure, dict[str, Scores]] = {}
    for table in items:
        for node, measure, scores in node_scores(table, protocols):
            measured.setdefault(measure, {})[node] = scores
    nodes = list(nodes)
    return [row for measure, scores in sorted(measured.items()) for row in _measure_rows(measure, scores, nodes)]


def node_scores(table: pa.Table, protocols: Mapping[str, Collection[str]]) -> Iterator[tuple[str, Measure, Scores]]:
    """(node, (evaluation, task, measure), scores) of all that one node's items of one evaluation allow.

    accuracy: 1 where an item was answered rightly; log_probability: ln p of its right choice, where it has one;
    loss: the negative log-likelihood of a document, by its tokens.
    """
    if not len(table):
        return
    node, evaluation = table["node"][0].as_py(), table["evaluation"][0].as_py()
    for task in pc.unique(table["task"]).to_pylist():
        rows = table.filter(pc.equal(table["task"], task))
        graded = pc.is_valid(rows["correct"])
        first = rows.filter(pc.and_(graded, pc.equal(rows["choice"], 0)))
        right = rows.filter(pc.fill_null(rows["answer"], False))
        documents = rows.filter(pc.invert(graded)) if task in protocols[evaluation] else rows.slice(0, 0)
        if len(first):
            yield node, (evaluation, task, "accuracy"), _scores(first, first["correct"])
        if len(right) and len(pc.unique(right["item"])) == len(right):
            yield node, (evaluation, task, "log_probability"), _scores(right, right["log_likelihood"])
        if len(documents):
            losses = pc.negate(documents["log_likelihood"])
            yield node, (evaluation, task, "loss"), _scores(documents, losses, documents["length"])


def _scores(rows: pa.Table, values: pa.ChunkedArray, weights: pa.ChunkedArray | None = None) -> Scores:
    names = np.array(rows["item"].to_pylist())
    order = np.argsort(names)
    values = np.asarray(values.to_numpy(), float)[order]
    tokens = np.ones(len(values)) if weights is None else np.asarray(weights.to_numpy(), float)[order]
    return Scores("\0".join(names[order]).encode() + tokens.tobytes(), values, tokens)


def _measure_rows(measure: Measure, scores: Mapping[str, Scores], nodes: list[Row]) -> list[Row]:
    """The rows of one evaluation, task and measure."""
    evaluation, task, name = measure
    unit, better = MEASURES[name]
    compared = [
        (relation, node, other)
        for relation, node, other in relations(nodes, {node: better * score.mean for node, score in scores.items()})
        if scores[node].items == scores[other].items
    ]
    tests = _tests(sorted({_canonical(node, other) for _, node, other in compared}), scores)
    adjusted = dict(zip(tests, holm(np.array([test["p_value"] for test in tests.values()])), strict=True))
    variances = _seed_variances(scores)
    rows = []
    for relation, node, other in compared:
        pair = _canonical(node, other)
        test = tests[pair] if pair == (node, other) else _reverse(tests[pair])
        seeds = [variances[one] for one in pair if one in variances]
        noise = 2 * math.sqrt(sum(seeds)) if len(seeds) == 2 else 0.0
        row = {
            "node": node,
            "other": other,
            "relation": relation,
            "evaluation": evaluation,
            "task": task,
            "measure": name,
            **test,
            "p_adjusted": float(adjusted[pair]),
            "family": len(tests),
            "distinguishable": bool(adjusted[pair] < LEVEL and abs(test["difference"]) > noise),
            "unit": unit,
        }
        if name == "accuracy":
            (_, gained), (lost, _) = flip_table(scores[other].values, scores[node].values).tolist()
            row |= {
                "mcnemar_p": mcnemar(lost, gained),
                "right_to_wrong": lost,
                "wrong_to_right": gained,
                "flip_rate": (lost + gained) / test["n"],
            }
        rows.append(row)
    return rows


def relations(nodes: list[Row], goodness: Mapping[str, float]) -> list[tuple[str, str, str]]:
    """(relation, node, other) of the nodes that have a `goodness` (more is better): to the dense model, to the parent,
    and to the next better node of the same dense model, where equals are ordered by name."""
    measured = [row for row in nodes if row["node"] in goodness]
    pairs = [("dense", row["node"], row["model"]) for row in measured if row["node"] != row["model"]]
    pairs += [("parent", row["node"], row["parent"]) for row in measured if row["parent"]]
    ranked = sorted((row["model"], -goodness[row["node"]], row["node"]) for row in measured)
    for (model, _, better), (other_model, _, worse) in pairwise(ranked):
        if model == other_model:
            pairs.append(("next", worse, better))
    return [pair for pair in pairs if pair[2] in goodness]


def _canonical(node: str, other: str) -> Pair:
    return (node, other) if node < other else (other, node)


def _reverse(test: Row) -> Row:
    """The test of a pair the other way round."""
    return test | {"difference": 0.0 - test["difference"], "low": 0.0 - test["high"], "high": 0.0 - test["low"]}


def _tests(pairs: list[Pair], scores: Mapping[str, Scores]) -> dict[Pair, Row]:
    """Difference, error, interval and p value of each pair; all pairs over the same items see the same resamples."""
    tests = {}
    by_items: dict[bytes, list[Pair]] = {}
    for pair in pairs:
        by_items.setdefault(scores[pair[0]].items, []).append(pair)
    for shared in by_items.values():
        differences = np.column_stack([scores[node].values - scores[other].values for node, other in shared])
        weights = scores[shared[0][0]].weights
        drawn = paired_bootstrap(differences, weights, RESAMPLES)
        for place, pair in enumerate(shared):
            tests[pair] = {
                "difference": float(drawn.difference[place]),
                "stderr": float(drawn.stderr[place]),
                "low": float(drawn.low[place]),
                "high": float(drawn.high[place]),
                "n": len(weights),
                "p_value": float(drawn.p_value[place]),
            }
    return tests


def _seed_variances(scores: Mapping[str, Scores]) -> dict[str, float]:
    """Of each node that was made with three seeds or more: the variance of its mean score over them.

    Two give so rough an estimate that twice the root would pass 14 pairs of a hundred that do not differ (simulated,
    without noise of items); three pass 7.
    """
    variances: dict[str, float] = {}
    for group in seed_groups(scores).values():
        if len(group) > 2:
            variance = float(np.var([scores[node].mean for node in group], ddof=1))
            variances |= dict.fromkeys(group, variance)
    return variances


def seed_groups(nodes: Iterable[str]) -> dict[str, list[str]]:
    """Nodes by their paths without seeds."""
    groups: dict[str, list[str]] = {}
    for node in sorted(nodes):
        groups.setdefault(NodeName(node).with_study_seed, []).append(node)
    return groups


def signals(metrics: Iterable[Row], curves: Iterable[Row]) -> list[Row]:
    """The rows of signals: what the seed of recovery changes, by metric; and how steadily recovery lowers the loss."""
    return _metric_signals(metrics) + _curve_signals(curves)


def _metric_signals(metrics: Iterable[Row]) -> list[Row]:
    by_metric: dict[Pair, dict[str, Row]] = {}
    for row in metrics:
        by_metric.setdefault((row["evaluation"], row["metric"]), {})[row["node"]] = row
    signal_rows = []
    for (evaluation, metric), rows in by_metric.items():
        for group, nodes in seed_groups(rows).items():
            if len(nodes) > 1:
                errors = [rows[node]["stderr"] for node in nodes]
                signal_rows.append(
                    {
                        "group": group,
                        "evaluation": evaluation,
                        "metric": metric,
                        **_over_seeds([rows[node]["value"] for node in nodes]),
                        "item_stderr": None if None in errors else float(np.mean(errors)),
                        "unit": rows[nodes[0]]["unit"],
                    }
                )
    return signal_rows


def _over_seeds(values: list[float]) -> Row:
    """Mean, deviation with its interval, and signal-to-noise ratio of one value a seed, two or more."""
    deviation = float(np.std(values, ddof=1))
    low, high = deviation_interval(deviation, len(values))
    return {
        "mean": float(np.mean(values)),
        "std": deviation,
        "low": low,
        "high": high,
        "seeds": len(values),
        "snr": signal_to_noise(np.array(values)),
    }


def _curve_signals(curves: Iterable[Row]) -> list[Row]:
    runs: dict[str, dict[int, float]] = {}
    for row in sorted(curves, key=lambda row: row["tokens"]):
        if row["split"] == "validation":
            runs.setdefault(row["node"], {})[row["tokens"]] = row["loss"]
    signal_rows = []
    for group, nodes in seed_groups(runs).items():
        losses = [np.array(list(runs[node].values())) for node in nodes]
        steady = [monotonicity(-loss) for loss in losses]
        row = {"group": group, "evaluation": None, "item_stderr": None}
        entries = [("validation_loss_monotonicity", _over_one_or_more(steady), "correlation")]
        if len(nodes) > 1:
            entries.append(("validation_loss", _over_seeds([loss[-1] for loss in losses]), "nats/token"))
            # A rung of the ladder is reached at the end of a step, so that seeds differ by some tokens.
            rungs = [[loss for tokens, loss in runs[node].items() if tokens > 0] for node in nodes]
            if shared := min(map(len, rungs)):
                deviation = seed_deviation(np.array([losses[:shared] for losses in rungs]))
                averaged = {"mean": deviation, "seeds": len(nodes)}
                entries.append(("validation_loss_seed_deviation", averaged, "nats/token"))
        signal_rows += [row | {"metric": metric, **values, "unit": unit} for metric, values, unit in entries]
    return signal_rows


def _over_one_or_more(values: list[float]) -> Row:
    """As `_over_seeds`; the mean alone of a single seed."""
    return _over_seeds(values) if len(values) > 1 else {"mean": values[0], "seeds": 1}
