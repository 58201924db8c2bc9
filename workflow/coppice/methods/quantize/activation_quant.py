"""Activation quantization: inputs of linears are rounded token by token, whatever form their weights have.

Ashkboos et al., QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs (arXiv 2404.00456), section 4, the online
quantization of inputs: each token x gets its own grid as it is computed. Symmetric: scale = c max|x| / (2^(b-1) - 1),
clip c; asymmetric: scale = c (max x - min x) / (2^b - 1). Nothing is calibrated.
"""

from __future__ import annotations

from pydantic import Field

from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import QUANTIZE_ACTIVATIONS
from coppice.methods.options import LayerOptions
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import QuantizedActivations

SOURCE = Source(
    "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs",
    "arXiv 2404.00456",
    "section 4: symmetric grids per token, scale = c max|x| / (2^(b-1) - 1)",
    "On a rotated model with 4-bit weights and cache too, LLaMA-2-70B loses at most 0.47 of WikiText-2 perplexity.",
)


class Options(LayerOptions):
    bits: int = Field(ge=4, le=8, description="Bits of a code.")
    symmetric: bool = Field(default=True, description="Signed codes around 0, instead of a grid from min to max.")
    clip: float = Field(
        default=1.0, gt=0, le=1, description="Share of a token's range that the grid covers; what is beyond saturates."
    )


def compress(linear: Linear, statistics: LinearStatistics | None, options: Options) -> QuantizedActivations:
    """The linear as it is, its inputs rounded before it."""
    record = {"input_bits": options.bits, "input_symmetric": options.symmetric, "input_clip": options.clip}
    return QuantizedActivations(options.bits, options.symmetric, options.clip, record=record)


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    adds_traits=frozenset({"quantized-activations"}),
    incompatible_with=QUANTIZE_ACTIVATIONS,
    compress=compress,
)
