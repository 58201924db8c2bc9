"""Curves of the precisions: piecewise linear in log2(total bits), how far apart they lie, and which is best where."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations, pairwise
from typing import TypedDict

import numpy as np

from coppice.laws.engine.points import Points, levels


@dataclass(frozen=True)
class Curve:
    """The knots [m >= 2] of one precision by increasing `x`, log2 bits: `value` and `stderr` of the metric."""

    x: np.ndarray
    value: np.ndarray
    stderr: np.ndarray

    def at(self, x: np.ndarray, values: np.ndarray | None = None) -> np.ndarray:
        """The interpolant at x [q] within the range: [q], or [..., q] of other values [..., m] at the knots."""
        weights = np.array([np.interp(x, self.x, hat) for hat in np.eye(len(self.x))])
        return (self.value if values is None else values) @ weights


Curves = dict[int, Curve]  # by k
Draws = dict[int, np.ndarray]  # values [draws, m] at the knots of each curve, by k


class Best(TypedDict):
    """A best k; None where no curve reaches. probability: how often it is the best over the draws, None without any."""

    k: int | None
    probability: float | None
    probabilities: dict[str, float] | None


class BestOfRange(Best):
    """The best k of a range of budgets, in bits; `bits`: its middle; `alone`: no other k reaches it."""

    bits: float
    low: float
    high: float
    alone: bool


def interpolate(points: Points) -> tuple[Curves, list[str]]:
    """The curve of each precision with two sizes or more, by k, and sentences on what was left out or averaged.

    Nodes of one k whose bits differ by less than 5% meet in one knot, the mean of them. Their errors count as
    independent: what nodes measured on the same items share would cancel, so that probabilities err towards caution.
    """
    curves: Curves = {}
    alone, averaged = [], 0
    for k in np.unique(points["k"]):
        rows = np.flatnonzero(points["k"] == k)
        level = levels(points["bits"][rows])
        sizes = np.bincount(level)
        averaged += int(np.sum(sizes > 1))
        if len(sizes) < 2:
            alone.append(int(k))
            continue
        curves[int(k)] = Curve(
            x=np.bincount(level, np.log2(points["bits"][rows])) / sizes,
            value=np.bincount(level, points["value"][rows]) / sizes,
            stderr=np.sqrt(np.bincount(level, points["stderr"][rows] ** 2)) / sizes,
        )
    notes = [f"There is one size of {k}-bit models, so that they have no curve." for k in alone]
    if averaged:
        notes.append(
            f"At {averaged} knots of the curves several nodes of one precision and nearly the same bits meet, and the "
            "curve goes through their mean; the options `method` and `nodes` choose among them."
        )
    return curves, notes


def is_noisy(curves: Curves) -> bool:
    """Whether any value has a standard error."""
    return any(curve.stderr.any() for curve in curves.values())


# How far apart they lie


def support(curves: Curves) -> np.ndarray:
    """The knots of all curves within the range that all of them reach, its ends included: x [q]; q < 2 for none."""
    low = max((curve.x[0] for curve in curves.values()), default=0.0)
    high = min((curve.x[-1] for curve in curves.values()), default=0.0)
    if low >= high:
        return np.empty(0)
    knots = np.concatenate([curve.x for curve in curves.values()])
    return np.unique(np.concatenate([[low, high], knots[(knots > low) & (knots < high)]]))


def gaps(curves: Curves, values: dict[int, np.ndarray], x: np.ndarray) -> dict[int, np.ndarray]:
    """m_k - mean of m_k over k, at x [q], of values [..., m_k] at the knots: {k: [..., q]}."""
    heights = {k: curve.at(x, values[k]) for k, curve in curves.items()}
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


# The best precision


def _crossings(first: Curve, second: Curve) -> np.ndarray:
    """Where two curves cross between the knots of both: x [c]."""
    x = support({0: first, 1: second})
    difference = first.at(x) - second.at(x)
    before = np.flatnonzero(difference[:-1] * difference[1:] < 0)
    part = difference[before] / (difference[before] - difference[before + 1])
    return x[before] + part * (x[before + 1] - x[before])


def find_best(curves: Curves, draws: Draws, higher_is_better: bool) -> list[BestOfRange]:
    """The best k of each range of budgets without a knot or a crossing of the curves, in bits, ascending.

    bits: its middle; k: None where no curve reaches; probability: how often k is the best there over the draws; None
    without any, and where no second k is measured. Ties go to fewer bits.
    """
    sign = 1 if higher_is_better else -1
    knots = [curve.x for curve in curves.values()]
    crossings = [_crossings(first, second) for first, second in combinations(curves.values(), 2)]
    edges = np.unique(np.concatenate([*knots, *crossings])) if curves else np.empty(0)
    ranges: list[BestOfRange] = []
    for low, high in pairwise(edges):
        middle = np.array([(low + high) / 2])
        reached = [k for k, curve in curves.items() if curve.x[0] <= middle[0] <= curve.x[-1]]
        ranges.append(
            {
                "bits": float(2 ** middle[0]),
                "low": float(2**low),
                "high": float(2**high),
                "alone": len(reached) == 1,
                **_find_best_at({k: curves[k] for k in reached}, draws, middle, sign),
            }
        )
    return ranges


def _find_best_at(curves: Curves, draws: Draws, x: np.ndarray, sign: int) -> Best:
    """The best k of curves that all reach x [1], its probability, and that of each; sign: 1 where more is better."""
    if not curves:
        return {"k": None, "probability": None, "probabilities": None}
    heights = [sign * curve.at(x)[0] for curve in curves.values()]
    chosen = int(np.argmax(heights))
    k = list(curves)[chosen]
    if len(curves) == 1 or not is_noisy(curves) or not len(draws[k]):
        return {"k": k, "probability": None, "probabilities": None}
    drawn = np.argmax([sign * curve.at(x, draws[k])[:, 0] for k, curve in curves.items()], axis=0)
    shares = np.bincount(drawn, minlength=len(curves)) / len(drawn)
    return {
        "k": k,
        "probability": float(shares[chosen]),
        "probabilities": {str(k): float(share) for k, share in zip(curves, shares, strict=True)},
    }
