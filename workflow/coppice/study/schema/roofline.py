"""`roofline`: the devices whose lower bounds of times are computed for every node."""

from __future__ import annotations

from typing import get_args

from pydantic import Field, NonNegativeInt, PositiveInt

from coppice.hardware import DeviceName
from coppice.study.schema.section import Section


class Roofline(Section):
    """Lower bounds of times by the roofline model: from shapes, stored bytes, and each device's bandwidth and peaks."""

    devices: list[DeviceName] = Field(
        default=list(get_args(DeviceName)),
        description="Names of devices; `details` of each row of costs.parquet names the source of their figures.",
        min_length=1,
    )
    batch: PositiveInt = Field(default=1, description="Sequences in a batch.")
    prompt: PositiveInt = Field(
        default=1024,
        description="Prompt length in tokens; shortened with `generate` where both exceed the model's context.",
    )
    generate: NonNegativeInt = Field(default=128, description="Tokens to generate.")
    sparse_kernels: bool = Field(default=False, description="Assume a kernel that exploits masks of the pattern 2:4.")
