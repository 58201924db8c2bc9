"""Codes packed into words."""

from __future__ import annotations

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32

from coppice.models import modules


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("columns", [5, 32, 43, 96])
def test_packing_is_that_of_compressed_tensors_and_inverts(bits: int, columns: int) -> None:
    codes = torch.randint(2**bits, (7, columns), dtype=torch.int32)
    words = modules.pack(codes, bits)
    assert torch.equal(words, pack_to_int32((codes - 2 ** (bits - 1)).to(torch.int8), bits))
    assert torch.equal(modules.unpack(words, bits, columns), codes)
    assert words.shape[1] == modules.packed_words(columns, bits)
