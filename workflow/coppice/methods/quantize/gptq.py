"""GPTQ: rounding input by input, while the inputs not yet rounded compensate for the error.

Frantar et al., GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers (arXiv 2210.17323),
algorithm 1 (see `solvers.rounding`).
"""

from __future__ import annotations

from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import QUANTIZE
from coppice.methods.solvers.rounding import SweptGridOptions, sweep_to_grid
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import Quantized

SOURCE = Source(
    "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    "arXiv 2210.17323",
    "algorithm 1",
    claim="LLaMA-7B on WikiText-2 (windows of 2048; dense 5.68): perplexity 6.09 at 4 bits and 8.07 at 3; 6.61 "
    "at 3 bits in groups of 128.",
)


class Options(SweptGridOptions):
    pass


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> Quantized:
    """Sweeps the weight over its inputs, in order or from the largest H_jj down; pruned weights stay zero.

    Raises UserError when the group size does not divide the width and `indivisible` is "error", or when the statistics
    are unfit (see `solvers.rounding`).
    """
    return sweep_to_grid(linear, statistics.second_moment, options)


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"quantized"}),
    incompatible_with=QUANTIZE,
    compress=compress,
)
