"""GEAR: a quantized key/value cache with a low-rank and a sparse correction of the rounding error.

Kang et al., GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM (arXiv
2403.05527), X ~ X^ + L + S: X^ rounded, L = Q P^T of rank r for each head by power iteration, S the largest and the
smallest values. Without outliers it is GEAR-L; with group_size -1 its grids are the paper's "KCVT". The mathematics are
in `models.modules.kv_cache`.
"""

from __future__ import annotations

from pydantic import Field

from coppice.methods.declaration import CacheMethod, Source
from coppice.methods.incompatible import QUANTIZE_CACHE
from coppice.methods.options import CacheOptions
from coppice.records.base import Json

SOURCE = Source(
    "GEAR: An Efficient KV Cache Compression Recipe for Near-Lossless Generative Inference of LLM",
    "arXiv 2403.05527",
    "algorithm 1: X ~ X^ + L + S",
    "Near-lossless at 4 bits, with up to 2.38 times the throughput and up to 2.29 times less peak memory.",
)


class Options(CacheOptions):
    rank: int = Field(
        default=4, ge=0, description="Rank of the correction of the prompt's rounding error, for each head."
    )
    decode_rank: int = Field(default=2, ge=0, description="The same for each chunk of tokens after the prompt.")
    outliers: float = Field(
        default=0.02,
        ge=0,
        le=1,
        description="Share of each key's channel and of each value's token that is stored as it is, half of it the "
        "largest and half the smallest values; one of each at least, unless 0.",
    )
    buffer: int | None = Field(
        default=None,
        ge=1,
        description="Tokens compressed at a time; fewer, the newest, stay in full precision. 64 when left out, or 20 "
        "where group_size is -1.",
    )
    loops: int = Field(default=3, ge=1, description="Power iterations.")


def cache(options: Options) -> Json:
    """Settings for `kv_cache.install_cache`."""
    return {
        "bits": options.bits,
        "group_size": options.group_size,
        "window": options.buffer or (20 if options.group_size == -1 else 64),
        "rank": options.rank,
        "decode_rank": options.decode_rank,
        "outliers": options.outliers,
        "loops": options.loops,
    }


METHOD = CacheMethod(
    source=SOURCE,
    options=Options,
    adds_traits=frozenset({"quantized-cache"}),
    incompatible_with=QUANTIZE_CACHE,
    cache=cache,
)
