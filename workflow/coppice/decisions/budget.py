"""How many recovery tokens to buy for a node, and what loss to expect after tokens that were not run."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import NormalDist

import numpy as np

from coppice.decisions import Answer
from coppice.decisions.fitted import Fitted, basis_of, held_out_sentences, points_of, refusal_answer
from coppice.formatting import human_count, number
from coppice.laws.engine.points import select
from coppice.laws.engine.problem import Problem
from coppice.laws.engine.search import Fit
from coppice.laws.options import LawOptions
from coppice.results.schemas import Row
from coppice.uncertainty import percentile_interval

_NORMAL = np.array([NormalDist().inv_cdf((place + 0.5) / 101) for place in range(101)])


def tokens_to_buy(fitted: Fitted, nodes: Sequence[Row], node: str, gain: float | None = None) -> Answer:
    """The tokens past which doubling them gains less than `gain` nats per token, by the law's own recommendation.

    Raises UserError where no recovery of the node is among the law's points.
    """
    title = f"Recovery tokens to buy for {node}"
    rows = points_of(fitted, nodes, node)
    if answer := refusal_answer(fitted, title):
        return answer
    advice, reasons = fitted.law.recommend(
        _restore_fit(fitted), fitted.samples, select(fitted.points, rows), fitted.scales, _options(fitted, gain)
    )
    sentences = [entry["sentence"] for entry in advice] + reasons + [held_out_sentences(fitted.name, fitted.report)]
    return {"title": title, "node": node, **basis_of(fitted), "tokens": advice, "sentences": sentences}


def _restore_fit(fitted: Fitted) -> Fit:
    """The optimum that fit.json describes, without its starts."""
    form, parameters = fitted.law.require_form(), fitted.report.parameters
    fixed, _ = form.reduce(fitted.points)
    return Fit(
        Problem(form, fitted.points, fixed),
        fitted.parameters,
        unidentified=tuple(name for name, entry in parameters.items() if not entry.identified and name not in fixed),
        converged=fitted.report.converged,
        starts=np.empty((0, len(parameters))),
    )


def _options(fitted: Fitted, gain: float | None) -> LawOptions:
    """The options of a fit, with another `gain` where one is given; options that the law no longer has are left out."""
    known = fitted.law.options.model_fields
    options = {name: value for name, value in fitted.report.options.items() if name in known}
    return fitted.law.options.model_validate(options if gain is None else options | {"gain": gain})


def expected_loss(fitted: Fitted, nodes: Sequence[Row], node: str, tokens: float) -> Answer:
    """The law's loss of a node after so many recovery tokens, with the interval of a new measurement.

    Raises UserError where no recovery of the node is among the law's points.
    """
    title = f"Loss of {node} after {human_count(tokens)} recovery tokens"
    rows = points_of(fitted, nodes, node)
    if answer := refusal_answer(fitted, title):
        return answer
    scale, unit = fitted.scales["tokens"], fitted.law.units["loss"]
    point = select(fitted.points, rows[:1]) | {"tokens": np.array([tokens / scale])}
    value, drawn = fitted.predict(point)
    low, high = (None, None)
    if len(drawn):
        low, high = predictive_interval(drawn[:, 0], fitted.noise)
    fewest, most = (float(end(fitted.points["tokens"][rows]) * scale) for end in (np.min, np.max))
    outside = not fewest <= tokens <= most
    between = "" if low is None else f", 95% interval of a new measurement [{number(low, 4)}, {number(high, 4)}]"
    sentences = [f"{node} after {human_count(tokens)} tokens: loss {number(value[0], 4)} {unit}{between}."]
    if outside:
        sentences.append(
            f"This is an extrapolation: {human_count(fewest)} to {human_count(most)} tokens were measured."
        )
    if low is None:
        sentences.append("No interval is given, since the fit has no resamples of its runs.")
    return {
        "title": title,
        "node": node,
        **basis_of(fitted),
        "at_tokens": tokens,
        "value": float(value[0]),
        "low": low,
        "high": high,
        "extrapolation": outside,
        "sentences": [*sentences, held_out_sentences(fitted.name, fitted.report)],
    }


def predictive_interval(samples: np.ndarray, noise: float) -> tuple[float, float]:
    """95% interval of x + noise e: x one of `samples` [k], e standard normal, here at 101 evenly likely values."""
    return percentile_interval(np.add.outer(samples, noise * _NORMAL))
