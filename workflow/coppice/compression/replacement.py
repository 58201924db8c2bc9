"""Puts what a layer method returned in a linear's place."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from coppice.models import modules
from coppice.models.replacements import Masked, QuantizedActivations, Replacement, Unchanged


def replace(
    block: nn.Module, name: str, module: modules.Replaceable, replacement: Replacement, storage: torch.dtype
) -> None:
    """Puts what a method returned in the linear's place: values as they will be read back from the checkpoint, in the
    dtype that the model computes in."""
    dtype = next(tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point())

    def as_stored(values: Tensor) -> Tensor:
        # A copy: what a method returns may be a view of something larger, and would be stored as such.
        return values.to(storage).to(dtype).clone(memory_format=torch.contiguous_format)

    match replacement:
        case Unchanged():
            return
        case QuantizedActivations(bits=bits, symmetric=symmetric, clip=clip):
            modules.quantize_activations(module, {"bits": bits, "symmetric": symmetric, "clip": clip})
        case Masked(weight=weight, mask=mask):
            module.weight = nn.Parameter(as_stored(weight) * mask)
            modules.set_masked(module, True)
        case _:
            form = modules.FORMS[type(replacement).__name__].from_replacement(replacement, module, as_stored)
            keep_activation_quantization(module, form)
            block.set_submodule(name, form)


def keep_activation_quantization(module: nn.Module, form: nn.Module) -> None:
    """Makes the matrices of a form round their inputs where the linear that it replaces did."""
    settings = getattr(module, "quantized_activations", None)
    if settings is None:
        return
    for matrix in modules.weight_matrices(form).values():
        if not hasattr(matrix, "quantized_activations"):
            modules.quantize_activations(matrix, settings)
