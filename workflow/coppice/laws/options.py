"""Options that every law has."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field

from coppice.laws.engine.forms import Objective
from coppice.laws.engine.search import Effort

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
    """The options that every law has."""

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
        description="A file of points (.parquet, .jsonl or .csv) instead of the study's tables, relative to the "
        "working directory.",
    )
    columns: dict[str, str] = Field(
        default={}, description="Column of the points -> column of `file`, where their names differ."
    )

    def effort(self, threads: int = 1) -> Effort:
        """The starts and resamples of the law's fits."""
        return Effort(self.starts, self.bootstrap, self.seed, threads)

    def objective(self) -> Objective:
        """What the law's fit minimises."""
        return Objective(self.residuals, self.huber)
