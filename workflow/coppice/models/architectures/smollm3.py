"""SmolLM3: smol, multilingual, long-context reasoner (Hugging Face, July 2025, huggingface.co/blog/smollm3).

Llama without rotary embeddings in every fourth block (NoPE, arXiv 2501.18795). `no_rope_layers` has for each block
whether it has them (1) or not (0), and moves with the blocks. transformers 5.23 does not read it from GGUF.
"""

from __future__ import annotations

from coppice.models.architectures import llama
from coppice.models.architectures.base import resembling

ARCHITECTURE = resembling(
    llama.ARCHITECTURE,
    model_type="smollm3",
    class_prefix="SmolLM3",
    per_block=("layer_types", "no_rope_layers"),
)
