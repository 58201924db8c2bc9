from __future__ import annotations

import pytest
import torch
from pydantic import ValidationError

from coppice.methods.quantize.rotate import Options, rotation
from coppice.methods.registry import method
from coppice.methods.solvers.hadamard import hadamard_like


@pytest.mark.parametrize("width", [1, 2, 3, 12, 64, 172, 250, 576, 960, 1152])
@pytest.mark.parametrize("seed", [None, 5])
def test_every_width_has_an_orthogonal_matrix_without_large_entries(width, seed):
    q = hadamard_like(width, seed)
    assert q.dtype == torch.float64 and q.shape == (width, width)
    torch.testing.assert_close(q @ q.T, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-13)
    torch.testing.assert_close(q.T @ q, torch.eye(width, dtype=torch.float64), rtol=0, atol=1e-13)
    assert q.abs().max() <= (2 / width) ** 0.5 + 1e-12


def test_a_power_of_two_is_the_hadamard_matrix():
    q = hadamard_like(64)
    assert torch.equal(q.abs(), torch.full_like(q, 0.125))
    assert torch.equal(q, q.T)


def test_a_product_of_a_power_of_two_and_an_odd_number_is_the_kronecker_product():
    torch.testing.assert_close(hadamard_like(12), torch.kron(hadamard_like(4), hadamard_like(3)))


def test_signs_follow_the_seed():
    plain, one, other = hadamard_like(172), hadamard_like(172, 1), hadamard_like(172, 2)
    assert torch.equal(one, hadamard_like(172, 1))
    assert not torch.equal(one, other)
    assert torch.equal(one.abs(), plain.abs())
    signs = (one / plain)[:, 0]
    assert 40 < int((signs < 0).sum()) < 132


def test_the_method_is_a_rotation():
    found = method("rotate")
    assert found.contract == "rotation" and found.family == "quantize"
    assert found.adds_traits == {"rotated"} and found.needs(Options()) == frozenset()
    assert {"factorized", "quantized", "compensated", "masked"} <= found.incompatible_with.keys()
    assert torch.equal(rotation(96, Options(seed=3)), hadamard_like(96, 3))
    assert torch.equal(rotation(96, Options(seed=None)), hadamard_like(96))
    with pytest.raises(ValidationError):
        Options(seed=-1)
