"""The density of each node, by parameters and by bits, and next to its parent's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypedDict

import numpy as np

from coppice.formatting import number
from coppice.laws.contracts import Recommendation
from coppice.laws.density.family import effective_parameters
from coppice.laws.engine.points import Points, count
from coppice.uncertainty import mean_interval


class Density(TypedDict):
    """A node's density by its score; `reason` explains what is None."""

    effective_parameters: float | None
    density: float | None
    density_low: float | None
    density_high: float | None
    density_by_bits: float | None
    reason: str | None


class NodeDensity(Density):
    """A node with its density, and that over its parent's."""

    node: str
    parent: str | None
    parameters: float
    stored_bits: float
    score: float
    relative_to_parent: float | None


def node_densities(
    points: Points, parameters: dict[str, float], tokens: float, reason: str | None = None
) -> list[NodeDensity]:
    """The density of every node at D0 = `tokens`, and relative to its parent's; `reason` where all are unknown.

    density_low is 0 where the interval of the score reaches down to chance; density_high is None, with the reason,
    where it reaches past what a reference model of any size scores. Both are None without a standard error.
    """
    numbers = [
        {name: float(points[name][row]) for name in ("parameters", "stored_bits", "score", "stderr")}
        for row in range(count(points))
    ]
    densities = [_without_density(reason) if reason else _density(each, parameters, tokens) for each in numbers]
    by_node = dict(zip(points["run"].tolist(), (each["density"] for each in densities), strict=True))
    return [
        {
            "node": node,
            "parent": parent or None,
            "parameters": each["parameters"],
            "stored_bits": each["stored_bits"],
            "score": each["score"],
            **density,
            "relative_to_parent": _ratio(density["density"], by_node.get(parent)),
        }
        for node, parent, each, density in zip(
            points["run"].tolist(), points["parent"].tolist(), numbers, densities, strict=True
        )
    ]


def _ratio(density: float | None, parent: float | None) -> float | None:
    """None where either is unknown; a score just above chance can have a density that a float holds as 0."""
    return density / parent if density is not None and parent else None


def _density(node: Mapping[str, float], parameters: dict[str, float], tokens: float) -> Density:
    """The density of a node by its score."""
    reason = _why_undefined(node["score"], parameters, tokens)
    if reason:
        return _without_density(reason)
    ends = mean_interval(node["score"], node["stderr"])
    size, low, high = (
        float(each) for each in effective_parameters([node["score"], *ends], parameters, tokens) / node["parameters"]
    )
    known, bounded = node["stderr"] > 0, bool(np.isfinite(high))
    return {
        "effective_parameters": size * node["parameters"],
        "density": size,
        # N^ falls to 0 as the score falls to chance.
        "density_low": (low if np.isfinite(low) else 0.0) if known else None,
        "density_high": high if known and bounded else None,
        "density_by_bits": size * node["parameters"] / (node["stored_bits"] / 16),
        "reason": None
        if bounded
        else "The interval of the score reaches past what a reference model of any size scores, so that the density "
        "has no upper end.",
    }


def _without_density(reason: str) -> Density:
    return {
        "effective_parameters": None,
        "density": None,
        "density_low": None,
        "density_high": None,
        "density_by_bits": None,
        "reason": reason,
    }


def _why_undefined(score: float, parameters: dict[str, float], tokens: float) -> str | None:
    """Why N^ of a score is undefined; None where it is not."""
    foot, top = parameters["d"], parameters["c"] + parameters["d"]
    if score <= foot:
        return f"The score {score:.4g} is not above {foot:.4g}, where the sigmoid begins: that of guessing."
    if score >= top:
        return f"The score {score:.4g} is not below {top:.4g}, where the sigmoid ends."
    if not np.isfinite(effective_parameters([score], parameters, tokens)[0]):
        return f"The score {score:.4g} is above what a reference model of any size reaches at D0."
    return None


def recommend_nodes(nodes: list[NodeDensity], models: np.ndarray) -> list[Recommendation]:
    """For each dense model the node with the largest density by bits, of two or more; `models` [n]: of each node."""
    entries = []
    for model in np.unique(models):
        known = [
            node
            for node, own in zip(nodes, models, strict=True)
            if own == model and node["density_by_bits"] is not None
        ]
        if len(known) < 2:
            continue
        best = max(known, key=lambda node: node["density_by_bits"] or 0.0)
        bits = 16 * best["parameters"] / best["stored_bits"]
        low, high = (None if end is None else bits * end for end in (best["density_low"], best["density_high"]))
        between = "" if low is None else f" ({number(low)} to {'no upper end' if high is None else number(high)})"
        entries.append(
            {
                "sentence": f"Of the {len(known)} nodes of {model!s} with a density, {best['node']!r} holds the most "
                f"for its bits: density by bits {number(best['density_by_bits'])}{between}.",
                "model": str(model),
                "node": best["node"],
                "density_by_bits": best["density_by_bits"],
                "low": low,
                "high": high,
            }
        )
    return entries


def summarize(nodes: list[NodeDensity], points: Points) -> list[str]:
    """Sentences on compressed nodes next to their parents, on undefined densities and missing standard errors."""
    notes = []
    relative = [
        node["relative_to_parent"]
        for node, reference in zip(nodes, points["reference"], strict=True)
        if node["relative_to_parent"] is not None and not reference
    ]
    if relative:
        less = sum(each < 1 for each in relative)
        notes.append(f"{less} of {len(relative)} compressed nodes are less dense than their parents, by parameters.")
    undefined = sum(node["density"] is None for node in nodes)
    if undefined:
        notes.append(f"{undefined} of {len(nodes)} nodes have no density; `reason` explains each.")
    exact = int(np.sum(points["stderr"] == 0))
    if exact:
        notes.append(f"{exact} of {len(nodes)} scores have no standard error, so their densities have no interval.")
    return notes
