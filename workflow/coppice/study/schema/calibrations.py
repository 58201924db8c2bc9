"""`calibrations`: the tokens that calibration statistics are gathered over."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from pydantic import Field, PositiveInt

from coppice.study.schema import texts
from coppice.study.schema.section import Length, Section

if TYPE_CHECKING:
    from coppice.study.schema.study import Study


class Calibration(Section):
    """Tokens that calibration statistics are gathered over: the role `calibration` of a text."""

    text: str = Field(description="Name of a text.")
    windows: PositiveInt = Field(default=128, description="Number of windows.")
    length: Length = Field(default=2048, description="Tokens in a window.")
    pack: bool = Field(default=True, description="Fill windows with several documents; false gives each its own.")


def problems(study: Study) -> Iterator[str]:
    """A sentence for each calibration whose text does not serve."""
    for name, calibration in study.calibrations.items():
        yield from texts.use_problems(study, f"calibrations.{name}.text", calibration.text, "calibration")
