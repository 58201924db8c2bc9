"""How many recovery tokens to buy for a node, and what loss to expect after tokens that were not run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from coppice.decisions import Answer
from coppice.decisions.fitted import Fitted, held_out, points_of, refused, rests_on
from coppice.formatting import human_count, number
from coppice.laws.fit import Fit, select
from coppice.results.schemas import Row
from coppice.uncertainty import percentile_interval

_NORMAL = np.array([NormalDist().inv_cdf((place + 0.5) / 101) for place in range(101)])


def tokens_to_buy(fitted: Fitted, nodes: Sequence[Row], node: str, gain: float | None = None) -> Answer:
    """The tokens past which doubling them gains less than `gain` nats per token, by the law's own recommendation.

    Raises UserError where no recovery of the node is among the law's points.
    """
    title = f"Recovery tokens to buy for {node}"
    rows = points_of(fitted, nodes, node)
    if answer := refused(fitted, title):
        return answer
    report, options = fitted.report, fitted.report.options
    fixed, _ = fitted.law.form.reduce(fitted.points)
    unknown = [name for name, entry in report.parameters.items() if not entry.identified and name not in fixed]
    starts = np.empty((0, len(fitted.parameters)))
    fit = Fit(fitted.parameters, fixed, tuple(unknown), report.converged, starts)
    asked = options if gain is None else options | {"gain": gain}
    advice, reasons = fitted.law.recommend(fit, fitted.samples, select(fitted.points, rows), fitted.scales, asked)
    sentences = [entry["sentence"] for entry in advice] + reasons + [held_out(fitted.name, report)]
    return {"title": title, "node": node, **rests_on(fitted), "tokens": advice, "sentences": sentences}


def expected_loss(fitted: Fitted, nodes: Sequence[Row], node: str, tokens: float) -> Answer:
    """The law's loss of a node after so many recovery tokens, with the interval of a new measurement.

    Raises UserError where no recovery of the node is among the law's points.
    """
    title = f"Loss of {node} after {human_count(tokens)} recovery tokens"
    rows = points_of(fitted, nodes, node)
    if answer := refused(fitted, title):
        return answer
    scale, unit = fitted.scales["tokens"], fitted.law.units["loss"]
    point = select(fitted.points, rows[:1]) | {"tokens": np.array([tokens / scale])}
    value, drawn = fitted.predicted(point)
    low, high = (None, None)
    if len(drawn):
        low, high = predictive_interval(drawn[:, 0], fitted.noise)
    measured = fitted.points["tokens"][rows] * scale
    outside = not measured.min() <= tokens <= measured.max()
    between = "" if low is None else f", 95% interval of a new measurement [{number(low, 4)}, {number(high, 4)}]"
    sentences = [f"{node} after {human_count(tokens)} tokens: loss {number(value[0], 4)} {unit}{between}."]
    if outside:
        sentences.append(
            f"This is an extrapolation: {human_count(measured.min())} to {human_count(measured.max())} tokens were "
            "measured."
        )
    if low is None:
        sentences.append("There is no interval, since the fit has no resamples of its runs.")
    return {
        "title": title,
        "node": node,
        **rests_on(fitted),
        "at_tokens": tokens,
        "value": float(value[0]),
        "low": low,
        "high": high,
        "extrapolation": outside,
        "sentences": [*sentences, held_out(fitted.name, fitted.report)],
    }


def predictive_interval(samples: np.ndarray, noise: float) -> tuple[float, float]:
    """95% interval of x + noise e: x one of `samples` [k], e standard normal, here at 101 evenly likely values."""
    return percentile_interval(np.add.outer(samples, noise * _NORMAL))
