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

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from coppice.formatting import human_count
from coppice.laws import Law, LawOptions
from coppice.laws.fit import FEWEST_RUNS, Points, drawn_interval, metrics, points_of, select
from coppice.laws.held_out import later_tokens, summary
from coppice.laws.quality import matches
from coppice.uncertainty import resampled_sums

if TYPE_CHECKING:
    from collections.abc import Callable

    import pandas as pd

COLUMNS = {"run": str, "tokens": float, "loss": float}

FEWEST = 3  # observations that a trend needs: as many as it has unknowns
_EXPONENTS = (0.01, 10.0)
_CANDIDATES = np.linspace(0, 1, 65)
_ZOOMS = 9  # each narrows the interval of ln b to a 32nd: below 1e-12 at the end
_MONOTONE_STEPS = 2
_EQUAL = 1e-9  # asymptotes closer than this part of their size are one


# Trends


@dataclass(frozen=True)
class Trend:
    """c + a x^-b; asymptote c and scale a in the unit of y."""

    asymptote: float
    scale: float
    exponent: float

    def at(self, x: Any) -> Any:
        """The value at x > 0, a number or an array; at infinity the asymptote."""
        return self.asymptote + self.scale * np.asarray(x, float) ** -self.exponent

    def gain(self, x: float, target: float) -> float:
        """How much it falls, in the unit of y, from x to `target` >= x."""
        return float(self.at(x) - self.at(target))


def trend(x: np.ndarray, y: np.ndarray, anchor: float | None = None) -> Trend:
    """Least squares of y [n] at x [n] > 0, n >= 3, over c, a >= 0 and 0.01 <= b <= 10; `anchor`: y at infinity.

    Where y does not fall a is 0 and b stands for nothing.
    """
    if anchor is not None:
        x, y = np.append(x, np.inf), np.append(y, anchor)
    c, a, b = _fitted(x, np.asarray(y, float)[None])
    return Trend(float(c[0]), float(a[0]), float(b[0]))


def _fitted(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """c, a and b [k] for each row of y [k, n] at x [n]."""
    x = np.asarray(x, float)
    center = np.exp(np.mean(np.log(x[np.isfinite(x)])))
    low, high = (np.full(len(y), np.log(bound)) for bound in _EXPONENTS)
    rows = np.arange(len(y))
    for _ in range(_ZOOMS):
        candidates = low[:, None] + (high - low)[:, None] * _CANDIDATES
        c, a, costs = _linear(x / center, y, np.exp(candidates))
        best = np.argmin(costs, axis=1)
        step = (high - low) * _CANDIDATES[1]
        low, high = np.maximum(low, candidates[rows, best] - step), np.minimum(high, candidates[rows, best] + step)
    b = np.exp(candidates[rows, best])
    return c[rows, best], a[rows, best] * center**b, b


def _linear(x: np.ndarray, y: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """c, a >= 0 and the summed squares [k, m] of y [k, n] = c + a u at each b [k, m], u = x^-b [k, m, n]."""
    u = x ** -b[..., None]
    mean_u, mean_y = u.mean(axis=-1), y.mean(axis=-1)[:, None]
    u_away, y_away = u - mean_u[..., None], y[:, None] - mean_y[..., None]
    variation = np.sum(u_away**2, axis=-1)
    # At one x alone nothing varies, and the trend is flat.
    a = np.maximum(np.sum(u_away * y_away, axis=-1), 0) / np.where(variation > 0, variation, 1)
    return mean_y - a * mean_u, a, np.sum((y_away - a[..., None] * u_away) ** 2, axis=-1)


def trends(x: np.ndarray, y: np.ndarray, anchored: bool = False) -> list[Trend]:
    """The trends of the levels 3 .. n of y [n] at increasing x [n].

    anchored: each from the second on has the asymptote of the free trend before it, but not below 0, at infinity.
    """
    free = [trend(x[:level], y[:level]) for level in range(FEWEST, len(x) + 1)]
    if not anchored:
        return free
    steadied = enumerate(free[:-1], FEWEST + 1)
    return free[:1] + [trend(x[:level], y[:level], max(before.asymptote, 0)) for level, before in steadied]


def asymptotes(found: list[Trend]) -> np.ndarray:
    """c_i of each trend, in the unit of y."""
    return np.array([each.asymptote for each in found])


def working_level(found: list[Trend]) -> int | None:
    """The first level from which on every trend in `found` (levels 3 ..) is possible; None where the last is not."""
    kept = _last_in_a_row(np.array([each.scale > 0 and each.asymptote >= 0 for each in found], bool))
    return FEWEST + len(found) - kept if kept else None


def prediction_level(found: list[Trend]) -> int | None:
    """The first level, past the working level, from which on the asymptotes are monotone over two steps or more."""
    first = working_level(found)
    if first is None:
        return None
    sequence = asymptotes(found[first - FEWEST :])
    steps = np.diff(sequence)
    steps[np.abs(steps) <= _EQUAL * np.abs(sequence).max()] = 0
    kept = max(_last_in_a_row(steps >= 0), _last_in_a_row(steps <= 0))
    return FEWEST + len(found) - 1 - kept if kept >= _MONOTONE_STEPS else None


def _last_in_a_row(flags: np.ndarray) -> int:
    """How many flags [n] at the end are set without a gap."""
    return len(flags) if flags.all() else int(np.argmin(flags[::-1]))


# Rules: each looks at no observation past the level that it speaks of.


def pays_too_little(x: np.ndarray, y: np.ndarray, target: float, gain: float) -> bool:
    """Whether the losses y [n] at tokens x [n] predict that going on to `target` tokens gains at most `gain`.

    That is L_n(x_n) - L_n(target) <= gain past the prediction level; with target infinity the rule of the source.
    """
    return _pays_too_little(trends(x, y), x, target, gain)


def _pays_too_little(found: list[Trend], x: np.ndarray, target: float, gain: float) -> bool:
    return prediction_level(found) is not None and found[-1].gain(x[FEWEST + len(found) - 2], target) <= gain


def _agrees(found: list[Trend], target: float, tolerance: float) -> bool:
    """Whether the last two trends, past the prediction level, agree on the loss at `target` within `tolerance`."""
    if prediction_level(found) is None:
        return False
    return float(abs(found[-1].at(target) - found[-2].at(target))) <= tolerance


def stop_level(x: np.ndarray, y: np.ndarray, target: float, gain: float) -> int | None:
    """The first level at which `pays_too_little`: where training with that rule would have ended."""
    return _first_level(trends(x, y), lambda found: _pays_too_little(found, x, target, gain))


def settled_level(x: np.ndarray, y: np.ndarray, target: float, tolerance: float) -> int | None:
    """The first level at which two consecutive trends agree on the loss at `target` within `tolerance`."""
    return _first_level(trends(x, y), lambda found: _agrees(found, target, tolerance))


def _first_level(found: list[Trend], holds: Callable[[list[Trend]], bool]) -> int | None:
    """The first level whose trends up to there do what `holds` asks."""
    counts = (count for count in range(1, len(found) + 1) if holds(found[:count]))
    return next((FEWEST + count - 1 for count in counts), None)


# The law


class Options(LawOptions):
    """What the trends of recovery runs are asked."""

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


def points(tables: dict[str, pd.DataFrame], options: dict[str, Any]) -> Points:
    """One row a validation loss of a recovery after its first tokens (at none the pattern has no value)."""
    nodes, curves = tables["nodes"], tables["curves"]
    runs = [node for node in nodes["node"][nodes["family"] == "recover"] if matches(node, options["nodes"])]
    rows = curves[(curves["split"] == "validation") & (curves["tokens"] > 0) & curves["node"].isin(runs)]
    return points_of(rows.sort_values(["node", "tokens"]).rename(columns={"node": "run"}), COLUMNS)


def report(points: Points, options: dict[str, Any]) -> dict[str, Any]:
    """The trend of each run, what the rules would have done, and the held-out error, as fit.json says them."""
    predicted = np.full(len(points["run"]), np.nan)
    entries, short = [], []
    for run in np.unique(points["run"]):
        rows = _rows(points, run)
        x, y = points["tokens"][rows], points["loss"][rows]
        if len(np.unique(x)) <= FEWEST:
            short.append(run)
            continue
        entries.append({"run": str(run)} | _described(x, y, options))
        predicted[rows] = trend(x, y).at(x)
    held_out = _later_tokens(points, options)
    advice, notes = _advice(entries, held_out, options)
    told = np.isfinite(predicted)
    return {
        "parameters": {},
        "metrics": metrics(select(points, told), predicted[told]) if told.any() else {},
        "held_out": {"later_tokens": held_out},
        "ranking": {},
        "recommendation": advice,
        "notes": _short_notes(short) + _flat_notes(entries) + _stop_notes(entries, options) + notes,
        "points": len(points["run"]),
        "runs": len(entries) + len(short),
        "converged": True,
        "details": {"runs": entries},
        "predicted": predicted,
    }


def _rows(points: Points, run: str) -> np.ndarray:
    """Indices of the run's points, by tokens."""
    rows = np.flatnonzero(points["run"] == run)
    return rows[np.argsort(points["tokens"][rows], kind="stable")]


def _described(x: np.ndarray, y: np.ndarray, options: dict[str, Any]) -> dict[str, Any]:
    """What the trends of one run say, its losses y [n] at tokens x [n]; intervals at 95%."""
    found, whole, end = trends(x, y, options["anchored"]), trend(x, y), x[-1]
    drawn = _redrawn(whole, x, y, options["bootstrap"], options["seed"])
    # At the last level nothing is left to save or to predict.
    stop = stop_level(x[:-1], y[:-1], end, options["tau"])
    settled = settled_level(x[:-1], y[:-1], end, options["tau"])
    return {
        "levels": len(x),
        "tokens": float(end),
        "loss": float(y[-1]),
        "falls": whole.scale > 0,
        "asymptote": _with_interval(whole, drawn, np.inf),
        "scale": whole.scale,
        "exponent": whole.exponent,
        "asymptotes": asymptotes(found).tolist(),
        "working_level": working_level(found),
        "prediction_level": prediction_level(found),
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
            "predicted_loss": float(found[settled - FEWEST].at(end)),
            "error": float(found[settled - FEWEST].at(end) - y[-1]),
        },
        "predicted": [{"tokens": float(many * end)} | _with_interval(whole, drawn, many * end) for many in (2, 4)],
    }


def _redrawn(whole: Trend, x: np.ndarray, y: np.ndarray, draws: int, seed: int) -> list[Trend]:
    """Trends of losses drawn about the trend with the variance of its residuals, sum r^2 / (n - 3)."""
    deviation = np.sqrt(np.sum((y - whole.at(x)) ** 2) / (len(x) - FEWEST))
    simulated = whole.at(x) + deviation * np.random.default_rng(seed).standard_normal((draws, len(x)))
    return [Trend(*map(float, row)) for row in zip(*_fitted(x, simulated), strict=True)] if draws else []


def _with_interval(whole: Trend, drawn: list[Trend], x: float) -> dict[str, float | None]:
    """The trend's value at x, with the interval of the drawn ones; None without any."""
    low, high = drawn_interval(np.array([float(each.at(x)) for each in drawn]))
    return {"value": float(whole.at(x)), "low": low, "high": high}


def _later_tokens(points: Points, options: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Errors on the last 20% of each run's points of its trend before them, and of its last loss before them."""
    held_out = later_tokens(points)
    names = ("learning-curve", "last_loss")
    if isinstance(held_out, str):
        return {name: {"reason": held_out} for name in names}
    differences: dict[str, list[np.ndarray]] = {"learning-curve": [], "last_loss": [], "mean": []}
    observed = []
    for run in np.unique(points["run"]):
        rows = _rows(points, run)
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
    differences: list[np.ndarray], observed: list[np.ndarray], naive: list[np.ndarray], options: dict[str, Any]
) -> dict[str, Any]:
    """Error over the held-out points of all runs, nats per token, with its interval by drawing runs again."""
    squares = np.array([[np.sum(each**2), len(each)] for each in differences])
    low, high = None, None
    if len(squares) >= FEWEST_RUNS and options["bootstrap"]:
        sums = resampled_sums(squares, options["bootstrap"], options["seed"])
        low, high = drawn_interval(np.sqrt(sums[:, 0] / sums[:, 1]))
    return summary(*map(np.concatenate, (differences, observed, naive))) | {"low": low, "high": high}


def _advice(
    entries: list[dict[str, Any]], held_out: dict[str, dict[str, Any]], options: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    """What twice the tokens would bring each run; none, but a sentence, where the trends fail their own test."""
    error, last = held_out["learning-curve"], held_out["last_loss"]
    if "reason" in error:
        return [], [f"No loss is predicted, since the trends could not be tested: {error['reason']}"]
    if error["relative"] > options["tolerance"] or error["rmse"] >= last["rmse"]:
        return [], [
            f"No loss is predicted, since the trends of the first 80% of the points miss the rest by "
            f"{error['rmse']:.4f} nats per token ({error['relative']:.1%}), where the last loss seen misses them by "
            f"{last['rmse']:.4f}."
        ]
    return [_doubled(entry, error["rmse"]) for entry in entries if entry["falls"]], []


def _doubled(entry: dict[str, Any], held_out: float) -> dict[str, Any]:
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
        f"({short[0]} is one): a trend has {FEWEST} unknowns. Give the study a longer ladder of budgets."
    ]


def _flat_notes(entries: list[dict[str, Any]]) -> list[str]:
    flat = [entry["run"] for entry in entries if not entry["falls"]]
    return [f"The loss of {run} does not fall, so that it has no trend." for run in flat]


def _stop_notes(entries: list[dict[str, Any]], options: dict[str, Any]) -> list[str]:
    """What the rule at `tau` would have saved and lost over all runs."""
    if not entries:
        return []
    stops = [entry["stop"] for entry in entries if entry["stop"] is not None]
    rule = f"Stopped where the rest of its tokens would gain at most {options['tau']:g} nats per token"
    if not stops:
        return [f"{rule}, none of the {len(entries)} runs would have ended early."]
    saved = sum(stop["saved_tokens"] for stop in stops) / sum(entry["tokens"] for entry in entries)
    lost = [stop["lost_loss"] for stop in stops]
    return [
        f"{rule}, {len(stops)} of the {len(entries)} runs would have ended early: {saved:.0%} of all tokens saved, for "
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
