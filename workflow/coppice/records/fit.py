"""A fitted law: `fit.json`."""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

from coppice.formatting import number, target_of
from coppice.records.base import Column, Json, Part, Record

Number = int | float


class Unit(Part):
    """The unit of a column of the points."""

    unit: Annotated[str, Column("Name of the unit.")]
    scale: Annotated[Number | None, Column("What the column was divided by for the fit; null without points.")]


class Parameter(Part):
    """A fitted parameter."""

    model_config = ConfigDict(extra="allow")

    value: Annotated[Number | None, Column("Its value; null without points.")]
    low: Annotated[Number | None, Column("Lower end of its 95% interval; null if it has none.")]
    high: Annotated[Number | None, Column("Upper end of that interval.")]
    stderr: Annotated[Number | None, Column("Its standard error over resamples of the runs.")] = None
    identified: Annotated[
        bool, Column("Whether the points identify it; a value that they do not is one choice of many.")
    ]
    spread: Annotated[Number | None, Column("Its range over equally good starts of the search.")] = None
    at_bound: Annotated[bool, Column("Whether it is the last value that the search allows.")] = False


class HeldOut(Part):
    """The error of one form in one held-out test, or the `reason` why the test could not be run."""

    model_config = ConfigDict(extra="allow")

    rmse: Annotated[Number | None, Column("Root mean square error, in the unit of the target.")] = None
    relative: Annotated[Number | None, Column("Sum of absolute errors by the sum of absolute values.")] = None
    low: Annotated[Number | None, Column("Lower end of the 95% interval of rmse; null if it has none.")] = None
    high: Annotated[Number | None, Column("Upper end of that interval.")] = None
    naive: Annotated[Number | None, Column("The rmse of a prediction without any law.")] = None
    unidentified: Annotated[list[str], Column("Parameters that the points fitted do not identify.")] = Field(
        default_factory=list
    )
    reason: Annotated[str | None, Column("Why it has no error.")] = None

    def sentence(self, target: str, unit: str) -> str:
        """The error, or why it is missing; target, unit: of what the law predicts."""
        if self.reason is not None:
            return self.reason
        interval = "" if self.low is None else f" [{number(self.low)}, {number(self.high)}]"
        return f"rmse {number(self.rmse)}{interval}{f' {unit}' if unit else ''}, {self.relative:.2%} of the {target}."


class Rank(Part):
    """The place of one form in a held-out test."""

    form: Annotated[str, Column("Name of the form.")]
    rmse: Annotated[Number, Column("Its root mean square error.")]
    behind: Annotated[Number, Column("How much higher it is than that of the best form.")]
    low: Annotated[Number | None, Column("Lower end of the 95% interval of that difference.")]
    high: Annotated[Number | None, Column("Upper end of that interval.")]
    first: Annotated[Number | None, Column("Part of the resamples in which it is the lowest.")]


class Passes(Part):
    """Whether the law passes its own tests, so that decisions may rest on it."""

    ok: Annotated[bool, Column("Whether it converged and its held-out errors are small enough.")]
    reasons: Annotated[list[str], Column("Sentences with the reasons why not.")]


class FitRecord(Record):
    """`fit.json` of a law."""

    law: Annotated[str, Column("Name of the law.")]
    source: Annotated[dict[str, str], Column("Title, arXiv number and equation of the paper.")]
    options: Annotated[Json, Column("All options of the law.")]
    units: Annotated[dict[str, Unit], Column("Units of the columns of the points.")]
    parameters: Annotated[dict[str, Parameter], Column("The fitted parameters.")]
    metrics: Annotated[dict[str, Number | None], Column("Quality of the fit on the points fitted: r2, rmse, ...")]
    objective: Annotated[Number | None, Column("The objective at the optimum; absent for a law of several fits.")] = (
        None
    )
    held_out: Annotated[dict[str, dict[str, HeldOut]], Column("Errors by held-out test and form.")]
    ranking: Annotated[dict[str, list[Rank]], Column("By held-out test the forms, from the lowest error.")]
    profiles: Annotated[
        dict[str, dict[str, list[Number | None]]], Column("The objective along parameters, where that was requested.")
    ] = Field(default_factory=dict)
    points: Annotated[int, Column("Number of points fitted.")]
    runs: Annotated[int, Column("Number of runs that they are of.")]
    recommendation: Annotated[list[Json], Column("What the law recommends; each with a `sentence`.")]
    notes: Annotated[list[str], Column("What the fit cannot determine.")]
    converged: Annotated[bool, Column("Whether the search converged.")]
    starts_within_tolerance: Annotated[int, Column("Number of equally good starts of the search.")] = 0
    target: Annotated[str | None, Column("Column that the law predicts; absent for a law without a formula.")] = None
    details: Annotated[Json, Column("What else a law reports, such as a density of each node.")] = Field(
        default_factory=dict
    )
    passes: Annotated[Passes | None, Column("The law's own tests; absent in files of early versions.")] = None

    @model_validator(mode="after")
    def _is_consistent(self) -> Self:
        """Raises ValueError, which says what the file lacks, where its parts do not fit each other."""
        problems = [
            *(f"lacks 'source.{key}'" for key in ("title", "equation") if key not in self.source),
            *(f"lacks 'held_out.{test}.{self.law}'" for test, forms in self.held_out.items() if self.law not in forms),
            *(
                f"lacks 'parameters.{name}', of which it has a profile"
                for name in self.profiles.keys() - self.parameters
            ),
        ]
        if self.target is not None and self.target not in self.units:
            problems.append(f"lacks 'units.{self.target}'")
        if self.objective is not None:
            problems += [f"lacks 'options.{key}'" for key in ("huber", "residuals") if key not in self.options]
        if problems:
            raise ValueError(problems[0])
        return self

    def to_json(self) -> Json:
        """What the file holds. It has borne no format_version so far; the key comes with its second format."""
        return self.model_dump(mode="json", exclude_unset=True)

    @property
    def target_and_unit(self) -> tuple[str, str]:
        """What the law predicts, and its unit; see `formatting.target_of`."""
        return target_of(self.to_json())

    @property
    def own_errors(self) -> dict[str, HeldOut]:
        """The law's own error in each held-out test."""
        return {test: errors[self.law] for test, errors in self.held_out.items()}
