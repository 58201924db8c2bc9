"""Linears with split channels."""

from __future__ import annotations

import torch
from forms import dense_linear, stored_form

from coppice.models import modules
from coppice.models.replacements import FlattenQuant


def test_flattened_inputs_add_up_and_stay_within_the_threshold() -> None:
    x = torch.tensor([[3.0, -0.4, -7.5, 0.0]], dtype=torch.float64)
    source, piece = torch.tensor([0, 0, 0, 1, 2, 2, 2, 2, 3]), torch.tensor([0, 1, 2, -1, 0, 1, 2, 3, 0])
    flat = modules.flatten_inputs(x, source, piece, torch.tensor([2.0], dtype=torch.float64))
    assert flat.tolist() == [[2.0, 1.0, 0.0, -0.4, -2.0, -2.0, -2.0, -1.5, 0.0]]
    assert torch.equal(torch.zeros_like(x).index_add(1, source, flat), x)


def test_a_flattened_linear_is_its_weight_on_grid_inputs() -> None:
    """Input 1 is split into two pieces, the column of input 2 into two parts; inputs on the grid are not rounded."""
    source, piece = torch.tensor([0, 1, 1, 2, 2]), torch.tensor([0, 0, 1, -1, -1])
    parts = torch.randint(-7, 8, (4, 5), dtype=torch.int32)
    parts[:, 2] = parts[:, 1]
    replacement = FlattenQuant(parts, torch.tensor([0.5]), source, piece, 7.0, 4)
    module = stored_form(replacement, dense_linear(3, 4, torch.ones(4)))
    expected = 0.5 * torch.stack([parts[:, 0], parts[:, 1], parts[:, 3] + parts[:, 4]], dim=1)
    torch.testing.assert_close(module.weight, expected)
    x = torch.tensor([[3.0, -12.0, 5.0], [-7.0, 14.0, 0.0]])
    torch.testing.assert_close(module(x), x @ expected.T + 1)
