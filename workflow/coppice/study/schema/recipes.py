"""`recipes`: which steps are applied to which models, in order."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from pydantic import Field, NonNegativeInt, SerializerFunctionWrapHandler, model_serializer, model_validator

from coppice.study.schema.section import Section, unknown_name

if TYPE_CHECKING:
    from coppice.study.schema.study import Study


class Recipe(Section):
    """Steps in order; or lists of steps whose product is taken. A plain list is short for `{steps: [...]}`."""

    models: list[str] | None = Field(default=None, description="Names of the models to run on; left out: on every one.")
    steps: list[str | None] | None = Field(default=None, description="Names of steps, in order.")
    product: list[list[str | None]] | None = Field(
        default=None,
        description="Lists of names of steps: one recipe for each way to take one of each; null leaves the place out.",
    )
    seeds: list[NonNegativeInt] | None = Field(
        default=None,
        description="Seeds to train with, from the first step that recovers on; left out: the study's seed.",
        min_length=1,
    )

    @model_validator(mode="after")
    def _one_form(self) -> Recipe:
        if (self.steps is None) == (self.product is None):
            raise ValueError("A recipe needs exactly one of the keys steps and product.")
        return self

    @model_serializer(mode="wrap")
    def _without_nulls(self, serialize: SerializerFunctionWrapHandler) -> dict[str, object]:
        return {key: value for key, value in serialize(self).items() if value is not None}


def expand_short_form(value: Any) -> Any:
    """A plain list of steps as the mapping that it is short for."""
    return {"steps": value} if isinstance(value, list) else value


def problems(study: Study) -> Iterator[str]:
    """A sentence for each model and step that a recipe names and that does not exist."""
    for i, recipe in enumerate(study.recipes):
        for model in recipe.models or ():
            if model not in study.models:
                yield unknown_name(f"recipes.{i}.models", "model", model, study.models)
        lists = [recipe.steps] if recipe.steps is not None else recipe.product or []
        for step in dict.fromkeys(name for names in lists for name in names if name is not None):
            if step in study.models:
                yield (
                    f"recipes.{i}: {step!r} is a model; a recipe lists steps, and its key `models` the models that it "
                    "runs on."
                )
            elif step not in study.steps:
                yield unknown_name(f"recipes.{i}", "step", step, study.steps)
