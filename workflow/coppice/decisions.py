"""`coppice recommend`: what a study's tables and fitted laws advise to do, and how far that can be trusted.

Four questions. From a law of recoveries: how many tokens to buy for a node, what loss to expect at a budget that was
not run, and which next run would tell most. From measurements alone: the best node within limits, with the probability
that it is the best. What rests on a law shows the law's held-out error, and is refused where the law fails its own
test.

Source of the choice of the next run: MacKay, Information-based objective functions for active data selection (Neural
Computation 4, 1992), with the bootstrap's parameters in the place of a posterior.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from coppice import laws
from coppice.comparisons import Scores, node_scores
from coppice.errors import UserError, nearest
from coppice.files import read_json
from coppice.laws.fit import Fit, Parameters, Points, levels, select
from coppice.tables import Row, front, read_table
from coppice.uncertainty import percentile_interval, resampled_sums
from coppice.wording import aligned, counted, held_out_sentence, listed, number, wrapped

Answer = dict[str, Any]  # title, sentences, perhaps a table (titles, then rows), and the numbers behind them

DRAWS = 4000
COVERED = 0.95  # runners-up are told until so much of the probability is
DOUBLINGS = (2, 4)  # times the largest tokens measured, as next runs
LATENCY = "decode_latency"
_ROOFLINE = "(roofline)"
_OF_RECOVERIES = {"run", "model", "dense_parameters", "rho", "tokens", "dense_loss"}
_NORMAL = np.array([NormalDist().inv_cdf((place + 0.5) / 101) for place in range(101)])


# Mathematics


def predictive_interval(samples: np.ndarray, noise: float) -> tuple[float, float]:
    """95% interval of x + noise e: x one of `samples` [k], e standard normal, here at 101 evenly likely values."""
    return percentile_interval(np.add.outer(samples, noise * _NORMAL))


def variance_reduction(target: np.ndarray, candidates: np.ndarray, noise: float) -> np.ndarray:
    """How much of Var(target) one observation of each candidate would take away: [m], in the square of the unit.

        Cov(t, c)^2 / (Var(c) + noise^2)

    `target` [k] and `candidates` [k, m] are predictions with the same k samples of the parameters; noise: the standard
    deviation of an observation. Exact where predictions are linear in Gaussian parameters.
    """
    target, candidates = target - target.mean(), candidates - candidates.mean(axis=0)
    covariance = target @ candidates / (len(target) - 1)
    variance = np.sum(candidates**2, axis=0) / (len(target) - 1) + noise**2
    return np.divide(covariance**2, variance, out=np.zeros_like(variance), where=variance > 0)


def probabilities_of_best(draws: np.ndarray, lower: bool) -> np.ndarray:
    """Part of the `draws` [k, n] in which each of n values is the best, ties shared: [n], with sum 1."""
    values = draws if lower else -draws
    best = values == values.min(axis=1, keepdims=True)
    return (best / best.sum(axis=1, keepdims=True)).mean(axis=0)


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


def _known(value: float | None) -> bool:
    return value is not None and math.isfinite(value)


# Laws


@dataclass(frozen=True)
class Fitted:
    """A fit as `coppice fit` left it: points [n] in the fit's units, samples [k, 1] of the parameters."""

    name: str
    law: laws.Law
    report: dict[str, Any]
    points: Points
    samples: Parameters

    @property
    def parameters(self) -> dict[str, float]:
        return {name: entry["value"] for name, entry in self.report["parameters"].items()}

    @property
    def scales(self) -> dict[str, float]:
        return {name: entry["scale"] or 1.0 for name, entry in self.report["units"].items()}

    def predicted(self, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """The law's values at `points`: [n], and with every sample of the parameters [k, n]."""
        predict = self.law.form.predict
        count = len(points["run"])
        drawn = predict(self.samples, points)
        return np.broadcast_to(predict(self.parameters, points), count), np.broadcast_to(drawn, (len(drawn), count))


def read_reports(results: Path) -> dict[str, dict[str, Any]]:
    """fit.json of every law that was fitted, by its name in the study."""
    return {path.parent.name: read_json(path) for path in sorted(Path(results).glob("laws/*/fit.json"))}


def read_fit(results: Path, name: str, report: dict[str, Any]) -> Fitted:
    """A fit with its points and its samples. Raises UserError where they cannot be read."""
    folder = Path(results) / "laws" / name
    law = laws.load(report["law"])
    scales = {column: entry["scale"] or 1.0 for column, entry in report["units"].items()}
    raw = _columns(folder / "points.parquet", list(law.columns))
    points = {column: values / scales[column] if column in scales else values for column, values in raw.items()}
    # A fit of no points has no samples either.
    samples = _columns(folder / "samples.parquet", list(report["parameters"]) if report["points"] else [])
    return Fitted(name, law, report, points, {parameter: values[:, None] for parameter, values in samples.items()})


def _columns(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    try:
        table = pq.read_table(path, columns=names)
    except (pa.ArrowException, OSError):
        raise UserError(f"{path} cannot be read; fit the law again.") from None
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}; fit the law again.")
    return {name: np.asarray(table[name].to_pylist()) for name in names}


def refusal(name: str, report: dict[str, Any]) -> str | None:
    """Why nothing may rest on a law: the test that it fails; None where it passes."""
    if "passes" not in report:
        return f"Nothing is recommended from law {name}, whose fit tells of no test; fit it again."
    if report["passes"]["ok"]:
        return None
    return f"Nothing is recommended from law {name}, which fails its own test. {' '.join(report['passes']['reasons'])}"


def held_out(name: str, report: dict[str, Any]) -> str:
    """A law's held-out errors as sentences."""
    own = {test.replace("_", " "): errors[report["law"]] for test, errors in report["held_out"].items()}
    shown = {test: error for test, error in own.items() if "reason" not in error} or own
    if not shown:
        return f"Law {name} has no held-out test."
    return " ".join(
        f"Held-out error of law {name}, {test}: {held_out_sentence(error)}" for test, error in shown.items()
    )


def of_recoveries(report: dict[str, Any]) -> bool:
    """Whether a fit's law follows recoveries of pruned models by size, ratio and tokens."""
    law = laws.load(report["law"])
    return law.form is not None and set(law.columns) >= _OF_RECOVERIES


def law_of_recoveries(results: Path, name: str | None) -> Fitted:
    """The fitted law of recoveries, by its name where there are several. Raises UserError where there is none."""
    reports = read_reports(results)
    if name is not None and name not in reports:
        raise UserError(f"--law {name}: no law of that name was fitted.{nearest(name, reports)}")
    chosen = [key for key, report in reports.items() if name in (None, key) and of_recoveries(report)]
    if not chosen and name is not None:
        raise UserError(f"--law {name}: it is no law of recoveries (such as p2), which this question needs.")
    if not chosen:
        raise UserError(f"No law of recoveries was fitted in {results}/laws; add p2 to the study's `laws`, and run it.")
    if len(chosen) > 1:
        raise UserError(f"Several laws of recoveries were fitted ({listed(chosen)}); choose one by --law.")
    return read_fit(results, chosen[0], reports[chosen[0]])


def _refused(fitted: Fitted, title: str) -> Answer | None:
    reason = refusal(fitted.name, fitted.report)
    return None if reason is None else {"title": title, "law": fitted.name, "refused": True, "sentences": [reason]}


def _rests_on(fitted: Fitted) -> dict[str, Any]:
    errors = {test: forms[fitted.report["law"]] for test, forms in fitted.report["held_out"].items()}
    return {"law": fitted.name, "refused": False, "held_out": errors}


def starting_points(fitted: Fitted, nodes: Sequence[Row]) -> np.ndarray:
    """The pruned node that each point's recovery started from: [n]; the run itself where the tables do not tell."""
    parents = {row["node"]: row["parent"] for row in nodes}
    return np.array([parents.get(run) or run for run in fitted.points["run"]], dtype=str)


def points_of(fitted: Fitted, nodes: Sequence[Row], node: str) -> np.ndarray:
    """Indices, by tokens, of the points of a recovery, or of all recoveries of a pruned node.

    Raises UserError where there are none.
    """
    runs, started = fitted.points["run"], starting_points(fitted, nodes)
    rows = np.flatnonzero((runs == node) | (started == node))
    if len(rows):
        return rows[np.argsort(fitted.points["tokens"][rows], kind="stable")]
    known = {row["node"] for row in nodes} | set(runs)
    if node not in known:
        raise UserError(f"There is no node {node!r}.{nearest(node, known)}")
    raise UserError(
        f"No recovery of {node!r} is among the points of law {fitted.name}; they belong to: "
        f"{', '.join(sorted(set(started)))}."
    )


def tokens_to_buy(fitted: Fitted, nodes: Sequence[Row], node: str, gain: float | None = None) -> Answer:
    """The tokens past which doubling them gains less than `gain` nats per token, by the law's own recommendation."""
    title = f"Recovery tokens to buy for {node}"
    if refused := _refused(fitted, title):
        return refused
    rows = points_of(fitted, nodes, node)
    report, options = fitted.report, fitted.report["options"]
    fixed, _ = fitted.law.form.reduce(fitted.points)
    unknown = [name for name, entry in report["parameters"].items() if not entry["identified"] and name not in fixed]
    starts = np.empty((0, len(fitted.parameters)))
    fit = Fit(fitted.parameters, fixed, tuple(unknown), report["converged"], starts)
    asked = options if gain is None else options | {"gain": gain}
    advice, reasons = fitted.law.recommend(fit, fitted.samples, select(fitted.points, rows), fitted.scales, asked)
    sentences = [entry["sentence"] for entry in advice] + reasons + [held_out(fitted.name, report)]
    return {"title": title, "node": node, **_rests_on(fitted), "tokens": advice, "sentences": sentences}


def expected_loss(fitted: Fitted, nodes: Sequence[Row], node: str, tokens: float) -> Answer:
    """The law's loss of a node after so many recovery tokens, with the interval of a new measurement."""
    title = f"Loss of {node} after {counted(tokens)} recovery tokens"
    if refused := _refused(fitted, title):
        return refused
    rows = points_of(fitted, nodes, node)
    scale, unit = fitted.scales["tokens"], fitted.law.units["loss"]
    point = select(fitted.points, rows[:1]) | {"tokens": np.array([tokens / scale])}
    value, drawn = fitted.predicted(point)
    low, high = (None, None)
    if len(drawn):
        low, high = predictive_interval(drawn[:, 0], fitted.report["metrics"]["rmse"])
    measured = fitted.points["tokens"][rows] * scale
    outside = not measured.min() <= tokens <= measured.max()
    between = "" if low is None else f", 95% interval of a new measurement [{number(low, 4)}, {number(high, 4)}]"
    sentences = [f"{node} after {counted(tokens)} tokens: loss {number(value[0], 4)} {unit}{between}."]
    if outside:
        sentences.append(
            f"This is an extrapolation: {counted(measured.min())} to {counted(measured.max())} tokens were measured."
        )
    if low is None:
        sentences.append("There is no interval, since the fit has no resamples of its runs.")
    return {
        "title": title,
        "node": node,
        **_rests_on(fitted),
        "at_tokens": tokens,
        "value": float(value[0]),
        "low": low,
        "high": high,
        "extrapolation": outside,
        "sentences": [*sentences, held_out(fitted.name, fitted.report)],
    }


def next_runs(
    fitted: Fitted, nodes: Sequence[Row], node: str | None = None, tokens: float | None = None, top: int = 5
) -> Answer:
    """The runs that would take most off the variance of one predicted loss, each counted by its last loss alone.

    The target: `node` after `tokens` (default: its largest measured), or the node whose loss at its largest is known
    worst. Runs: each pruned node at the next doublings of its tokens, or again with another seed, and the dense sizes
    and ratios that were measured, but not together.
    """
    title = "Next run"
    if refused := _refused(fitted, title):
        return refused
    if not len(next(iter(fitted.samples.values()))):
        reason = f"Law {fitted.name} has no resamples of its runs, so it cannot tell which run would shrink what."
        return {"title": title, **_rests_on(fitted), "runs": [], "sentences": [reason]}
    scale = fitted.scales["tokens"]
    target, of_node = _target(fitted, nodes, node, tokens)
    candidates, runs = _candidates(fitted, nodes)
    _, aimed = fitted.predicted(target)
    _, drawn = fitted.predicted(candidates)
    before = float(np.var(aimed[:, 0], ddof=1))
    reduction = variance_reduction(aimed[:, 0], drawn, fitted.report["metrics"]["rmse"])
    order = np.argsort(-reduction, kind="stable")[:top]
    found = [
        runs[place]
        | {
            "variance_reduction": float(reduction[place]),
            "part": float(reduction[place] / before) if before > 0 else 0.0,
            "part_per_token": float(reduction[place] / before / runs[place]["tokens"]) if before > 0 else 0.0,
            "deviation_after": float(np.sqrt(max(before - reduction[place], 0.0))),
        }
        for place in order
    ]
    at = float(target["tokens"][0] * scale)
    unit = 1000.0 ** math.floor(math.log(max(run["tokens"] for run in found), 1000) + 1e-9)
    sentences = [
        f"The predicted loss of {of_node} after {counted(at)} tokens has a standard deviation of "
        f"{number(before**0.5)} {fitted.law.units['loss']} from the fit. The runs that would shrink it most:",
        *(
            f"{place}. {run['run']}: the variance falls by {run['part']:.0%}, the standard deviation to "
            f"{number(run['deviation_after'])}, which is {100 * run['part_per_token'] * unit:.2g}% per {counted(unit)} "
            "tokens."
            for place, run in enumerate(found, 1)
        ),
        held_out(fitted.name, fitted.report),
    ]
    return {
        "title": title,
        **_rests_on(fitted),
        "node": of_node,
        "at_tokens": at,
        "deviation": before**0.5,
        "runs": found,
        "sentences": sentences,
    }


def _target(fitted: Fitted, nodes: Sequence[Row], node: str | None, tokens: float | None) -> tuple[Points, str]:
    """The point whose loss is to be known better, and its node."""
    if node is not None:
        point = select(fitted.points, points_of(fitted, nodes, node)[-1:])
        return point if tokens is None else point | {"tokens": np.array([tokens / fitted.scales["tokens"]])}, node
    started = starting_points(fitted, nodes)
    last = np.array(_last_of_each(started, fitted.points["tokens"]))
    _, drawn = fitted.predicted(select(fitted.points, last))
    widths = np.subtract(*np.quantile(drawn, [0.975, 0.025], axis=0))
    widest = last[np.argmax(widths)]
    return select(fitted.points, np.array([widest])), str(started[widest])


def _last_of_each(started: np.ndarray, tokens: np.ndarray) -> list[int]:
    """For each starting point the index of its point with the most tokens."""
    places = (np.flatnonzero(started == node) for node in np.unique(started))
    return [int(rows[np.argmax(tokens[rows])]) for rows in places]


def _candidates(fitted: Fitted, nodes: Sequence[Row]) -> tuple[Points, list[dict[str, Any]]]:
    """Runs that could be next: their last points in the fit's units, and what they are."""
    points, scale = fitted.points, fitted.scales["tokens"]
    started = starting_points(fitted, nodes)
    found = []  # (a point like it, rho, tokens, kind, what to do)
    for row in _last_of_each(started, points["tokens"]):
        ratio, tokens, name = points["rho"][row], points["tokens"][row], f"train {started[row]} on"
        found += [(row, ratio, factor * tokens, "tokens", name) for factor in DOUBLINGS]
        found.append((row, ratio, tokens, "seed", f"with another seed, {name}"))
    level = levels(points["rho"])
    for model in np.unique(points["model"]):
        of_model = np.flatnonzero(points["model"] == model)
        row = of_model[np.argmax(points["tokens"][of_model])]
        for missing in np.setdiff1d(level, level[of_model]):
            ratio = points["rho"][level == missing].mean()
            found.append(
                (row, ratio, points["tokens"][row], "design", f"prune {model} to rho {ratio:.2f}, train it on")
            )
    rows, ratios, tokens, kinds, deeds = zip(*found, strict=True)
    runs = [
        {
            "run": f"{deed} {counted(cost)} tokens",
            "kind": kind,
            "model": str(points["model"][row]),
            "rho": float(ratio),
            "tokens": cost,
        }
        for row, ratio, cost, kind, deed in zip(
            rows, ratios, np.multiply(tokens, scale).tolist(), kinds, deeds, strict=True
        )
    ]
    return select(points, np.array(rows)) | {"rho": np.array(ratios), "tokens": np.array(tokens)}, runs


# Measurements


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
            notes.append(f"Not compared, since they have no finite {self.metric}: {listed(self.unmeasured)}.")
        if exact:
            notes.append(f"Taken as exact, since their {self.metric} has no standard error: {listed(exact)}.")
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
        node | {"value": values[node["node"]]["value"], "stderr": values[node["node"]]["stderr"]}
        for node in nodes
        if node["node"] in values and _known(values[node["node"]]["value"])
    ]
    measured = {row["node"] for row in rows}
    link = np.exp if pair[1].startswith("perplexity_") else np.asarray
    drawn = joint_draws(rows, scores_of(items, *pair), link, draws, seed)
    return Compared(*pair, lower, rows, drawn, [row["node"] for row in nodes if row["node"] not in measured])


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


def lower_is_better(metric: str, unit: str, prefer: str | None = None) -> bool:
    """Whether less of a metric is better. Raises UserError where its name and unit do not tell, nor `prefer`."""
    if prefer is not None:
        return prefer == "lower"
    if metric.startswith(("perplexity_", "loss_")):
        return True
    if unit == "accuracy" or metric.startswith("knowledge_"):
        return False
    raise UserError(f"--metric {metric}: it does not say which way is better; add --prefer lower or --prefer higher.")


def chosen_metric(metrics: Sequence[Row], metric: str | None, evaluation: str | None) -> tuple[str, str]:
    """The pair (evaluation, metric) that was asked for, or the one perplexity. Raises UserError where it is unclear."""
    pairs = {(row["evaluation"], row["metric"]) for row in metrics}
    names = {name for _, name in pairs}
    if metric is not None and metric not in names:
        raise UserError(f"--metric {metric}: the tables hold no such metric.{nearest(metric, names)}")
    if evaluation is not None and evaluation not in {found for found, _ in pairs}:
        known = {found for found, _ in pairs}
        raise UserError(f"--evaluation {evaluation}: it measured no metric.{nearest(evaluation, known)}")
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
            f"--metric {metric}: several evaluations measured it ({listed([pair[0] for pair in fitting])}); choose "
            "one by --evaluation."
        )
    if metric is not None:
        raise UserError(f"--metric {metric}: the evaluation {evaluation!r} did not measure it.")
    raise UserError(f"Choose what is to be best by --metric; the tables hold: {', '.join(sorted(names))}.")


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
        raise UserError(f"--device {device}: no {LATENCY} is known on it.{nearest(device, devices)}")
    fitting = [name for name in devices if (name == device if device else not name.endswith(_ROOFLINE))]
    if len(fitting) != 1:
        raise UserError(
            f"--max-latency: choose by --device where it holds; latencies are known on: {'; '.join(devices)}."
        )
    rows = [row for row in rows if row["device"] == fitting[0]]
    evaluations = sorted({row["evaluation"] for row in rows})
    if len(evaluations) > 1:
        raise UserError(
            f"--max-latency: several evaluations measured {LATENCY} ({listed(evaluations)}); choose by --cost."
        )
    return fitting[0], {row["node"]: row for row in rows}


@dataclass(frozen=True)
class Limit:
    """An upper bound on a number of each node; `values` has no entry, or None, where it is not known."""

    text: str
    most: float
    values: dict[str, float | None]

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
        found.append(Limit(f"at most {max_bytes:,.0f} stored bytes", max_bytes, sizes))
    if max_recovery_tokens is not None:
        trained = {row["node"]: row["path_recovery_tokens"] for row in nodes}
        text = f"at most {counted(max_recovery_tokens)} recovery tokens on the path"
        found.append(Limit(text, max_recovery_tokens, trained))
    if max_latency is not None:
        where, rows = latencies(costs, device, cost)
        text = f"a {LATENCY} of at most {max_latency:g} s/token on {where}"
        found.append(Limit(text, max_latency, {node: row["value"] for node, row in rows.items()}))
        simulated = sorted(node for node, row in rows.items() if row["simulated"])
        if where.endswith(_ROOFLINE):
            notes.append(f"The latencies on {where} are predictions, not measurements.")
        elif simulated:
            notes.append(f"Their latency is that of a simulation: {listed(simulated)}.")
    return found, notes


def best_within(compared: Compared, bounds: Sequence[Limit]) -> Answer:
    """The node that is the best within the limits, with its probability, and its rivals until 95% is covered.

    Raises UserError where no node is within them.
    """
    within = [place for place, row in enumerate(compared.rows) if all(bound.admits(row["node"]) for bound in bounds)]
    words = f" with {listed([bound.text for bound in bounds])}" if bounds else ""
    if not within:
        raise UserError(_nothing_within(compared, bounds, words))
    probabilities = probabilities_of_best(compared.draws[:, within], compared.lower)
    values = np.array([compared.rows[place]["value"] for place in within]) * (1 if compared.lower else -1)
    order = np.lexsort((values, -probabilities))
    told = int(np.searchsorted(np.cumsum(probabilities[order]), COVERED - 1e-9)) + 1
    found = [
        {
            **{key: compared.rows[within[place]][key] for key in ("node", "value", "stderr", "stored_bytes")},
            "path_recovery_tokens": compared.rows[within[place]]["path_recovery_tokens"],
            "probability": float(probabilities[place]),
        }
        for place in order[:told]
    ]
    best = found[0]
    those = "1 node" if len(within) == 1 else f"{len(within)} nodes"
    sentences = [
        f"Best of {those}{words}: {best['node']}, {compared.metric} {number(best['value'])}, with a probability of "
        f"{best['probability']:.0%} that it is the best.",
        *compared.notes(),
    ]
    unknown = sorted(
        row["node"] for row in compared.rows if any(bound.values.get(row["node"]) is None for bound in bounds)
    )
    if unknown:
        sentences.append(f"Not compared, since what the limits bound is not known of them: {listed(unknown)}.")
    return {
        "title": f"Best {compared.metric} ({compared.evaluation})",
        "nodes": found,
        "compared": len(within),
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
                    number(row["stored_bytes"] / 1e6),
                    counted(row["path_recovery_tokens"]),
                ]
                for row in found
            ),
        ],
    }


def _with_error(row: Row) -> str:
    return number(row["value"]) + (f" +- {number(1.96 * row['stderr'], 2)}" if _known(row["stderr"]) else "")


def _nothing_within(compared: Compared, bounds: Sequence[Limit], words: str) -> str:
    """Which node comes nearest to each limit, as a sentence."""
    if not compared.rows:
        return f"No node has a finite {compared.metric} ({compared.evaluation})."
    nearest_values = []
    for bound in bounds:
        known = [value for row in compared.rows if (value := bound.values.get(row["node"])) is not None]
        nearest_values.append(f"{number(min(known), 4)} is the least for '{bound.text}'" if known else "")
    told = "; ".join(text for text in nearest_values if text)
    return f"No node with a {compared.metric} is one{words}{f' ({told})' if told else ''}; raise a limit."


def ladder(compared: Compared) -> Answer:
    """The nodes that no smaller one beats: each the best at or below its size, with the probability that it is so."""
    sizes = np.array([row["stored_bytes"] for row in compared.rows])
    sign = 1 if compared.lower else -1
    steps = []
    for place in front([(row["stored_bytes"], sign * row["value"]) for row in compared.rows]):
        smaller = np.flatnonzero(sizes <= sizes[place])
        probabilities = probabilities_of_best(compared.draws[:, smaller], compared.lower)
        row = compared.rows[place]
        steps.append(
            {
                **{key: row[key] for key in ("node", "value", "stderr", "stored_bytes")},
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
                    number(step["stored_bytes"] / 1e6),
                    _with_error(step),
                    f"{step['probability']:.0%}",
                    str(step["compared"]),
                ]
                for step in steps
            ),
        ],
    }


# All of it


def overview(results: Path, tables: Mapping[str, Sequence[Row]], top: int = 3) -> list[Answer]:
    """What every law recommends, the best node at each size by each perplexity, and the next runs.

    tables: rows of `nodes` and `metrics`; the table of items is read here. Raises UserError where it is missing.
    """
    results = Path(results)
    reports = read_reports(results)
    answers = [advice(name, report) for name, report in reports.items()]
    pairs = sorted({(row["evaluation"], row["metric"]) for row in tables["metrics"]})
    perplexities = [pair for pair in pairs if pair[1].startswith("perplexity_")]
    if perplexities:
        items = read_table(results / "tables", "items")
        compared = (compare(tables["nodes"], tables["metrics"], items, pair, True) for pair in perplexities)
        answers += [ladder(each) for each in compared if each.rows]
    for name, report in reports.items():
        if refusal(name, report) is None and of_recoveries(report):
            answers.append(next_runs(read_fit(results, name, report), tables["nodes"], top=top))
    return answers


def advice(name: str, report: dict[str, Any]) -> Answer:
    """What a law recommends, with its held-out error, or why it recommends nothing."""
    title, reason = f"Law {name}", refusal(name, report)
    if reason is not None:
        return {"title": title, "law": name, "refused": True, "recommendation": [], "sentences": [reason]}
    told = [entry["sentence"] for entry in report["recommendation"]] or [f"Law {name} has nothing to recommend."]
    return {
        "title": title,
        "law": name,
        "refused": False,
        "recommendation": report["recommendation"],
        "sentences": [*told, held_out(name, report)],
    }


def answer_lines(answer: Answer) -> list[str]:
    """An answer as text of at most 120 columns."""
    lines = [answer["title"]]
    for sentence in answer["sentences"]:
        lines += wrapped(sentence, "  ")
    return lines + [f"  {line}".rstrip() for line in (aligned(answer["table"]) if "table" in answer else [])]


# The command


def _positive(text: str) -> float:
    value = float(text)
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is not a number above zero")
    return value


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--results", required=True, type=Path, help="folder of the study's results")
    add("--law", help="the fitted law of recoveries to ask, where there are several")
    add("--node", help="a pruned node, or a recovery of it: the tokens to buy for it, or its loss after --tokens")
    add("--gain", type=_positive, help="nats/token that one more doubling of the tokens must gain (default: the law's)")
    add("--tokens", type=_positive, help="recovery tokens, such as 1e9, at which a loss is predicted")
    add("--metric", help="the best node by this metric, within the limits below")
    add("--evaluation", help="the evaluation that measured it, where several did")
    add("--prefer", choices=["lower", "higher"], help="which way the metric is better, where its name does not tell")
    add("--max-bytes", type=_positive, help="limit of the stored bytes")
    add("--max-latency", type=_positive, help="limit of the decoding latency, s/token")
    add("--max-recovery-tokens", type=_positive, help="limit of the recovery tokens on a node's path")
    add("--device", help="device of the latency; one that ends in '(roofline)' is a prediction")
    add("--cost", help="the cost evaluation that measured the latency, where several did")
    add("--next", action="store_true", help="the runs that would shrink the uncertainty of a predicted loss most")
    add("--top", type=int, default=5, help="how many next runs to tell (default: 5)")
    add("--json", action="store_true", help="print JSON")


def run(arguments: argparse.Namespace) -> None:
    found = answers(arguments)
    if arguments.json:
        print(json.dumps(found, indent=1, allow_nan=False))
        return
    print("\n\n".join("\n".join(answer_lines(answer)) for answer in found))


def answers(arguments: argparse.Namespace) -> list[Answer]:
    """The answers to what the command line asks; to everything where it asks nothing."""
    asked, results = arguments, Path(arguments.results)
    if asked.top < 1:
        raise UserError(f"--top {asked.top} is no number of runs; pass 1 or more.")
    if asked.node is None and (asked.tokens is not None or asked.gain is not None):
        raise UserError("--tokens and --gain are about one node; name it by --node.")
    if asked.max_latency is None and (asked.device is not None or asked.cost is not None):
        raise UserError("--device and --cost say where --max-latency holds; add it.")
    tables = {name: read_table(results / "tables", name).to_pylist() for name in ("nodes", "metrics", "costs")}
    found = []
    if asked.node is not None or asked.next:
        fitted = law_of_recoveries(results, asked.law)
        if asked.gain is not None or (asked.tokens is None and not asked.next):
            found.append(tokens_to_buy(fitted, tables["nodes"], asked.node, asked.gain))
        if asked.tokens is not None:
            found.append(expected_loss(fitted, tables["nodes"], asked.node, asked.tokens))
        if asked.next:
            found.append(next_runs(fitted, tables["nodes"], asked.node, asked.tokens, asked.top))
    bounds = (asked.max_bytes, asked.max_latency, asked.max_recovery_tokens)
    if asked.metric is not None or any(bound is not None for bound in bounds):
        found.append(_best(asked, results, tables))
    return found or overview(results, tables)


def _best(asked: argparse.Namespace, results: Path, tables: dict[str, list[Row]]) -> Answer:
    pair = chosen_metric(tables["metrics"], asked.metric, asked.evaluation)
    unit = next(row["unit"] for row in tables["metrics"] if (row["evaluation"], row["metric"]) == pair)
    lower = lower_is_better(pair[1], unit, asked.prefer)
    bounds, notes = limits(
        tables["nodes"],
        tables["costs"],
        asked.max_bytes,
        asked.max_latency,
        asked.max_recovery_tokens,
        asked.device,
        asked.cost,
    )
    compared = compare(tables["nodes"], tables["metrics"], read_table(results / "tables", "items"), pair, lower)
    answer = best_within(compared, bounds)
    return answer | {"sentences": answer["sentences"] + notes}
