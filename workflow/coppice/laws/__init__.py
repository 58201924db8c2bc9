"""Laws: one file a law, found by name.

`fit` is the engine, `held_out` its tests; `quality` and `recoveries` find points in the tables; `stage` is the command.
"""

from __future__ import annotations

import pkgutil
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from coppice.errors import UserError, did_you_mean

if TYPE_CHECKING:
    import pandas as pd

    from coppice.laws.fit import Fit, Form, Parameters, Points
    from coppice.laws.held_out import HoldOut

_OTHERS = ("fit", "held_out", "quality", "recoveries", "stage")


Residuals = Annotated[
    Literal["absolute", "logarithmic"],
    Field(description="What a residual is: the predicted less the measured value, or the same of their logarithms."),
]
Huber = Annotated[
    float | None,
    Field(
        gt=0,
        description="Residuals larger than this count by their size and no longer by their square (Huber's loss), so "
        "that outliers pull less; null: least squares.",
    ),
]


class LawOptions(BaseModel):
    """Options that every law has."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    starts: int = Field(default=32, ge=1, description="How many points the search begins from; it ends at the best.")
    bootstrap: int = Field(default=200, ge=0, description="How many resamples of the runs the intervals come from.")
    seed: int = Field(default=0, ge=0, description="Seed of the starts and of the resamples.")
    residuals: Residuals = "absolute"
    huber: Huber = None
    profile: list[str] = Field(
        default=[], description="Parameters whose profile is computed: the best objective at each of their values."
    )
    tolerance: float = Field(
        default=0.1,
        gt=0,
        description="The largest held-out error, as a part of the value, with which the law still recommends anything: "
        "0.1 is 10%.",
    )
    file: str | None = Field(
        default=None,
        description="A file of points (.parquet, .jsonl or .csv) in the place of the study's tables, relative to the "
        "working directory.",
    )
    columns: dict[str, str] = Field(
        default={}, description="Column of the points -> column of `file`, where their names differ."
    )


def _no_scales(points: Points) -> dict[str, float]:
    return {}


def _no_notes(points: Points) -> list[str]:
    return []


def _no_advice(
    fit: Fit, samples: Parameters, points: Points, scales: dict[str, float], options: dict[str, Any]
) -> tuple[list[dict[str, Any]], list[str]]:
    return [], []


@dataclass(frozen=True)
class Law:
    """What a law's file says of itself: `LAW`.

    source: title, arxiv, equation; units: of each number among the columns; columns: of the points, with their types,
    `run` (str: what is drawn again by the bootstrap) among them; needs: the columns that it reads of each table;
    points_are: a sentence that says which rows of a study are points; options: its type of options;
    points(tables, options) finds them. axis: the column on the horizontal axis of the figure, and its label.
    base: the column that holds what the target starts from, such as the dense model's loss, where there is one.

    A parametric law has a `form`, and may have rival forms, held-out tests, scales (column -> the unit that it is
    divided by before the fit), notes on the points (sentences), and recommendations (entries and sentences) from
    (fit, samples [k, 1] of the parameters, points in scaled units, scales, options). A law that no single formula
    says has `report(points, options)`, which gives what fit.json says, in its place.
    """

    source: dict[str, str]
    units: dict[str, str]
    columns: dict[str, type]
    needs: dict[str, tuple[str, ...]]
    points_are: str
    options: type[LawOptions]
    points: Callable[[dict[str, pd.DataFrame], dict[str, Any]], Points]
    axis: tuple[str, str]
    base: str | None = None
    form: Form | None = None
    rivals: dict[str, Form] = field(default_factory=dict)
    held_out: dict[str, HoldOut] = field(default_factory=dict)
    scales: Callable[[Points], dict[str, float]] = _no_scales
    notes: Callable[[Points], list[str]] = _no_notes
    recommend: Callable[..., tuple[list[dict[str, Any]], list[str]]] = _no_advice
    report: Callable[[Points, dict[str, Any]], dict[str, Any]] | None = None


def names() -> tuple[str, ...]:
    """Names of the laws in this package, in alphabetical order."""
    found = (module.name.replace("_", "-") for module in pkgutil.iter_modules(__path__) if module.name not in _OTHERS)
    return tuple(sorted(found))


def load(name: str) -> Law:
    """The law of that name. Raises UserError where there is none."""
    if name not in names():
        raise UserError(f"There is no law named '{name}'.{did_you_mean(name, names())}")
    return import_module(f"{__name__}.{name.replace('-', '_')}").LAW


def validated(name: str, options: Mapping[str, Any]) -> LawOptions:
    """A law's options, checked. Raises UserError with every problem in one sentence."""
    known = load(name).options
    unknown = [
        f"there is no option {key!r}.{did_you_mean(key, known.model_fields)}"
        for key in options
        if key not in known.model_fields
    ]
    if unknown:
        raise UserError(f"Law {name!r}: {' '.join(unknown)}")
    try:
        return known.model_validate(options)
    except ValidationError as error:
        found = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors()]
        raise UserError(f"The options of law {name!r} are not valid: {'; '.join(found)}.") from None


def source_files(name: str) -> list[Path]:
    """The files of the law and of the engine."""
    folder = Path(__file__).parent
    files, waiting = {folder / "__init__.py"}, {name.replace("-", "_"), "stage"}
    while waiting:
        file = folder / f"{waiting.pop()}.py"
        if file.is_file() and file not in files:
            files.add(file)
            text = file.read_text(encoding="utf-8")
            packages = re.findall(r"^\s*from coppice\.laws import (.+)$", text, re.MULTILINE)
            modules = re.findall(r"^\s*from coppice\.laws\.(\w+) import", text, re.MULTILINE)
            waiting |= {name for names in packages for name in re.findall(r"\w+", names)} | set(modules)
    return sorted(files)
