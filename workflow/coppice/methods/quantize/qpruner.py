"""QPruner: mixed precision, with more bits for linears whose outputs share more information with the prediction.

Zhou et al., QPruner: Probabilistic Decision Quantization for Structured Pruning in Large Language Models (arXiv
2412.11629). Each linear l gets b_l bits of a few candidates, sum n_l b_l <= B sum n_l for n_l weights and B bits on
average, by one of three searches:

- mutual-information: I(X_l; Y) in nats, largest first to the most bits that still fit. X_l: the mean of the linear's
  outputs at a token, Y: the log-probability of the token that the model finds most likely there. Both are cut into bins
  of equally many tokens; I = H(X) + H(Y) - H(X, Y), each H with Miller and Madow's correction (cells - 1) / (2 tokens);
- knapsack: the least sum of tr((W - Q_b) H (W - Q_b)^T), H = E[x x^T], exactly (see `solvers.knapsack`);
- bayesian: a Gaussian process over the assignments, from these two on. The objective is the loss on the calibration
  windows with every weight rounded to nearest; a proposal gives up bits where that sum grows least until it fits, and
  spends what is left where it falls most.

The paper's other steps are steps of a recipe: structured pruning before (`llm-pruner`), recovery after (`lora`). Its
objective is the score after a short recovery, its mutual information that of whole layers.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict

from pydantic import Field, field_validator, model_validator

from coppice.errors import UserError, error_context
from coppice.lazy import LazyModule, torch
from coppice.methods.declaration import LayerMethod, Resources, Source
from coppice.methods.incompatible import QUANTIZE
from coppice.methods.solvers.demand import rounding_losses
from coppice.methods.solvers.grid import GroupOptions, dequantize
from coppice.methods.solvers.knapsack import knapsack
from coppice.methods.solvers.rounding import SweepOptions, SweptGridOptions, round_to_nearest, sweep_to_grid
from coppice.methods.solvers.selection import share_of
from coppice.models.contracts import Decoder, Linear, LinearStatistics
from coppice.models.replacements import Quantized
from coppice.records.base import Json

if TYPE_CHECKING:
    from torch import Tensor

optuna: Any = LazyModule("optuna")

SOURCE = Source(
    "QPruner: Probabilistic Decision Quantization for Structured Pruning in Large Language Models",
    "arXiv 2412.11629",
    "the layer-wise bits by I(X_l; Y) under a memory budget, refined by Bayesian optimization",
    "The authors report at least 30 % less memory than LLM-Pruner, at up to about 6 % better accuracy.",
)


class Options(GroupOptions, SweepOptions):
    bits_average: float = Field(ge=2, le=8, description="Bits of a code, on average over the weights of all linears.")
    candidates: list[int] = Field(default=[4, 8], description="The bits that a linear can have, from 2 to 8.")
    search: Literal["mutual-information", "knapsack", "bayesian"] = Field(
        default="mutual-information",
        description="mutual-information: most bits where outputs share most information with the prediction; knapsack: "
        "the least summed error of the outputs; bayesian: the least loss of the model of `trials`, from these two on.",
    )
    quantizer: Literal["rtn", "gptq"] = Field(
        default="rtn", description="Round to nearest, or GPTQ's sweep (act_order, damping and block are the sweep's)."
    )
    bins: int = Field(default=16, ge=2, description="Bins of each variable, for the mutual information.")
    trials: int = Field(
        default=16,
        ge=2,
        description="Assignments whose loss is measured by the bayesian search, its two starts included.",
    )

    @field_validator("candidates")
    @classmethod
    def _are_bits(cls, candidates: list[int]) -> list[int]:
        if not candidates or len(set(candidates)) < len(candidates) or not set(candidates) <= set(range(2, 9)):
            raise ValueError(f"the candidates {candidates} are not one or more different integers from 2 to 8")
        return sorted(candidates)

    @model_validator(mode="after")
    def _within_reach(self) -> Options:
        if self.bits_average < self.candidates[0]:
            raise ValueError(
                f"no linear can have fewer than {self.candidates[0]} bits of the candidates {self.candidates}, so "
                f"bits_average cannot be {self.bits_average:g}: raise it, or give smaller candidates"
            )
        return self

    @property
    def needs(self) -> frozenset[str]:
        return super().needs | (frozenset() if self.search == "knapsack" else frozenset({"windows"}))


class Planned(TypedDict):
    """The bits of a linear, and the record of how they were chosen."""

    bits: int
    record: Json


def plan(decoder: Decoder, options: Options) -> dict[str, Planned]:
    """For each linear its `bits`, and the `record` of how they were chosen.

    Raises UserError when the windows, the weights or the statistics give no numbers to choose by.
    """
    names = decoder.names
    costs = [
        [bits * size for bits in options.candidates] for size in (decoder.linear(name).weight.numel() for name in names)
    ]
    size = sum(row[0] for row in costs) // options.candidates[0]
    capacity = share_of(options.bits_average, size)
    records: list[Json] = [{} for _ in names]
    starts: dict[str, list[int]] = {}
    if options.search != "knapsack":
        information, tokens = output_information(decoder, options.bins)
        starts["mutual-information"] = by_information(information, costs, capacity)
        records = [{"mutual_information": each, "tokens": tokens, "bins": options.bins} for each in information]
    if options.search != "mutual-information":
        errors = [_errors(decoder, name, options) for name in names]
        starts["knapsack"] = knapsack(costs, errors, capacity)
    overall: Json = {}
    if options.search == "bayesian":
        starts = {start: repair_levels(levels, costs, errors, capacity) for start, levels in starts.items()}
        losses = refine(decoder, options, list(starts.values()), errors, costs, capacity)
        best = min(losses, key=losses.__getitem__)
        chosen = list(best)
        overall = {"trials": options.trials, "loss": min(losses.values())}
        overall |= {f"loss_{start.replace('-', '_')}": losses[tuple(levels)] for start, levels in starts.items()}
    else:
        chosen = starts[options.search]
    cost = sum(row[level] for row, level in zip(costs, chosen, strict=True))
    overall |= {
        "search": options.search,
        "bits_average_asked": options.bits_average,
        "bits_average": cost / size,
    }
    return {
        name: {"bits": options.candidates[level], "record": record | overall}
        for name, level, record in zip(names, chosen, records, strict=True)
    }


def compress(linear: Linear, statistics: LinearStatistics, options: Options) -> Quantized:
    """Rounds the weight to the bits that `plan` chose; pruned weights stay zero.

    Raises UserError when the group size does not divide the width and `indivisible` is "error", or when the statistics
    are unfit (see `solvers.rounding`).
    """
    grid = _grid(options, linear.plan["bits"])
    if options.quantizer == "rtn":
        quantized = round_to_nearest(linear, grid)
    else:
        quantized = sweep_to_grid(linear, statistics.second_moment, grid)
    return replace(quantized, record={**quantized.record, **linear.plan["record"]})


def _grid(options: Options, bits: int) -> SweptGridOptions:
    shared = (*GroupOptions.__annotations__, *SweepOptions.__annotations__)
    return SweptGridOptions(bits=bits, **{field: getattr(options, field) for field in shared})


def _errors(decoder: Decoder, name: str, options: Options) -> list[float]:
    """tr((W - Q_b) H (W - Q_b)^T) at each candidate b."""
    grid = _grid(options, options.candidates[0])
    with error_context(name):
        moment = decoder.statistics(name).second_moment
        return rounding_losses(decoder.linear(name), moment, grid, options.candidates)


def output_information(decoder: Decoder, bins: int) -> tuple[list[float], int]:
    """I(X_l; Y) of each linear, and the number of tokens.

    Raises UserError when no window has two tokens, or when an output is not finite.
    """
    outputs: dict[str, list[Tensor]] = {name: [] for name in decoder.names}
    predictions = []

    def observe(name: str, y: Tensor) -> Tensor:
        # The last token of a window predicts nothing that is known.
        outputs[name].append(y[:-1].double().mean(dim=-1).cpu())
        return y

    with torch.no_grad():
        for window in range(decoder.windows):
            logits = decoder.logits(window, observe)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            predictions.append((logits.amax(dim=-1) - logits.logsumexp(dim=-1)).double().cpu())
    y = torch.cat(predictions) if predictions else torch.empty(0)
    if not len(y):
        raise UserError("No calibration window has two tokens, so the mutual information cannot be measured.")
    information = []
    for name in decoder.names:
        x = torch.cat(outputs[name])
        if not (torch.isfinite(x).all() and torch.isfinite(y).all()):
            raise UserError(f"{name}: its outputs or the predictions are not finite; calibrate in a wider dtype.")
        information.append(mutual_information(x, y, bins))
    return information, len(y)


def mutual_information(x: Tensor, y: Tensor, bins: int) -> float:
    """I(X; Y) in nats of samples x, y [n], from bins of equally many samples; equal values share a bin.

    The correction leaves the mean for independent X and Y near 0, so single values may be below it.
    """
    cells = [_bin_values(values, bins) for values in (x, y)]
    counts = torch.bincount(cells[0] * bins + cells[1], minlength=bins**2).view(bins, bins)
    return _entropy(counts.sum(1)) + _entropy(counts.sum(0)) - _entropy(counts)


def _bin_values(values: Tensor, bins: int) -> Tensor:
    """[n] int64 in 0 .. bins - 1."""
    firsts = torch.arange(1, bins, device=values.device) * len(values) // bins
    return torch.searchsorted(values.sort().values[firsts], values, right=True)


def _entropy(counts: Tensor) -> float:
    """Miller and Madow's estimate of the entropy, in nats."""
    counts = counts[counts > 0].double()
    number = counts.sum()
    plain = number.log() - (counts * counts.log()).sum() / number
    return (plain + (len(counts) - 1) / (2 * number)).item()


def by_information(information: Sequence[float], costs: Sequence[Sequence[int]], capacity: int) -> list[int]:
    """Levels: in order of information, from the largest down, the highest that leaves the others their lowest."""
    levels = [0] * len(costs)
    left = capacity - sum(row[0] for row in costs)
    for index in sorted(range(len(costs)), key=lambda index: -information[index]):
        row = costs[index]
        levels[index] = max(level for level in range(len(row)) if row[level] - row[0] <= left)
        left -= row[levels[index]] - row[0]
    return levels


def repair_levels(
    levels: Sequence[int], costs: Sequence[Sequence[int]], errors: Sequence[Sequence[float]], capacity: int
) -> list[int]:
    """The levels, lowered step by step where the error grows least for what is saved, until they fit; then raised where
    it falls most for what is spent, until no step fits."""
    levels = list(levels)
    left = capacity - sum(row[level] for row, level in zip(costs, levels, strict=True))

    def price(index: int, level: int) -> int:
        return costs[index][level] - costs[index][level - 1]

    def gain(index: int, level: int) -> float:
        """What the step up to this level takes off the error, for its price."""
        return (errors[index][level - 1] - errors[index][level]) / price(index, level)

    while left < 0:
        index = min((index for index, level in enumerate(levels) if level), key=lambda i: gain(i, levels[i]))
        left += price(index, levels[index])
        levels[index] -= 1
    while fitting := [
        index for index, level in enumerate(levels) if level + 1 < len(costs[index]) and price(index, level + 1) <= left
    ]:
        index = max(fitting, key=lambda i: gain(i, levels[i] + 1))
        levels[index] += 1
        left -= price(index, levels[index])
    return levels


def refine(
    decoder: Decoder,
    options: Options,
    starts: Sequence[Sequence[int]],
    errors: Sequence[Sequence[float]],
    costs: Sequence[Sequence[int]],
    capacity: int,
) -> dict[tuple[int, ...], float]:
    """The loss of every assignment of levels that was tried, the starts first.

    Raises UserError when none of the losses is finite.
    """
    losses: dict[tuple[int, ...], float] = {}
    last = len(options.candidates) - 1

    def objective(trial: Any) -> float:
        proposal = [trial.suggest_int(name, 0, last) for name in decoder.names]
        levels = tuple(repair_levels(proposal, costs, errors, capacity))
        if levels not in losses:
            losses[levels] = _loss(decoder, options, levels)
        return losses[levels]

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = optuna.samplers.GPSampler(seed=decoder.seed, n_startup_trials=len(starts))
    study = optuna.create_study(sampler=sampler)
    for start in starts:
        study.enqueue_trial(dict(zip(decoder.names, start, strict=True)))
    study.optimize(objective, n_trials=options.trials)
    if math.isinf(min(losses.values())):
        raise UserError("The loss is not finite under any assignment of bits that was tried: give larger candidates.")
    return losses


def _loss(decoder: Decoder, options: Options, levels: Sequence[int]) -> float:
    """The loss with every weight rounded to nearest; infinite where it is not a number."""
    weights = {
        name: dequantize(round_to_nearest(decoder.linear(name), _grid(options, options.candidates[level])))
        for name, level in zip(decoder.names, levels, strict=True)
    }
    with torch.no_grad():
        loss = decoder.loss(weights=weights).item()
    return loss if math.isfinite(loss) else math.inf


METHOD = LayerMethod(
    source=SOURCE,
    options=Options,
    needs=frozenset({"moments"}),
    adds_traits=frozenset({"quantized"}),
    incompatible_with=QUANTIZE,
    compress=compress,
    plan=plan,
    draws=True,
    resources=Resources(reach="model"),
)
