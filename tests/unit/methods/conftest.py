from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from coppice.models.contracts import Linear, LinearStatistics


def statistics_of(inputs: torch.Tensor) -> LinearStatistics:
    """Statistics of inputs x, [tokens, n]."""
    return LinearStatistics(
        second_moment=inputs.T @ inputs / len(inputs),
        mean=inputs.mean(0),
        absmean=inputs.abs().mean(0),
        absmax=inputs.abs().amax(0),
        tokens=len(inputs),
    )


@pytest.fixture
def statistics_with() -> Callable[[torch.Tensor], LinearStatistics]:
    """Statistics with a given second moment."""

    def make(second_moment: torch.Tensor) -> LinearStatistics:
        blank = torch.zeros(len(second_moment), dtype=second_moment.dtype)
        return LinearStatistics(second_moment, blank, blank, blank, 1)

    return make


@pytest.fixture
def inputs() -> torch.Tensor:
    """[tokens, n] = [200, 24] correlated inputs of very different power."""
    generator = torch.Generator().manual_seed(7)
    mixing = torch.randn(24, 24, generator=generator, dtype=torch.float64)
    scales = torch.logspace(-1, 1, 24, dtype=torch.float64)
    return torch.randn(200, 24, generator=generator, dtype=torch.float64) @ mixing * scales


@pytest.fixture
def linear() -> Linear:
    """[m, n] = [20, 24]."""
    return Linear(torch.randn(20, 24, generator=torch.Generator().manual_seed(8), dtype=torch.float64))


@pytest.fixture
def statistics(inputs: torch.Tensor) -> LinearStatistics:
    return statistics_of(inputs)


@pytest.fixture
def loss(inputs: torch.Tensor) -> Callable[[torch.Tensor], float]:
    """|dW X|_F^2 from the inputs themselves, not from their second moment."""

    def of(difference: torch.Tensor) -> float:
        return (inputs @ difference.T).square().sum().item()

    return of
