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

from itertools import groupby
from typing import TYPE_CHECKING, Any, TypedDict

import numpy as np
from pydantic import Field

from coppice.laws.contracts import Law, LawReport, Recommendation, Tables
from coppice.laws.engine.held_out import HeldOutError, summarize_errors
from coppice.laws.engine.inference import sample_interval
from coppice.laws.engine.points import Points
from coppice.laws.k_bit.curves import (
    BestOfRange,
    Curves,
    Draws,
    find_best,
    gap_deviation,
    gaps,
    interpolate,
    is_noisy,
    mean_gap,
    support,
)
from coppice.laws.points.quality import METRICS, QualityOptions, join_quality, list_steps, parent, step_options, traits

if TYPE_CHECKING:
    import pandas as pd

_FALLING = (("perplexity_", "loss_"), ("_loss", "_brier"))  # how names of metrics begin or end whose less is better


class Offset(TypedDict):
    """How a curve lies to the mean of all: the mean of the gap, its deviation, and the deviation over its size."""

    value: float
    deviation: float
    parallelism: float | None


class OffsetReport(TypedDict):
    """An offset as a parameter of fit.json."""

    value: float
    low: float | None
    high: float | None
    identified: bool
    at_bound: bool
    spread: float


class Options(QualityOptions):
    """Which nodes the curves go through, and the metric that they are compared by."""

    bootstrap: int = Field(
        default=2000, ge=0, description="How many times values are drawn from their standard errors."
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


def points(tables: Tables, options: Options) -> Points:
    """One row a node, dense or with quantized weights: k, bits (stored), and the metric's value and stderr.

    k comes from the options of the step that quantized the weights, `bits` or the rounded `bits_average`. Nodes that
    were not quantized to one number of bits are not points. A stderr that is missing is 0.
    """
    nodes = tables["nodes"].set_index("node")
    measured = join_quality(tables, options.evaluation, options.metric, options.nodes)
    steps = [_quantization(nodes, node) for node in measured["node"]]
    measured["k"] = [_precision(nodes, node, step) for node, step in zip(measured["node"], steps, strict=True)]
    selected = [_is_chosen(nodes, node, step, options) for node, step in zip(measured["node"], steps, strict=True)]
    measured = measured[measured["k"].notna() & np.array(selected, bool)].sort_values(["k", "stored_bits", "node"])
    return {
        "run": measured["node"].to_numpy(dtype=str),
        "model": measured["model"].to_numpy(dtype=str),
        "k": measured["k"].to_numpy(dtype=float),
        "bits": measured["stored_bits"].to_numpy(dtype=float),
        "value": measured["value"].to_numpy(dtype=float),
        "stderr": measured["stderr"].fillna(0.0).to_numpy(dtype=float),
    }


def _is_chosen(nodes: pd.DataFrame, node: str, step: str | None, options: Options) -> bool:
    """Whether the options choose a node, given the node whose step quantized it."""
    if step is None:
        return True
    if options.method is not None and nodes.at[step, "method"] != options.method:
        return False
    return options.nodes is not None or list_steps(nodes, node) == [step]


def _quantization(nodes: pd.DataFrame, node: str) -> str | None:
    """The node of the path of `node`, itself included, whose step quantized the weights; None where none did."""
    steps = list_steps(nodes, node)
    before = [str(nodes.at[step, "parent"]) for step in steps]
    quantizing = [
        step
        for step, source in zip(steps, before, strict=True)
        if "quantized" in traits(nodes, step) - traits(nodes, source)
    ]
    return quantizing[-1] if quantizing else None


def _precision(nodes: pd.DataFrame, node: str, step: str | None) -> float | None:
    """k of a node, given the node whose step quantized it; None where it has none."""
    if step is not None:
        options = step_options(nodes, step)
        bits = options.get("bits", options.get("bits_average"))
        return float(round(bits)) if isinstance(bits, int | float) else None
    stored: Any = nodes.at[node, "bits_per_weight"]
    return float(round(stored)) if parent(nodes, node) is None else None


# Offsets


def _offsets(curves: Curves, draws: Draws) -> tuple[dict[str, Offset], dict[str, OffsetReport], list[str]]:
    """The offsets and parallelism of the curves, the offsets as parameters, and sentences where there are none."""
    if len(curves) < 2:
        return {}, {}, ["Offsets compare curves, and fewer than two precisions have one."]
    x = support(curves)
    if len(x) < 2:
        return {}, {}, ["The curves share no range of total bits, so their offsets are unknown."]
    drawn = gaps(curves, draws, x)
    offsets: dict[str, Offset] = {}
    parameters: dict[str, OffsetReport] = {}
    for k, gap in gaps(curves, {k: curve.value for k, curve in curves.items()}, x).items():
        value, deviation = float(mean_gap(gap, x)), gap_deviation(gap, x)
        low, high = sample_interval(mean_gap(drawn[k], x)) if is_noisy(curves) else (None, None)
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


# The report


def _recommend(ranges: list[BestOfRange]) -> list[Recommendation]:
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


def _mean_probability(ranges: list[BestOfRange]) -> float | None:
    """The mean over log2 bits of the ranges' probabilities; None where one has none."""
    known = [entry["probability"] for entry in ranges if entry["probability"] is not None]
    if len(known) < len(ranges):
        return None
    widths = [np.log2(entry["high"] / entry["low"]) for entry in ranges]
    return float(np.average(known, weights=widths))


def _test_interior_sizes(curves: Curves) -> HeldOutError:
    """Error at each knot within a curve of its neighbours' interpolant, and of the other knots' mean; or {"reason"}."""
    values, errors, naive = [], [], []
    for curve in curves.values():
        for place in range(1, len(curve.x) - 1):
            x, others, value = np.delete(curve.x, place), np.delete(curve.value, place), curve.value[place]
            values.append(value)
            errors.append(np.interp(curve.x[place], x, others) - value)
            naive.append(others.mean() - value)
    if not errors:
        return {"reason": "This test leaves out a size between two others, and no precision has three sizes."}
    return summarize_errors(np.array(errors), np.array(values), np.array(naive))


def report(points: Points, options: Options) -> LawReport:
    """The curves, their offsets, and the best precision of each budget, as fit.json has them."""
    curves, notes = interpolate(points)
    generator = np.random.default_rng(options.seed)
    draws = {
        k: curve.value + curve.stderr * generator.standard_normal((options.bootstrap, len(curve.x)))
        for k, curve in curves.items()
    }
    offsets, parameters, missing = _offsets(curves, draws)
    ranges = find_best(curves, draws, _higher_is_better(options.metric))
    if curves and not is_noisy(curves):
        notes.append("No node has a standard error, so probabilities are unknown.")
    return {
        "parameters": parameters,
        "metrics": {},
        "held_out": {"interior_size": {"k-bit": _test_interior_sizes(curves)}},
        "ranking": {},
        "recommendation": _recommend(ranges),
        "notes": notes + missing,
        "points": len(points["run"]),
        "runs": len(points["run"]),
        "converged": True,
        "details": {
            "curves": {str(k): np.column_stack([2**curve.x, curve.value]).tolist() for k, curve in curves.items()},
            "offsets": offsets,
            "base": "the mean of the curves over the range of total bits that all of them reach",
            "best": ranges,
        },
    }


def _higher_is_better(metric: str | None) -> bool:
    """Whether more of the metric is better; None: a perplexity."""
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
