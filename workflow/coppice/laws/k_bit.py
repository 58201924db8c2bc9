"""k-bit inference scaling: which precision gives the best model for a number of total bits.

Source: Dettmers and Zettlemoyer, The case for 4-bit precision: k-bit Inference Scaling Laws (arXiv 2212.09720). Power
laws in size and precision fitted poorly there, and the curves of the precisions were almost parallel, so each precision
k is represented by the piecewise-linear interpolant m_k of the metric against x = log2(total model bits):

    offset_k = mean of m_k(x) - base(x) over the common support of the curves, base = mean of m_k over k
    best k at a budget of 2^x bits = the k whose m_k(x) is best, among those whose curve reaches x

Total bits are those stored: scales, zero points and all unquantized tensors are included. A dense model's k is its
stored bits per parameter: 16, or 32 where it is stored in single precision. Curves are not extended past their models.
"""

from __future__ import annotations

import json
from itertools import combinations, groupby, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from coppice.laws import Law
from coppice.laws.fit import Points, drawn_interval, levels
from coppice.laws.held_out import summary
from coppice.laws.quality import METRICS, QualityOptions, measured, path

if TYPE_CHECKING:
    import pandas as pd

Curve = dict[str, np.ndarray]  # columns [m >= 2] by increasing `x`, log2 bits: `value` and `stderr` of the metric

_FALLING = (("perplexity_", "loss_"), ("_loss", "_brier"))  # how names of metrics begin or end whose less is better


class Options(QualityOptions):
    """Which nodes the curves go through, and the metric that they are compared by."""

    bootstrap: int = Field(
        default=2000, ge=0, description="How many times the values are drawn anew from their standard errors."
    )
    method: str | None = Field(default=None, description="The quantizer; null: all of them, averaged where they meet.")
    nodes: list[str] | None = Field(
        default=None,
        description="Patterns of the nodes; null: the dense models and those made from them by one quantization.",
    )


def bits_per_parameter(k: float, block: int, outlier_share: float = 0.0) -> float:
    """k + 16 / B + p (16 - k): bits of a weight of k bits, with a 16-bit constant for each block of B weights.

    outlier_share: p, the share of the inputs whose weights stay in 16 bits. This is the paper's accounting; the points
    take the bits that a checkpoint really stores.
    """
    return k + 16 / block + outlier_share * (16 - k)


def points(tables: dict[str, pd.DataFrame], options: dict[str, Any]) -> Points:
    """One row a node, dense or with quantized weights: k, bits (stored), and the metric's value and stderr.

    k comes from the options of the step that quantized the weights, `bits` or the rounded `bits_average`. Nodes that
    were quantized to no one number of bits are no points. A stderr that is missing is 0.
    """
    nodes = tables["nodes"].set_index("node")
    found = measured(tables, options)
    steps = [_quantization(nodes, node) for node in found["node"]]
    found["k"] = [_precision(nodes, node, step) for node, step in zip(found["node"], steps, strict=True)]
    chosen = [_is_chosen(nodes, node, step, options) for node, step in zip(found["node"], steps, strict=True)]
    found = found[found["k"].notna() & np.array(chosen, bool)].sort_values(["k", "stored_bits", "node"])
    return {
        "run": found["node"].to_numpy(dtype=str),
        "model": found["model"].to_numpy(dtype=str),
        "k": found["k"].to_numpy(dtype=float),
        "bits": found["stored_bits"].to_numpy(dtype=float),
        "value": found["value"].to_numpy(dtype=float),
        "stderr": found["stderr"].fillna(0.0).to_numpy(dtype=float),
    }


def _is_chosen(nodes: pd.DataFrame, node: str, step: str | None, options: dict[str, Any]) -> bool:
    """Whether the options ask for a node, given the node whose step quantized it."""
    if step is None:
        return True
    if options["method"] is not None and nodes.at[step, "method"] != options["method"]:
        return False
    return options["nodes"] is not None or (step == node and _is_dense(nodes, nodes.at[step, "parent"]))


def _is_dense(nodes: pd.DataFrame, node: str) -> bool:
    return not isinstance(nodes.at[node, "parent"], str)


def _quantization(nodes: pd.DataFrame, node: str) -> str | None:
    """The node of the path of `node`, itself included, whose step quantized the weights; None where none did."""
    found = [
        step
        for step in path(nodes, node)
        if "quantized" in nodes.at[step, "traits"] and "quantized" not in nodes.at[nodes.at[step, "parent"], "traits"]
    ]
    return found[-1] if found else None


def _precision(nodes: pd.DataFrame, node: str, step: str | None) -> float | None:
    """k of a node, given the node whose step quantized it; None where it has none."""
    if step is not None:
        chosen = json.loads(nodes.at[step, "options"])
        bits = chosen.get("bits", chosen.get("bits_average"))
        return float(round(bits)) if isinstance(bits, int | float) else None
    return float(round(nodes.at[node, "bits_per_weight"])) if _is_dense(nodes, node) else None


def curves(points: Points) -> tuple[dict[int, Curve], list[str]]:
    """The curve of each precision with two sizes or more, by k, and sentences on what was left out or averaged.

    Nodes of one k whose bits differ by less than 5% meet in one knot, the mean of them. Their errors count as
    independent: what nodes measured on the same items share would cancel, so that probabilities err towards caution.
    """
    found, alone, averaged = {}, [], 0
    for k in np.unique(points["k"]):
        rows = np.flatnonzero(points["k"] == k)
        level = levels(points["bits"][rows])
        sizes = np.bincount(level)
        averaged += int(np.sum(sizes > 1))
        if len(sizes) < 2:
            alone.append(int(k))
            continue
        found[int(k)] = {
            "x": np.bincount(level, np.log2(points["bits"][rows])) / sizes,
            "value": np.bincount(level, points["value"][rows]) / sizes,
            "stderr": np.sqrt(np.bincount(level, points["stderr"][rows] ** 2)) / sizes,
        }
    notes = [f"There is one size of {k}-bit models, so that they have no curve." for k in alone]
    if averaged:
        notes.append(
            f"At {averaged} knots of the curves several nodes of one precision and nearly the same bits meet, and the "
            "curve goes through their mean; the options `method` and `nodes` choose among them."
        )
    return found, notes


def _at(curve: Curve, values: np.ndarray, x: np.ndarray) -> np.ndarray:
    """The interpolant of values [..., m] at the curve's knots, at x [q] within its range: [..., q]."""
    return values @ np.array([np.interp(x, curve["x"], hat) for hat in np.eye(len(curve["x"]))])


# Offsets


def support(found: dict[int, Curve]) -> np.ndarray:
    """The knots of all curves within the range that all of them reach, its ends included: x [q]; q < 2 for none."""
    low = max((curve["x"][0] for curve in found.values()), default=0.0)
    high = min((curve["x"][-1] for curve in found.values()), default=0.0)
    if low >= high:
        return np.empty(0)
    knots = np.concatenate([curve["x"] for curve in found.values()])
    return np.unique(np.concatenate([[low, high], knots[(knots > low) & (knots < high)]]))


def gaps(found: dict[int, Curve], values: dict[int, np.ndarray], x: np.ndarray) -> dict[int, np.ndarray]:
    """m_k - mean of m_k over k, at x [q], of values [..., m_k] at the knots: {k: [..., q]}."""
    heights = {k: _at(curve, values[k], x) for k, curve in found.items()}
    base = sum(heights.values()) / len(heights)
    return {k: height - base for k, height in heights.items()}


def mean_gap(gap: np.ndarray, x: np.ndarray) -> np.ndarray:
    """Mean over x of the piecewise-linear gap [..., q] with knots x [q], exact: [...]."""
    return np.trapezoid(gap, x) / (x[-1] - x[0])


def gap_deviation(gap: np.ndarray, x: np.ndarray) -> float:
    """Standard deviation over x of the piecewise-linear gap [q] with knots x [q], exact."""
    centred = gap - mean_gap(gap, x)
    first, last = centred[:-1], centred[1:]
    squares = np.sum(np.diff(x) * (first**2 + first * last + last**2) / 3)
    return float(np.sqrt(squares / (x[-1] - x[0])))


def _offsets(
    found: dict[int, Curve], draws: dict[int, np.ndarray]
) -> tuple[dict[str, dict[str, Any]], dict[str, dict[str, Any]], list[str]]:
    """The offsets and parallelism of the curves, the offsets as parameters, and sentences where there are none."""
    if len(found) < 2:
        return {}, {}, ["Offsets compare curves, and fewer than two precisions have one."]
    x = support(found)
    if len(x) < 2:
        return {}, {}, ["The curves share no range of total bits, so that no offsets can be told."]
    drawn = gaps(found, draws, x)
    offsets, parameters = {}, {}
    for k, gap in gaps(found, {k: curve["value"] for k, curve in found.items()}, x).items():
        value, deviation = float(mean_gap(gap, x)), gap_deviation(gap, x)
        low, high = drawn_interval(mean_gap(drawn[k], x)) if _noisy(found) else (None, None)
        offsets[str(k)] = {
            "value": value,
            "deviation": deviation,
            "parallelism": deviation / abs(value) if value != 0 else None,
        }
        parameters[f"offset_{k}"] = {
            "value": value,
            "low": low,
            "high": high,
            "identified": True,
            "at_bound": False,
            "spread": 0.0,
        }
    return offsets, parameters, []


def _noisy(found: dict[int, Curve]) -> bool:
    return any(curve["stderr"].any() for curve in found.values())


# The best precision


def _crossings(first: Curve, second: Curve) -> np.ndarray:
    """Where two curves cross between the knots of both: x [c]."""
    x = support({0: first, 1: second})
    difference = _at(first, first["value"], x) - _at(second, second["value"], x)
    before = np.flatnonzero(difference[:-1] * difference[1:] < 0)
    part = difference[before] / (difference[before] - difference[before + 1])
    return x[before] + part * (x[before + 1] - x[before])


def best(found: dict[int, Curve], draws: dict[int, np.ndarray], higher_is_better: bool) -> list[dict[str, Any]]:
    """The best k of each range of budgets without a knot or a crossing of the curves, in bits, ascending.

    bits: its middle; k: None where no curve reaches; probability: how often k is the best there over the draws; None
    without any, and where no second k is measured. Ties go to fewer bits.
    """
    sign = 1 if higher_is_better else -1
    knots = [curve["x"] for curve in found.values()]
    crossings = [_crossings(first, second) for first, second in combinations(found.values(), 2)]
    edges = np.unique(np.concatenate([*knots, *crossings])) if found else np.empty(0)
    ranges = []
    for low, high in pairwise(edges):
        middle = np.array([(low + high) / 2])
        reached = [k for k, curve in found.items() if curve["x"][0] <= middle[0] <= curve["x"][-1]]
        ranges.append(
            {"bits": float(2 ** middle[0]), "low": float(2**low), "high": float(2**high), "alone": len(reached) == 1}
            | _best_at({k: found[k] for k in reached}, draws, middle, sign)
        )
    return ranges


def _best_at(found: dict[int, Curve], draws: dict[int, np.ndarray], x: np.ndarray, sign: int) -> dict[str, Any]:
    """The best k of curves that all reach x [1], its probability, and that of each; sign: 1 where more is better."""
    if not found:
        return {"k": None, "probability": None, "probabilities": None}
    heights = [sign * _at(curve, curve["value"], x)[0] for curve in found.values()]
    chosen = int(np.argmax(heights))
    k = list(found)[chosen]
    if len(found) == 1 or not _noisy(found) or not len(draws[k]):
        return {"k": k, "probability": None, "probabilities": None}
    drawn = np.argmax([sign * _at(curve, draws[k], x)[:, 0] for k, curve in found.items()], axis=0)
    shares = np.bincount(drawn, minlength=len(found)) / len(drawn)
    return {
        "k": k,
        "probability": float(shares[chosen]),
        "probabilities": {str(k): float(share) for k, share in zip(found, shares, strict=True)},
    }


def _advice(ranges: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One recommendation for neighbouring ranges of one best k, its probability the mean over their log2 bits."""
    entries = []
    for (k, alone), group in groupby(ranges, key=lambda entry: (entry["k"], entry["alone"])):
        if k is None:
            continue
        pieces = list(group)
        low, high = pieces[0]["low"], pieces[-1]["high"]
        probability = _mean_probability(pieces)
        where = f"Between {low:.3g} and {high:.3g} total bits"
        if alone:
            sentence = f"{where}, {k}-bit models alone were measured."
        elif probability is None:
            sentence = f"{where}, {k}-bit models are best."
        else:
            sentence = f"{where}, {k}-bit models are best (probability {probability:.2f})."
        entries.append(
            {"sentence": sentence, "low": low, "high": high, "k": k, "probability": probability, "alone": alone}
        )
    return entries


def _mean_probability(ranges: list[dict[str, Any]]) -> float | None:
    """The mean over log2 bits of the ranges' probabilities; None where one has none."""
    known = [entry["probability"] for entry in ranges]
    widths = [np.log2(entry["high"] / entry["low"]) for entry in ranges]
    return None if None in known else float(np.average(known, weights=widths))


# The report


def interior_size(found: dict[int, Curve]) -> dict[str, Any]:
    """Error at each knot within a curve of its neighbours' interpolant, and of the other knots' mean; or {"reason"}."""
    values, errors, naive = [], [], []
    for curve in found.values():
        for place in range(1, len(curve["x"]) - 1):
            x, others, value = np.delete(curve["x"], place), np.delete(curve["value"], place), curve["value"][place]
            values.append(value)
            errors.append(np.interp(curve["x"][place], x, others) - value)
            naive.append(others.mean() - value)
    if not errors:
        return {"reason": "This test leaves out a size between two others, and no precision has three sizes."}
    return summary(np.array(errors), np.array(values), np.array(naive))


def report(points: Points, options: dict[str, Any]) -> dict[str, Any]:
    """The curves, their offsets, and the best precision of each budget, as fit.json says them."""
    found, notes = curves(points)
    generator = np.random.default_rng(options["seed"])
    draws = {
        k: curve["value"] + curve["stderr"] * generator.standard_normal((options["bootstrap"], len(curve["x"])))
        for k, curve in found.items()
    }
    offsets, parameters, missing = _offsets(found, draws)
    ranges = best(found, draws, _higher_is_better(options["metric"]))
    if found and not _noisy(found):
        notes.append("No node has a standard error, so that no probability can be told.")
    return {
        "parameters": parameters,
        "metrics": {},
        "held_out": {"interior_size": {"k-bit": interior_size(found)}},
        "ranking": {},
        "recommendation": _advice(ranges),
        "notes": notes + missing,
        "points": len(points["run"]),
        "runs": len(points["run"]),
        "converged": True,
        "details": {
            "curves": {
                str(k): np.column_stack([2 ** curve["x"], curve["value"]]).tolist() for k, curve in found.items()
            },
            "offsets": offsets,
            "base": "the mean of the curves over the range of total bits that all of them reach",
            "best": ranges,
        },
    }


def _higher_is_better(metric: str | None) -> bool:
    """Whether more of the metric is better; None stands for a perplexity."""
    starts, ends = _FALLING
    return metric is not None and not metric.startswith(starts) and not metric.endswith(ends)


LAW = Law(
    source={
        "title": "The case for 4-bit precision: k-bit Inference Scaling Laws",
        "arxiv": "2212.09720",
        "equation": "m_k(x), piecewise linear in x = log2(total bits); offset_k = mean of m_k - mean over k of m_k",
    },
    # The first but the axis is what is drawn.
    units={"value": "of the metric", "bits": "bits", "k": "bits per weight", "stderr": "of the metric"},
    columns={"run": str, "model": str, "k": float, "bits": float, "value": float, "stderr": float},
    needs={
        "nodes": ("node", "parent", "model", "method", "options", "traits", "stored_bits", "bits_per_weight"),
        "metrics": METRICS,
    },
    points_are="they are the dense models, and the models quantized from them, that were measured by the metric.",
    options=Options,
    points=points,
    axis=("bits", "total model bits"),
    report=report,
)
