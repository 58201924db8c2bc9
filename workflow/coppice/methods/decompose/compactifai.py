"""CompactifAI: linears as matrix product operators.

Tomut et al., CompactifAI: Extreme Compression of Large Language Models using Quantum-Inspired Tensor Networks (arXiv
2401.14109). W [m, n] becomes K cores [chi_k-1, o_k, i_k, chi_k] (see `solvers.tensor_train`), whose bonds chi say how
much is kept. K = 2 is a sum of chi Kronecker products.

The paper publishes neither site shapes nor bonds: these are chosen here, by rule or by a profile of the loss against
the bond. An operator saves storage; its products may cost more than the dense ones, which is on record.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Literal, TypedDict

from pydantic import Field, model_validator

from coppice.errors import UserError, error_context
from coppice.lazy import torch
from coppice.methods.declaration import LayerMethod, Resources, Source
from coppice.methods.incompatible import DECOMPOSE
from coppice.methods.options import LayerOptions
from coppice.methods.solvers.moments import input_power
from coppice.methods.solvers.selection import share_of
from coppice.methods.solvers.tensor_train import (
    Approximation,
    Sites,
    contract,
    decompose,
    outer,
    product_scaling,
    split,
    unscale,
)
from coppice.models.contracts import Decoder, Linear, LinearStatistics
from coppice.models.replacements import TensorTrain, Unchanged
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Source(
    "CompactifAI: Extreme Compression of Large Language Models using Quantum-Inspired Tensor Networks",
    "arXiv 2401.14109",
    "matrix product operators by sequential singular value decompositions",
    "The authors report Llama 2 7B with 70 % fewer parameters, healed and partly in 4 bits, at 2 to 3 % less accuracy.",
)


class Options(LayerOptions):
    """Exactly one of keep and bond; a profile spreads keep over the linears."""

    sites: int = Field(default=2, ge=2, le=4, description="Cores of every linear.")
    keep: float | None = Field(
        default=None, gt=0, le=1, description="Share of the linear's parameters that its cores have, at most."
    )
    bond: int | None = Field(default=None, ge=1, description="Largest bond dimension of every linear.")
    exclude: list[str] = Field(
        default=["down_proj"], description="Linears that stay dense and do not count towards keep."
    )
    scaling: Literal["none", "absmean"] = Field(
        default="none",
        description="Decompose the weight times the mean magnitude of its inputs, as far as that is a product of one "
        "factor for each site, and divide the cores by it again.",
    )
    profile: list[float] | None = Field(
        default=None,
        min_length=1,
        description="Shares to try on each linear alone. The loss on calibration windows then decides which linear "
        "gets which, or stays dense, so that all together have the share keep.",
    )
    profile_windows: int = Field(default=8, ge=1, description="Calibration windows, the first ones, of the profile.")

    @property
    def needs(self) -> frozenset[str]:
        profile = frozenset() if self.profile is None else frozenset({"windows"})
        scaling = frozenset() if self.scaling == "none" else frozenset({"moments"})
        return super().needs | profile | scaling

    @model_validator(mode="after")
    def _one_budget(self) -> Options:
        if (self.keep is None) == (self.bond is None):
            raise ValueError("give exactly one of 'keep' and 'bond'")
        if self.profile is not None and self.keep is None:
            raise ValueError("a profile spreads 'keep' over the linears; give 'keep' instead of 'bond'")
        if self.profile is not None and not all(0 < share < 1 for share in self.profile):
            raise ValueError(f"the shares of a profile are above 0 and below 1, not {self.profile}")
        return self


class Choice(TypedDict):
    """What a linear can be: dense (bond None) or an operator of a bond; its parameters and the loss that it adds."""

    bond: int | None
    parameters: int
    loss_increase: float


class Planned(TypedDict):
    """The bond of a linear (None: dense), and the choices that it was taken from."""

    bond: int | None
    profile: list[Choice]


def plan(decoder: Decoder, options: Options) -> dict[str, Planned]:
    """For each linear that is not excluded, its bond (None: dense) and the loss increases that decided it.

    Empty without a profile. Raises UserError when a loss is not finite, or when the smallest shares exceed the budget.
    """
    if options.profile is None:
        return {}
    windows = range(min(options.profile_windows, decoder.windows))
    names = [name for name in decoder.names if not _is_excluded(name, options)]
    with torch.no_grad():
        dense = decoder.loss(windows).item()
        if not math.isfinite(dense):
            raise UserError(f"The parent's loss on the calibration windows is {dense}; check the parent's step.")
        profiles = {name: _profile(decoder, name, dense, windows, options) for name in names}
    sizes = [[entry["parameters"] for entry in profiles[name]] for name in names]
    increases = [[entry["loss_increase"] for entry in profiles[name]] for name in names]
    assert options.keep is not None  # a profile spreads `keep`
    budget = share_of(options.keep, sum(max(choices) for choices in sizes))
    chosen = least_increase(sizes, increases, budget)
    return {
        name: {"bond": profiles[name][index]["bond"], "profile": profiles[name]}
        for name, index in zip(names, chosen, strict=True)
    }


def compress(linear: Linear, statistics: LinearStatistics | None, options: Options) -> TensorTrain | Unchanged:
    """The cores of a linear; one that is excluded, planned to stay, or whose bond reaches break-even, stays dense.

    Raises UserError when the weight holds values that are not finite, or when the statistics are unfit.
    """
    if _is_excluded(linear.name, options):
        kind = linear.name.rpartition(".")[-1]
        return Unchanged(record={"unchanged": f"`exclude` names {kind}.", "keep": 1.0})
    planned = {} if linear.plan is None else {"profile": linear.plan["profile"]}
    rows, columns = linear.weight.shape
    sites = split(rows, columns, options.sites)
    bond = chosen_bond(options, sites) if linear.plan is None else linear.plan["bond"]
    if bond is None:
        reason = "The profile spends the parameters better elsewhere by leaving this linear dense."
        return Unchanged(record={"unchanged": reason, "keep": 1.0, **planned})
    if bond >= break_even(sites):
        reason = (
            f"Bond {bond} reaches {break_even(sites)}, where {options.sites} cores of {linear.weight.shape[0]} x "
            f"{linear.weight.shape[1]} save no parameters."
        )
        return Unchanged(record={"unchanged": reason, "bond_asked": bond, "keep": 1.0, **planned})
    operator, scaling = operator_of(linear.weight, statistics, sites, bond, options)
    bonds = sites.bonds(bond)
    record: Json = {
        "bond_asked": bond,
        "bond": max(bonds),
        "bonds": list(bonds),
        "out_shape": list(sites.outputs),
        "in_shape": list(sites.inputs),
        "keep": sites.parameters(bond) / sites.weights,
        "truncation_error": operator.error,
        "macs_per_token": sites.multiply_adds(bond),
        "dense_macs_per_token": sites.weights,
    }
    return TensorTrain(operator.cores, record={**record, **scaling, **planned, **_indivisible_note(sites)})


def chosen_bond(options: Options, sites: Sites) -> int:
    """The requested bond, or the largest that the share affords, at least 1."""
    if options.bond is not None:
        return options.bond
    assert options.keep is not None  # exactly one of both is given
    return sites.largest_bond(share_of(options.keep, sites.weights))


def break_even(sites: Sites) -> int:
    """The bond from which nothing is saved."""
    bond = sites.largest_bond(sites.weights)
    return bond if sites.parameters(bond) <= sites.weights else 0


def operator_of(
    weight: Tensor, statistics: LinearStatistics | None, sites: Sites, bond: int, options: Options
) -> tuple[Approximation, dict[str, float]]:
    """The operator of that bond and the record of its scaling; its error is that of the scaled weight."""
    if options.scaling == "none":
        return decompose(weight, sites, bond), {}
    assert statistics is not None  # scaling needs moments
    scale, dead = input_scale(statistics)
    vectors, explained = product_scaling(scale, sites.inputs)
    scaled = decompose(weight * outer(vectors).to(weight.dtype), sites, bond)
    record = {"scaling_explained": explained, "dead_inputs": dead}
    return Approximation(unscale(scaled.cores, vectors), scaled.error), record


def input_scale(statistics: LinearStatistics) -> tuple[Tensor, int]:
    """E|x_j| [n] over its mean, with the least of the others for inputs that are always 0, and how many those are.

    Raises UserError when the statistics are unfit (see `solvers.moments`), or the magnitudes are not finite or all 0.
    """
    input_power(statistics.second_moment)
    scale = statistics.absmean.double()
    dead = scale == 0
    if not torch.isfinite(scale).all() or (scale < 0).any() or dead.all():
        raise UserError(
            "The mean magnitudes of this layer's inputs are damaged (not finite, negative or all zero); calibrate "
            "again."
        )
    return scale.masked_fill(dead, scale[~dead].min().item()) / scale.mean(), int(dead.sum())


def least_increase(sizes: list[list[int]], increases: list[list[float]], budget: int) -> list[int]:
    """Which choice each item takes, so that the sum of sizes is within the budget and that of increases is small.

    Items go down their lower convex hulls in the order of increase for each parameter saved until the budget is met,
    which is the least increase of all for the size so reached; what is left is spent where it lowers the increase most.
    Choices whose increase is not finite are not taken. Raises UserError when the smallest choices exceed the budget.
    """
    current, steps = [], []
    for item, (size, increase) in enumerate(zip(sizes, increases, strict=True)):
        allowed = [index for index in range(len(size)) if math.isfinite(increase[index])]
        place = min(allowed, key=lambda index: (increase[index], size[index]))
        current.append(place)
        while smaller := [index for index in allowed if size[index] < size[place]]:
            slope, _, following = min(
                ((increase[index] - increase[place]) / (size[place] - size[index]), size[index], index)
                for index in smaller
            )
            steps.append((slope, item, following))
            place = following
    total = sum(size[index] for size, index in zip(sizes, current, strict=True))
    for _, item, following in sorted(steps, key=lambda step: step[0]):
        if total <= budget:
            break
        total += sizes[item][following] - sizes[item][current[item]]
        current[item] = following
    if total > budget:
        raise UserError(
            f"The smallest shares of the profile leave {total:,} parameters where keep allows {budget:,}; add a "
            "smaller share to profile, or raise keep."
        )
    while True:
        gains = [
            (increases[item][current[item]] - increase, item, index)
            for item in range(len(sizes))
            for index, increase in enumerate(increases[item])
            if increase < increases[item][current[item]]
            and total + sizes[item][index] - sizes[item][current[item]] <= budget
        ]
        if not gains:
            return current
        _, item, index = max(gains)
        total += sizes[item][index] - sizes[item][current[item]]
        current[item] = index


def _profile(decoder: Decoder, name: str, dense: float, windows: range, options: Options) -> list[Choice]:
    """The dense linear, then its operator at each share that saves parameters: bond, parameters and loss increase."""
    weight = decoder.linear(name).weight
    statistics = None if options.scaling == "none" else decoder.statistics(name)
    rows, columns = weight.shape
    sites = split(rows, columns, options.sites)
    bonds = {sites.largest_bond(share_of(share, sites.weights)) for share in options.profile or ()}
    entries: list[Choice] = [{"bond": None, "parameters": sites.weights, "loss_increase": 0.0}]
    for bond in sorted(bonds, reverse=True):
        if bond >= break_even(sites):
            continue
        with error_context(name):
            operator, _ = operator_of(weight, statistics, sites, bond, options)
        loss = decoder.loss(windows, weights={name: contract(operator.cores)}).item()
        entries.append({"bond": bond, "parameters": sites.parameters(bond), "loss_increase": loss - dense})
    return entries


def _is_excluded(name: str, options: Options) -> bool:
    return name.rpartition(".")[-1] in options.exclude


def _indivisible_note(sites: Sites) -> dict[str, str]:
    """The sentence about widths that do not split into as many factors as there are sites."""
    widths = {"outputs": sites.outputs, "inputs": sites.inputs}
    sentences = [
        f"{math.prod(shape)} {side} have no {len(shape)} factors above 1, so some sites see one of them"
        for side, shape in widths.items()
        if 1 in shape
    ]
    return {"indivisible": "; ".join(sentences) + "."} if sentences else {}


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    adds_traits=frozenset({"factorized"}),
    incompatible_with=DECOMPOSE,
    compress=compress,
    plan=plan,
    resources=Resources(reach="model"),
)
