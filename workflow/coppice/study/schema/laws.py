"""`laws`: formulas that are fitted to the tables, with their options."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ConfigDict, Field, SerializeAsAny, model_serializer, model_validator

from coppice.laws import registry as laws
from coppice.laws.options import LawOptions
from coppice.study.schema.section import refuse_unknown_keys

if TYPE_CHECKING:
    from coppice.study.schema.study import Study


class Law(BaseModel):
    """A law with its options: written as one mapping, `{law: p2, method: full}`."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    law: str = Field(description="Name of a law.")
    options: SerializeAsAny[LawOptions]

    @model_validator(mode="before")
    @classmethod
    def _typed_options(cls, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        options = dict(value)
        name = options.pop("law", None)
        if not isinstance(name, str):
            raise ValueError("A law needs the key 'law' with the name of a law.")
        options_class = laws.load(name).options
        if "options" in options:
            raise ValueError(
                "the key `options` is no longer nested; write the law's options next to `law`, as in "
                f"`{{law: {name}, bootstrap: 200}}`."
            )
        refuse_unknown_keys(options, options_class.model_fields, f"{name} option")
        return {"law": name, "options": options_class.model_validate(options)}

    @model_serializer(mode="plain")
    def _flatten(self) -> dict[str, object]:
        return {"law": self.law, **self.options.model_dump(mode="json")}


def problems(study: Study) -> Iterator[str]:
    """A sentence for each file of points that is missing."""
    for name, law in study.laws.items():
        file = law.options.file
        if file is not None and not Path(file).is_file():
            yield f"laws.{name}.file: {file} does not exist (looked in {Path.cwd()})."
