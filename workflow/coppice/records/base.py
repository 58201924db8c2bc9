"""What all records share: read, write and upgrade of one JSON file, and what each of its fields means."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Self

from pydantic import BaseModel, ConfigDict, JsonValue, ValidationError

from coppice.errors import UserError
from coppice.files import read_json_object, write_json

Json = dict[str, JsonValue]
# Json that is only read.
JsonMapping = Mapping[str, JsonValue]


@dataclass(frozen=True, slots=True)
class Column:
    """What a field of a record, or a column of a table, means. unit: empty where it has none."""

    text: str
    unit: str = ""


class Part(BaseModel):
    """A part of a record. Keys that this version does not know are ignored."""

    model_config = ConfigDict(frozen=True)


class Record(Part):
    """A JSON file that a job writes and others read; `format_version` is its first key.

    A field has one writer: a record is built once, whole. Fields that are not given do not appear in the file.
    """

    FORMAT_VERSION: ClassVar[int] = 1

    @classmethod
    def read(cls, path: Path) -> Self:
        """The record of a file, upgraded where an older version wrote it.

        Raises UserError where the file is missing, damaged, or of a newer format.
        """
        content = read_json_object(path)
        version = content.pop("format_version", 1)
        if type(version) is not int or version < 1:
            raise _damage_error(path, f"has format_version {version!r}, which is not a number from 1 on")
        if version > cls.FORMAT_VERSION:
            raise UserError(
                f"{path} has format {version}, this version of Coppice reads up to {cls.FORMAT_VERSION}; use a newer "
                "Coppice or recompute it."
            )
        try:
            return cls.model_validate(cls.upgrade(content, version))
        except ValidationError as error:
            raise _damage_error(path, _problem(error)) from error

    @classmethod
    def upgrade(cls, content: Json, version: int) -> Json:
        """The content of a file of an older format, under the names of this one. It is not validated yet."""
        return content

    def to_json(self) -> Json:
        """What the file holds."""
        return {"format_version": self.FORMAT_VERSION, **self.model_dump(mode="json", exclude_unset=True)}

    def write(self, path: Path) -> None:
        """Writes the file, whole or not at all. Raises ValueError for NaN, which JSON does not have."""
        write_json(path, self.to_json())


def _problem(error: ValidationError) -> str:
    """The first problem that validation found, as the end of a sentence about the file."""
    problem = error.errors()[0]
    place = ".".join(str(part) for part in problem["loc"])
    if problem["type"] == "value_error":  # of a record's own check, which says it all
        return str(problem["ctx"]["error"])
    if problem["type"] == "missing":
        return f"lacks {place!r}"
    return f"has a wrong value of {place!r} ({problem['msg'][0].lower()}{problem['msg'][1:]})"


def _damage_error(path: Path, problem: str) -> UserError:
    return UserError(f"{path} {problem}; it is damaged or was edited by hand: remove it and run again.")
