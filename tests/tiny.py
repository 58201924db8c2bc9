"""Tiny random decoders of every supported architecture, for tests."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel

from coppice.models.architectures import base as architectures
from coppice.models.architectures.base import Architecture

# By the name that a test gives one: its model_type, and fields of its config. hidden_size is not num_attention_heads *
# head_dim in mistral and qwen3.
_CONFIGS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {"num_attention_heads": 4, "num_key_value_heads": 4}),
    "llama-gqa": ("llama", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "mistral": ("mistral", {"num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 8}),
    "olmo2": ("olmo2", {"num_attention_heads": 8, "num_key_value_heads": 4}),
    "qwen2": ("qwen2", {"num_attention_heads": 4, "num_key_value_heads": 2}),
    "qwen3": ("qwen3", {"num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 12}),
    "smollm3": ("smollm3", {"num_attention_heads": 8, "num_key_value_heads": 4, "no_rope_layer_interval": 2}),
}
ARCHITECTURES = tuple(_CONFIGS)

VOCABULARY = 61


def family(architecture: str) -> Architecture:
    """The description of one of `ARCHITECTURES`."""
    return architectures.architecture(_CONFIGS[architecture][0])


# Those whose norms of queries and keys act across heads: a removal of heads changes the others' queries and keys too.
NORMS_ACROSS_HEADS = tuple(name for name in ARCHITECTURES if family(name).norms.across_heads)
# Those whose blocks normalise what they add to the residual stream, which then cannot be rotated.
NORMS_AFTER = tuple(name for name in ARCHITECTURES if family(name).norms.after_attention)


def tiny_model(
    architecture: str = "llama-gqa", *, seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any
) -> PreTrainedModel:
    """A random model of one of `ARCHITECTURES` in evaluation mode: 3 blocks, hidden_size 32, 48 neurons, 61 tokens.

    Embeddings are untied unless `tie_word_embeddings=True`; `changes` are fields of the configuration. Every parameter
    is random, norms and biases too. In float64 the norms compute in float64 (see `exact_norms`).
    """
    config_class, _ = family(architecture).classes()
    defaults = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 0,
    }
    # The seed draws nothing outside this function.
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        config = config_class(**defaults | _CONFIGS[architecture][1] | changes)
        model = AutoModelForCausalLM.from_config(config).to(dtype).eval()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.normal_(1.0 if "norm" in name else 0.0, 0.2)
    return exact_norms(model) if dtype == torch.float64 else model


def tiny_tokens(windows: int = 4, length: int = 12, *, seed: int = 0) -> Tensor:
    """[windows, length] random int64 tokens, none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (windows, length), generator=generator)


def exact_norms(model: PreTrainedModel) -> PreTrainedModel:
    """The same model, its norms computed in their input's dtype: transformers rounds there to float32.

    To be called again on a model that was loaded from a file.
    """
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(_exact_norm, module)
    return model


def _exact_norm(norm: nn.Module, x: Tensor) -> Tensor:
    return norm.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + norm.variance_epsilon)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """[windows, length, vocabulary]."""
    return model(input_ids=tokens, use_cache=False).logits
