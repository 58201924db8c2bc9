"""Qwen2 Technical Report (arXiv 2407.10671).

Llama with biases on q, k and v, and sliding-window attention in the blocks that `layer_types` names, by default those
after the first `max_window_layers`.
"""

from __future__ import annotations

from coppice.models.architectures import llama
from coppice.models.architectures.base import Gguf, resembling

ARCHITECTURE = resembling(
    llama.ARCHITECTURE,
    model_type="qwen2",
    class_prefix="Qwen2",
    leading_blocks=("max_window_layers",),
    gguf=Gguf("qwen2"),
)
