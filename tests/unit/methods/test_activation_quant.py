from __future__ import annotations

import pytest
from pydantic import ValidationError

from coppice.methods.quantize.activation_quant import Options, compress
from coppice.models.replacements import QuantizedActivations

# Read by tests/rows.py.
ROWS = [{"bits": 8}]


def test_says_how_inputs_are_rounded(linear):
    rounded = compress(linear, None, Options(bits=4, symmetric=False, clip=0.9))
    assert isinstance(rounded, QuantizedActivations)
    assert (rounded.bits, rounded.symmetric, rounded.clip) == (4, False, 0.9)
    assert rounded.record == {"input_bits": 4, "input_symmetric": False, "input_clip": 0.9}


def test_defaults_cover_the_whole_range_around_zero():
    options = Options(bits=8)
    assert options.symmetric and options.clip == 1.0


@pytest.mark.parametrize("wrong", [{"bits": 3}, {"bits": 9}, {"bits": 4, "clip": 0}, {"bits": 4, "clip": 1.1}, {}])
def test_options_out_of_range(wrong):
    with pytest.raises(ValidationError):
        Options(**wrong)
