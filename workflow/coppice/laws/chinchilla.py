"""Chinchilla's law of training from random weights, its rivals, and the best size and tokens for a stated compute.

Sources: Hoffmann et al., Training Compute-Optimal Large Language Models (arXiv 2203.15556), for the law; Besiroglu et
al., Chinchilla Scaling: A Replication Attempt (arXiv 2404.10102), for the fit of its third approach:

    L(N, D) = E + A / N^alpha + B / D^beta

N: parameters; D: tokens trained on from random weights; L: loss in nats per token; E: the loss that no size and no
number of tokens removes. What is minimised is the SUM over points of Huber's loss, delta = 1e-3, of the residuals
ln L' - ln L, over the logarithms of A, B and E. A mean instead of the sum is so small that a search with the usual
tolerances ends where it began: the replication's explanation of the published parameters.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from coppice.formatting import human_count, join_words, number
from coppice.laws.contracts import Advice, Law, Recommendation, Source, Tables
from coppice.laws.engine.forms import Form, Objective, Parameter, Parameters, Reduction, without
from coppice.laws.engine.held_out import HoldOut, largest, later_tokens, leave_one_out
from coppice.laws.engine.inference import sample_interval
from coppice.laws.engine.points import Points, is_single, points_from, powers_of_a_thousand
from coppice.laws.engine.search import Fit
from coppice.laws.options import Huber, Residuals
from coppice.laws.points.recoveries import CURVES, RecoveryOptions, join_recoveries

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

Ends = tuple[float, float] | tuple[None, None]  # of an interval

SOURCE: Source = {
    "title": "Chinchilla Scaling: A Replication Attempt",
    "arxiv": "2404.10102",
    "equation": "L = E + A / N^alpha + B / D^beta",
}

COLUMNS = {"run": str, "parameters": float, "tokens": float, "loss": float}

HUBER = 1e-3


class Options(RecoveryOptions):
    """What Chinchilla's law is fitted to, and what it recommends."""

    residuals: Residuals = "logarithmic"
    huber: Huber = HUBER
    method: str = Field(
        default="scratch", description="The recovery method whose runs are the points: one that trains random weights."
    )
    compute: float | None = Field(
        default=None,
        gt=0,
        description="Floating-point operations of a training run, C = 6 N D, for which the best size and number of "
        "tokens are recommended; null: no recommendation.",
    )


_COEFFICIENT = Parameter(bounds=(1e-12, 1e15), start=(0.05, 500), logarithmic=True)
_EXPONENT = Parameter(bounds=(0.01, 3), start=(0.1, 1.2), logarithmic=True)

PARAMETERS = {
    "A": _COEFFICIENT,
    "B": _COEFFICIENT,
    "E": Parameter(bounds=(1e-4, 1e3), start=(0.2, 4), logarithmic=True),
    "alpha": _EXPONENT,
    "beta": _EXPONENT,
}


def predict(parameters: Parameters, points: Points) -> np.ndarray:
    """L, nats per token, [n] or [k, n] with parameters [k, 1]. N and D are in the fit's units."""
    return (
        parameters["E"]
        + parameters["A"] * points["parameters"] ** -parameters["alpha"]
        + parameters["B"] * points["tokens"] ** -parameters["beta"]
    )


def slopes(parameters: Parameters, points: Points) -> dict[str, np.ndarray]:
    """d L / d theta by the name of each parameter, shaped as `predict` shapes L.

    d L / d A = N^-alpha, d L / d alpha = -A N^-alpha ln N, the same of B and D, and d L / d E = 1.
    """
    by_size = points["parameters"] ** -parameters["alpha"]
    by_tokens = points["tokens"] ** -parameters["beta"]
    return {
        "A": by_size,
        "B": by_tokens,
        "E": np.ones_like(by_size),
        "alpha": -parameters["A"] * by_size * np.log(points["parameters"]),
        "beta": -parameters["B"] * by_tokens * np.log(points["tokens"]),
    }


_ONE_SIZE = "There is one size, so A and alpha are not identified: {stands} stands for the term of N as well."
_ONE_TOKEN_COUNT = (
    "There is one number of tokens, so B and beta are not identified: {stands} stands for the term of D as well."
)
_ONE_RATIO = (
    "All runs have one ratio of tokens to parameters, so the effects of N and D cannot be separated: the term of D is "
    "left out and the term of N stands for both."
)


def reduce(points: Points) -> Reduction:
    """The nested form that one size, one number of tokens, or one ratio of the two leaves, and why."""
    one_size, one_count, one_ratio = _design(points)
    fixed: dict[str, float] = {}
    notes = []
    if one_size:
        fixed |= {"A": 0.0, "alpha": 1.0}
        notes.append(_ONE_SIZE.format(stands="E"))
    if one_count:
        fixed |= {"B": 0.0, "beta": 1.0}
        notes.append(_ONE_TOKEN_COUNT.format(stands="E"))
    if one_ratio:
        fixed |= {"B": 0.0, "beta": 1.0}
        notes.append(_ONE_RATIO)
    return fixed, notes


def _design(points: Points) -> tuple[bool, bool, bool]:
    """Whether the points have one size, one number of tokens, and, where they have neither, one ratio of the two."""
    size, tokens = points["parameters"], points["tokens"]
    one_size, one_count = is_single(size), is_single(tokens)
    return one_size, one_count, not one_size and not one_count and is_single(tokens / size)


FORM = Form(PARAMETERS, predict, reduce, objective=Objective("logarithmic", HUBER), slopes=slopes)


def _reduce_without_irreducible_loss(points: Points) -> Reduction:
    """As `reduce`, save that a term which does not vary takes the part of the constant."""
    one_size, one_count, one_ratio = _design(points)
    fixed: dict[str, float] = {"alpha": 0.0} if one_size else {}
    if one_ratio or (one_size and one_count):
        return fixed | {"B": 0.0, "beta": 1.0}, []
    return fixed | ({"beta": 0.0} if one_count else {}), []


def _predict_tied(parameters: Parameters, points: Points) -> np.ndarray:
    """E + A / N^alpha + B / D^alpha."""
    return predict(parameters | {"beta": parameters["alpha"]}, points)


def _reduce_tied(points: Points) -> Reduction:
    one_size, one_count, one_ratio = _design(points)
    fixed = ({"A": 0.0} if one_size else {}) | ({"B": 0.0} if one_count or one_ratio else {})
    return fixed | ({"alpha": 1.0} if one_size and one_count else {}), []


# Comparators of ours: enough parameters and tokens remove all loss; size and tokens have one exponent.
RIVALS = {
    "without_irreducible_loss": replace(without(FORM, "E"), reduce=_reduce_without_irreducible_loss),
    "one_exponent": replace(without(FORM, "beta"), predict=_predict_tied, reduce=_reduce_tied),
}

HELD_OUT: dict[str, HoldOut] = {
    "larger_model": partial(largest, column="parameters", name="size"),
    "each_size": partial(leave_one_out, column="parameters", name="size"),
    "later_tokens": later_tokens,
}


def points(tables: Tables, options: Options) -> Points:
    """One row a validation loss, after its first tokens, of a run that trained random weights.

    A run is a node that `recoveries` chooses. `parameters` [n] are all of the node's, embeddings included, and `tokens`
    [n] those that the run had seen; not yet in units.
    """
    return points_from(join_recoveries(tables, options), COLUMNS)


scales = partial(powers_of_a_thousand, names=("parameters", "tokens"))


# Compute


def compute_optimal(parameters: Parameters, compute: float | np.ndarray) -> tuple[Any, Any]:
    """N* and D* that minimise L where 6 N D = C; all in one unit of N and one of D, and C in six times their product.

    N* = G (C / 6)^(beta / (alpha + beta)) and D* = C / (6 N*), with G = (alpha A / (beta B))^(1 / (alpha + beta)).
    """
    alpha, beta = parameters["alpha"], parameters["beta"]
    balance = (alpha * parameters["A"] / (beta * parameters["B"])) ** (1 / (alpha + beta))
    size = balance * (compute / 6) ** (beta / (alpha + beta))
    return size, compute / (6 * size)


def recommend(fit: Fit, samples: Parameters, points: Points, scales: dict[str, float], options: Options) -> Advice:
    """The size and the tokens of least loss for options.compute operations, with their intervals over `samples`."""
    compute = options.compute
    if compute is None:
        return [], []
    lost: list[str] = [name for name in ("A", "B", "alpha", "beta") if name in fit.unidentified or name in fit.fixed]
    if lost:
        return [], [f"No compute-optimal size is recommended, since the points do not identify {join_words(lost)}."]
    in_units = compute / (scales["parameters"] * scales["tokens"])
    optimum = {name: float(value) for name, value in _optimum(fit.parameters, in_units, scales).items()}
    ends = {name: sample_interval(values) for name, values in _optimum(samples, in_units, scales).items()}
    note = _range_note(optimum, points, scales)
    entry: Recommendation = {"compute": compute}
    for name, value in optimum.items():
        low, high = ends[name]
        entry |= {name: value, f"{name}_low": low, f"{name}_high": high}
    return [entry | {"note": note, "sentence": _sentence(compute, optimum, ends, note)}], []


def _optimum(parameters: Parameters, compute: float, scales: dict[str, float]) -> dict[str, np.ndarray]:
    """N*, D*, their ratio and the loss there, in parameters, tokens and nats; `parameters` and `compute` in units."""
    size, tokens = compute_optimal(parameters, compute)
    return {
        "parameters": size * scales["parameters"],
        "tokens": tokens * scales["tokens"],
        "tokens_per_parameter": tokens * scales["tokens"] / (size * scales["parameters"]),
        "loss": predict(parameters, {"parameters": size, "tokens": tokens}),
    }


def _range_note(optimum: Mapping[str, float], points: Points, scales: dict[str, float]) -> str | None:
    """A sentence where the recommended size or tokens lie outside those measured."""
    outside = [
        name
        for name in ("parameters", "tokens")
        if not points[name].min() <= optimum[name] / scales[name] <= points[name].max()
    ]
    return f"Its {' and '.join(outside)} lie outside those measured: an extrapolation." if outside else None


def _sentence(compute: float, optimum: Mapping[str, float], ends: Mapping[str, Ends], note: str | None) -> str:
    names: dict[str, Callable[[float], str]] = {
        "parameters": human_count,
        "tokens": human_count,
        "tokens_per_parameter": number,
    }
    size, tokens, ratio = (
        _format_with_interval(optimum[name], ends[name], format_value) for name, format_value in names.items()
    )
    return (
        f"For {compute:.3g} floating-point operations the loss is least, {number(optimum['loss'], 4)} nats per "
        f"token, with {size} parameters trained on {tokens} tokens, {ratio} tokens per parameter."
        f"{f' {note}' if note else ''}"
    )


def _format_with_interval(value: float, ends: Ends, format_value: Callable[[float], str]) -> str:
    low, high = ends
    if low is None or high is None:
        return format_value(value)
    return f"{format_value(value)} ({format_value(low)} to {format_value(high)})"


LAW = Law(
    source=SOURCE,
    units={"parameters": "parameters", "tokens": "tokens", "loss": "nats per token"},
    columns=COLUMNS,
    needs={
        "nodes": ("node", "parent", "model", "method", "family", "parameters"),
        "curves": CURVES,
    },
    points_are="they are the validation losses of runs that train random weights by the chosen method.",
    options=Options,
    points=points,
    axis=("tokens", "training tokens"),
    form=FORM,
    rivals=RIVALS,
    held_out=HELD_OUT,
    scales=scales,
    recommend=recommend,
)
