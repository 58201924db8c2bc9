"""Linears as tensor trains."""

from __future__ import annotations

import pytest
import torch

from coppice.models import modules


@pytest.mark.parametrize(
    ("in_shape", "out_shape", "bonds"), [((12,), (10,), ()), ((4, 3), (2, 5), (6,)), ((2, 3, 4), (5, 1, 2), (3, 7))]
)
def test_a_tensor_train_contracts_its_cores(in_shape, out_shape, bonds) -> None:
    module = modules.TensorTrainLinear(in_shape, out_shape, bonds, bias=True, dtype=torch.float64)
    torch.nn.init.normal_(module.bias)
    ends = (1, *bonds, 1)
    whole = torch.ones(1, 1, 1, dtype=torch.float64)  # [outputs, inputs, bond]
    for k, site in enumerate(module.sites):
        core = site.weight.view(ends[k], out_shape[k], in_shape[k], ends[k + 1])
        whole = torch.einsum("oib,bpjc->opijc", whole, core).flatten(2, 3).flatten(0, 1)
    weight = whole[:, :, 0]
    torch.testing.assert_close(modules.effective_weight(module), weight)
    # Few vectors go through the sites, many through the matrix; watched sites are always gone through.
    for vectors in (1, 1000):
        x = torch.randn(2, vectors, module.in_features, dtype=torch.float64)
        torch.testing.assert_close(module(x), x @ weight.T + module.bias)
        torch.testing.assert_close(module.product(x), x @ weight.T)
    seen = []
    module.sites[0].register_forward_hook(lambda *parts: seen.append(parts))
    torch.testing.assert_close(module(x), x @ weight.T + module.bias)
    assert len(seen) == 1
    assert len(modules.weight_matrices(module)) == len(in_shape)
