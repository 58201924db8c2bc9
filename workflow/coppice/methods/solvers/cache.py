"""Options of the grids on which keys and values are kept; the mathematics are `kv_cache`'s."""

from __future__ import annotations

from pydantic import Field, field_validator

from coppice.methods.options import MethodOptions


class CacheOptions(MethodOptions):
    """Grids of keys along tokens, of values along channels."""

    bits: int = Field(ge=2, le=8, description="Bits of a code.")
    group_size: int = Field(
        default=64,
        description="Consecutive tokens of a key's channel, or channels of a value's token (all heads' in a row), that "
        "share a scale and a minimum; a group ends where a chunk ends. -1: all of them.",
    )

    @field_validator("group_size")
    @classmethod
    def _is_size(cls, group_size: int) -> int:
        if group_size < 1 and group_size != -1:
            raise ValueError(f"a group size is a positive number of values, or -1 for all of them, not {group_size}")
        return group_size
