"""`steps`: methods with their options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_serializer, model_validator

from coppice.methods.options import MethodOptions, RecoverOptions
from coppice.methods.registry import method, renamed_options_sentence
from coppice.study.schema import texts
from coppice.study.schema.section import refuse_unknown_keys, unknown_name

if TYPE_CHECKING:
    from coppice.study.schema.study import Study


class Step(BaseModel):
    """A method with its options: written as one mapping, `{method: wanda, sparsity: 0.5}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    method: str = Field(description="Name of a method; `coppice methods` lists them.")
    calibration: str | None = Field(
        default=None,
        description="Name of a calibration, for methods that need one; may be left out when the study has only one.",
    )
    options: SerializeAsAny[MethodOptions]

    @model_validator(mode="before")
    @classmethod
    def _typed_options(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        options = dict(value)
        name, calibration = options.pop("method", None), options.pop("calibration", None)
        if not isinstance(name, str):
            raise ValueError("A step needs the key 'method' with the name of a method.")
        options_class = method(name).options
        if sentence := renamed_options_sentence(options, options_class):
            raise ValueError(sentence)
        refuse_unknown_keys(options, ["calibration", *options_class.model_fields], f"{name} option")
        return {"method": name, "calibration": calibration, "options": options_class.model_validate(options)}

    @model_serializer(mode="plain")
    def _flatten(self) -> dict[str, object]:
        calibration = {} if self.calibration is None else {"calibration": self.calibration}
        return {"method": self.method, **calibration, **self.options.model_dump(mode="json")}


def problems(study: Study) -> Iterator[str]:
    """A sentence for each step whose texts or calibration do not serve."""
    for name, step in study.steps.items():
        if isinstance(step.options, RecoverOptions):
            yield from texts.use_problems(study, f"steps.{name}.text", step.options.text, "recovery")
            yield from texts.use_problems(study, f"steps.{name}.validation", step.options.validation, "validation")
        yield from _calibration_problems(study, f"steps.{name}", step)


def _calibration_problems(study: Study, place: str, step: Step) -> Iterator[str]:
    needs = method(step.method).needs(step.options)
    if step.calibration is not None:
        if step.calibration not in study.calibrations:
            yield unknown_name(f"{place}.calibration", "calibration", step.calibration, study.calibrations)
        elif not needs:
            yield f"{place}.calibration: {step.method} with these options needs no calibration; leave the key out."
    elif needs and len(study.calibrations) != 1:
        known = ", ".join(study.calibrations)
        what = f"name one of the study's: {known}" if known else "describe one under `calibrations`"
        yield f"{place}: {step.method} needs a calibration; {what}."
