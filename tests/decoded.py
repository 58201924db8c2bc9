"""What a codebook stands for, decoded by hand."""

from __future__ import annotations

import torch
from torch import Tensor

from coppice.methods.base import Codebook


def dequantize(codebook: Codebook) -> Tensor:
    """[m, n] the weights that the codes stand for, in the scales' type."""
    shape = codebook.codes.shape
    block = torch.arange(codebook.codes.numel(), device=codebook.codes.device).view(shape) // codebook.block
    values = codebook.table[codebook.codes.long()] * codebook.absmax[block]
    if codebook.outliers is not None:
        whole = values.new_empty(shape[0], shape[1] + len(codebook.outliers))
        kept = torch.ones(whole.shape[1], dtype=torch.bool, device=values.device)
        kept[codebook.outliers] = False
        whole[:, kept], whole[:, codebook.outliers] = values, codebook.outlier_weight
        values = whole
    return values.T if codebook.transposed else values
