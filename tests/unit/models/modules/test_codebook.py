"""Linears coded by a table."""

from __future__ import annotations

import pytest
import torch
from forms import dense_linear, stored_form

from coppice.models.replacements import Codebook


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("outliers", [None, [1, 4]])
@pytest.mark.parametrize("block", [7, 16, 1000])
def test_a_codebook_linear_decodes_its_blocks(transposed: bool, outliers: list[int] | None, block: int) -> None:
    rows, columns, bits = 6, 9, 3
    kept = [j for j in range(columns) if j not in (outliers or [])]
    codes = torch.randint(2**bits, (rows, len(kept)), dtype=torch.int32)
    table = torch.linspace(-1, 1, 2**bits, dtype=torch.float64)
    absmax = torch.rand(-(-codes.numel() // block))
    index = None if outliers is None else torch.tensor(outliers)
    values = None if outliers is None else torch.randn(rows, len(outliers))
    bias = torch.randn(columns if transposed else rows)
    book = Codebook(codes, table, absmax, block, bits, index, values, transposed)
    module = stored_form(book, dense_linear(*book.shape[::-1], bias))
    expected = torch.empty(rows, columns)
    if outliers is not None:
        expected[:, outliers] = values
    for place, code in enumerate(codes.flatten().tolist()):
        expected[place // len(kept), kept[place % len(kept)]] = table[code].float() * absmax[place // block]
    expected = expected.T if transposed else expected
    torch.testing.assert_close(module.weight, expected)
    x = torch.randn(3, expected.shape[1])
    torch.testing.assert_close(module(x), x @ expected.T + bias)


def test_a_table_survives_storage_in_bfloat16() -> None:
    table = torch.linspace(-1, 1, 256, dtype=torch.float64)
    codes = torch.arange(256, dtype=torch.int32).view(1, -1)
    module = stored_form(Codebook(codes, table, torch.ones(1), 256, 8), dense_linear(256, 1, None))
    module.weight_absmax = module.weight_absmax.to(torch.bfloat16).float()
    torch.testing.assert_close(module.weight[0].double(), table, rtol=0, atol=1e-7)
