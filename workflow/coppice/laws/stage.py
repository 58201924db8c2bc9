"""`coppice fit`: a law fitted to a study's tables, with its uncertainty, its held-out error and its figure."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from coppice import laws
from coppice.files import atomic_write, write_json
from coppice.laws.fit import (
    FEWEST_RUNS,
    Fit,
    Form,
    Points,
    bootstrap,
    columns,
    count,
    held_out_error,
    least_squares_fit,
    metrics,
    select,
)
from coppice.uncertainty import percentile_interval


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--law", required=True, help="the law's name")
    parser.add_argument("--tables", required=True, type=Path, help="folder of the study's tables")
    parser.add_argument("--options", type=json.loads, default={}, help="JSON: the law's options")
    parser.add_argument("--output", required=True, type=Path, help="folder of the fit")


def run(arguments: argparse.Namespace) -> None:
    fit_law(arguments.law, arguments.tables, arguments.options, arguments.output)


def fit_law(law_name: str, tables_directory: Path, options: dict[str, Any], output_directory: Path) -> dict[str, Any]:
    """Fits a law to the tables and writes fit.json, points.parquet and fit.svg, each whole or not at all.

    Returns what fit.json holds. Raises UserError for a law or an option that does not exist.
    """
    law = laws.load(law_name)
    options = laws.validated(law_name, options).model_dump()
    tables = {
        name: pd.read_parquet(Path(tables_directory) / f"{name}.parquet", columns=list(columns))
        for name, columns in law.NEEDS.items()
    }
    raw, notes = _finite(law.points(tables, options))
    report, predicted, curves = _nothing(law, raw) if count(raw) == 0 else _report(law, raw, options)
    report = {"law": law_name, "source": law.SOURCE} | report
    report["notes"] = notes + report["notes"]
    output_directory = Path(output_directory)
    types = [(name, pa.string() if kind is str else pa.float64()) for name, kind in law.COLUMNS.items()]
    table = pa.table(raw | {"predicted": predicted}, schema=pa.schema([*types, ("predicted", pa.float64())]))
    with atomic_write(output_directory / "points.parquet") as path:
        pq.write_table(table, path)
    with atomic_write(output_directory / "fit.svg") as path:
        draw(law_name, raw, curves, path)
    # Last, since whoever finds fit.json should find the others beside it.
    write_json(output_directory / "fit.json", report)
    return report


def _finite(points: Points) -> tuple[Points, list[str]]:
    """The points whose numbers are all finite, and a sentence where some are not."""
    numbers = [column for column in points.values() if column.dtype.kind == "f"]
    finite = np.isfinite(numbers).all(axis=0)
    if finite.all():
        return points, []
    return select(points, finite), [
        f"{np.sum(~finite)} of {len(finite)} points hold a value that is not finite and were left out."
    ]


def _nothing(law: ModuleType, raw: Points) -> tuple[dict[str, Any], np.ndarray, Points]:
    """The report where there is no point to fit."""
    unknown = {"value": None, "low": None, "high": None, "identified": False, "spread": None}
    names = ("r2", "huber", "asd", "asd_relative", "rmse")
    report = {
        "units": {column: {"unit": unit, "scale": None} for column, unit in law.UNITS.items()},
        "parameters": {name: dict(unknown) for name in law.PARAMETERS},
        "metrics": dict.fromkeys(names),
        "held_out": {test: {name: {"reason": "There are no points."} for name in _forms(law)} for test in law.HELD_OUT},
        "points": 0,
        "runs": 0,
        "recommendation": [],
        "notes": [f"There are no points to fit: {law.POINTS}"],
        "converged": False,
        "starts_within_tolerance": 0,
    }
    return report, np.empty(0), raw


def _forms(law: ModuleType) -> dict[str, Form]:
    """The law's own form under its module's name, then its rivals."""
    return {law.__name__.rpartition(".")[2]: law.FORM} | law.RIVALS


def _report(law: ModuleType, raw: Points, options: dict[str, Any]) -> tuple[dict[str, Any], np.ndarray, Points]:
    """What fit.json says, the predicted losses [n], and the fitted curves to draw."""
    units = law.units(raw)
    points = _in_units(raw, units)
    form: Form = law.FORM
    fit = least_squares_fit(form, points, options["starts"], options["seed"])
    samples, _ = bootstrap(form, points, fit, options["bootstrap"], options["seed"])
    predicted = form.predict(fit.parameters, points)
    curves = _curves(raw)
    curves["loss"] = form.predict(fit.parameters, _in_units(curves, units))
    recommendation, advice = law.recommend(fit, columns(form, samples), points, units, options)
    held_out = _held_out(law, points, options)
    runs = len(np.unique(points["run"]))
    report = {
        "units": {column: {"unit": unit, "scale": units.get(column, 1.0)} for column, unit in law.UNITS.items()}
        | {"asd": {"unit": f"{law.UNITS['loss']} per {units['tokens']:g} tokens", "scale": 1.0}},
        "parameters": _parameters(fit, samples),
        "metrics": metrics(points, predicted),
        "held_out": held_out,
        "points": count(points),
        "runs": runs,
        "recommendation": recommendation,
        "notes": fit.notes
        + law.notes(points)
        + _notes(form, fit, points, runs)
        + _held_out_notes(law, held_out)
        + advice,
        "converged": fit.converged,
        "starts_within_tolerance": len(fit.starts),
    }
    return report, predicted, curves


def _held_out(law: ModuleType, points: Points, options: dict[str, Any]) -> dict[str, dict[str, dict[str, Any]]]:
    """The held-out errors of the law and its rivals in each of the law's tests."""
    report = {}
    for test, hold_out in law.HELD_OUT.items():
        rows = hold_out(points)
        report[test] = {name: held_out_error(form, points, rows, options) for name, form in _forms(law).items()}
    return report


def _in_units(points: Points, units: dict[str, float]) -> Points:
    """The points with each column named in `units` divided by its unit."""
    return points | {name: points[name] / scale for name, scale in units.items()}


def _parameters(fit: Fit, samples: np.ndarray) -> dict[str, dict[str, Any]]:
    """Each parameter's value, 95% bootstrap interval, whether it is identified, and its spread over equal starts."""
    spread = np.ptp(fit.starts, axis=0)
    report = {}
    for place, (name, value) in enumerate(fit.parameters.items()):
        identified = name not in fit.fixed and name not in fit.unidentified
        known = identified and len(samples) > 0
        low, high = percentile_interval(samples[:, place]) if known else (None, None)
        report[name] = {
            "value": value,
            "low": low,
            "high": high,
            "identified": identified,
            "spread": float(spread[place]),
        }
    return report


def _notes(form: Form, fit: Fit, points: Points, runs: int) -> list[str]:
    """Sentences on what the fit cannot say."""
    notes = []
    if fit.unidentified:
        notes.append(
            f"The points do not identify {_listed(fit.unidentified)}: other values fit them equally well, so the "
            "values given are one choice of many."
        )
    at_bound = [
        name
        for name in fit.free
        if name not in fit.unidentified and _at_bound(fit.parameters[name], form.parameters[name].bounds)
    ]
    if at_bound:
        notes.append(f"The best fit lies at the bound of {_listed(at_bound)}.")
    if not fit.converged:
        notes.append("The search ended before the gradient vanished, so the values given are not an optimum.")
    if count(points) <= len(fit.free):
        notes.append(
            f"The fit has {len(fit.free)} free parameters for {count(points)} points, so nothing is left to test it "
            "by, and no interval is given."
        )
    elif runs < FEWEST_RUNS:
        notes.append(
            f"No interval is given: it comes from drawing runs again, which needs at least {FEWEST_RUNS} runs, and "
            f"there {'is' if runs == 1 else 'are'} {runs}."
        )
    return notes


def _at_bound(value: float, bounds: tuple[float, float]) -> bool:
    return bool(np.min(np.abs(np.subtract(bounds, value))) <= 1e-6 * max(1.0, abs(value)))


def _held_out_notes(law: ModuleType, held_out: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Sentences on held-out errors of the law where the points fitted leave a parameter unidentified."""
    name = next(iter(_forms(law)))
    return [
        f"In the held-out test '{test}' the points fitted do not identify {_listed(errors[name]['unidentified'])}, so "
        "the error hangs on where the search started."
        for test, errors in held_out.items()
        if errors[name].get("unidentified")
    ]


def _listed(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:-1]) + " and " + names[-1] if len(names) > 1 else names[0]


def _curves(points: Points, steps: int = 60) -> Points:
    """Token counts evenly spaced by their logarithm over each run's range, with the run's other columns."""
    pieces = []
    for run in np.unique(points["run"]):
        rows = np.flatnonzero(points["run"] == run)
        piece = select(points, np.repeat(rows[:1], steps))
        tokens = points["tokens"][rows]
        pieces.append(piece | {"tokens": np.geomspace(tokens.min(), tokens.max(), steps)})
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in points}


def draw(law_name: str, points: Points, curves: Points, path: Path) -> None:
    """Draws each run's losses (dots) and fitted curve (line) against tokens, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    with mpl.rc_context({"svg.hashsalt": law_name, "svg.fonttype": "none", "font.size": 11}):
        figure = Figure(figsize=(8, 5))
        axes = figure.add_subplot(xlabel="recovery tokens", ylabel="validation loss (nats per token)")
        axes.set_title(f"Law {law_name}: measured (dots) and fitted (lines)")
        runs = np.unique(points["run"])
        colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(runs)))
        for run, color in zip(runs, colors, strict=True):
            measured, fitted = select(points, points["run"] == run), select(curves, curves["run"] == run)
            axes.plot(measured["tokens"], measured["loss"], "o", color=color, markersize=5, label=run)
            axes.plot(fitted["tokens"], fitted["loss"], "-", color=color, linewidth=1.5)
        if len(runs):
            axes.set_xscale("log")
            axes.grid(alpha=0.3)
            axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, frameon=False)
        else:
            axes.text(0.5, 0.5, "no points", ha="center", va="center", transform=axes.transAxes, fontsize=16)
        figure.savefig(path, format="svg", metadata={"Date": None}, bbox_inches="tight")
