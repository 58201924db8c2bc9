"""Runs a structure method: what it sees of the model, and the removal of the units that it chooses."""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import torch

from coppice.compression.inputs import Inputs
from coppice.compression.views import decoder_view, linear_view
from coppice.errors import UserError
from coppice.methods.options import MethodOptions
from coppice.methods.registry import Method
from coppice.models import modules, surgery
from coppice.models.architectures.base import architecture_of, blocks
from coppice.models.contracts import Removal
from coppice.records.base import Json

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def change_structure(
    model: PreTrainedModel,
    method: Method,
    options: MethodOptions,
    inputs: Inputs,
    storage: torch.dtype,
    seed: int,
    device: str,
) -> tuple[PreTrainedModel, Json]:
    """Removes the units that a structure method chooses; returns the model and what was achieved.

    The model is on the device while the method chooses, if its reach is the model. Raises UserError where the removal
    does not fit the model.
    """
    linears = {
        architecture_of(model).full_name(index, inner): module
        for index, block in enumerate(blocks(model))
        for inner, module in modules.weight_matrices(block).items()
    }
    model.requires_grad_(False)
    if method.resources.reach == "model":
        model.to(device)
    decoder = decoder_view(model, linears, partial(linear_view, storage=storage, seed=seed), inputs, seed, device)
    statistics = {name: tensor for tensors in decoder.kinds.values() for name, tensor in tensors.items()}
    removal = method.structure.choose(decoder, statistics, options)
    if not isinstance(removal, Removal):
        raise UserError(f"The method {method.name!r} returned {type(removal).__name__} from `choose`, not a Removal.")
    model.to("cpu")
    achieved = {**removal.record, **surgery.describe_removal(model, removal)}
    return surgery.remove(model, removal), achieved
