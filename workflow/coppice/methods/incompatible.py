"""Why methods cannot work on nodes with some traits: reasons that several methods share, as half sentences.

Each names what to do instead; messages put "because" before it.
"""

from __future__ import annotations

_FITTED = "the correction was fitted to the weights as they are"

PRUNE = {
    "quantized": "packed integers cannot be masked; prune before quantizing",
    "compensated": f"{_FITTED}; prune before compensating",
}
QUANTIZE = {
    "quantized": "the weights are on a grid already; quantize once",
    "compensated": f"{_FITTED}; quantize before compensating",
}
DECOMPOSE = {
    "quantized": "packed integers have no factors; decompose before quantizing",
    "compensated": f"{_FITTED}; decompose before compensating",
}
QUANTIZED_CACHE = "its keys and values are quantized as it runs; train before the step that quantizes them"
