"""Llama: Open and Efficient Foundation Language Models (arXiv 2302.13971); The Llama 3 Herd of Models (2407.21783).

An RMS norm before attention and before the MLP, rotary embeddings, a gated MLP, grouped queries since Llama 2. The
other architectures are described by how they differ from it. Its config refuses a number of heads that does not divide
hidden_size, although the model computes with any: such a model is saved as a Mistral without a window, whose linears
have no biases.
"""

from __future__ import annotations

from coppice.models.architectures.base import Architecture, Gguf, Norms, Substitute

ARCHITECTURE = Architecture(
    model_type="llama",
    class_prefix="Llama",
    decoder="model",
    rotary="model.rotary_emb",
    embeddings="model.embed_tokens",
    blocks="model.layers",
    final_norm="model.norm",
    head="lm_head",
    attention="self_attn",
    mlp="mlp",
    linears={
        "q": "self_attn.q_proj",
        "k": "self_attn.k_proj",
        "v": "self_attn.v_proj",
        "o": "self_attn.o_proj",
        "gate": "mlp.gate_proj",
        "up": "mlp.up_proj",
        "down": "mlp.down_proj",
    },
    norms=Norms(before_attention="input_layernorm", before_mlp="post_attention_layernorm"),
    per_block=("layer_types",),
    substitute=Substitute(
        model_type="mistral",
        dropped=("model_type", "architectures", "attention_bias", "mlp_bias", "pretraining_tp"),
        biases=("attention_bias", "mlp_bias"),
        changed={"sliding_window": None},
    ),
    gguf=Gguf("llama", adjacent_rotary=True, reads_biases=False, heads_divide=True),
)
