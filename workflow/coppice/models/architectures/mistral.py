"""Mistral 7B (arXiv 2310.06825).

Llama with sliding-window attention, without biases, and with any number of heads of any width. GGUF has no name for it:
it is written as a llama.
"""

from __future__ import annotations

from coppice.models.architectures import llama
from coppice.models.architectures.base import resembling

ARCHITECTURE = resembling(
    llama.ARCHITECTURE, model_type="mistral", class_prefix="Mistral", gguf=llama.ARCHITECTURE.gguf
)
