"""KIVI: a quantized key/value cache, keys per channel and values per token.

Liu et al., KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache (arXiv 2402.02750), section 3. A grid of 2^b
levels from the minimum to the maximum of g consecutive tokens of a key's channel, or of g consecutive channels of a
value's token. Tokens that do not fill a window stay as they are, values too (in the paper the newest values always do).
The mathematics are in `models.modules.kv_cache`, without its low-rank and its sparse part.
"""

from __future__ import annotations

from pydantic import Field

from coppice.methods.declaration import CacheMethod, Source
from coppice.methods.incompatible import QUANTIZE_CACHE
from coppice.methods.options import CacheOptions
from coppice.records.base import Json

SOURCE = Source(
    "KIVI: A Tuning-Free Asymmetric 2bit Quantization for KV Cache",
    "arXiv 2402.02750",
    "section 3: scale = (max X - min X) / (2^b - 1), keys per channel, values per token",
    "With 2 bits, Llama, Falcon and Mistral keep almost the same quality at 2.6 times less peak memory, weights "
    "included, which allows batches up to 4 times as large.",
)


class Options(CacheOptions):
    window: int = Field(
        default=64, ge=1, description="Tokens compressed at a time; fewer, the newest, stay in full precision."
    )


def cache(options: Options) -> Json:
    """Settings for `kv_cache.install_cache`."""
    return {"bits": options.bits, "group_size": options.group_size, "window": options.window}


METHOD = CacheMethod(
    source=SOURCE,
    options=Options,
    adds_traits=frozenset({"quantized-cache"}),
    incompatible_with=QUANTIZE_CACHE,
    cache=cache,
)
