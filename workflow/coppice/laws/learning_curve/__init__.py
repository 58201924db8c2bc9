"""Learning-curve prediction: the power law of one recovery run, where it leads, and when its rest pays too little.

Source: Modeling of learning curves with applications to POS tagging (Vilares, Darriba and Ribadas, arXiv 2402.02515).
There an accuracy follows c - a x^-b; here a loss follows L(x) = c + a x^-b, a, b > 0, and c its asymptote. The trend
of level i is fitted to the first i observations, and the asymptotes c_i form a sequence:

- working level: the first level from which on every trend is possible, that is, it falls, and not below 0 nats;
- prediction level: the first level from the working level on, from which the asymptotes are monotone; here over at
  least two steps, as a single step is monotone whatever the data;
- proximity: past the prediction level, training may stop where the trend has at most tau left to go, and the prediction
  for a later x may be taken where two consecutive trends agree on it within tau;
- anchor: the asymptote of the trend before, taken as an observation at infinity, steadies the next one. It is an option
  that training does not use: it holds on to an asymptote that a loss still falling has begun to contradict.

For given b the pattern is linear in c and a, so that the least squares of a trend are a search in one dimension.
"""

from __future__ import annotations

from typing import TypedDict

import numpy as np
from pydantic import Field

from coppice.formatting import human_count
from coppice.laws.contracts import Advice, Law, LawReport, Recommendation, Tables
from coppice.laws.engine.held_out import HeldOutError, later_tokens, summarize_errors
from coppice.laws.engine.inference import FEWEST_RUNS, sample_interval
from coppice.laws.engine.metrics import metrics
from coppice.laws.engine.points import Points, points_from, run_rows, select
from coppice.laws.learning_curve.trends import (
    FEWEST,
    Trend,
    agreement_level,
    asymptotes,
    fit_rows,
    pays_too_little,
    prediction_level,
    stop_level,
    trend,
    trends,
    working_level,
)
from coppice.laws.options import LawOptions
from coppice.laws.points.quality import matches
from coppice.laws.points.recoveries import validation_losses
from coppice.uncertainty import resampled_sums

__all__ = ["LAW", "Options", "pays_too_little", "points", "report"]

COLUMNS = {"run": str, "tokens": float, "loss": float}


class Options(LawOptions):
    """What is read from the trends of recovery runs."""

    tau: float = Field(
        default=0.005,
        gt=0,
        description="Nats per token: the rule stops a run where the rest of its tokens would gain less.",
    )
    nodes: list[str] | None = Field(
        default=None, description="Patterns of the recovery nodes, such as small/*; null: all of them."
    )
    anchored: bool = Field(
        default=False, description="Steady each trend by the asymptote of the one before it, as the source does."
    )


def points(tables: Tables, options: Options) -> Points:
    """One row a validation loss of a recovery after its first tokens (at none the pattern has no value)."""
    nodes, curves = tables["nodes"], tables["curves"]
    runs = [node for node in nodes["node"][nodes["family"] == "recover"] if matches(node, options.nodes)]
    return points_from(validation_losses(curves, runs), COLUMNS)


class Value(TypedDict):
    """A value of a trend with its 95% interval, None without draws."""

    value: float
    low: float | None
    high: float | None


class Prediction(Value):
    """A loss at a number of tokens that was not run."""

    tokens: float


class Stop(TypedDict):
    """Where the rule would have stopped a run, and what that would have saved and lost."""

    level: int
    tokens: float
    saved_tokens: float
    lost_loss: float


class Settled(TypedDict):
    """Where two trends first agree on the last loss, and how far off it they are."""

    level: int
    tokens: float
    predicted_loss: float
    error: float


class RunTrend(TypedDict):
    """What the trends of one run say, as fit.json has it."""

    run: str
    levels: int
    tokens: float
    loss: float
    falls: bool
    asymptote: Value
    scale: float
    exponent: float
    asymptotes: list[float]
    working_level: int | None
    prediction_level: int | None
    stop: Stop | None
    settled: Settled | None
    predicted: list[Prediction]


def report(points: Points, options: Options) -> LawReport:
    """The trend of each run, what the rules would have done, and the held-out error, as fit.json has them."""
    predicted = np.full(len(points["run"]), np.nan)
    runs: list[RunTrend] = []
    short: list[str] = []
    for run in np.unique(points["run"]).tolist():
        rows = run_rows(points, run)
        x, y = points["tokens"][rows], points["loss"][rows]
        if len(np.unique(x)) <= FEWEST:
            short.append(run)
            continue
        runs.append(_describe(run, x, y, options))
        predicted[rows] = trend(x, y).at(x)
    held_out = _test_later_tokens(points, options)
    advice, notes = _recommend(runs, held_out, options)
    with_trend = np.isfinite(predicted)
    return {
        "parameters": {},
        "metrics": metrics(select(points, with_trend), predicted[with_trend]) if with_trend.any() else {},
        "held_out": {"later_tokens": held_out},
        "ranking": {},
        "recommendation": advice,
        "notes": _short_notes(short) + _flat_notes(runs) + _stop_notes(runs, options.tau) + notes,
        "points": len(points["run"]),
        "runs": len(runs) + len(short),
        "converged": True,
        "details": {"runs": runs},
        "predicted": predicted,
    }


def _describe(run: str, x: np.ndarray, y: np.ndarray, options: Options) -> RunTrend:
    """What the trends of one run say, its losses y [n] at tokens x [n]."""
    by_level, whole, end = trends(x, y, options.anchored), trend(x, y), x[-1]
    samples = _resample(whole, x, y, options.bootstrap, options.seed)
    # At the last level nothing is left to save or to predict.
    stop = stop_level(x[:-1], y[:-1], end, options.tau)
    settled = agreement_level(x[:-1], y[:-1], end, options.tau)
    return {
        "run": run,
        "levels": len(x),
        "tokens": float(end),
        "loss": float(y[-1]),
        "falls": whole.scale > 0,
        "asymptote": _value(whole, samples, np.inf),
        "scale": whole.scale,
        "exponent": whole.exponent,
        "asymptotes": asymptotes(by_level).tolist(),
        "working_level": working_level(by_level),
        "prediction_level": prediction_level(by_level),
        "stop": None
        if stop is None
        else {
            "level": stop,
            "tokens": float(x[stop - 1]),
            "saved_tokens": float(end - x[stop - 1]),
            "lost_loss": float(y[stop - 1] - y[-1]),
        },
        "settled": None
        if settled is None
        else {
            "level": settled,
            "tokens": float(x[settled - 1]),
            "predicted_loss": float(by_level[settled - FEWEST].at(end)),
            "error": float(by_level[settled - FEWEST].at(end) - y[-1]),
        },
        "predicted": [{"tokens": float(many * end), **_value(whole, samples, many * end)} for many in (2, 4)],
    }


def _resample(whole: Trend, x: np.ndarray, y: np.ndarray, draws: int, seed: int) -> list[Trend]:
    """Trends of losses drawn about the trend with the variance of its residuals, sum r^2 / (n - 3)."""
    deviation = np.sqrt(np.sum((y - whole.at(x)) ** 2) / (len(x) - FEWEST))
    simulated = whole.at(x) + deviation * np.random.default_rng(seed).standard_normal((draws, len(x)))
    return [Trend(*map(float, row)) for row in zip(*fit_rows(x, simulated), strict=True)] if draws else []


def _value(whole: Trend, samples: list[Trend], x: float) -> Value:
    """The trend's value at x, with the interval over the samples."""
    low, high = sample_interval(np.array([float(each.at(x)) for each in samples]))
    return {"value": float(whole.at(x)), "low": low, "high": high}


def _test_later_tokens(points: Points, options: Options) -> dict[str, HeldOutError]:
    """Errors on the last 20% of each run's points of its trend before them, and of its last loss before them."""
    held_out = later_tokens(points)
    names = ("learning-curve", "last_loss")
    if isinstance(held_out, str):
        return {name: {"reason": held_out} for name in names}
    differences: dict[str, list[np.ndarray]] = {"learning-curve": [], "last_loss": [], "mean": []}
    observed = []
    for run in np.unique(points["run"]):
        rows = run_rows(points, run)
        seen, unseen = rows[~held_out[rows]], rows[held_out[rows]]
        x, y = points["tokens"][seen], points["loss"][seen]
        if len(np.unique(x)) < FEWEST:
            continue
        later = points["loss"][unseen]
        observed.append(later)
        differences["learning-curve"].append(trend(x, y).at(points["tokens"][unseen]) - later)
        differences["last_loss"].append(y[-1] - later)
        differences["mean"].append(y.mean() - later)
    if not observed:
        return {name: {"reason": "No run has three losses before the last fifth of its points."} for name in names}
    return {name: _error(differences[name], observed, differences["mean"], options) for name in names}


def _error(
    differences: list[np.ndarray], observed: list[np.ndarray], naive: list[np.ndarray], options: Options
) -> HeldOutError:
    """Error over the held-out points of all runs, nats per token, with its interval by resampling runs."""
    squares = np.array([[np.sum(each**2), len(each)] for each in differences])
    low, high = None, None
    if len(squares) >= FEWEST_RUNS and options.bootstrap:
        sums = resampled_sums(squares, options.bootstrap, options.seed)
        low, high = sample_interval(np.sqrt(sums[:, 0] / sums[:, 1]))
    error = summarize_errors(np.concatenate(differences), np.concatenate(observed), np.concatenate(naive))
    return error | {"low": low, "high": high}


def _recommend(runs: list[RunTrend], held_out: dict[str, HeldOutError], options: Options) -> Advice:
    """What twice the tokens would bring each run; none, but a sentence, where the trends fail their own test."""
    error, last = held_out["learning-curve"], held_out["last_loss"]
    if "reason" in error:
        return [], [f"No loss is predicted, since the trends could not be tested: {error['reason']}"]
    if error["relative"] > options.tolerance or error["rmse"] >= last["rmse"]:
        return [], [
            f"No loss is predicted, since the trends of the first 80% of the points miss the rest by "
            f"{error['rmse']:.4f} nats per token ({error['relative']:.1%}), where the last loss seen misses them by "
            f"{last['rmse']:.4f}."
        ]
    return [_recommend_doubling(run, error["rmse"]) for run in runs if run["falls"]], []


def _recommend_doubling(entry: RunTrend, held_out: float) -> Recommendation:
    """The prediction for twice the tokens of one run."""
    twice = entry["predicted"][0]
    interval = "" if twice["low"] is None else f" ({twice['low']:.4f} to {twice['high']:.4f})"
    return {
        "sentence": f"{entry['run']}: twice its {human_count(entry['tokens'])} tokens would bring its held-out loss "
        f"from {entry['loss']:.4f} to {twice['value']:.4f}{interval} nats per token; the error of such "
        f"predictions on the held-out points is {held_out:.4f}.",
        "run": entry["run"],
        "tokens": twice["tokens"],
        "loss": twice["value"],
        "low": twice["low"],
        "high": twice["high"],
        "held_out_rmse": held_out,
    }


def _short_notes(short: list[str]) -> list[str]:
    if not short:
        return []
    return [
        f"{len(short)} runs have fewer than {FEWEST + 1} held-out losses after their first tokens and were left out "
        f"({short[0]} is one): a trend has {FEWEST} unknowns. Give the study more `budgets`."
    ]


def _flat_notes(runs: list[RunTrend]) -> list[str]:
    flat = [run["run"] for run in runs if not run["falls"]]
    return [f"The loss of {run} does not fall, so that it has no trend." for run in flat]


def _stop_notes(runs: list[RunTrend], tau: float) -> list[str]:
    """What the rule at `tau` would have saved and lost over all runs."""
    if not runs:
        return []
    stops = [run["stop"] for run in runs if run["stop"] is not None]
    rule = f"Stopped where the rest of its tokens would gain at most {tau:g} nats per token"
    if not stops:
        return [f"{rule}, none of the {len(runs)} runs would have ended early."]
    saved = sum(stop["saved_tokens"] for stop in stops) / sum(run["tokens"] for run in runs)
    lost = [stop["lost_loss"] for stop in stops]
    return [
        f"{rule}, {len(stops)} of the {len(runs)} runs would have ended early: {saved:.0%} of all tokens saved, for "
        f"a loss higher by {np.mean(lost):.4f} on average and {max(lost):.4f} at most."
    ]


LAW = Law(
    source={
        "title": "Modeling of learning curves with applications to POS tagging",
        "arxiv": "2402.02515",
        "equation": "L(x) = c + a x^-b, fitted to the first i observations for each i",
    },
    units={"loss": "nats per token", "tokens": "tokens"},
    columns=COLUMNS,
    needs={"nodes": ("node", "family"), "curves": ("node", "tokens", "split", "loss")},
    points_are="they are the validation losses of recovery runs.",
    options=Options,
    points=points,
    axis=("tokens", "recovery tokens"),
    report=report,
)
