"""Fitted laws as `coppice fit` left them: their predictions, their held-out errors, and whether they may be trusted."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from coppice.decisions import Answer, Basis
from coppice.errors import UserError, did_you_mean
from coppice.formatting import join_words
from coppice.laws import registry as laws
from coppice.laws.contracts import Law
from coppice.laws.engine.forms import Parameters
from coppice.laws.engine.points import Points
from coppice.records.fit import FitRecord
from coppice.records.layout import ResultsLayout
from coppice.results.schemas import Row

_OF_RECOVERIES = {"run", "model", "dense_parameters", "rho", "tokens", "dense_loss"}


@dataclass(frozen=True)
class Fitted:
    """A fit as `coppice fit` left it: points [n] in the fit's units, samples [k, 1] of the parameters."""

    name: str
    law: Law
    report: FitRecord
    points: Points
    samples: Parameters

    @property
    def parameters(self) -> dict[str, float]:
        return {name: entry.value for name, entry in self.report.parameters.items() if entry.value is not None}

    @property
    def scales(self) -> dict[str, float]:
        return {name: entry.scale or 1.0 for name, entry in self.report.units.items()}

    @property
    def noise(self) -> float:
        """Deviation of an observation from the law, in the target's unit: rmse sqrt(n / (n - p)).

        p: the number of parameters that are identified.
        """
        points, rmse = self.report.points, self.report.metrics["rmse"]
        if rmse is None:  # of a fit without points
            return float("nan")
        free = sum(entry.identified for entry in self.report.parameters.values())
        return rmse * float(np.sqrt(points / max(points - free, 1)))

    def predict(self, points: Points) -> tuple[np.ndarray, np.ndarray]:
        """The law's values at `points`: [n], and with every sample of the parameters [k, n]."""
        predict = self.law.require_form().predict
        count = len(points["run"])
        drawn = predict(self.samples, points)
        return np.broadcast_to(predict(self.parameters, points), count), np.broadcast_to(drawn, (len(drawn), count))


def read_reports(results: Path) -> dict[str, FitRecord]:
    """fit.json of every law that was fitted, by its name in the study."""
    return {name: FitRecord.read(path) for name, path in ResultsLayout(Path(results)).fits.items()}


def read_fit(results: Path, name: str, report: FitRecord) -> Fitted:
    """A fit with its points and its samples. Raises UserError where they cannot be read."""
    folder = ResultsLayout(Path(results)).law(name)
    law = laws.load(report.law)
    scales = {column: entry.scale or 1.0 for column, entry in report.units.items()}
    raw = _columns(folder / "points.parquet", list(law.columns))
    points = {column: values / scales[column] if column in scales else values for column, values in raw.items()}
    # A fit of no points has no samples either.
    samples = _columns(folder / "samples.parquet", list(report.parameters) if report.points else [])
    return Fitted(name, law, report, points, {parameter: values[:, None] for parameter, values in samples.items()})


def _columns(path: Path, names: list[str]) -> dict[str, np.ndarray]:
    try:
        table = pq.read_table(path, columns=names)
    except (pa.ArrowException, OSError):
        raise UserError(f"{path} cannot be read; fit the law again.") from None
    missing = [name for name in names if name not in table.column_names]
    if missing:
        raise UserError(f"{path} has no column {missing[0]!r}; fit the law again.")
    return {name: np.asarray(table[name].to_pylist()) for name in names}


def refusal(name: str, report: FitRecord) -> str | None:
    """Why nothing may rest on a law: the test that it fails; None where it passes."""
    if report.passes is None:
        return f"Nothing is recommended from law {name}, whose fit records no test; fit it again."
    if report.passes.ok:
        return None
    return f"Nothing is recommended from law {name}, which fails its own test. {' '.join(report.passes.reasons)}"


def held_out_sentences(name: str, report: FitRecord) -> str:
    """A law's held-out errors as sentences."""
    own = {test.replace("_", " "): error for test, error in report.own_errors.items()}
    errors = {test: error for test, error in own.items() if error.reason is None} or own
    if not errors:
        return f"Law {name} has no held-out test."
    return " ".join(
        f"Held-out error of law {name}, {test}: {error.sentence(*report.target_and_unit)}"
        for test, error in errors.items()
    )


def follows_recoveries(report: FitRecord) -> bool:
    """Whether a fit's law follows recoveries of pruned models by size, ratio and tokens."""
    law = laws.load(report.law)
    return law.form is not None and set(law.columns) >= _OF_RECOVERIES


def read_law_of_recoveries(results: Path, name: str | None) -> Fitted:
    """The fitted law of recoveries, by its name where several were fitted. Raises UserError where none was fitted."""
    reports = read_reports(results)
    if name is not None and name not in reports:
        raise UserError(f"--law {name}: no law of that name was fitted.{did_you_mean(name, reports)}")
    candidates = [key for key, report in reports.items() if name in (None, key) and follows_recoveries(report)]
    if not candidates and name is not None:
        raise UserError(f"--law {name}: it is not a law of recoveries (such as p2), which this question needs.")
    if not candidates:
        raise UserError(f"No law of recoveries was fitted in {results}/laws; add p2 to the study's `laws`, and run it.")
    if len(candidates) > 1:
        raise UserError(f"Several laws of recoveries were fitted ({join_words(candidates)}); choose one by --law.")
    return read_fit(results, candidates[0], reports[candidates[0]])


def refusal_answer(fitted: Fitted, title: str) -> Answer | None:
    reason = refusal(fitted.name, fitted.report)
    return None if reason is None else {"title": title, "law": fitted.name, "refused": True, "sentences": [reason]}


def basis_of(fitted: Fitted) -> Basis:
    errors = {test: error.model_dump(exclude_unset=True) for test, error in fitted.report.own_errors.items()}
    return {"law": fitted.name, "refused": False, "held_out": errors}


def starting_points(fitted: Fitted, nodes: Sequence[Row]) -> np.ndarray:
    """The pruned node that each point's recovery started from: [n]; the run itself where the tables do not hold it."""
    parents = {row["node"]: row["parent"] for row in nodes}
    return np.array([parents.get(run) or run for run in fitted.points["run"]], dtype=str)


def points_of(fitted: Fitted, nodes: Sequence[Row], node: str) -> np.ndarray:
    """Indices, by tokens, of the points of a recovery, or of all recoveries of a pruned node.

    Raises UserError where it has none.
    """
    runs, started = fitted.points["run"], starting_points(fitted, nodes)
    rows = np.flatnonzero((runs == node) | (started == node))
    if len(rows):
        return rows[np.argsort(fitted.points["tokens"][rows], kind="stable")]
    known = {row["node"] for row in nodes} | set(runs)
    if node not in known:
        raise UserError(f"There is no node {node!r}.{did_you_mean(node, known)}")
    belong = f"they belong to: {', '.join(sorted(set(started)))}" if len(started) else "it has none"
    raise UserError(f"No recovery of {node!r} is among the points of law {fitted.name}; {belong}.")
