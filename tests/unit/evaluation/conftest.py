from __future__ import annotations

import pytest
import torch
from manifests import provenance
from transformers import LlamaConfig, LlamaForCausalLM

from coppice.data import biographies, sources
from coppice.models.checkpoint import save_checkpoint

WORLD = {"builtin": "biographies", "people": 30}


def make_model(vocabulary: int, seed: int = 0, tied: bool = True) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        bos_token_id=2,
        eos_token_id=3,
    )
    # Random weights of the usual size leave all tokens about equally likely, and tests blind.
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8 if parameter.ndim == 2 else 1)
    return model


def save(model, folder):
    """A root checkpoint of `model` with the tokenizer of the world."""
    tokenizer = folder.parent / f"{folder.name}-tokenizer"
    biographies.tokenizer(sources.world(WORLD)).save_pretrained(tokenizer)
    save_checkpoint(model, folder, tokenizer, provenance(), torch.float32)
    return folder


@pytest.fixture(scope="package")
def tokenizer():
    return biographies.tokenizer(sources.world(WORLD))


@pytest.fixture(scope="package")
def model(tokenizer):
    return make_model(len(tokenizer))


@pytest.fixture(scope="package")
def checkpoint(model, tmp_path_factory):
    """A tiny model with random weights that knows the words of the world."""
    return save(model, tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="package")
def stories(shared_data):
    """stories260K in memory, and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = shared_data / "stories260K" / "hf"
    found = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return found.eval(), AutoTokenizer.from_pretrained(folder)
