"""Puts what a layer method returned in a linear's place."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from coppice.methods.contracts import (
    CUR,
    Codebook,
    FlattenQuant,
    LowRank,
    LowRankCorrection,
    Masked,
    Quantized,
    QuantizedActivations,
    Replacement,
    TensorTrain,
    Unchanged,
)
from coppice.models import layers

if TYPE_CHECKING:
    pass


def replace(block: nn.Module, name: str, module: nn.Module, replacement: Replacement, storage: torch.dtype) -> None:
    """Puts what a method returned in the linear's place: values as they will be read back from the checkpoint, in the
    dtype that the model computes in."""
    dtype = next(tensor.dtype for tensor in module.state_dict().values() if tensor.is_floating_point())

    def stored(values: Tensor) -> Tensor:
        # A copy: what a method returns may be a view of something larger, and would be stored as such.
        return values.to(storage).to(dtype).clone(memory_format=torch.contiguous_format)

    if isinstance(replacement, Unchanged):
        return
    if isinstance(replacement, QuantizedActivations):
        settings = {"bits": replacement.bits, "symmetric": replacement.symmetric, "clip": replacement.clip}
        layers.quantize_activations(module, settings)
        return
    if isinstance(replacement, Masked):
        module.weight = nn.Parameter(stored(replacement.weight) * replacement.mask)
        module.masked = True
        return
    shape = (module.in_features, module.out_features)
    if isinstance(replacement, Quantized):
        new: nn.Module = layers.QuantizedLinear.from_codes(
            replacement.codes,
            stored(replacement.scale),
            replacement.zero_point,
            replacement.bits,
            replacement.group_size,
            replacement.symmetric,
            module.bias,
        )
    elif isinstance(replacement, Codebook):
        new = coded(replacement, module.bias, stored)
    elif isinstance(replacement, FlattenQuant):
        new = layers.FlattenQuantLinear.from_codes(
            replacement.codes,
            stored(replacement.scale),
            replacement.source,
            replacement.piece,
            stored(torch.tensor([replacement.threshold], device=replacement.codes.device)),
            replacement.bits,
            module.in_features,
            module.bias,
        )
    elif isinstance(replacement, LowRank):
        first, second = replacement.first, replacement.second
        rank = len(first) if isinstance(first, Tensor) else len(first.codes)
        new = layers.LowRankLinear(*shape, rank, module.bias is not None, device="meta")
        new.first = matrix(first, None, stored)
        new.second = matrix(second, module.bias, stored)
    elif isinstance(replacement, CUR):
        new = layers.CURLinear(*shape, len(replacement.link), module.bias is not None, device="meta")
        new.rows = matrix(replacement.rows, None, stored)
        new.link = matrix(replacement.link, None, stored)
        new.columns = matrix(replacement.columns, module.bias, stored)
    elif isinstance(replacement, TensorTrain):
        cores = replacement.cores
        shapes = [[core.shape[axis] for core in cores] for axis in (2, 1, 3)]
        new = layers.TensorTrainLinear(shapes[0], shapes[1], shapes[2][:-1], device="meta")
        new.sites = nn.ModuleList(matrix(core.flatten(2).flatten(0, 1), None, stored) for core in cores)
        new.bias = module.bias
    elif isinstance(replacement, LowRankCorrection):
        new = layers.LowRankCorrectedLinear(module, len(replacement.first), device="meta")
        new.compensation.first.weight = nn.Parameter(stored(replacement.first))
        new.compensation.second.weight = nn.Parameter(stored(replacement.second))
    if hasattr(module, "rounded_inputs"):
        for part in layers.weight_matrices(new).values():
            if not hasattr(part, "rounded_inputs"):
                layers.quantize_activations(part, module.rounded_inputs)
    block.set_submodule(name, new)


def matrix(values: Tensor | Codebook, bias: nn.Parameter | None, stored: Callable[[Tensor], Tensor]) -> nn.Linear:
    """A linear that holds a matrix [m, n], plain or in codes."""
    if isinstance(values, Codebook):
        return coded(values, bias, stored)
    linear = nn.Linear(values.shape[1], values.shape[0], bias is not None, device="meta")
    linear.weight = nn.Parameter(stored(values))
    linear.bias = bias
    return linear


def coded(book: Codebook, bias: nn.Parameter | None, stored: Callable[[Tensor], Tensor]) -> layers.CodebookLinear:
    """A linear that holds the matrix of a codebook."""
    return layers.CodebookLinear.from_codes(
        book.codes,
        book.table,
        stored(book.absmax),
        book.block,
        book.bits,
        book.outliers,
        None if book.outlier_weight is None else stored(book.outlier_weight),
        book.transposed,
        bias,
    )
