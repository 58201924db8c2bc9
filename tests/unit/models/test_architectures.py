"""Descriptions of architectures: whole, true of the models that they describe, and read without torch."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from tiny import ARCHITECTURES, tiny_model
from torch import nn

from coppice.errors import UserError
from coppice.models.architectures import base as architectures
from coppice.models.architectures.base import ATTENTION_READERS, architecture_of, blocks


def test_every_description_has_a_tiny_model() -> None:
    described = {tiny_model(name).config.model_type for name in ARCHITECTURES}
    assert described == set(architectures.model_types())


@pytest.mark.parametrize("model_type", architectures.model_types())
def test_a_file_describes_the_architecture_of_its_name(model_type: str) -> None:
    family = architectures.architecture(model_type)
    config_class, model_class = family.classes()
    assert family.model_type == config_class.model_type == model_type
    assert model_class.config_class is config_class


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_paths_name_every_linear_and_norm_of_a_model(architecture: str) -> None:
    model = tiny_model(architecture)
    family, norms = architecture_of(model), architecture_of(model).norms
    named = {norms.before_attention, norms.after_attention, norms.before_mlp, norms.after_mlp}
    named |= {*(norms.within_heads or ()), *(norms.across_heads or ())}
    for index, block in enumerate(blocks(model)):
        linears = {name for name, module in block.named_modules() if isinstance(module, nn.Linear)}
        assert linears == set(family.linears.values())
        assert {name for name, module in block.named_modules() if "Norm" in type(module).__name__} == named - {None}
        for path in (family.attention, family.mlp, *linears):
            name = family.full_name(index, path)
            assert model.get_submodule(name) is block.get_submodule(path)
            assert family.place(name) == (index, path)
    assert model.get_submodule(family.embeddings) is model.get_input_embeddings()
    assert model.get_submodule(family.head) is model.get_output_embeddings()
    assert model.get_submodule(family.decoder) is model.get_decoder()
    assert "Norm" in type(model.get_submodule(family.final_norm)).__name__
    assert "Rotary" in type(model.get_submodule(family.rotary)).__name__


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_norms_of_queries_and_keys_are_as_wide_as_a_head_or_as_all(architecture: str) -> None:
    model = tiny_model(architecture)
    norms, config = architecture_of(model).norms, model.config
    for paths, heads in (
        (norms.within_heads, (1, 1)),
        (norms.across_heads, (config.num_attention_heads, config.num_key_value_heads)),
    ):
        if paths is not None:
            widths = [len(blocks(model)[0].get_parameter(f"{path}.weight")) for path in paths]
            assert widths == [count * architectures.head_dim(config) for count in heads]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_shape_gives_the_linears_their_sizes(architecture: str) -> None:
    model = tiny_model(architecture)
    family, shape = architecture_of(model), architectures.shape_of(model.config.to_dict())
    assert shape.head_dim == architectures.head_dim(model.config) and shape.layers == len(blocks(model))
    for role, size in shape.linears().items():
        linear = blocks(model)[0].get_submodule(family.linears[role])
        assert size == (linear.in_features, linear.out_features)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_an_input_is_scalable_unless_it_is_the_residual_stream(architecture: str) -> None:
    model = tiny_model(architecture)
    block, family = blocks(model)[0], architecture_of(model)
    inputs: dict[str, torch.Tensor] = {}
    outputs: dict[str, torch.Tensor] = {}

    def note(name: str) -> Callable[[nn.Module, Any, Any], None]:
        def hook(_: nn.Module, arguments: Any, output: Any) -> None:
            inputs[name], outputs[name] = arguments[0] if arguments else None, output

        return hook

    for name, module in block.named_modules():
        module.register_forward_hook(note(name))
    stream = model.get_input_embeddings()(torch.arange(5, 9)[None])
    model(inputs_embeds=stream)
    scalable = {name: shared.producer for shared in family.scalable_inputs() for name in shared.consumers}
    for role, name in family.linears.items():
        if role in ("o", "down"):
            assert scalable[name] == family.linears["v" if role == "o" else "up"]
        elif name in scalable:
            assert inputs[name] is outputs[scalable[name]]
        elif role in ATTENTION_READERS:
            assert torch.equal(inputs[name], stream)
        else:
            assert torch.equal(inputs[name], stream + outputs[family.norms.after_attention])


def test_an_unknown_architecture_is_refused() -> None:
    with pytest.raises(UserError, match="'base' is not supported; supported are llama, "):
        architectures.architecture("base")


def test_descriptions_are_read_without_torch_and_transformers() -> None:
    script = (
        "import sys; from coppice.models.architectures.base import architecture, model_types; "
        "print([architecture(name).model_type for name in model_types()], {'torch', 'transformers'} & set(sys.modules))"
    )
    printed = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert printed == f"{list(architectures.model_types())} set()\n"
