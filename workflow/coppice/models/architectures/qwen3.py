"""Qwen3 Technical Report (arXiv 2505.09388).

Qwen2 without biases, and with an RMS norm on the queries and keys of each head. These norms act after what a rotation
changes and within what a removal keeps or takes, so both leave them as they are.
"""

from __future__ import annotations

from dataclasses import replace

from coppice.models.architectures import qwen2
from coppice.models.architectures.base import Gguf, QueryKeyNorms, resembling

ARCHITECTURE = resembling(
    qwen2.ARCHITECTURE,
    model_type="qwen3",
    class_prefix="Qwen3",
    norms=replace(qwen2.ARCHITECTURE.norms, within_heads=QueryKeyNorms("self_attn.q_norm", "self_attn.k_norm")),
    gguf=Gguf("qwen3"),
)
