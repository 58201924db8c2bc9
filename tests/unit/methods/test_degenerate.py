"""Every layer method on degenerate weights and statistics: a finite replacement of a sane loss, or a sentence.

Each row of `ROWS` meets each of `SITUATIONS` in both types, by the driver's own steps: plan, scales, compress, the
module that takes the linear's place, and its errors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from coppice import compress as driver
from coppice import folding, layers
from coppice.allocate import allocate
from coppice.errors import UserError
from coppice.methods.base import Linear, LinearStatistics, Method, MethodOptions, Replacement, Unchanged, method, methods
from coppice.methods.solvers.truncation import break_even

NAME = "model.layers.0.mlp.gate_proj"
ROW = {"group_size": -1}

# Options of every layer method, one row for each way through it.
ROWS: dict[str, list[dict[str, Any]]] = {
    "magnitude": [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.5, "scope": "row", "refit": True}],
    "wanda": [{"sparsity": 0.5}, {"pattern": "2:4"}, {"sparsity": 0.5, "refit": True}],
    "sparsegpt": [{"sparsity": 0.5, "block": 8}, {"pattern": "2:4"}, {"sparsity": 0.5, "bits": 4, **ROW}],
    "awp": [
        {"sparsity": 0.5, "iterations": 20},
        {"sparsity": 0.5, "iterations": 20, "step": "spectral"},
        {"bits": 4, "iterations": 3, **ROW},
        {"sparsity": 0.5, "bits": 4, "iterations": 4, **ROW},
    ],
    "net-trim": [{"epsilon": 0.3, "iterations": 60}, {"sparsity": 0.5, "iterations": 60}],
    "obert": [
        {"sparsity": 0.5, "block": 8},
        {"sparsity": 0.5, "block": 8, "unit": 4, "update": "joint", "scope": "layer"},
    ],
    "obr": [{"sparsity": 0.5}, {"sparsity": 0.5, "bits": 4, **ROW}, {"sparsity": 0.5, "bits": 4, "form": "rtn", **ROW}],
    "svd": [{"rank": 3}],
    "asvd": [
        {"keep": 0.6},
        {"rank": 3, "statistic": "absmax", "alpha": 1},
        {"keep": 0.6, "search": "strs", "grid": [0.4]},
        {"keep": 0.6, "search": "spectrum"},
    ],
    "svd-llm": [{"rank": 5}, {"rank": 3, "whitening": "cholesky"}, {"rank": 3, "update": True}],
    "fwsvd": [{"rank": 3}],
    "dobi-svd": [{"keep": 0.6, "steps": 2}, {"keep": 0.6, "remap": False, "learn": False}],
    "curing": [{"keep": 0.8}, {"rank": 3, "link": "data"}, {"rank": 3, "importance": "weight"}],
    "compactifai": [
        {"keep": 0.6},
        {"bond": 2, "sites": 3, "scaling": "absmean"},
        {"keep": 0.6, "profile": [0.1, 0.2, 0.3], "scaling": "absmean"},
    ],
    "rtn": [{"bits": 4, **ROW}, {"bits": 2, "symmetric": True, **ROW}],
    "gptq": [{"bits": 4, **ROW}, {"bits": 3, "act_order": True, "symmetric": True, "block": 4, **ROW}],
    "coordinate-descent": [{"bits": 3, **ROW}, {"bits": 3, "start": "gptq", "block": 4, **ROW}],
    "awq": [{"bits": 4, **ROW}, {"bits": 4, "duo_scaling": True, "clip": False, **ROW}],
    "flattenquant": [{"bits": 8}, {"solver": "gptq", "smoothing": 1, "fence": 0}],
    "k-bit": [{"bits": 4}, {"bits": 3, "type": "quantile"}, {"bits": 4, "type": "normal", "outliers": 0.3}],
    "learned-rounding": [{"bits": 3, "steps": 5, **ROW}, {"bits": 4, "format": "float", "steps": 5}],
    "qpruner": [
        {"bits_average": 5, **ROW},
        {"bits_average": 5, "search": "knapsack", "quantizer": "gptq", **ROW},
    ],
    "round-inputs": [{"bits": 8}],
    "eora": [{"rank": 2}],
}
LABELS = {f"{name}-{index}": (name, options) for name, rows in ROWS.items() for index, options in enumerate(rows)}
# They need moments for what other options do with them, and look at none themselves.
BLIND = {"qpruner-0"}
# Weights of inputs that were never seen become zero.
CLEARING = {"sparsegpt", "awp", "net-trim", "obr", "gptq"}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(inputs: Tensor) -> LinearStatistics:
    """Statistics of inputs x, [tokens, n]."""
    return LinearStatistics(
        inputs.T @ inputs / len(inputs), inputs.mean(0), inputs.abs().mean(0), inputs.abs().amax(0), len(inputs)
    )


@dataclass(frozen=True)
class Situation:
    """weight: [m, n]. inputs: [tokens, n], of the windows. damage: what then happens to the second moment.

    refusal: what a method that reads the statistics says, empty where it can work. loss: the most that is sane.
    """

    weight: Tensor
    inputs: Tensor
    damage: Callable[[LinearStatistics], LinearStatistics] = lambda statistics: statistics
    refusal: str = ""
    mask: Tensor | None = None

    def statistics(self, dtype: torch.dtype) -> LinearStatistics:
        return self.damage(statistics_of(self.inputs.to(dtype)))


def moment(change: Callable[[Tensor], Any]) -> Callable[[LinearStatistics], LinearStatistics]:
    """The second moment changed, in place or by what `change` returns."""

    def damage(statistics: LinearStatistics) -> LinearStatistics:
        found = statistics.second_moment.clone()
        changed = change(found)
        return dataclasses.replace(statistics, second_moment=found if changed is None else changed)

    return damage


def everywhere(value: float) -> Callable[[LinearStatistics], LinearStatistics]:
    def damage(statistics: LinearStatistics) -> LinearStatistics:
        parts = ("second_moment", "mean", "absmean", "absmax")
        return LinearStatistics(*(torch.full_like(getattr(statistics, part), value) for part in parts), 8)

    return damage


def one_entry(row: int, column: int, value: float) -> Callable[[LinearStatistics], LinearStatistics]:
    def change(found: Tensor) -> None:
        found[row, column] = found[column, row] = value

    return moment(change)


W, X = draw(12, 16), draw(64, 16, seed=1) @ draw(16, 16, seed=2)
LIVE = torch.arange(16) % 5 != 2
REPEATED = X[:, torch.arange(16) // 2]
NOT_FINITE, NEGATIVE = "not finite|not numbers", "negative"
# Every eigenvector but (1, .. 1) has power: there it is -6.5, far below what any damping makes up for.
INDEFINITE = 1.5 * torch.eye(16, dtype=torch.float64) - 0.5
SITUATIONS = {
    "ordinary": Situation(W, X),
    "in a subspace": Situation(W, X[:, :5] @ draw(5, 16, seed=3)),
    "inputs that repeat": Situation(W, REPEATED),
    "fewer tokens than inputs": Situation(W, X[:6]),
    "one token": Situation(W, X[:1]),
    "dead inputs": Situation(W, X * LIVE),
    "one live input": Situation(W, X * (torch.arange(16) == 3)),
    "tiny inputs": Situation(W, 1e-12 * X),
    "huge inputs": Situation(W, 1e12 * X),
    "primes": Situation(draw(13, 17), draw(64, 17, seed=1)),
    "one row": Situation(W[:1], X),
    "one column": Situation(W[:, :1], X[:, :1]),
    "one weight": Situation(W[:1, :1], X[:, :1]),
    "zero weights": Situation(torch.zeros_like(W), X),
    "constant weights": Situation(torch.full_like(W, 0.3), X),
    "weights of rank one": Situation(W[:, :1] @ W[:1], X),
    "a row and a column of zeros": Situation(W * (torch.arange(16) != 1) * (torch.arange(12) != 2)[:, None], X),
    "tiny weights": Situation(1e-30 * W, X),
    "all pruned": Situation(torch.zeros_like(W), X, mask=torch.zeros_like(W, dtype=torch.bool)),
    "an output pruned": Situation(
        W * (torch.arange(12) > 3)[:, None], X, mask=(torch.arange(12) > 3)[:, None].expand(12, 16).contiguous()
    ),
    "NaN": Situation(W, X, everywhere(math.nan), NOT_FINITE),
    "infinite": Situation(W, X, everywhere(math.inf), NOT_FINITE),
    "one NaN": Situation(W, X, one_entry(2, 5, math.nan), NOT_FINITE),
    "one NaN on the diagonal": Situation(W, X, one_entry(4, 4, math.nan), NOT_FINITE),
    "zero": Situation(W, 0 * X, refusal="zero"),
    "negative": Situation(W, X, everywhere(-1.0), NEGATIVE),
    "negative outputs": Situation(
        1 + 0.01 * W, X, moment(lambda found: INDEFINITE.to(found)), "not positive semidefinite"
    ),
    "NaN weights": Situation(W.where(torch.arange(16) != 4, math.nan), X, refusal=NOT_FINITE),
    "infinite weights": Situation(W.where(torch.arange(16) != 4, math.inf), X, refusal=NOT_FINITE),
}
DTYPES = [torch.float32, torch.float64]


class FakeDecoder:
    """Tokens are predicted from the outputs of the one linear, in windows of 8 tokens."""

    windows, head_dim, seed = 3, 1, 0

    def __init__(self, given: Linear, statistics: LinearStatistics | None, inputs: Tensor) -> None:
        self.names, self._linear, self._statistics = [NAME], given, statistics
        rows = torch.arange(24) % len(inputs)
        self._inputs = (inputs[rows] / inputs.abs().max().clamp(min=1e-30)).to(given.weight.dtype).view(3, 8, -1)
        self._head = draw(7, len(given.weight), seed=4).to(given.weight.dtype)
        self._tokens = torch.randint(7, (3, 8), generator=torch.Generator().manual_seed(5))

    def linear(self, name: str) -> Linear:
        return self._linear

    def statistics(self, name: str) -> LinearStatistics:
        return self._statistics

    def logits(self, window: int, outputs: Any = None, weight: Tensor | None = None) -> Tensor:
        y = self._inputs[window] @ (self._linear.weight if weight is None else weight).T
        return ((y if outputs is None else outputs(NAME, y)) @ self._head.T)[:-1]

    def loss(self, windows: Any = None, weights: Any = None, outputs: Any = None) -> Tensor:
        weight = (weights or {}).get(NAME)
        chosen = range(3) if windows is None else windows
        losses = [
            nn.functional.cross_entropy(self.logits(window, outputs, weight), self._tokens[window, 1:])
            for window in chosen
        ]
        return torch.stack(losses).mean()

    def gradients(self, batch: int = 1) -> Iterator[dict[str, Tensor]]:
        for window in range(3):
            weight = self._linear.weight.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss([window], {NAME: weight}), [weight])
            if not torch.isfinite(gradient).all():
                raise UserError(f"{NAME}: its gradient is not finite; calibrate in a wider dtype.")
            yield {NAME: gradient}


@dataclass(frozen=True)
class Outcome:
    """weight: [m, n] what stands in the place of `before`; errors: the driver's."""

    linear: Linear
    replacement: Replacement
    weight: Tensor
    errors: dict[str, float] = field(default_factory=dict)


def reads(used: Method, options: MethodOptions) -> bool:
    return bool(used.needs(options) & {"moments", "behind"})


def outcome(label: str, situation: Situation, dtype: torch.dtype) -> Outcome:
    """What the driver does with one linear. A method that needs no statistics is given none."""
    name, given = LABELS[label]
    used = method(name)
    options = used.validated(given)
    weight = situation.weight.to(dtype)
    statistics = situation.statistics(dtype) if reads(used, options) else None
    reference = None
    if used.family == "compensate":
        scale = weight.abs().amax().clamp(min=torch.finfo(dtype).tiny)
        reference, weight = weight, torch.round(weight / scale) * scale
    linear = Linear(weight, situation.mask, reference, dtype, NAME, behind=statistics)
    if hasattr(used.module, "plan"):
        planned = used.module.plan(FakeDecoder(linear, statistics, situation.inputs), options)
        linear = dataclasses.replace(linear, plan=planned.get(NAME))
    if hasattr(used.module, "scales"):
        factors = used.module.scales([linear], statistics, options)
        if factors is not None:
            assert torch.isfinite(factors).all()
            assert (factors > 0).all()
            linear = dataclasses.replace(linear, weight=weight * factors)
            statistics = folding.scaled(statistics, factors)
    replacement = used.module.compress(linear, statistics, options)
    block = nn.Module()
    block.linear = nn.Linear(weight.shape[1], len(weight), bias=False, dtype=dtype)
    block.linear.weight = nn.Parameter(linear.weight.clone())
    with torch.no_grad():
        driver.replace(block, "linear", block.linear, replacement, dtype)
        new = layers.effective_weight(block.linear)
        return Outcome(linear, replacement, new, driver.errors(new, linear, statistics))


def expected_refusal(label: str, situation: Situation) -> str:
    """What the sentence must hold, empty where there is to be a result."""
    name, given = LABELS[label]
    width = situation.weight.shape[1]
    if width % 4 and (given.get("pattern") or given.get("unit") == 4):
        return "divide"
    if not torch.isfinite(situation.weight).all():
        return situation.refusal
    if name == "fwsvd" and not situation.inputs.any():
        return "zero on every window"
    used = method(name)
    if not situation.refusal or not reads(used, used.validated(given)):
        return ""
    return "" if label in BLIND and situation.refusal != NOT_FINITE else situation.refusal


def test_every_layer_method_has_a_row() -> None:
    assert set(ROWS) == {name for name, used in methods().items() if used.contract == "layer"}


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", SITUATIONS)
@pytest.mark.parametrize("label", LABELS)
def test_a_sane_result_or_a_sentence(label: str, name: str, dtype: torch.dtype) -> None:
    situation = SITUATIONS[name]
    if situation.mask is not None and "masked" in method(LABELS[label][0]).refuses:
        pytest.skip("refused before it begins")
    refusal = expected_refusal(label, situation)
    if refusal:
        with pytest.raises(UserError, match=refusal) as raised:
            outcome(label, situation, dtype)
        assert ":" in str(raised.value)
        assert str(raised.value).endswith(".")
        return
    found = outcome(label, situation, dtype)
    assert found.weight.shape == situation.weight.shape
    assert torch.isfinite(found.weight).all()
