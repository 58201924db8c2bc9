"""`coppice fit`: a law fitted to a study's tables, with its uncertainty, its held-out error and its figure."""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NotRequired, TypedDict

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import JsonValue

from coppice.files import atomic_write
from coppice.formatting import join_words, number
from coppice.laws import registry
from coppice.laws.contracts import Law, LawReport, Source
from coppice.laws.engine.forms import parameter_columns
from coppice.laws.engine.held_out import HeldOutError, Rank, held_out_test
from coppice.laws.engine.inference import (
    FEWEST_RUNS,
    ParameterReport,
    bootstrap,
    report_parameters,
    report_profile,
)
from coppice.laws.engine.metrics import metrics
from coppice.laws.engine.points import Points, count
from coppice.laws.engine.search import Fit, fit_form
from coppice.laws.figure import draw, spread_along_axis
from coppice.laws.options import LawOptions
from coppice.laws.points.reading import read_points
from coppice.records.base import Json
from coppice.records.fit import FitRecord

_MANY_RUNS = 10
_EXAMPLE = """'{"file": "points.jsonl"}', with the single quotes for the shell"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--law", required=True, help="the law's name")
    parser.add_argument("--tables", type=Path, help="folder of the study's tables; not needed with the option `file`")
    parser.add_argument("--options", type=_mapping, default={}, help="JSON: the law's options")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="refits at once (default: all CPUs)")
    parser.add_argument("--output", required=True, type=Path, help="folder of the fit")


def _mapping(text: str) -> Json:
    try:
        options = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not JSON ({error}); write such as {_EXAMPLE}") from None
    if not isinstance(options, dict):
        raise argparse.ArgumentTypeError(f"{text!r} does not map options to values; write such as {_EXAMPLE}")
    return options


def run(arguments: argparse.Namespace) -> None:
    fit_law(arguments.law, arguments.tables, arguments.options, arguments.output, arguments.threads)


class Judgement(TypedDict):
    """Whether a law may recommend anything, and the reasons why not, as sentences."""

    ok: bool
    reasons: list[str]


class Unit(TypedDict):
    """Unit of a column, and the number of it that is 1 in the fit (None where there are no points)."""

    unit: str
    scale: float | None


class FitReport(LawReport):
    """The content of fit.json. target: of a law with a form."""

    law: str
    source: Source
    options: Json
    units: dict[str, Unit]
    target: NotRequired[str]
    passes: NotRequired[Judgement]


@dataclass(frozen=True)
class _Outcome:
    """The outcome of a fit: the report, the predictions for the points [n], curves to draw, the bootstrap's samples."""

    report: LawReport
    predicted: np.ndarray
    curves: Points
    samples: dict[str, np.ndarray] = field(default_factory=dict)


def fit_law(
    law_name: str, tables: Path | None, options: Mapping[str, JsonValue], output: Path, threads: int = 1
) -> FitReport:
    """Fits a law and writes points.parquet, samples.parquet, fit.svg and fit.json, each whole or not at all.

    tables: the folder of the study's tables; None where the option `file` names the points. Returns the content of
    fit.json. Raises UserError for a law, an option, a table or a column that does not exist, and for units that differ.
    """
    law = registry.load(law_name)
    law_options = registry.validate_options(law_name, options)
    points, notes = read_points(law, tables, law_options)
    if count(points) == 0:
        outcome = _report_nothing(law, law_name, points)
    elif law.report is not None:
        outcome = _report_by_itself(law.report(points, law_options), points)
    else:
        outcome = _fit(law, law_name, points, law_options, threads)
    report: FitReport = {
        "law": law_name,
        "source": law.source,
        "options": law_options.model_dump(),
        "units": _units(law, points),
        **outcome.report,
        "notes": notes + outcome.report["notes"],
    }
    if law.form is not None:
        report["target"] = law.form.target
    report["passes"] = judge(law_name, outcome.report, law_options.tolerance)
    _write(law, law_name, report, points, outcome, Path(output))
    return report


# The fit


def _report_by_itself(report: LawReport, points: Points) -> _Outcome:
    """The outcome of a law that has a `report` of its own."""
    predicted = np.asarray(report.pop("predicted", np.full(count(points), np.nan)), float)
    return _Outcome(report, predicted, points)


def _fit(law: Law, law_name: str, raw: Points, options: LawOptions, threads: int) -> _Outcome:
    """The outcome of a law with a form: its fit, with its rivals in every held-out test."""
    scales = law.scales(raw)
    points = _divide(raw, scales)
    objective, effort = options.objective(), options.effort(threads)
    forms = {
        name: replace(form, objective=objective) for name, form in {law_name: law.require_form(), **law.rivals}.items()
    }
    form = forms[law_name]
    fit = fit_form(form, points, effort.starts, effort.seed)
    with _progress(f"{law_name}: refits", effort.bootstrap) as advance:
        samples, _ = bootstrap(fit, effort.bootstrap, effort.seed, threads, advance)
    drawn = parameter_columns(form, samples)
    predicted = fit.predict(points)
    curves = spread_along_axis(law, raw)
    curves[form.target] = fit.predict(_divide(curves, scales))
    held_out: dict[str, dict[str, HeldOutError]] = {}
    ranking: dict[str, list[Rank]] = {}
    for test, hold_out in law.held_out.items():
        held_out[test], ranking[test] = held_out_test(forms, points, hold_out(points), effort, law.axis[0], law.base)
    recommendation, advice = law.recommend(fit, drawn, points, scales, options)
    report: LawReport = {
        "parameters": report_parameters(fit, samples),
        "metrics": metrics(points, predicted, form.target),
        "objective": fit.objective,
        "held_out": held_out,
        "ranking": ranking,
        "profiles": {name: report_profile(fit, samples, name) for name in options.profile if name in fit.free},
        "points": count(points),
        "runs": len(np.unique(points["run"])),
        "recommendation": recommendation,
        "notes": [
            *fit.notes,
            *law.notes(points),
            *_fit_notes(fit),
            *_held_out_notes(law_name, held_out),
            *[f"The law has no parameter {name!r} to profile." for name in options.profile if name not in fit.free],
            *advice,
        ],
        "converged": fit.converged,
        "starts_within_tolerance": len(fit.starts),
    }
    return _Outcome(report, predicted, curves, {name: column[:, 0] for name, column in drawn.items()})


@contextmanager
def _progress(what: str, total: int) -> Iterator[Callable[[int], object]]:
    """A line of progress every ten seconds, for what takes longer than that."""
    from tqdm import tqdm

    with tqdm(desc=what, total=total, delay=10, mininterval=10) as bar:
        yield bar.update


def _divide(points: Points, scales: Mapping[str, float]) -> Points:
    """The points with each column named in `scales` divided by its unit."""
    return points | {name: points[name] / scale for name, scale in scales.items()}


def _units(law: Law, points: Points) -> dict[str, Unit]:
    scales = law.scales(points) if count(points) else {}
    scale = 1.0 if count(points) else None
    units: dict[str, Unit] = {
        name: {"unit": unit, "scale": scales.get(name, scale)} for name, unit in law.units.items()
    }
    if law.form is not None and "tokens" in scales:
        units["asd"] = {"unit": f"{law.units[law.form.target]} per {scales['tokens']:g} tokens", "scale": 1.0}
    return units


# Sentences


def _fit_notes(fit: Fit) -> list[str]:
    """Sentences on what the fit leaves open."""
    notes = []
    points, target = fit.problem.points, fit.problem.form.target
    runs = len(np.unique(points["run"]))
    if np.ptp(points[target]) == 0:
        notes.append(f"All {count(points)} points have the same {target}, so the law has nothing to explain.")
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
            f"No interval is given: it comes from resampling runs, which needs at least {FEWEST_RUNS} runs, and "
            f"the points have {runs}."
        )
    elif runs < _MANY_RUNS:
        notes.append(f"The intervals come from {runs} runs, and from so few they are narrower than they should be.")
    return notes


def _held_out_notes(law_name: str, held_out: dict[str, dict[str, HeldOutError]]) -> list[str]:
    """Sentences on held-out errors of the law where the points fitted leave a parameter unidentified."""
    return [
        f"In the held-out test '{test.replace('_', ' ')}' the points fitted do not identify "
        f"{join_words(errors[law_name]['unidentified'])}, so the error depends on where the search started."
        for test, errors in held_out.items()
        if errors[law_name].get("unidentified")
    ]


def judge(law_name: str, report: LawReport, tolerance: float) -> Judgement:
    """Whether the law may recommend anything.

    It must have converged on four runs or more, some held-out test must have been possible, and in each that was, its
    error must be below `tolerance` of the value and below that of the naive prediction without any law.
    """
    reasons = [] if report["converged"] else ["The search for its parameters did not converge."]
    if report["runs"] < FEWEST_RUNS:
        reasons.append(
            f"It rests on {report['runs']} runs, and what differs between runs shows in {FEWEST_RUNS} or more."
        )
    errors = {test: forms[law_name] for test, forms in report["held_out"].items() if law_name in forms}
    tested = {test: error for test, error in errors.items() if "reason" not in error}
    if not tested:
        reasons.append("No held-out test of it was possible.")
    for test, error in tested.items():
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


def _report_nothing(law: Law, law_name: str, points: Points) -> _Outcome:
    """The outcome of a fit without points."""
    unknown: ParameterReport = {
        "value": None,
        "low": None,
        "high": None,
        "stderr": None,
        "identified": False,
        "spread": None,
        "at_bound": False,
    }
    forms = () if law.form is None else (law_name, *law.rivals)
    report: LawReport = {
        "parameters": dict.fromkeys(law.form.parameters if law.form else (), unknown),
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
    return _Outcome(report, np.empty(0), points)


# Output


def _write(law: Law, law_name: str, report: FitReport, points: Points, outcome: _Outcome, output: Path) -> None:
    types = [(name, pa.string() if kind is str else pa.float64()) for name, kind in law.columns.items()]
    columns = {name: points[name] for name in law.columns} | {"predicted": outcome.predicted}
    table = pa.table(columns, schema=pa.schema([*types, ("predicted", pa.float64())]))
    for name, content in (("points", table), ("samples", pa.table(outcome.samples))):
        with atomic_write(output / f"{name}.parquet") as path:
            pq.write_table(content, path)
    with atomic_write(output / "fit.svg") as path:
        draw(law, law_name, points, outcome.curves, path)
    # Last, so that the other files exist wherever fit.json does.
    FitRecord.model_validate(report).write(output / "fit.json")
