"""The best node within limits, and at each size, with the probability that it is the best, from measurements alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from coppice.decisions import Answer
from coppice.errors import UserError, did_you_mean
from coppice.formatting import human_count, join_first, join_words, number, with_interval
from coppice.results.comparisons import Scores, node_scores
from coppice.results.reading import pareto_front
from coppice.results.schemas import Row
from coppice.uncertainty import interval, resampled_sums

DRAWS = 4000
MEASURED = ("value", "stderr", "low", "high")
COVERED = 0.95  # runners-up are told until so much of the probability is
LATENCY = "decode_latency"
_ROOFLINE = "(roofline)"


# Which values, and how sure


def chosen_metric(metrics: Sequence[Row], metric: str | None, evaluation: str | None) -> tuple[str, str]:
    """The pair (evaluation, metric) that was asked for, or the one perplexity. Raises UserError where it is unclear."""
    pairs = {(row["evaluation"], row["metric"]) for row in metrics}
    names = {name for _, name in pairs}
    if metric is not None and metric not in names:
        raise UserError(f"--metric {metric}: the tables hold no such metric.{did_you_mean(metric, names)}")
    if evaluation is not None and evaluation not in {found for found, _ in pairs}:
        known = {found for found, _ in pairs}
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
    """Whether less of a metric is better. Raises UserError where its name and unit do not tell, nor `prefer`."""
    if prefer is not None:
        return prefer == "lower"
    if metric.startswith(("perplexity_", "loss_")):
        return True
    if unit == "accuracy" or metric.startswith("knowledge_"):
        return False
    raise UserError(f"--metric {metric}: it does not say which way is better; add --prefer lower or --prefer higher.")


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
        exact = [row["node"] for row in self.rows if not _known(row["stderr"])]
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
        node | {key: values[node["node"]][key] for key in MEASURED}
        for node in nodes
        if node["node"] in values and _known(values[node["node"]]["value"])
    ]
    measured = {row["node"] for row in rows}
    link = np.exp if pair[1].startswith("perplexity_") else np.asarray
    drawn = joint_draws(rows, scores_of(items, *pair), link, draws, seed)
    return Compared(*pair, lower, rows, drawn, [row["node"] for row in nodes if row["node"] not in measured])


def joint_draws(
    rows: Sequence[Row], scores: Mapping[str, Scores], link: Callable[[Any], Any], draws: int = DRAWS, seed: int = 0
) -> np.ndarray:
    """Draws of the values of `rows` (node, value, stderr): [draws, rows]; value = link(mean of the node's scores).

    Nodes measured on the same items are drawn together, the same items drawn for all of them, so that what is hard for
    all cancels in their comparison. Nodes whose items do not give their value are drawn by normal(value, stderr), each
    for itself; without a standard error a value counts as exact.
    """
    values = np.array([row["value"] for row in rows])
    spread = np.array([row["stderr"] if _known(row["stderr"]) else 0.0 for row in rows])
    found = values + spread * np.random.default_rng(seed).standard_normal((draws, len(rows)))
    groups: dict[bytes, list[int]] = {}
    for place, row in enumerate(rows):
        of_node = scores.get(row["node"])
        gives = of_node is not None and math.isclose(link(of_node.mean), row["value"], rel_tol=1e-6)
        if gives and len(of_node.values) > 1:
            groups.setdefault(of_node.items, []).append(place)
    for group, places in enumerate(groups.values()):
        shared = [scores[rows[place]["node"]] for place in places]
        columns = np.column_stack([*(each.values for each in shared), shared[0].weights])
        sums = resampled_sums(columns, draws, seed + 1 + group)
        found[:, places] = link(sums[:, :-1] / sums[:, -1:])
    return found


def scores_of(items: pa.Table, evaluation: str, metric: str) -> dict[str, Scores]:
    """Of each node the scores that a metric is made of: losses of documents, or rightness of answers."""
    documents = metric.startswith(("perplexity_", "loss_"))
    task = metric.partition("_")[2] if documents else metric.removesuffix("_acc").removesuffix("_exact_match")
    chosen = items.filter((pc.field("evaluation") == evaluation) & (pc.field("task") == task))
    owners = np.asarray(chosen["node"].to_pylist(), dtype=str)
    wanted, protocols = ("loss", {task}) if documents else ("accuracy", set())
    # The table is sorted by node.
    ends = np.append(np.flatnonzero(owners[1:] != owners[:-1]) + 1, len(owners))
    starts = np.append(0, ends[:-1])
    return {
        node: scores
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True)
        for (node, *_, measure), scores in node_scores(chosen.slice(start, end - start), {evaluation: protocols})
        if measure == wanted
    }


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# Limits


@dataclass(frozen=True)
class Limit:
    """An upper bound on a number of each node; `values` has no entry, or None, where it is not known.

    text: the bound in words; shown: a value with its unit.
    """

    text: str
    most: float
    values: dict[str, float | None]
    shown: Callable[[float], str] = number

    def admits(self, node: str) -> bool:
        value = self.values.get(node)
        return value is not None and value <= self.most


def limits(
    nodes: Sequence[Row],
    costs: Sequence[Row],
    max_bytes: float | None = None,
    max_latency: float | None = None,
    max_recovery_tokens: float | None = None,
    device: str | None = None,
    cost: str | None = None,
) -> tuple[list[Limit], list[str]]:
    """The limits that were asked for, and sentences on what they rest on."""
    found, notes = [], []
    if max_bytes is not None:
        sizes = {row["node"]: row["stored_bytes"] for row in nodes}
        found.append(Limit(f"at most {_bytes(max_bytes)}", max_bytes, sizes, _bytes))
    if max_recovery_tokens is not None:
        trained = {row["node"]: row["path_recovery_tokens"] for row in nodes}
        text = f"at most {_recovery_tokens(max_recovery_tokens)} on the path"
        found.append(Limit(text, max_recovery_tokens, trained, _recovery_tokens))
    if max_latency is not None:
        where, rows = latencies(costs, device, cost)
        text = f"a {LATENCY} of at most {max_latency:g} s/token on {where}"
        found.append(Limit(text, max_latency, {node: row["value"] for node, row in rows.items()}, _latency))
        simulated = sorted(node for node, row in rows.items() if row["simulated"])
        if where.endswith(_ROOFLINE):
            notes.append(f"The latencies on {where} are predictions, not measurements.")
        elif simulated:
            notes.append(f"Their latency is that of a simulation: {join_words(simulated)}.")
    return found, notes


def _bytes(value: float) -> str:
    return f"{value:,.0f} stored bytes"


def _recovery_tokens(value: float) -> str:
    return f"{human_count(value)} recovery tokens"


def _latency(value: float) -> str:
    return f"{number(value, 4)} s/token"


def latencies(costs: Sequence[Row], device: str | None, cost: str | None) -> tuple[str, dict[str, Row]]:
    """A device, and the rows of the decoding latency on it, by node. Raises UserError where the choice is unclear.

    Without a device named it is the one that was measured on; predictions by a roofline are used when named.
    """
    rows = [
        row for row in costs if row["metric"] == LATENCY and _known(row["value"]) and cost in (None, row["evaluation"])
    ]
    devices = sorted({row["device"] for row in rows})
    if not devices:
        of_cost = "" if cost is None else f" by {cost!r}"
        raise UserError(f"--max-latency: no {LATENCY} was measured{of_cost}; add a cost evaluation to the study.")
    if device is not None and device not in devices:
        raise UserError(f"--device {device}: no {LATENCY} is known on it.{did_you_mean(device, devices)}")
    fitting = [name for name in devices if (name == device if device else not name.endswith(_ROOFLINE))]
    if len(fitting) != 1:
        raise UserError(
            f"--max-latency: choose by --device where it holds; latencies are known on: {'; '.join(devices)}."
        )
    rows = [row for row in rows if row["device"] == fitting[0]]
    evaluations = sorted({row["evaluation"] for row in rows})
    if len(evaluations) > 1:
        raise UserError(
            f"--max-latency: several evaluations measured {LATENCY} ({join_words(evaluations)}); choose by --cost."
        )
    return fitting[0], {row["node"]: row for row in rows}


# Answers


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
    told = int(np.searchsorted(np.cumsum(probabilities[likeliest]), COVERED - 1e-9)) + 1
    shown = [place for place in order if place == order[0] or place in likeliest[:told]]
    found = [
        {
            **{key: compared.rows[within[place]][key] for key in ("node", *MEASURED, "stored_bytes")},
            "path_recovery_tokens": compared.rows[within[place]]["path_recovery_tokens"],
            "probability": float(probabilities[place]),
        }
        for place in shown
    ]
    best = found[0]
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
        sentences.append(f"Not compared, since what the limits bound is not known of them: {join_first(unknown)}.")
    return {
        "title": f"Best {compared.metric} ({compared.evaluation})",
        "nodes": found,
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
                for row in found
            ),
        ],
    }


def ladder(compared: Compared) -> Answer:
    """The nodes that no smaller one beats: each the best at or below its size, with the probability that it is so."""
    sizes = np.array([row["stored_bytes"] for row in compared.rows])
    sign = 1 if compared.lower else -1
    steps = []
    for place in pareto_front([(row["stored_bytes"], sign * row["value"]) for row in compared.rows]):
        smaller = np.flatnonzero(sizes <= sizes[place])
        probabilities = probabilities_of_best(compared.draws[:, smaller], compared.lower)
        row = compared.rows[place]
        steps.append(
            {
                **{key: row[key] for key in ("node", *MEASURED, "stored_bytes")},
                "probability": float(probabilities[np.flatnonzero(smaller == place)[0]]),
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


def _with_error(row: Row) -> str:
    return with_interval(row["value"], interval(row))


def _megabytes(row: Row) -> str:
    return number(row["stored_bytes"] / 1e6)


def _nothing_within(compared: Compared, bounds: Sequence[Limit]) -> str:
    """That no node is within the limits, and how near to each of them one comes."""
    if not compared.rows:
        return f"No node has a finite {compared.metric} ({compared.evaluation})."
    least = []
    for bound in bounds:
        known = [value for row in compared.rows if (value := bound.values.get(row["node"])) is not None]
        least += [bound.shown(min(known))] if known else []
    told = f": the least that one has is {join_words(least)}" if least else ""
    alone = ", each limit taken alone" if len(least) > 1 else ""
    limited = join_words([bound.text for bound in bounds])
    return f"No node whose {compared.metric} was measured has {limited}{told}{alone}. Raise a limit."
