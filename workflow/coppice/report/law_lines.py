"""A fitted law's loss along the study's recovery runs: its curve, its band, and its extrapolation."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coppice.errors import UserError
from coppice.laws import registry as laws
from coppice.laws.engine.forms import Form, Parameters, parameter_columns
from coppice.laws.engine.points import Points
from coppice.records.arrow import read_parquet
from coppice.records.fit import FitRecord

_WITHIN, _BEYOND = 45, 16  # tokens at which a line is drawn: among the points fitted, and after the last of them
_FURTHEST = 4  # times the tokens of the last point fitted


@dataclass(frozen=True)
class Line:
    """A law's loss along one run, nats per token: at `tokens` [n]; low, high [n]: the 95% interval over the bootstrap's
    refits, None without refits. Beyond `fitted_to` tokens it is extrapolated."""

    tokens: np.ndarray
    loss: np.ndarray
    low: np.ndarray | None
    high: np.ndarray | None
    fitted_to: float


def law_lines(fit: FitRecord, folder: Path, nodes: set[str]) -> dict[str, Line]:
    """The line of each of the `nodes` whose recovery the law in `folder` was fitted to; empty for a law that does not
    predict a loss by tokens, or that could not be fitted."""
    law = laws.load(fit.law)
    values = {name: entry.value for name, entry in fit.parameters.items() if entry.value is not None}
    path = folder / "points.parquet"
    if law.form is None or law.form.target != "loss" or law.axis[0] != "tokens" or len(values) < len(fit.parameters):
        return {}
    if not path.exists():
        return {}
    if missing := set(law.form.parameters) - set(values):
        raise UserError(f"{folder / 'fit.json'} lacks the parameter {min(missing)!r}; fit the law again.")
    table = read_parquet(path, list(law.columns))
    points = {name: np.asarray(table[name].to_pylist()) for name in table.column_names}
    scales = {name: entry.scale for name, entry in fit.units.items() if entry.scale and name in points}
    drawn = _samples(law.form, folder / "samples.parquet")
    runs = sorted(nodes & set(points["run"].tolist()))
    return {run: _line(law.form, values, drawn, points, scales, run) for run in runs}


def _samples(form: Form, path: Path) -> Parameters | None:
    """The bootstrap's parameters [k, 1]; None where there was none."""
    if not path.exists():
        return None
    table = read_parquet(path, list(form.parameters))
    if not len(table):
        return None
    return parameter_columns(form, np.column_stack([table[name].to_numpy() for name in form.parameters]))


def _line(
    form: Form,
    values: dict[str, float],
    drawn: Parameters | None,
    points: Points,
    scales: dict[str, float],
    run: str,
) -> Line:
    rows = np.flatnonzero(points["run"] == run)
    first, last = points["tokens"][rows].min(), points["tokens"][rows].max()
    beyond = np.geomspace(last, _FURTHEST * last, _BEYOND)[1:]
    tokens = np.concatenate([np.geomspace(first, last, _WITHIN), beyond])
    at = {name: np.repeat(column[rows[:1]], len(tokens)) for name, column in points.items()} | {"tokens": tokens}
    at |= {name: at[name] / scale for name, scale in scales.items()}
    with np.errstate(over="ignore"):
        low, high = (None, None) if drawn is None else _band(form.predict(drawn, at))
    return Line(tokens, form.predict(values, at), low, high, float(last))


def _band(losses: np.ndarray) -> np.ndarray:
    """The 95% interval [2, n] of draws [k, n], some of which may be infinite: nothing is interpolated between two."""
    return np.quantile(losses, [0.025, 0.975], axis=0, method="nearest")
