"""What every section of the config shares: unknown keys, alternatives, and the sentences about names."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Discriminator, Field, model_validator

from coppice.errors import did_you_mean

PINNED = r"[0-9a-f]{40}"

Length = Annotated[int, Field(ge=2)]


class Section(BaseModel):
    """A mapping of the config. Unknown keys are errors that name the nearest known one."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, value: Any) -> Any:
        if isinstance(value, Mapping):
            refuse_unknown_keys(value, cls.model_fields, "key")
        return value


def refuse_unknown_keys(value: Mapping[str, Any], known: Collection[str], noun: str) -> None:
    """Raises ValueError that names each unknown key and the nearest known one."""
    unknown = [key for key in value if key not in known]
    if unknown:
        raise ValueError(" ".join(f"There is no {noun} {key!r}.{did_you_mean(str(key), known)}" for key in unknown))


def discriminate_by_key(noun: str, *keys: str) -> Discriminator:
    """Chooses among sections by the one of `keys` that each requires; a section's tag is its key in <>."""

    def tag(value: Any) -> str | None:
        known = value if isinstance(value, Mapping) else type(value).model_fields if isinstance(value, Section) else ()
        present = [key for key in keys if key in known]
        return f"<{present[0]}>" if len(present) == 1 else None

    message = f"A {noun} needs exactly one of the keys {', '.join(keys)}."
    return Discriminator(tag, custom_error_type="alternatives", custom_error_message=message)


def unknown_name(place: str, noun: str, name: str, known: Collection[str]) -> str:
    """The sentence about a name that refers to nothing."""
    near = did_you_mean(name, known) if known else f" There are no {noun}s yet."
    return f"{place}: there is no {noun} {name!r}.{near}"
