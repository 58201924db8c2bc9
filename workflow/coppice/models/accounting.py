"""The accounting of a checkpoint: parameters, stored bytes and bits, the same for every method."""

from __future__ import annotations

import resource
import sys
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from coppice.files import FileEntry
from coppice.models import modules
from coppice.models.architectures.base import architecture_of, blocks
from coppice.records.manifest import DenseParameters, Parameters, Sizes, StoredBits

if TYPE_CHECKING:
    from transformers import PreTrainedModel


def sizes(
    model: PreTrainedModel, state: dict[str, Tensor], files: dict[str, FileEntry], dense: DenseParameters | None
) -> Sizes:
    """The accounting of a node; the same for every method. dense: None for a dense model, which is its own.

    parameters: how many numbers the model multiplies by (a quantized weight counts as one, a pruned but stored zero
    too; `nonzero` leaves zeros out); decoder_linears: those in the blocks' linears. stored_bytes: of the weight files.
    bits_per_weight: stored bits of all tensors by the parameters of the dense root; bits_per_linear_weight: stored bits
    of the blocks' linears (scales and zero points included) by the weights that the dense root has there.
    rho: 1 - parameters / dense parameters; rho_blocks: the same within the blocks; rho_nonzero: with non-zeros.
    """
    linear_weights = linear_zeros = 0
    linear_prefixes = []
    prefix = f"{architecture_of(model).blocks}."
    for name, module in blocks(model).named_modules():
        if isinstance(module, torch.nn.Linear):
            count = module.in_features * module.out_features
            linear_weights += count
            linear_zeros += int((module.weight == 0).sum())
            linear_prefixes.append(f"{prefix}{name}.")
    packed = {name: module for name, module in model.named_modules() if isinstance(module, modules.PackedForm)}
    packed_weights = sum(module.in_features * module.out_features for module in packed.values())
    # Of a packed linear, all but the bias encodes its weights.
    packed_tensors = {f"{name}.{buffer}" for name, module in packed.items() for buffer, _ in module.named_buffers()}
    total = packed_weights + sum(tensor.numel() for name, tensor in state.items() if name not in packed_tensors)
    in_blocks = total - sum(tensor.numel() for name, tensor in state.items() if not name.startswith(prefix))
    bytes_of = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    linear_bytes = sum(size for name, size in bytes_of.items() if name.startswith(tuple(linear_prefixes)))
    nonzero, stored_bits = total - linear_zeros, 8 * sum(bytes_of.values())
    dense = dense or DenseParameters(total=total, blocks=in_blocks, decoder_linears=linear_weights)
    return Sizes(
        parameters=Parameters(total=total, blocks=in_blocks, decoder_linears=linear_weights, nonzero=nonzero),
        dense=dense,
        dense_parameters=dense.total,
        stored_bytes=sum(entry.bytes for name, entry in files.items() if is_weights(name)),
        stored_bits=StoredBits(total=stored_bits, decoder_linears=8 * linear_bytes),
        bits_per_weight=stored_bits / dense.total,
        bits_per_linear_weight=8 * linear_bytes / dense.decoder_linears,
        rho=1 - total / dense.total,
        rho_blocks=1 - in_blocks / dense.blocks,
        rho_nonzero=1 - nonzero / dense.total,
    )


def is_weights(name: str) -> bool:
    return name.startswith("model") and name.endswith(".safetensors")


def peak_memory() -> int:
    """The most bytes that this process has held: resident on the CPU, plus allocated on CUDA."""
    unit = 1 if sys.platform == "darwin" else 1024
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return resident + (torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0)
