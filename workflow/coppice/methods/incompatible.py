"""Why methods cannot work on nodes with some traits: reasons that several methods share, as half sentences.

Each names what to do instead; messages put "because" before it.
"""

from __future__ import annotations

_FITTED = "the correction was fitted to the weights as they are"

PRUNE = {
    "quantized": "packed integers cannot be masked; prune before quantizing",
    "compensated": f"{_FITTED}; prune before compensating",
}
# For methods that round what they keep.
PRUNE_AND_ROUND = {
    **PRUNE,
    "quantized": "packed integers can be neither masked nor rounded again; start from a node that is not quantized",
}
QUANTIZE = {
    "quantized": "the weights are on a grid already; quantize once",
    "compensated": f"{_FITTED}; quantize before compensating",
}
QUANTIZE_ACTIVATIONS = {"quantized-activations": "its linears round their inputs already; round them once"}
QUANTIZE_CACHE = {"quantized-cache": "its keys and values are compressed already; choose one way to keep them"}
ROTATE = {
    "factorized": "norms and rotations are folded into whole linears; rotate before decomposing",
    "quantized": "rotated weights do not lie on the grid of their codes; rotate before quantizing",
    "quantized-activations": "inputs are rounded with what was chosen for them as they are; rotate before that",
    "compensated": f"{_FITTED}; rotate before compensating",
    "masked": "a rotation fills the pruned places again; rotate before pruning",
    "rotated": "its residual stream is rotated already, and another rotation can undo the first; rotate once",
}
DECOMPOSE = {
    "quantized": "packed integers have no factors; decompose before quantizing",
    "factorized": "a linear that is factors already would be factorized twice; choose a smaller keep instead",
    "masked": "factors fill the pruned places again; decompose before pruning",
    "compensated": f"{_FITTED}; decompose before compensating",
}
REMOVE_UNITS = {
    "factorized": "the factors of a linear have no rows or columns that belong to heads and neurons alone",
    "quantized": "its codes are packed for the widths that it has",
    "compensated": "the corrections of its linears were fitted to the widths that it has",
}
COMPENSATE = {"compensated": "the linear has a correction already; choose a larger rank instead"}
QUANTIZED_CACHE = "its keys and values are quantized as it runs; train before the step that quantizes them"
