"""What methods see of a model: one linear, or the whole decoder."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from coppice.compression.inputs import Inputs
from coppice.models import modules
from coppice.models.contracts import Linear, linear_seed
from coppice.models.decoder import WholeDecoder
from coppice.models.modules import Replaceable

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def linear_view(
    name: str,
    module: Replaceable,
    storage: torch.dtype,
    seed: int,
    reference: Replaceable | None = None,
    **more: Any,
) -> Linear:
    """One linear, or composite, by its full name.

    storage: the type of the checkpoint's numbers. seed: the study's. reference: the same before compression. more:
    other fields of `Linear`.
    """
    return Linear(
        weight=modules.effective_weight(module).float(),
        mask=modules.mask(module) if isinstance(module, nn.Linear) else None,
        reference=None if reference is None else modules.effective_weight(reference).float(),
        storage=storage,
        name=name,
        seed=linear_seed(seed, name),
        **more,
    )


def decoder_view(
    model: PreTrainedModel,
    linears: Mapping[str, Replaceable],
    view: Callable[[str, Replaceable], Linear],
    inputs: Inputs,
    seed: int,
    device: str,
) -> WholeDecoder:
    """The whole decoder with these linears, by full name, each seen as `view` shows it."""
    tokens, kept = inputs.tokens()
    return WholeDecoder(
        model,
        linears,
        view,
        lambda index: inputs.moments(index, device),
        inputs.whole_model_tensors(),
        tokens,
        kept,
        seed,
    )
