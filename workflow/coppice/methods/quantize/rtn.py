"""Round to nearest: every weight goes to the closest point of its group's grid.

The baseline of Frantar et al., GPTQ (arXiv 2210.17323), section 4; the rounding is `solvers.rounding`'s.
"""

from __future__ import annotations

from coppice.methods.declaration import LayerMethod, Source
from coppice.methods.incompatible import QUANTIZE
from coppice.methods.solvers.grid import GridOptions
from coppice.methods.solvers.rounding import round_to_nearest
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import Quantized

SOURCE = Source(
    "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers",
    "arXiv 2210.17323",
    "section 4, the baseline: q = clip(round(w / s) + z)",
    claim="LLaMA-7B on WikiText-2 (windows of 2048; dense 5.68): perplexity 6.29 at 4 bits and 25.54 at 3.",
)


class Options(GridOptions):
    pass


def compress(linear: Linear, statistics: LinearStatistics | None, options: Options) -> Quantized:
    """Rounds each group of consecutive inputs to its own grid; zeros stay zeros.

    Raises UserError when the group size does not divide the width and `indivisible` is "error".
    """
    return round_to_nearest(linear, options)


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    adds_traits=frozenset({"quantized"}),
    incompatible_with=QUANTIZE,
    compress=compress,
)
