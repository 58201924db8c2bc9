from __future__ import annotations

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.solvers.stable_svd import apply_gates, inverse_gaps


def with_values(values: list[float], rows: int, columns: int) -> torch.Tensor:
    """A matrix with these singular values."""
    generator = torch.Generator().manual_seed(5)
    left, _ = torch.linalg.qr(torch.randn(rows, len(values), generator=generator, dtype=torch.float64))
    right, _ = torch.linalg.qr(torch.randn(columns, len(values), generator=generator, dtype=torch.float64))
    return left * torch.tensor(values, dtype=torch.float64) @ right.T


def plainly_gated(matrix: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    left, values, right = torch.linalg.svd(matrix, full_matrices=False)
    return (left[:, : len(gate)] * (values[: len(gate)] * gate)) @ right[: len(gate)]


GATE = torch.tensor([1.0, 0.95, 0.9, 0.7, 0.4, 0.2, 0.1, 0.0], dtype=torch.float64)


@pytest.mark.parametrize(("rows", "columns"), [(7, 4), (4, 7), (4, 4)])
def test_gradient_is_that_of_finite_differences(rows, columns):
    matrix = with_values([4, 3, 2, 1], rows, columns).requires_grad_()
    gate = GATE[::2].clone().requires_grad_()
    torch.testing.assert_close(apply_gates(matrix, gate), plainly_gated(matrix, gate))
    assert torch.autograd.gradcheck(apply_gates, (matrix, gate))


def test_gradient_is_that_of_the_decomposition():
    matrix = with_values([8, 7, 6, 5, 4, 3, 2, 1], 16, 8).requires_grad_()
    direction = torch.linspace(-1, 1, 128, dtype=torch.float64).view(16, 8)
    (ours,) = torch.autograd.grad((apply_gates(matrix, GATE) * direction).sum(), [matrix])
    (expected,) = torch.autograd.grad((plainly_gated(matrix, GATE) * direction).sum(), [matrix])
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-9)


def test_gradient_is_exact_where_what_is_left_out_has_no_power():
    """Y = X W^T of rank 3 with t = 7 and m = 5: by W, whatever is left out stays zero."""
    inputs, weight = with_values([5, 3, 2], 7, 3), with_values([3, 2, 1], 5, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda weight: apply_gates(inputs @ weight.T, GATE[2:5]), (weight,))


def test_gaps():
    values = torch.tensor([3.0, 2.0, 2.0, 1.0, 0.0, 0.0], dtype=torch.float64)
    gaps = inverse_gaps(values)
    assert torch.equal(gaps, -gaps.T)
    assert gaps[0, 1].item() == pytest.approx(1 / 5)
    assert gaps[0, 4].item() == pytest.approx(1 / 9)
    assert gaps[1, 2].item() == pytest.approx(11 / 4)
    assert gaps[4, 5] == 0
    torch.testing.assert_close(inverse_gaps(1e6 * values), 1e-12 * gaps)


@pytest.mark.parametrize("scale", [1.0, 1e-30])
@pytest.mark.parametrize("matrix", [torch.zeros(6, 4), torch.eye(6, 4), torch.ones(6, 4)])
def test_gradient_is_finite_where_values_meet_or_vanish(matrix, scale):
    matrix = (scale * matrix).requires_grad_()
    gate = torch.tensor([1.0, 1.0, 0.5, 0.0], requires_grad=True)
    (apply_gates(matrix, gate) * torch.linspace(-1, 1, 24).view(6, 4)).sum().backward()
    assert torch.isfinite(matrix.grad).all() and torch.isfinite(gate.grad).all()


@pytest.mark.parametrize("matrix", [2 * torch.eye(4), torch.zeros(4, 4), torch.ones(4, 4)])
def test_open_gates_pass_the_gradient_on_whatever_the_values(matrix):
    matrix = matrix.double().requires_grad_()
    direction = torch.linspace(-1, 1, 16, dtype=torch.float64).view(4, 4)
    (apply_gates(matrix, torch.ones(4, dtype=torch.float64)) * direction).sum().backward()
    torch.testing.assert_close(matrix.grad, direction)


def test_values_that_are_not_finite():
    with pytest.raises(UserError, match="outputs of this layer hold values that are not finite"):
        apply_gates(torch.full((3, 3), float("nan")), torch.ones(2))
