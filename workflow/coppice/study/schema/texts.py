"""`texts`: what models are calibrated, trained and measured on, each from one of three sources."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt, Tag, model_validator

from coppice.data.biographies import World
from coppice.data.sources import SUFFIXES, Unit
from coppice.data.splits import ROLES, Role
from coppice.study.schema.section import PINNED, Section, discriminate_by_key, unknown_name

if TYPE_CHECKING:
    from coppice.study.schema.study import Study

Share = Annotated[float, Field(gt=0, le=1)]
Documents = Annotated[
    PositiveInt | None, Field(description="Read only the first documents, this many; null: read all.")
]


class SplitText(Section):
    """A text whose parts for the roles are cut from its documents."""

    splits: dict[Role, Share] = Field(
        default={"calibration": 0.1, "recovery": 0.7, "validation": 0.1, "evaluation": 0.1},
        description=f"Disjoint parts of the text by role ({', '.join(ROLES)}), as shares of its documents, cut in this "
        "order. A document that repeats an earlier one is left out.",
    )

    @model_validator(mode="after")
    def _shares(self) -> SplitText:
        total = sum(self.splits.values())
        if total > 1 + 1e-9:
            raise ValueError(f"The shares in splits sum to {total:g}; they may sum to 1 at most.")
        return self


class BuiltinText(Section):
    """The built-in world of synthetic biographies; its parts for the roles are disjoint by construction."""

    builtin: Literal["biographies"] = Field(description="The built-in world: `biographies`.")
    people: PositiveInt = Field(default=1200, description="Number of people.")
    seed: NonNegativeInt = Field(default=0, description="Seed that the world is drawn from.")
    first_names: PositiveInt = Field(default=64, description="Number of first names to draw from.")
    middle_names: PositiveInt = Field(default=64, description="Number of middle names.")
    last_names: PositiveInt = Field(default=128, description="Number of last names.")
    months: PositiveInt = Field(default=12, description="Number of months of birth.")
    days: PositiveInt = Field(default=28, description="Number of days of birth.")
    years: PositiveInt = Field(default=64, description="Number of years of birth.")
    cities: PositiveInt = Field(default=64, description="Number of cities of birth.")
    universities: PositiveInt = Field(default=64, description="Number of universities.")
    majors: PositiveInt = Field(default=32, description="Number of majors.")
    employers: PositiveInt = Field(default=64, description="Number of employers.")
    templates: PositiveInt = Field(default=8, description="Number of sentence templates for each attribute.")

    @model_validator(mode="after")
    def _possible(self) -> BuiltinText:
        World(**self.model_dump(exclude={"builtin"}))
        return self


class FileText(SplitText):
    """A local file: .txt, .jsonl or .parquet."""

    path: str = Field(description="The file, relative to the working directory.")
    field: str = Field(default="text", description="Key or column that holds the text; unused for .txt.")
    document: Unit = Field(default="paragraph", description="What a document is in a .txt file.")
    documents: Documents = None


class HubText(SplitText):
    """A dataset of the Hugging Face hub, pinned to a revision."""

    dataset: str = Field(description="Name on the hub, as in `organisation/name`.", min_length=1)
    name: str | None = Field(default=None, description="The dataset's configuration.")
    revision: str = Field(description="Commit of the dataset's repository: 40 hexadecimal digits.")
    split: str = Field(default="train", description="The dataset's own split to read.")
    field: str = Field(default="text", description="Column that holds the text.")
    documents: Documents = None

    @model_validator(mode="after")
    def _pinned(self) -> HubText:
        if not re.fullmatch(PINNED, self.revision):
            raise ValueError(f"revision is {self.revision!r}; write the commit's 40 hexadecimal digits.")
        return self


Text = Annotated[
    Annotated[BuiltinText, Tag("<builtin>")]
    | Annotated[FileText, Tag("<path>")]
    | Annotated[HubText, Tag("<dataset>")],
    discriminate_by_key("text", "builtin", "path", "dataset"),
]


def problems(study: Study) -> Iterator[str]:
    """A sentence for each file that is missing or of another kind, and for each source that has two names."""
    for name, text in study.texts.items():
        if isinstance(text, FileText):
            path = Path(text.path)
            if path.suffix not in SUFFIXES:
                yield f"texts.{name}.path: {text.path} must be one of {', '.join(SUFFIXES)}."
            elif not path.is_file():
                yield f"texts.{name}.path: {text.path} does not exist (looked in {Path.cwd()})."
    counts = Counter(map(_source, study.texts.values()))
    for source, count in counts.items():
        if count > 1:
            first, second, *_ = [name for name, text in study.texts.items() if _source(text) == source]
            yield (
                f"texts.{second} is the same source as texts.{first}; use one text with splits, so that its parts "
                "stay apart."
            )


def _source(text: Text) -> tuple[str, ...]:
    """What two texts of one source have in common."""
    if isinstance(text, FileText):
        return ("path", str(Path(text.path).resolve()))
    if isinstance(text, HubText):
        return ("dataset", text.dataset, text.name or "", text.split)
    return ("builtin", text.builtin, str(text.people), str(text.seed))


def use_problems(study: Study, place: str, name: str, role: str) -> Iterator[str]:
    """A sentence where the text that `place` names does not exist, or has no part for the role."""
    if name not in study.texts:
        yield unknown_name(place, "text", name, study.texts)
    elif isinstance(text := study.texts[name], SplitText) and role not in text.splits:
        yield (
            f"{place}: the text {name!r} has no part for {role}; add `{role}` to texts.{name}.splits, or use another "
            "text."
        )
