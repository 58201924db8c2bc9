"""The family of reference models: its two laws, their joint fit, and the size at which it would reach a score.

The formulas and their symbols are in `coppice.laws.density`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from coppice.laws.engine.forms import Form, Objective, Parameter, Parameters, Reduction
from coppice.laws.engine.points import Points, count, is_single
from coppice.laws.engine.search import Fit, fit_form

PARAMETERS_OF_A_STEP = 4  # each step has four: with no more references than that it is given fewer


def _predict_loss(parameters: Parameters, points: Points) -> np.ndarray:
    """L = a N^-alpha + b D^-beta, nats per item."""
    return (
        parameters["a"] * points["parameters"] ** -parameters["alpha"]
        + parameters["b"] * points["tokens"] ** -parameters["beta"]
    )


def _reduce_loss(points: Points) -> Reduction:
    """The loss law that few references leave: b = 0 without a choice of D, and no alpha without one of N."""
    fixed: dict[str, float] = {}
    notes = []
    if is_single(points["parameters"]):
        fixed["alpha"] = 1.0
        notes.append(
            "The reference models have one size, so alpha is not identified: it is fixed at 1, and effective sizes are "
            "unknown."
        )
    if is_single(points["tokens"]):
        fixed |= {"b": 0.0, "beta": 1.0}
        notes.append(
            "The reference models have one number of pretraining tokens, or none is given by `pretraining_tokens`, so "
            "the term b D^-beta is left out."
        )
    elif count(points) <= PARAMETERS_OF_A_STEP:
        fixed |= {"b": 0.0, "beta": 1.0}
        notes.append(
            f"There are {count(points)} reference models, too few for the four parameters of the loss law, so the term "
            "b D^-beta is left out."
        )
    return fixed, notes


def _predict_score(parameters: Parameters, points: Points) -> np.ndarray:
    """S = c / (1 + e^(-gamma (L - l))) + d, with 1 / (1 + e^-x) = (1 + tanh(x / 2)) / 2, which does not overflow."""
    x = parameters["gamma"] * (points["answer_loss"] - parameters["l"])
    return parameters["c"] * (1 + np.tanh(x / 2)) / 2 + parameters["d"]


_COEFFICIENT = Parameter(bounds=(1e-9, 1e15), start=(1, 1e4), logarithmic=True)
_EXPONENT = Parameter(bounds=(1e-3, 3), start=(0.05, 1), logarithmic=True)

LOSS_FORM = Form(
    {"a": _COEFFICIENT, "alpha": _EXPONENT, "b": _COEFFICIENT, "beta": _EXPONENT},
    _predict_loss,
    _reduce_loss,
    target="answer_loss",
    objective=Objective("logarithmic"),
)

SCORE_FORM = Form(
    {
        "c": Parameter(bounds=(1e-3, 1), start=(0.2, 0.9), logarithmic=True),
        "gamma": Parameter(bounds=(-1e4, -1e-6), start=(-20, -0.5)),
        "l": Parameter(bounds=(-1e4, 1e4), start=(0.1, 3)),
        "d": Parameter(bounds=(0, 1), start=(0, 0.5)),
    },
    _predict_score,
    target="score",
)


def score_form(points: Points) -> Form:
    """SCORE_FORM with starts within the losses of the points, whose size is that of the answers' texts."""
    low, high = float(points["answer_loss"].min()), float(points["answer_loss"].max())
    width = max(high - low, 1e-6 * high)
    starts = {"gamma": (-20 / width, -0.5 / width), "l": (low - width / 2, high + width / 2)}
    parameters = {
        name: replace(parameter, start=starts.get(name, parameter.start))
        for name, parameter in SCORE_FORM.parameters.items()
    }
    return replace(SCORE_FORM, parameters=parameters)


@dataclass(frozen=True)
class Family:
    """Both laws as fitted to the reference models."""

    loss: Fit
    score: Fit

    @property
    def fits(self) -> dict[str, Fit]:
        return {"loss": self.loss, "score": self.score}

    @property
    def parameters(self) -> dict[str, float]:
        return self.loss.parameters | self.score.parameters

    @property
    def unidentified(self) -> list[str]:
        """Parameters without which no score can be inverted, and that the references do not identify."""
        return [
            name
            for fit in self.fits.values()
            for name in fit.parameters
            if name in fit.unidentified or (name == "alpha" and name in fit.fixed)
        ]

    def predict_score(self, points: Points) -> np.ndarray:
        """S(L(N, D)) [n]: the score of a reference model of each point's size and tokens."""
        return self.score.predict({"answer_loss": self.loss.predict(points)})


def fit_family(
    references: Points, objective: Objective, score_range: dict[str, float], starts: int, seed: int
) -> Family:
    """Both laws fitted to the reference models; `score_range`: c and d of the score, where they are fixed."""
    return Family(
        loss=fit_form(replace(LOSS_FORM, objective=objective), references, starts, seed),
        score=fit_form(score_form(references), references, starts, seed, score_range),
    )


def effective_parameters(score: np.ndarray | list[float], parameters: Parameters, tokens: float) -> np.ndarray:
    """N^ of each score [n] at D0 = `tokens`; NaN outside d < S < c + d, and where L^ <= b D0^-beta."""
    share = np.asarray(score, float) - parameters["d"]
    with np.errstate(divide="ignore", invalid="ignore", over="ignore"):
        odds = parameters["c"] / share - 1
        loss = parameters["l"] - np.log(np.where((share > 0) & (odds > 0), odds, np.nan)) / parameters["gamma"]
        reducible = (loss - parameters["b"] * tokens ** -parameters["beta"]) / parameters["a"]
        return np.where(reducible > 0, reducible, np.nan) ** (-1 / parameters["alpha"])
