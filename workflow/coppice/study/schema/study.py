"""The study: all sections of the config as one type."""

from __future__ import annotations

from typing import Annotated

from pydantic import BeforeValidator, Field, NonNegativeInt, PositiveInt

from coppice.study.schema.calibrations import Calibration
from coppice.study.schema.evaluations import Evaluation
from coppice.study.schema.laws import Law
from coppice.study.schema.models import Model
from coppice.study.schema.recipes import Recipe, expand_short_form
from coppice.study.schema.roofline import Roofline
from coppice.study.schema.section import Section
from coppice.study.schema.steps import Step
from coppice.study.schema.texts import Text
from coppice.study.schema.tracking import Tracking


class Study(Section):
    """Everything that a study consists of: models, texts, steps, recipes, evaluations, laws and tracking."""

    study: str = Field(description="The study's name; results go to results/<study>.")
    seed: NonNegativeInt = Field(default=0, description="Seed of everything random.")
    models: dict[str, Model] = Field(description="Dense models by name.", min_length=1)
    texts: dict[str, Text] = Field(default={}, description="Texts by name. A source appears once.")
    budgets: list[PositiveInt] = Field(
        default=[],
        description="Ladder of tokens: recovery reports the held-out loss at each budget that is within its tokens.",
    )
    calibrations: dict[str, Calibration] = Field(default={}, description="Calibrations by name.")
    steps: dict[str, Step] = Field(default={}, description="Steps by name.")
    recipes: list[Annotated[Recipe, BeforeValidator(expand_short_form)]] = Field(
        default=[], description="What is done to the models, each an ordered list of steps."
    )
    evaluations: dict[str, Evaluation] = Field(default={}, description="Evaluations by name.")
    laws: dict[str, Law] = Field(default={}, description="Laws by name.")
    roofline: Roofline | None = Field(
        default=Roofline(), description="Lower bounds of times on devices, for every node; null: none."
    )
    tracking: Tracking = Field(default=Tracking(), description="Where results are mirrored to.")
