from __future__ import annotations

from math import prod

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.solvers.tensor_train import (
    Sites,
    contract,
    decompose,
    factors_of,
    outer,
    product_scaling,
    split,
    unscale,
)

SITES = [Sites((4, 6), (4, 5)), Sites((2, 3, 4), (5, 2, 2)), Sites((2, 2, 3, 2), (2, 1, 5, 2))]


@pytest.fixture
def matrix() -> torch.Tensor:
    """[m, n] = [24, 20] with singular values that fall."""
    generator = torch.Generator().manual_seed(3)
    left, right = (torch.randn(size, 20, generator=generator, dtype=torch.float64) for size in (24, 20))
    return left @ torch.diag(torch.logspace(0, -2, 20, dtype=torch.float64)) @ right.T


def by_definition(cores, sites):
    """The matrix, entry by entry, as the product of the matrices that the indices of a row and a column select."""
    rows = list(torch.cartesian_prod(*(torch.arange(size) for size in sites.outputs)).view(-1, len(cores)))
    columns = list(torch.cartesian_prod(*(torch.arange(size) for size in sites.inputs)).view(-1, len(cores)))
    entries = torch.empty(len(rows), len(columns), dtype=cores[0].dtype)
    for row, outputs in enumerate(rows):
        for column, inputs in enumerate(columns):
            product = torch.ones(1, 1, dtype=cores[0].dtype)
            for core, o, i in zip(cores, outputs, inputs, strict=True):
                product = product @ core[:, o, i, :]
            entries[row, column] = product
    return entries


@pytest.mark.parametrize("sites", SITES)
def test_full_bond_is_exact(matrix, sites):
    train = decompose(matrix, sites, sites.weights)
    torch.testing.assert_close(contract(train.cores), matrix, rtol=1e-12, atol=1e-12)
    assert train.error == 0


@pytest.mark.parametrize("sites", SITES)
def test_matrix_is_what_the_cores_define(matrix, sites):
    train = decompose(matrix, sites, 3)
    torch.testing.assert_close(contract(train.cores), by_definition(train.cores, sites), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("sites", SITES)
def test_error_is_the_root_sum_square_of_all_values_left_out_and_falls_with_the_bond(matrix, sites):
    errors = []
    for bond in range(1, 12):
        train = decompose(matrix, sites, bond)
        true = (contract(train.cores) - matrix).square().sum() / matrix.square().sum()
        assert train.error == pytest.approx(true.item(), rel=1e-9, abs=1e-14)
        errors.append(train.error)
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > errors[-1]


@pytest.mark.parametrize("sites", SITES)
def test_shapes_parameters_and_multiply_adds_are_those_of_the_cores(matrix, sites):
    for bond in (1, 4, 1000):
        train = decompose(matrix, sites, bond)
        assert tuple(core.shape[3] for core in train.cores) == (*sites.bonds(bond), 1)
        assert sum(core.numel() for core in train.cores) == sites.parameters(bond)
        done, left, counted = 1, prod(sites.inputs), 0
        for core in reversed(train.cores):
            left //= core.shape[2]
            counted += left * core.numel() * done
            done *= core.shape[1]
        assert sites.multiply_adds(bond) == counted


def test_kronecker_product_has_bond_one():
    generator = torch.Generator().manual_seed(5)
    first, second = (torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in ((4, 5), (6, 3)))
    product = torch.kron(first, second)
    train = decompose(product, Sites((4, 6), (5, 3)), 1)
    torch.testing.assert_close(contract(train.cores), product, rtol=1e-12, atol=1e-12)


def test_one_site_is_the_matrix(matrix):
    (core,) = decompose(matrix, Sites((24,), (20,)), 1).cores
    assert torch.equal(core[0, :, :, 0], matrix)


def test_sites_of_outputs_and_of_inputs_are_the_plain_decomposition(matrix):
    train = decompose(matrix, Sites((24, 1), (1, 20)), 7)
    left, values, right = torch.linalg.svd(matrix)
    expected = left[:, :7] * values[:7] @ right[:7]
    torch.testing.assert_close(contract(train.cores), expected, rtol=1e-11, atol=1e-11)


def test_zero_matrix_is_exact():
    train = decompose(torch.zeros(12, 12), split(12, 12, 3), 2)
    assert not contract(train.cores).any()
    assert train.error == 0


def test_weights_that_are_not_finite(matrix):
    matrix[3, 4] = float("inf")
    with pytest.raises(UserError, match="not finite"):
        decompose(matrix, SITES[0], 2)


@pytest.mark.parametrize(
    ("width", "sites", "factors"),
    [
        (4096, 2, (64, 64)),
        (11008, 2, (86, 128)),
        (14336, 2, (112, 128)),
        (4096, 4, (8, 8, 8, 8)),
        (896, 3, (8, 8, 14)),
        (13, 2, (1, 13)),
        (6, 4, (1, 1, 2, 3)),
        (1, 2, (1, 1)),
    ],
)
def test_factors_are_as_equal_as_they_can_be(width, sites, factors):
    assert factors_of(width, sites) == factors


def test_accounting_of_published_shapes():
    two, four = split(4096, 4096, 2), split(4096, 4096, 4)
    assert two.parameters(100) / two.weights == pytest.approx(0.0488, abs=1e-4)
    assert two.largest_bond(two.weights) == 2048
    assert two.multiply_adds(32) == two.weights
    shares = [four.parameters(bond) / four.weights for bond in (64, 100, 128, 200)]
    assert shares == pytest.approx([0.032, 0.049, 0.063, 0.098], abs=1e-3)
    assert four.bonds(5000) == (64, 4096, 64)


@pytest.mark.parametrize("sites", SITES)
def test_largest_bond_is_the_last_that_the_budget_affords(sites):
    for budget in range(60, 1200, 37):
        bond = sites.largest_bond(budget)
        assert sites.parameters(bond) <= budget or bond == 1
        assert sites.parameters(bond + 1) > budget or sites.bonds(bond + 1) == sites.bonds(bond)


@pytest.mark.parametrize("inputs", [(20,), (4, 5), (5, 2, 2)])
def test_scaling_that_is_a_product_is_found(inputs):
    generator = torch.Generator().manual_seed(6)
    true = outer([torch.rand(size, generator=generator, dtype=torch.float64) + 0.1 for size in inputs])
    vectors, explained = product_scaling(true, inputs)
    torch.testing.assert_close(outer(vectors), true, rtol=1e-12, atol=0)
    assert explained == pytest.approx(1)


def test_nearest_scaling_is_the_least_squares_of_logarithms():
    generator = torch.Generator().manual_seed(6)
    scale = torch.rand(20, generator=generator, dtype=torch.float64) + 0.1
    vectors, explained = product_scaling(scale, (4, 5))
    places = torch.cartesian_prod(torch.arange(4), torch.arange(5))
    design = torch.cat([torch.nn.functional.one_hot(places[:, 0]), torch.nn.functional.one_hot(places[:, 1])], dim=1)
    design = design.double()
    logarithm = scale.log()[:, None]
    fitted = (design @ torch.linalg.pinv(design) @ logarithm)[:, 0]
    torch.testing.assert_close(outer(vectors).log(), fitted, rtol=1e-10, atol=1e-12)
    left = (fitted - logarithm[:, 0]).square().sum() / (logarithm - logarithm.mean()).square().sum()
    assert explained == pytest.approx(1 - left.item())


def test_constant_scaling_is_explained():
    vectors, explained = product_scaling(torch.full((20,), 3.0), (4, 5))
    torch.testing.assert_close(outer(vectors), torch.full((20,), 3.0, dtype=torch.float64))
    assert explained == 1


@pytest.mark.parametrize("sites", SITES)
def test_scaling_is_undone_exactly(matrix, sites):
    vectors = [torch.rand(size, dtype=torch.float64) + 0.1 for size in sites.inputs]
    train = decompose(matrix * outer(vectors), sites, 3)
    ours, scaled = contract(unscale(train.cores, vectors)), contract(train.cores)
    torch.testing.assert_close(ours * outer(vectors), scaled, rtol=1e-12, atol=1e-13)
