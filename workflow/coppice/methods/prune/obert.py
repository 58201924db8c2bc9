"""oBERT: second-order pruning with an empirical-Fisher update of the weights that stay.

Kurtic et al., The Optimal BERT Surgeon: Scalable and Accurate Second-Order Pruning for Large Language Models (arXiv
2203.07259), section 3. The weights of a linear, [m, n] flattened row after row, are cut into blocks of
B. With g_k [B] the gradients of a block on K batches of windows, its empirical Fisher matrix is

    F = lambda I + (1 / K) sum_k g_k g_k^T    [B, B]

and removing the weights b, one or a group of 4, raises the loss by rho = w_b^T ([F^-1]_bb)^-1 w_b / 2 when the others
follow by d = -F^-1[:, b] ([F^-1]_bb)^-1 w_b. The lowest rho over all linears are pruned. The sum of d over all pruned
weights is the paper's update ("independent"); -F^-1 E_Q ([F^-1]_QQ)^-1 w_Q for all of them, Q, at once is the best one
("joint").

The paper updates F^-1 by one gradient at a time; here F is summed and inverted once, which is the same matrix. It takes
8 B bytes for each weight of all linears together, the most that this method holds. Pruning in one step: the paper's
schedule is a chain of nodes with training between them.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Literal

from pydantic import Field, model_validator

from coppice.errors import UserError
from coppice.lazy import torch
from coppice.methods.declaration import LayerMethod, Resources, Source
from coppice.methods.incompatible import PRUNE
from coppice.methods.options import LayerOptions
from coppice.methods.solvers.mask import keep_largest, nothing_to_prune
from coppice.methods.solvers.selection import share_of
from coppice.models.contracts import Decoder, Linear, LinearStatistics
from coppice.models.replacements import Masked, Unchanged
from coppice.records.base import JsonMapping

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "The Optimal BERT Surgeon: Scalable and Accurate Second-Order Pruning for Large Language Models",
    "arXiv 2203.07259",
    "section 3: rho_b = w_b^T ([F^-1]_bb)^-1 w_b / 2",
    "The authors' repository reports for BERT-base on SQuAD, pruned over 30 epochs of training, F1 89.04 at 80 % and "
    "88.31 at 90 %, against 88.54 of the dense model.",
)

# Of the [B, B] matrices that are inverted at a time.
_CHUNK_BYTES = 2**28


class Options(LayerOptions):
    sparsity: float = Field(ge=0, lt=1, description="Share of weights to prune over the scope; 0 changes nothing.")
    scope: Literal["global", "layer"] = Field(
        default="global", description="Which weights are compared: those of all linears, or those of each."
    )
    unit: Literal[1, 4] = Field(
        default=1, description="Consecutive inputs of an output that are pruned together: 1 or 4."
    )
    block: int = Field(
        default=50,
        ge=1,
        description="Consecutive weights whose curvature is known together; a multiple of unit. Memory: 8 bytes times "
        "this for each weight.",
    )
    dampening: float = Field(
        default=1e-7,
        gt=0,
        description="Added to the Fisher matrix's diagonal; the larger, the closer to magnitude pruning.",
    )
    batch: int = Field(default=1, ge=1, description="Calibration windows whose mean loss gives one gradient.")
    update: Literal["independent", "joint"] = Field(
        default="independent",
        description="Let what stays follow each pruned unit as if it went alone, as in the paper, or all at once.",
    )

    @model_validator(mode="after")
    def _units_fill_a_block(self) -> Options:
        if self.block % self.unit:
            raise ValueError(
                f"a block of {self.block} weights is not a multiple of unit {self.unit}; make it one, such as "
                f"{max(self.block // self.unit, 1) * self.unit}"
            )
        return self


@dataclass(frozen=True)
class Planned:
    """weight and mask: [m, n] of a linear after pruning, and numbers for its record."""

    weight: Tensor
    mask: Tensor
    record: JsonMapping


def plan(decoder: Decoder, options: Options) -> dict[str, Planned]:
    """Ranks the units of all linears and updates what stays.

    What a parent has pruned counts first and stays pruned. Raises UserError when unit 4 does not divide a width, when
    gradients are not finite, or when the dampening is lost in the rounding of the Fisher matrix.
    """
    if options.sparsity == 0:
        return {}
    linears = {name: decoder.linear(name) for name in decoder.names}
    for name, linear in linears.items():
        width = linear.weight.shape[1]
        if width % options.unit:
            raise UserError(
                f"Groups of {options.unit} inputs need a number of inputs that {options.unit} divides, and {name} has "
                f"{width}: prune single weights with unit: 1."
            )
    curvature, count = fisher(decoder, linears, options)
    homes = {name: linear.weight.device for name, linear in linears.items()}
    linears = {name: _on(linear, curvature[name].device) for name, linear in linears.items()}
    scores = {}
    for name, linear in linears.items():
        # In the place of the matrices themselves.
        invert(curvature[name], name, options.dampening)
        scores[name] = saliency(curvature[name], linear.weight, options.unit)
    kept = _select(scores, linears, options)

    planned = {}
    for name, linear in linears.items():
        mask = kept[name].repeat_interleave(options.unit, dim=1)
        if linear.mask is not None:
            mask &= linear.mask
        weight = _update_weight(curvature.pop(name), linear.weight, mask, options)
        # What the parent had pruned adds nothing: its score is zero.
        predicted = scores[name].masked_fill(kept[name], 0).sum().item()
        record = {"gradients": count, "predicted_loss_increase": predicted}
        planned[name] = Planned(weight.to(homes[name]), mask.to(homes[name]), record)
    return planned


def compress(linear: Linear, statistics: LinearStatistics | None, options: Options) -> Masked | Unchanged:
    """What was planned for the linear."""
    if options.sparsity == 0:
        return nothing_to_prune()
    planned, device = linear.plan, linear.weight.device
    pruned = planned.mask.numel() - int(planned.mask.sum())
    record = {"sparsity_asked": options.sparsity, "sparsity": pruned / planned.mask.numel(), **planned.record}
    return Masked(planned.weight.to(device), planned.mask.to(device), record=record)


def fisher(decoder: Decoder, linears: dict[str, Linear], options: Options) -> tuple[dict[str, Tensor], int]:
    """F of every block of each linear, [blocks, B, B] float64, without lambda, and the number of gradients K.

    Gradients of pruned weights count as zero. The last block is padded with weights that have no gradient. The matrices
    are where the gradients are.
    """
    fishers: dict[str, Tensor] = {}
    count = 0
    for gradients in decoder.gradients(options.batch):
        for name, linear in linears.items():
            gradient = gradients[name]
            if linear.mask is not None:
                gradient = gradient.masked_fill(~linear.mask.to(gradient.device), 0)
            parts = _blocks(gradient, options.block)
            if name not in fishers:
                fishers[name] = parts.new_zeros(*parts.shape, options.block)
            fishers[name].baddbmm_(parts[:, :, None], parts[:, None, :])
        count += 1
    for matrices in fishers.values():
        matrices /= count
    return fishers, count


def invert(matrices: Tensor, name: str, dampening: float) -> None:
    """Puts (lambda I + F)^-1 in the place of each F [blocks, B, B]. Raises UserError where rounding hides lambda."""
    size = matrices.shape[-1]
    for chunk in matrices.split(_chunk(size)):
        chunk.diagonal(dim1=1, dim2=2).add_(dampening)
        lower, failed = torch.linalg.cholesky_ex(chunk)
        diagonal = chunk.diagonal(dim1=1, dim2=2)
        floor = size * torch.finfo(chunk.dtype).eps * diagonal.amax(1)
        if failed.any() or (lower.diagonal(dim1=1, dim2=2).square().amin(1) <= floor).any():
            raise UserError(
                f"A dampening of {dampening:g} is lost in rounding next to the Fisher matrix of {name}, whose diagonal "
                f"reaches {diagonal.max():.3g}: raise it to {10 * floor.max():.1g} or more."
            )
        chunk.copy_(torch.cholesky_inverse(lower))


def saliency(inverse: Tensor, weight: Tensor, unit: int) -> Tensor:
    """rho of every unit, [m, n / unit] float64: how much the loss rises when it alone goes and the others follow."""
    parts = _blocks(weight, inverse.shape[-1])
    scores = (parts * _alone(inverse, parts, unit)).unflatten(1, (-1, unit)).sum(2) / 2
    return scores.flatten()[: weight.numel() // unit].view(len(weight), -1)


def _on(linear: Linear, device: torch.device) -> Linear:
    mask = None if linear.mask is None else linear.mask.to(device)
    return replace(linear, weight=linear.weight.to(device), mask=mask)


def _blocks(weight: Tensor, size: int) -> Tensor:
    """[m, n] -> [blocks, B] float64, the last block padded with zeros."""
    flat = weight.flatten().double()
    return torch.nn.functional.pad(flat, (0, -len(flat) % size)).view(-1, size)


def _alone(inverse: Tensor, weight: Tensor, unit: int) -> Tensor:
    """([F^-1]_bb)^-1 w_b of each unit b: [blocks, B] of F^-1 [blocks, B, B] and w [blocks, B]."""
    if unit == 1:
        return weight / inverse.diagonal(dim1=1, dim2=2)
    # [blocks, B / u, u, u], the units on the diagonal.
    own = inverse.unflatten(2, (-1, unit)).unflatten(1, (-1, unit)).diagonal(dim1=1, dim2=3).movedim(-1, 1)
    return torch.linalg.solve(own, weight.unflatten(1, (-1, unit)).unsqueeze(-1)).squeeze(-1).flatten(1)


def _select(scores: dict[str, Tensor], linears: dict[str, Linear], options: Options) -> dict[str, Tensor]:
    """Which units stay, [m, n / unit] bool by linear: the lowest floor(sparsity * units) of each scope go."""
    scopes = [list(scores)] if options.scope == "global" else [[name] for name in scores]
    kept = {}
    for names in scopes:
        together = torch.cat([scores[name].flatten() for name in names])[None]
        alive = torch.cat([_alive(linears[name], options.unit).flatten() for name in names])[None]
        count = share_of(options.sparsity, together.numel())
        mask = keep_largest(together, together.numel(), count, alive)[0]
        for name, part in zip(names, mask.split([scores[name].numel() for name in names]), strict=True):
            kept[name] = part.view_as(scores[name])
    return kept


def _alive(linear: Linear, unit: int) -> Tensor:
    """[m, n / unit] bool: the units that the parent has not pruned whole."""
    mask = torch.ones_like(linear.weight, dtype=torch.bool) if linear.mask is None else linear.mask
    return mask.unflatten(1, (-1, unit)).any(2)


def _update_weight(inverse: Tensor, weight: Tensor, mask: Tensor, options: Options) -> Tensor:
    """[m, n] w + d, with exact zeros where mask is False."""
    before = _blocks(weight, options.block)
    gone = _blocks(~mask, options.block)
    if options.update == "joint":
        chunk = _chunk(options.block)
        parts = zip(inverse.split(chunk), before.split(chunk), gone.split(chunk), strict=True)
        force = torch.cat([_together(*part) for part in parts])
    else:
        force = _alone(inverse, before, options.unit) * gone
    after = torch.baddbmm(before[:, :, None], inverse, force[:, :, None], alpha=-1)
    return after.flatten()[: weight.numel()].view_as(weight).to(weight.dtype).masked_fill(~mask, 0)


def _together(inverse: Tensor, weight: Tensor, gone: Tensor) -> Tensor:
    """E_Q ([F^-1]_QQ)^-1 w_Q of all that goes (gone = 1) in each block: [blocks, B]."""
    system = inverse * gone[:, :, None] * gone[:, None, :]
    # The identity in the other places, where nothing acts.
    system.diagonal(dim1=1, dim2=2).add_(1 - gone)
    return torch.linalg.solve(system, weight * gone)


def _chunk(size: int) -> int:
    """How many [size, size] matrices are solved at a time."""
    return max(_CHUNK_BYTES // (8 * size * size), 1)


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"windows"}),
    adds_traits=frozenset({"masked"}),
    incompatible_with=PRUNE,
    compress=compress,
    plan=plan,
    resources=Resources(reach="model"),
)
