"""`models`: dense models, each from one of three sources."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field, Tag, model_validator

from coppice.files import read_json_object
from coppice.models.architectures.base import model_types
from coppice.models.sources import SHIPPED
from coppice.study.schema.section import PINNED, Section, discriminate_by_key, unknown_name

if TYPE_CHECKING:
    from coppice.study.schema.study import Study

MODEL_TYPES = model_types()


class ShippedModel(Section):
    """A small pretrained model that comes with Coppice."""

    shipped: str = Field(description="Name of a folder of resources/models.")


class LocalModel(Section):
    """A folder in Hugging Face format: config.json, safetensors, tokenizer."""

    path: str = Field(description="The folder, relative to the working directory.")


class HubModel(Section):
    """A model of the Hugging Face hub, pinned to a revision."""

    hub: str = Field(description="Name on the hub, as in `organisation/name`.", min_length=1)
    revision: str = Field(description="Commit of the model's repository: 40 hexadecimal digits.")

    @model_validator(mode="after")
    def _pinned(self) -> HubModel:
        if not re.fullmatch(PINNED, self.revision):
            raise ValueError(
                f"revision is {self.revision!r}; write the commit's 40 hexadecimal digits, so that the model is "
                "the same next year."
            )
        return self


Model = Annotated[
    Annotated[ShippedModel, Tag("<shipped>")]
    | Annotated[LocalModel, Tag("<path>")]
    | Annotated[HubModel, Tag("<hub>")],
    discriminate_by_key("model", "shipped", "path", "hub"),
]


def problems(study: Study) -> Iterator[str]:
    """A sentence for each model that is missing or of an unsupported architecture."""
    for name, model in study.models.items():
        if isinstance(model, ShippedModel):
            shipped = sorted(path.parent.name for path in SHIPPED.glob("*/config.json"))
            if model.shipped not in shipped:
                yield unknown_name(f"models.{name}.shipped", "shipped model", model.shipped, shipped)
        elif isinstance(model, LocalModel):
            yield from _folder_problems(f"models.{name}.path", Path(model.path))


def _folder_problems(place: str, path: Path) -> Iterator[str]:
    if not (path / "config.json").is_file():
        yield f"{place}: {path} is not a model folder: it has no config.json (looked in {Path.cwd()})."
        return
    model_type = read_json_object(path / "config.json").get("model_type")
    if model_type not in MODEL_TYPES:
        yield f"{place}: {path} is a model of type {model_type!r}; supported are {', '.join(MODEL_TYPES)}."
