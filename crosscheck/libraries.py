"""Other libraries' own functions, called as Coppice's layer methods are: on W [m, n] and H = E[x x^T] [n, n].

llm-compressor's functions work in place: a moment given here is used up. Its Wanda wants |X_j|^2 and its patterns the
number of weights pruned of M, not kept; its codes are signed, so that asymmetric ones lie 2^(b-1) below Coppice's.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy, quantize
from compressed_tensors.quantization.utils import calculate_qparams
from llmcompressor.modifiers.gptq.gptq_quantize import quantize_weight
from llmcompressor.modifiers.pruning.sparsegpt import sgpt_sparsify
from llmcompressor.modifiers.pruning.wanda import wanda_sparsify
from torch import Tensor


@dataclass(frozen=True)
class Rounded:
    """weight: [m, n] as it is read back; codes [m, n], scale and zero_point [m, groups] by Coppice's convention."""

    weight: Tensor
    codes: Tensor
    scale: Tensor
    zero_point: Tensor


def wanda(weight: Tensor, moment: Tensor, sparsity: float, pattern: tuple[int, int] | None = None) -> Tensor:
    """[m, n] pruned. pattern: (kept, of), in place of the sparsity."""
    module = _linear(weight)
    return wanda_sparsify.sparsify_weight(module, {module: moment.diagonal()}, sparsity, *_pruned_of(pattern))


def sparsegpt(
    weight: Tensor,
    moment: Tensor,
    sparsity: float,
    pattern: tuple[int, int] | None = None,
    block: int = 128,
    damping: float = 0.01,
) -> Tensor:
    """[m, n] pruned. The library prunes one weight more in each block than its share (see the tests)."""
    module = _linear(weight)
    _, pruned = sgpt_sparsify.sparsify_weight(
        module, {module: moment}, sparsity, *_pruned_of(pattern), block, damping, preserve_sparsity_mask=False
    )
    return pruned


def gptq(
    weight: Tensor, moment: Tensor, bits: int, group_size: int, symmetric: bool, act_order: bool, damping: float = 0.01
) -> Rounded:
    """Groups are fitted to the original weights, in whatever order inputs are swept. group_size -1: the row."""
    arguments = _arguments(bits, group_size, symmetric, act_order)
    scale, zero_point = _fit(weight, group_size, arguments)
    swept, _, (fell_back,) = quantize_weight(
        weight[None].clone(), moment[None], scale[None], zero_point[None], None, arguments, percdamp=damping
    )
    if fell_back:
        raise RuntimeError("llm-compressor rounded to nearest: it found this moment not positive definite")
    width = weight.shape[1] if group_size == -1 else group_size
    per_input = [parameter.repeat_interleave(width, dim=1) for parameter in (scale, zero_point)]
    return _rounded(swept[0], torch.round(swept[0] / per_input[0]) + per_input[1], scale, zero_point, arguments)


def round_to_nearest(weight: Tensor, bits: int, group_size: int, symmetric: bool) -> Rounded:
    arguments = _arguments(bits, group_size, symmetric)
    scale, zero_point = _fit(weight, group_size, arguments)
    codes = quantize(weight, scale, zero_point, arguments)
    width = weight.shape[1] if group_size == -1 else group_size
    per_input = [parameter.repeat_interleave(width, dim=1) for parameter in (scale, zero_point)]
    return _rounded(per_input[0] * (codes - per_input[1]), codes, scale, zero_point, arguments)


def _linear(weight: Tensor) -> torch.nn.Linear:
    module = torch.nn.Linear(*weight.T.shape, bias=False, device="meta")
    module.weight = torch.nn.Parameter(weight, requires_grad=False)
    return module


def _pruned_of(pattern: tuple[int, int] | None) -> tuple[int, int]:
    """(0, 0) stands for no pattern."""
    return (0, 0) if pattern is None else (pattern[1] - pattern[0], pattern[1])


def _arguments(bits: int, group_size: int, symmetric: bool, act_order: bool = False) -> QuantizationArgs:
    strategy = QuantizationStrategy.CHANNEL if group_size == -1 else QuantizationStrategy.GROUP
    return QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy=strategy,
        group_size=None if group_size == -1 else group_size,
        actorder="static" if act_order else None,
    )


def _fit(weight: Tensor, group_size: int, arguments: QuantizationArgs) -> tuple[Tensor, Tensor]:
    """The library's min-max observer: scale and zero point [m, groups]."""
    groups = weight.unflatten(1, (-1, weight.shape[1] if group_size == -1 else group_size))
    return calculate_qparams(groups.amin(dim=-1), groups.amax(dim=-1), arguments)


def _rounded(weight: Tensor, codes: Tensor, scale: Tensor, zero_point: Tensor, arguments: QuantizationArgs) -> Rounded:
    shift = 0 if arguments.symmetric else 2 ** (arguments.num_bits - 1)
    return Rounded(weight, (codes + shift).int(), scale, zero_point.int() + shift)
