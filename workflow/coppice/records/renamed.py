"""Names that older versions wrote, and what they are called now."""

from __future__ import annotations

OPTIONS = {"propagate": "sequential", "linears": "target_modules"}
METHODS = {"round-inputs": "activation-quant"}
TRAITS = {"quantized-inputs": "quantized-activations"}
