"""`coppice fit`: a law fitted to a study's tables, with its uncertainty, its held-out error and its figure."""

from __future__ import annotations

import argparse
import json
import os
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq

from coppice import laws
from coppice.errors import UserError, did_you_mean
from coppice.files import atomic_write
from coppice.formatting import join_words, number
from coppice.laws import Law
from coppice.laws.fit import (
    FEWEST_RUNS,
    Fit,
    Form,
    Objective,
    Points,
    bootstrap,
    columns,
    count,
    fit_form,
    fitted_parameters,
    metrics,
    objective,
    profile,
    select,
)
from coppice.laws.held_out import held_out_test
from coppice.records.fit import FitRecord
from coppice.records.renamed import COLUMNS as RENAMED
from coppice.uncertainty import percentile_interval

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

SUFFIXES = (".parquet", ".jsonl", ".csv")
_PROFILE_STEPS = 41
_MANY_RUNS = 10
_KEYS = {"nodes": ("node",), "metrics": ("node", "evaluation", "metric"), "curves": ("node", "tokens", "split")}
_COUNTED = ("parameters", "tokens")  # units of what is never zero or less
_EXAMPLE = """'{"file": "points.jsonl"}', with the single quotes for the shell"""
_NO_SAMPLES: dict[str, np.ndarray] = {}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--law", required=True, help="the law's name")
    parser.add_argument("--tables", type=Path, help="folder of the study's tables; not needed with the option `file`")
    parser.add_argument("--options", type=_mapping, default={}, help="JSON: the law's options")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="refits at once (default: all CPUs)")
    parser.add_argument("--output", required=True, type=Path, help="folder of the fit")


def _mapping(text: str) -> dict[str, Any]:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is no JSON ({error}); write such as {_EXAMPLE}") from None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"{text!r} maps no options to values; write such as {_EXAMPLE}")
    return options


def run(arguments: argparse.Namespace) -> None:
    fit_law(arguments.law, arguments.tables, arguments.options, arguments.output, arguments.threads)


def fit_law(
    law_name: str, tables: Path | None, options: dict[str, Any], output: Path, threads: int = 1
) -> dict[str, Any]:
    """Fits a law and writes points.parquet, samples.parquet, fit.svg and fit.json, each whole or not at all.

    tables: the folder of the study's tables; None where the option `file` names the points. Returns what fit.json
    holds. Raises UserError for a law, an option, a table or a column that does not exist, and for units that differ.
    """
    law = laws.load(law_name)
    chosen = laws.validated(law_name, options).model_dump()
    found = _from_file(law, chosen) if chosen["file"] else law.points(_tables(law, tables), chosen)
    points, notes = _usable(law, found, chosen)
    settings = chosen | {"threads": threads}
    if count(points) == 0:
        report, predicted, curves, samples = _nothing(law, law_name), np.empty(0), points, _NO_SAMPLES
    elif law.report is not None:
        report, curves, samples = law.report(points, settings), points, _NO_SAMPLES
        predicted = np.asarray(report.pop("predicted", np.full(count(points), np.nan)), float)
    else:
        report, predicted, curves, samples = _fitted(law, law_name, points, settings)
    report = {"law": law_name, "source": law.source, "options": chosen, "units": _units(law, points), **report}
    if law.form is not None:
        report["target"] = law.form.target
    report["notes"] = notes + report["notes"]
    report["passes"] = passes(law_name, report, chosen["tolerance"])
    _write(law, law_name, report, points, predicted, curves, samples, Path(output))
    return report


# Points


def _tables(law: Law, directory: Path | None) -> dict[str, pd.DataFrame]:
    """The columns that the law reads of each table."""
    if directory is None:
        raise UserError("The law reads a study's tables; pass --tables, or name a file of points in its options.")
    return {name: _table(Path(directory) / f"{name}.parquet", needed) for name, needed in law.needs.items()}


def _table(path: Path, needed: tuple[str, ...]) -> pd.DataFrame:
    with _readable(path):
        stored = {RENAMED.get(name, name): name for name in pq.read_schema(path).names}
        missing = [column for column in needed if column not in stored]
        if missing:
            raise UserError(
                f"{path} has no column {missing[0]!r}: it was written by another version; remove it, and make the "
                "tables anew (`snakemake tables`)."
            )
        frame = pd.read_parquet(path, columns=[stored[column] for column in needed]).rename(columns=RENAMED)
        return _distinct(frame.reset_index(drop=True), path)


def _distinct(table: pd.DataFrame, path: Path) -> pd.DataFrame:
    """The table with each row once. Raises UserError where two rows of a key differ."""
    key = [column for column in _KEYS.get(path.stem, ()) if column in table]
    if not key or not (repeated := table.duplicated(key)).any():
        return table
    # Lists, such as the traits of a node, have no hash.
    if table[~table.astype(str).duplicated()].duplicated(key).any():
        name = ", ".join(f"{column} {table.at[repeated.idxmax(), column]}" for column in key)
        raise UserError(
            f"{path} holds two different rows of {name}; remove it, and make the tables anew (`snakemake tables`)."
        )
    return table[~repeated].reset_index(drop=True)


def _from_file(law: Law, options: dict[str, Any]) -> Points:
    """The points of the file that the options name, with the law's columns."""
    path = Path(options["file"])
    readers: dict[str, Callable[[Path], pd.DataFrame]] = {
        ".parquet": pd.read_parquet,
        ".jsonl": lambda path: pd.read_json(path, lines=True),
        ".csv": pd.read_csv,
    }
    if path.suffix not in readers:
        raise UserError(f"{path} must be one of {', '.join(SUFFIXES)}.")
    with _readable(path):
        frame = readers[path.suffix](path)
    points = {}
    for name, kind in law.columns.items():
        column = options["columns"].get(name, name)
        if column not in frame.columns:
            raise UserError(
                f"{path} has no column {column!r}.{did_you_mean(column, list(frame.columns))} The law needs a column "
                f"for {name!r}; name it as {{{name}: <column>}} in the option `columns`."
            )
        try:
            points[name] = frame[column].to_numpy(dtype=kind)
        except (TypeError, ValueError):
            raise UserError(f"The column {column!r} of {path} holds values that are no numbers.") from None
    return points


@contextmanager
def _readable(path: Path) -> Iterator[None]:
    """Turns what readers of files raise into a sentence."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read ({str(error).splitlines()[0]}); make it anew.") from error


def _usable(law: Law, points: Points, options: dict[str, Any]) -> tuple[Points, list[str]]:
    """The points that can be fitted, and sentences on those that were left out."""
    notes = []
    total = count(points)
    numbers = [points[name] for name, kind in law.columns.items() if kind is float]
    finite = np.isfinite(numbers).all(axis=0)
    if not finite.all():
        notes.append(f"{np.sum(~finite)} of {total} points hold a value that is not finite and were left out.")
        points = select(points, finite)
    counted = [points[name] for name, unit in law.units.items() if unit in _COUNTED and name in law.columns]
    above = np.all([column > 0 for column in counted], axis=0) if counted else np.ones(count(points), bool)
    if not above.all():
        notes.append(f"{np.sum(~above)} of {total} points have no parameters or tokens and were left out.")
        points = select(points, above)
    first = ~pd.DataFrame(points).duplicated().to_numpy() if count(points) else np.empty(0, bool)
    if not first.all():
        notes.append(f"{np.sum(~first)} of {total} points repeat another one and were left out.")
        points = select(points, first)
    if law.form is not None and options["residuals"] == "logarithmic":
        positive = points[law.form.target] > 0
        if not positive.all():
            notes.append(f"{np.sum(~positive)} of {total} points have no logarithm and were left out.")
            points = select(points, positive)
    return points, notes


# The fit of a form


def _forms(law: Law, law_name: str, options: dict[str, Any]) -> dict[str, Form]:
    """The law's own form under its name, then its rivals, all with the objective that the options ask for."""
    chosen = Objective(options["residuals"], options["huber"])
    return {name: replace(form, objective=chosen) for name, form in ({law_name: law.form} | law.rivals).items()}


def _fitted(
    law: Law, law_name: str, raw: Points, options: dict[str, Any]
) -> tuple[dict[str, Any], np.ndarray, Points, dict[str, np.ndarray]]:
    """What fit.json says, the predictions [n], the fitted curves to draw, and the bootstrap's parameters."""
    scales = law.scales(raw)
    points = _scaled(raw, scales)
    forms = _forms(law, law_name, options)
    form = forms[law_name]
    fit = fit_form(form, points, options["starts"], options["seed"])
    with _progress(f"{law_name}: refits", options["bootstrap"]) as advance:
        samples, _ = bootstrap(
            form, points, fit, options["bootstrap"], options["seed"], threads=options["threads"], progress=advance
        )
    predicted = form.predict(fit.parameters, points)
    curves = _curves(law, raw)
    curves[form.target] = form.predict(fit.parameters, _scaled(curves, scales))
    held_out, ranking = {}, {}
    for test, hold_out in law.held_out.items():
        held_out[test], ranking[test] = held_out_test(forms, points, hold_out(points), options, law.axis[0], law.base)
    recommendation, advice = law.recommend(fit, columns(form, samples), points, scales, options)
    profiles = {name: _profile(form, points, fit, samples, name) for name in options["profile"] if name in fit.free}
    report = {
        "parameters": fitted_parameters(fit, samples),
        "metrics": metrics(points, predicted, form.target),
        "objective": float(objective(form, fit.parameters, points)),
        "held_out": held_out,
        "ranking": ranking,
        "profiles": profiles,
        "points": count(points),
        "runs": len(np.unique(points["run"])),
        "recommendation": recommendation,
        "notes": [
            *fit.notes,
            *law.notes(points),
            *_notes(form, fit, points),
            *_held_out_notes(law_name, held_out),
            *[f"The law has no parameter {name!r} to profile." for name in options["profile"] if name not in fit.free],
            *advice,
        ],
        "converged": fit.converged,
        "starts_within_tolerance": len(fit.starts),
    }
    drawn = {name: samples[:, place] for place, name in enumerate(form.parameters)}
    return report, predicted, curves, drawn


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], Any]]:
    """A line of progress every ten seconds, for what takes longer than that."""
    from tqdm import tqdm

    with tqdm(desc=what, total=total, delay=10, mininterval=10) as bar:
        yield bar.update


def _scaled(points: Points, scales: dict[str, float]) -> Points:
    """The points with each column named in `scales` divided by its unit."""
    return points | {name: points[name] / scale for name, scale in scales.items()}


def _units(law: Law, points: Points) -> dict[str, dict[str, Any]]:
    """Unit of each column, and the number of it that is 1 in the fit (None where there are no points)."""
    scales = law.scales(points) if count(points) else {}
    scale = 1.0 if count(points) else None
    found = {name: {"unit": unit, "scale": scales.get(name, scale)} for name, unit in law.units.items()}
    if law.form is not None and "tokens" in scales:
        found["asd"] = {"unit": f"{law.units[law.form.target]} per {scales['tokens']:g} tokens", "scale": 1.0}
    return found


def _profile(form: Form, points: Points, fit: Fit, samples: np.ndarray, name: str) -> dict[str, list[float]]:
    """The objective along a parameter, over twice its bootstrap interval, or half to double its value without one."""
    value = fit.parameters[name]
    place = list(fit.parameters).index(name)
    low, high = percentile_interval(samples[:, place]) if len(samples) else (value / 1.5, value * 1.5)
    bounds = form.parameters[name].bounds
    values = np.clip(np.linspace(2 * low - value, 2 * high - value, _PROFILE_STEPS), *bounds)
    return {"values": values.tolist(), "objective": profile(form, points, fit, name, values).tolist()}


def _notes(form: Form, fit: Fit, points: Points) -> list[str]:
    """Sentences on what the fit cannot say."""
    notes = []
    runs = len(np.unique(points["run"]))
    if np.ptp(points[form.target]) == 0:
        notes.append(
            f"All {count(points)} points have the same {form.target}, so there is nothing for the law to explain."
        )
    if fit.unidentified:
        notes.append(
            f"The points do not identify {join_words(fit.unidentified)}: other values fit them equally well, so the "
            "values given are one choice of many."
        )
    if fit.at_bound:
        notes.append(f"The best fit lies at the bound of {join_words(fit.at_bound)}.")
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
    elif runs < _MANY_RUNS:
        notes.append(f"The intervals come from {runs} runs, and from so few they are narrower than they should be.")
    return notes


def _held_out_notes(law_name: str, held_out: dict[str, dict[str, dict[str, Any]]]) -> list[str]:
    """Sentences on held-out errors of the law where the points fitted leave a parameter unidentified."""
    return [
        f"In the held-out test '{test.replace('_', ' ')}' the points fitted do not identify "
        f"{join_words(errors[law_name]['unidentified'])}, so the error hangs on where the search started."
        for test, errors in held_out.items()
        if errors[law_name].get("unidentified")
    ]


def passes(law_name: str, report: dict[str, Any], tolerance: float) -> dict[str, Any]:
    """Whether the law may recommend anything: {"ok", "reasons"}, the sentences that say why not.

    It must have converged on four runs or more, some held-out test must have been possible, and in each that was, its
    error must be below `tolerance` of the value and below that of the naive prediction without any law.
    """
    reasons = [] if report["converged"] else ["The search for its parameters did not converge."]
    if report["runs"] < FEWEST_RUNS:
        reasons.append(
            f"It rests on {report['runs']} runs, and what differs between runs shows in {FEWEST_RUNS} or more."
        )
    errors = {test: forms[law_name] for test, forms in report["held_out"].items() if law_name in forms}
    made = {test: error for test, error in errors.items() if "reason" not in error}
    if not made:
        reasons.append("No held-out test of it could be made.")
    for test, error in made.items():
        name = test.replace("_", " ")
        if not error["relative"] <= tolerance:
            reasons.append(
                f"Its error in the held-out test '{name}' is {error['relative']:.1%} of the value, more than the "
                f"{tolerance:.1%} that its option `tolerance` allows."
            )
        if error.get("naive") is not None and not error["rmse"] < error["naive"]:
            reasons.append(
                f"Its error in the held-out test '{name}', {number(error['rmse'])}, is no less than that of "
                f"a prediction without any law, {number(error['naive'])}."
            )
    return {"ok": not reasons, "reasons": reasons}


def _nothing(law: Law, law_name: str) -> dict[str, Any]:
    """The report where there is no point to fit."""
    numbers = dict.fromkeys(("value", "low", "high", "stderr", "spread"))
    unknown = numbers | {"identified": False, "at_bound": False}
    forms = {} if law.form is None else {law_name: law.form} | law.rivals
    return {
        "parameters": {name: dict(unknown) for name in (law.form.parameters if law.form else ())},
        "metrics": dict.fromkeys(("r2", "huber", "rmse")),
        "objective": None,
        "held_out": {test: {name: {"reason": "There are no points."} for name in forms} for test in law.held_out},
        "ranking": {test: [] for test in law.held_out},
        "profiles": {},
        "points": 0,
        "runs": 0,
        "recommendation": [],
        "notes": [f"There are no points to fit: {law.points_are}"],
        "converged": False,
        "starts_within_tolerance": 0,
    }


# Output


def _write(
    law: Law,
    law_name: str,
    report: dict[str, Any],
    points: Points,
    predicted: np.ndarray,
    curves: Points,
    samples: dict[str, np.ndarray],
    output: Path,
) -> None:
    types = [(name, pa.string() if kind is str else pa.float64()) for name, kind in law.columns.items()]
    chosen = {name: points[name] for name in law.columns}
    table = pa.table(chosen | {"predicted": predicted}, schema=pa.schema([*types, ("predicted", pa.float64())]))
    for name, content in (("points", table), ("samples", pa.table(samples))):
        with atomic_write(output / f"{name}.parquet") as path:
            pq.write_table(content, path)
    with atomic_write(output / "fit.svg") as path:
        draw(law, law_name, points, curves, path)
    # Last, since whoever finds fit.json should find the others beside it.
    FitRecord.model_validate(report).write(output / "fit.json")


def _curves(law: Law, points: Points, steps: int = 60) -> Points:
    """Values of the law's axis evenly spaced by their logarithm over each run's range, with the run's other columns."""
    axis = law.axis[0]
    pieces = []
    for run_name in np.unique(points["run"]):
        rows = np.flatnonzero(points["run"] == run_name)
        piece = select(points, np.repeat(rows[:1], steps))
        low, high = points[axis][rows].min(), points[axis][rows].max()
        spaced = np.geomspace(low, high, steps) if low > 0 else np.linspace(low, high, steps)
        pieces.append(piece | {axis: spaced})
    return {name: np.concatenate([piece[name] for piece in pieces]) for name in points}


def draw(law: Law, law_name: str, points: Points, curves: Points, path: Path) -> None:
    """Draws each run's points (dots) and fitted curve (line) along the law's axis, as SVG."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    target = law.form.target if law.form else next(name for name in law.units if name != law.axis[0])
    axis, label = law.axis
    with mpl.rc_context({"svg.hashsalt": law_name, "svg.fonttype": "none", "font.size": 11}):
        figure = Figure(figsize=(8, 5))
        axes = figure.add_subplot(xlabel=label, ylabel=f"{target.replace('_', ' ')} ({law.units[target]})")
        axes.set_title(f"Law {law_name}: measured (dots) and fitted (lines)")
        runs = np.unique(points["run"])
        colors = mpl.colormaps["viridis"](np.linspace(0, 0.9, len(runs)))
        for run_name, color in zip(runs, colors, strict=True):
            measured, fitted = select(points, points["run"] == run_name), select(curves, curves["run"] == run_name)
            axes.plot(measured[axis], measured[target], "o", color=color, markersize=5, label=run_name)
            axes.plot(fitted[axis], fitted[target], "-", color=color, linewidth=1.5)
        if len(runs):
            if np.min(points[axis]) > 0 and np.max(points[axis]) > 3 * np.min(points[axis]):
                axes.set_xscale("log")
            axes.grid(alpha=0.3)
            if len(runs) <= 24:  # more names than fit beside the figure say nothing
                axes.legend(loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=9, frameon=False)
        else:
            axes.text(0.5, 0.5, "no points", ha="center", va="center", transform=axes.transAxes, fontsize=16)
        figure.savefig(path, format="svg", metadata={"Date": None}, bbox_inches="tight")
