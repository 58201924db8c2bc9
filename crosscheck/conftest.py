from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch

from coppice.models.contracts import Linear, LinearStatistics

SHAPES = ("64 x 256", "96 x 160", "256 x 512", "64 x 256, one input dead")
_ROWS = pytest.StashKey["dict[tuple[str, str, str], Agreement]"]()


@dataclass(frozen=True)
class Problem:
    """weight: [m, n]; moment: [n, n] E[x x^T] of correlated inputs of very different power, 1 in the mean."""

    name: str
    weight: torch.Tensor
    moment: torch.Tensor

    @property
    def linear(self) -> Linear:
        return Linear(self.weight)

    @property
    def statistics(self) -> LinearStatistics:
        blank = torch.zeros(len(self.moment))
        return LinearStatistics(self.moment, blank, blank, blank, 1)

    def loss(self, weight: torch.Tensor) -> float:
        """tr((W - Q) H (W - Q)^T) / tr(W H W^T), in float64."""
        moment = self.moment.double()
        error, whole = self.weight.double() - weight.double(), self.weight.double()
        return ((error @ moment * error).sum() / (whole @ moment * whole).sum()).item()


@pytest.fixture(params=SHAPES, scope="session")
def problem(request) -> Problem:
    rows, inputs = (int(part) for part in request.param.partition(",")[0].split(" x "))
    generator = torch.Generator().manual_seed(rows + inputs)
    common = torch.randn(inputs // 8, inputs, generator=generator)
    factors = torch.randn(4 * inputs, inputs // 8, generator=generator)
    activations = torch.randn(4 * inputs, inputs, generator=generator) + 0.5 * factors @ common
    activations *= torch.logspace(-0.5, 0.5, inputs)[torch.randperm(inputs, generator=generator)]
    alive = torch.ones(inputs)
    if "dead" in request.param:
        alive[37] = 0
    activations *= alive
    moment = activations.T.double() @ activations.double() / len(activations)
    # Mean power 1: llm-compressor gives a dead input the power 1, and its damping the mean of that too.
    moment /= moment.diagonal()[alive.bool()].mean()
    weight = torch.randn(rows, inputs, generator=generator) / inputs**0.5
    return Problem(request.param, weight, moment.float())


@dataclass
class Agreement:
    """What held over all problems of a setting: the least share of equal entries (codes, entries of a mask or of a
    table), the largest difference of weights over the largest weight, where entries are equal, and the ratio of losses
    farthest from 1.
    """

    problems: int = 0
    equal: float = 1.0
    difference: float = 0.0
    ratio: float = 1.0

    def add(self, equal: float, difference: float, ratio: float) -> None:
        self.problems += 1
        self.equal = min(self.equal, equal)
        self.difference = max(self.difference, difference)
        self.ratio = max(self.ratio, ratio, key=lambda one: abs(one - 1))


@pytest.fixture
def agreement(request) -> Callable[..., None]:
    """agreement(method, setting, library, equal, difference, ratio) counts in a row of the table at the end."""

    def add(method: str, setting: str, library: str, equal: float, difference: float = 0.0, ratio: float = 1.0) -> None:
        rows = request.config.stash.setdefault(_ROWS, {})
        rows.setdefault((method, setting, library), Agreement()).add(equal, difference, ratio)

    return add


def pytest_terminal_summary(terminalreporter, config) -> None:
    rows = [("method", "setting", "library", "problems", "equal", "weights differ by", "loss ratio - 1")]
    for names, row in config.stash.get(_ROWS, {}).items():
        measured = f"{100 * row.equal:.6g} %", f"{row.difference:.0e}", f"{row.ratio - 1:.0e}"
        rows.append((*names, str(row.problems), *("0" if value == "0e+00" else value for value in measured)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    terminalreporter.write_sep("=", "agreement")
    for row in rows:
        terminalreporter.write_line("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)))
