"""Which next run would be most informative: the one that reduces the variance of a predicted loss most.

Source: MacKay, Information-based objective functions for active data selection (Neural Computation 4, 1992), with the
bootstrap's parameters instead of a posterior.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TypedDict

import numpy as np

from coppice.decisions import Answer
from coppice.decisions.fitted import Fitted, basis_of, held_out_sentences, points_of, refusal_answer, starting_points
from coppice.formatting import human_count, number
from coppice.laws.engine.points import Points, levels, select
from coppice.results.schemas import Row

DOUBLINGS = (2, 4)  # times the largest tokens measured, as next runs


class Candidate(TypedDict):
    """A run that could be next. kind: `tokens` (more of them), `seed` (another one) or `design` (a new ratio)."""

    run: str
    kind: str
    model: str
    rho: float
    tokens: float


class NextRun(Candidate):
    """A candidate with its reduction of the variance of the predicted loss, also as a part of it, and that per token.

    deviation_after: the standard deviation that would be left.
    """

    variance_reduction: float
    part: float
    part_per_token: float
    deviation_after: float


def variance_reduction(target: np.ndarray, candidates: np.ndarray, noise: float) -> np.ndarray:
    """How much one observation of each candidate would reduce Var(target): [m], in the square of the unit.

        Cov(t, c)^2 / (Var(c) + noise^2)

    `target` [k] and `candidates` [k, m] are predictions with the same k samples of the parameters; noise: the standard
    deviation of an observation. Exact where predictions are linear in Gaussian parameters.
    """
    target, candidates = target - target.mean(), candidates - candidates.mean(axis=0)
    covariance = target @ candidates / (len(target) - 1)
    variance = np.sum(candidates**2, axis=0) / (len(target) - 1) + noise**2
    return np.divide(covariance**2, variance, out=np.zeros_like(variance), where=variance > 0)


def next_runs(
    fitted: Fitted, nodes: Sequence[Row], node: str | None = None, tokens: float | None = None, top: int = 5
) -> Answer:
    """The runs that would reduce the variance of one predicted loss most, each counted by its last loss alone.

    The target: `node` after `tokens` (default: its largest measured), or the node whose loss at its largest is known
    worst. Runs: each pruned node at the next doublings of its tokens, or again with another seed, and the dense sizes
    and ratios that were measured, but not together. Raises UserError where no recovery of `node` is among the points.
    """
    title = "Next run"
    if node is not None:
        points_of(fitted, nodes, node)
    if answer := refusal_answer(fitted, title):
        return answer
    if not len(next(iter(fitted.samples.values()))):
        reason = (
            f"Law {fitted.name} has no resamples of its runs, so which run would shrink the uncertainty is unknown."
        )
        return {"title": title, **basis_of(fitted), "runs": [], "sentences": [reason]}
    scale = fitted.scales["tokens"]
    target, target_node = _choose_target(fitted, nodes, node, tokens)
    points, candidates = _list_candidates(fitted, nodes)
    _, target_samples = fitted.predict(target)
    _, samples = fitted.predict(points)
    before = float(np.var(target_samples[:, 0], ddof=1))
    reduction = variance_reduction(target_samples[:, 0], samples, fitted.noise)
    order = np.argsort(-reduction, kind="stable")[:top]
    runs: list[NextRun] = [
        {
            **candidates[place],
            "variance_reduction": float(reduction[place]),
            "part": float(reduction[place] / before) if before > 0 else 0.0,
            "part_per_token": float(reduction[place] / before / candidates[place]["tokens"]) if before > 0 else 0.0,
            "deviation_after": float(np.sqrt(max(before - reduction[place], 0.0))),
        }
        for place in map(int, order)
    ]
    at = float(target["tokens"][0] * scale)
    unit = 1000.0 ** math.floor(math.log(max(run["tokens"] for run in runs), 1000) + 1e-9)
    sentences = [
        f"The predicted loss of {target_node} after {human_count(at)} tokens has a standard deviation of "
        f"{number(before**0.5)} {fitted.law.units['loss']} from the fit. The runs that would shrink it most:",
        *(
            f"{place}. {run['run']}: the variance falls by {run['part']:.0%}, the standard deviation to "
            f"{number(run['deviation_after'])}, which is {100 * run['part_per_token'] * unit:.2g}% per "
            f"{human_count(unit)} tokens."
            for place, run in enumerate(runs, 1)
        ),
        held_out_sentences(fitted.name, fitted.report),
    ]
    return {
        "title": title,
        **basis_of(fitted),
        "node": target_node,
        "at_tokens": at,
        "deviation": before**0.5,
        "runs": runs,
        "sentences": sentences,
    }


def _choose_target(fitted: Fitted, nodes: Sequence[Row], node: str | None, tokens: float | None) -> tuple[Points, str]:
    """The point whose loss is to be known better, and its node."""
    if node is not None:
        point = select(fitted.points, points_of(fitted, nodes, node)[-1:])
        return point if tokens is None else point | {"tokens": np.array([tokens / fitted.scales["tokens"]])}, node
    started = starting_points(fitted, nodes)
    last = np.array(_last_of_each(started, fitted.points["tokens"]))
    _, drawn = fitted.predict(select(fitted.points, last))
    widths = np.subtract(*np.quantile(drawn, [0.975, 0.025], axis=0))
    widest = last[np.argmax(widths)]
    return select(fitted.points, np.array([widest])), str(started[widest])


def _last_of_each(started: np.ndarray, tokens: np.ndarray) -> list[int]:
    """For each starting point the index of its point with the most tokens."""
    places = (np.flatnonzero(started == node) for node in np.unique(started))
    return [int(rows[np.argmax(tokens[rows])]) for rows in places]


def _list_candidates(fitted: Fitted, nodes: Sequence[Row]) -> tuple[Points, list[Candidate]]:
    """Runs that could be next: their last points in the fit's units, and what they are."""
    points, scale = fitted.points, fitted.scales["tokens"]
    started = starting_points(fitted, nodes)
    options = []  # (index of a point like it, rho, tokens, kind, what to do)
    for row in _last_of_each(started, points["tokens"]):
        ratio, tokens, name = points["rho"][row], points["tokens"][row], f"train {started[row]} on"
        options += [(row, ratio, factor * tokens, "tokens", name) for factor in DOUBLINGS]
        options.append((row, ratio, tokens, "seed", f"with another seed, {name}"))
    level = levels(points["rho"])
    for model in np.unique(points["model"]):
        of_model = np.flatnonzero(points["model"] == model)
        row = of_model[np.argmax(points["tokens"][of_model])]
        for missing in np.setdiff1d(level, level[of_model]):
            ratio = points["rho"][level == missing].mean()
            options.append(
                (row, ratio, points["tokens"][row], "design", f"prune {model} to rho {ratio:.2f}, train it on")
            )
    rows, ratios, tokens, kinds, actions = zip(*options, strict=True)
    candidates: list[Candidate] = [
        {
            "run": f"{action} {human_count(cost)} tokens",
            "kind": kind,
            "model": str(points["model"][row]),
            "rho": float(ratio),
            "tokens": cost,
        }
        for row, ratio, cost, kind, action in zip(
            rows, ratios, np.multiply(tokens, scale).tolist(), kinds, actions, strict=True
        )
    ]
    return select(points, np.array(rows)) | {"rho": np.array(ratios), "tokens": np.array(tokens)}, candidates
