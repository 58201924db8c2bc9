"""What a law is: the record that its file defines as `LAW`, and the checks that a registered one has passed."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NotRequired, TypedDict

import numpy as np

from coppice.laws.engine.forms import Form, Parameters
from coppice.laws.engine.held_out import HeldOutError, HoldOut, Rank
from coppice.laws.engine.inference import Profile
from coppice.laws.engine.points import Columns, Points
from coppice.laws.engine.search import Fit
from coppice.laws.options import LawOptions
from coppice.records.layout import TABLES

if TYPE_CHECKING:
    import pandas as pd

Tables = Mapping[str, "pd.DataFrame"]  # the columns that a law needs of each table, by the table's name
Recommendation = dict[str, Any]  # `sentence`, and the numbers behind it
Advice = tuple[list[Recommendation], list[str]]  # recommendations, and sentences on why none are given
Options = Any  # a law's own type of options: a subclass of LawOptions


class Source(TypedDict):
    """The paper that a law follows."""

    title: str
    arxiv: str
    equation: str


class LawReport(TypedDict):
    """The outcome of a fit, as fit.json has it; with a law's own `report` also `details`, perhaps `predicted`."""

    parameters: Mapping[str, Any]
    metrics: dict[str, float | None]
    objective: NotRequired[float | None]
    held_out: dict[str, dict[str, HeldOutError]]
    ranking: dict[str, list[Rank]]
    profiles: NotRequired[dict[str, Profile]]
    points: int
    runs: int
    recommendation: list[Recommendation]
    notes: list[str]
    converged: bool
    starts_within_tolerance: NotRequired[int]
    details: NotRequired[Mapping[str, object]]
    predicted: NotRequired[np.ndarray]


def _no_scales(points: Points) -> dict[str, float]:
    return {}


def _no_notes(points: Points) -> list[str]:
    return []


def _no_advice(fit: Fit, samples: Parameters, points: Points, scales: dict[str, float], options: Options) -> Advice:
    return [], []


@dataclass(frozen=True, kw_only=True)
class Law:
    """A law, as its file defines it: `LAW = Law(...)`.

    source: title, arxiv, equation; units: of each number among the columns; columns: of the points, with their types,
    `run` (str: what the bootstrap draws) among them. needs: the columns that it reads of each table; points_are: a
    sentence that names the rows of a study that are points; options: its type of options; points(tables, options) finds
    them. axis: the column on the horizontal axis of the figure, and its label. base: the column that holds what the
    target starts from, such as the dense model's loss, where there is one.

    A parametric law has a `form`, and may have rival forms, held-out tests, and scales (column -> the unit that it is
    divided by before the fit). It may have notes on the points (sentences), and recommendations (entries and
    sentences) from (fit, samples [k, 1] of the parameters, points in scaled units, scales, options). A law that is not
    a single formula has `report(points, options)` instead, which gives the content of fit.json.
    """

    source: Source
    units: Mapping[str, str]
    columns: Columns
    needs: Mapping[str, tuple[str, ...]]
    points_are: str
    options: type[LawOptions]
    points: Callable[[Tables, Options], Points]
    axis: tuple[str, str]
    base: str | None = None
    form: Form | None = None
    rivals: Mapping[str, Form] = field(default_factory=dict)
    held_out: Mapping[str, HoldOut] = field(default_factory=dict)
    scales: Callable[[Points], dict[str, float]] = _no_scales
    notes: Callable[[Points], list[str]] = _no_notes
    recommend: Callable[[Fit, Parameters, Points, dict[str, float], Options], Advice] = _no_advice
    report: Callable[[Points, Options], LawReport] | None = None

    def require_form(self) -> Form:
        """The form of a parametric law; TypeError for one that has a `report` of its own."""
        if self.form is None:
            raise TypeError("This law is not a single formula.")
        return self.form

    @property
    def target(self) -> str:
        """The column that is predicted, or else the first number that is not on the axis: what the figure shows."""
        return self.form.target if self.form else next(name for name in self.units if name != self.axis[0])


def find_problems(law: Any) -> Iterator[str]:
    """What is wrong with a law's record, half a sentence each; nothing for a record that can be used."""
    if not isinstance(law, Law):
        yield f"`LAW` is {type(law).__name__}, not a Law of coppice.laws.contracts"
        return
    wrong_types = list(_find_wrong_types(law))
    yield from wrong_types
    if not wrong_types:
        yield from _find_contradictions(law)


def _find_wrong_types(law: Law) -> Iterator[str]:
    if not _maps(law.source, str) or set(law.source) != set(Source.__annotations__):
        yield "`source` does not map title, arxiv and equation to texts"
    if not _maps(law.units, str):
        yield "`units` does not map columns to texts"
    if not isinstance(law.columns, Mapping) or not all(kind in (str, float) for kind in law.columns.values()):
        yield "`columns` does not map columns to `str` or `float`"
    if not _maps(law.needs, tuple) or not all(isinstance(name, str) for names in law.needs.values() for name in names):
        yield "`needs` does not map tables to tuples of their columns"
    if not isinstance(law.points_are, str):
        yield "`points_are` is not a text"
    if not isinstance(law.options, type) or not issubclass(law.options, LawOptions):
        yield "`options` is not a subclass of LawOptions"
    if not isinstance(law.axis, tuple) or [type(part) for part in law.axis] != [str, str]:
        yield "`axis` is not a tuple of a column and its label"
    if not isinstance(law.form, Form | None):
        yield "`form` is not a Form"
    if not _maps(law.rivals, Form):
        yield "`rivals` does not map names to Forms"
    if not isinstance(law.held_out, Mapping) or not all(map(callable, law.held_out.values())):
        yield "`held_out` does not map names to functions"
    if isinstance(law.form, Form):
        yield from _find_wrong_functions(law.form, {"predict": 2, "reduce": 1, "slopes": 2})
    yield from _find_wrong_functions(law, {"points": 2, "scales": 1, "notes": 1, "recommend": 5, "report": 2})


_OPTIONAL = ("slopes", "report")


def _find_wrong_functions(owner: Law | Form, arguments: Mapping[str, int]) -> Iterator[str]:
    for name, count in arguments.items():
        function = getattr(owner, name)
        if function is None and name in _OPTIONAL:
            continue
        if not callable(function):
            yield f"`{name}` is not a function"
            continue
        try:
            inspect.signature(function).bind(*range(count))
        except (TypeError, ValueError):
            yield f"`{name}` does not take the {count} argument{'s' * (count > 1)} that it is called with"


def _find_contradictions(law: Law) -> Iterator[str]:
    if unknown := sorted(set(law.needs) - set(TABLES)):
        yield f"`needs` names {', '.join(unknown)}; the tables are {', '.join(TABLES)}"
    if law.columns.get("run") is not str:
        yield "`columns` has no `run` of type `str`, which the bootstrap draws"
    numbers = {name for name, kind in law.columns.items() if kind is float}
    if law.axis[0] not in numbers:
        yield f"the column of `axis`, {law.axis[0]!r}, is not a number among `columns`"
    if law.base is not None and law.base not in numbers:
        yield f"`base`, {law.base!r}, is not a number among `columns`"
    if (law.form is None) == (law.report is None):
        yield "it must have either a `form` or a `report`"
    if law.form is not None and law.form.target not in numbers & set(law.units):
        yield f"the form's target, {law.form.target!r}, is not a number among `columns` with a unit in `units`"
    if any(option.is_required() for option in law.options.model_fields.values()):
        yield "`options` has an option without a default"


def _maps(value: Any, kind: type) -> bool:
    """Whether a value maps texts to values of a type."""
    return isinstance(value, Mapping) and all(
        isinstance(name, str) and isinstance(each, kind) for name, each in value.items()
    )
