from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.quantize.k_bit import Options, Proxy, compress, plan, writers
from coppice.methods.solvers.codebook import dequantize
from coppice.models.architectures.base import architecture
from coppice.models.contracts import Linear, Role

# Read by tests/rows.py.
ROWS = [{"bits": 4}, {"bits": 3, "type": "quantile"}, {"bits": 4, "type": "normal", "outliers": 0.3}]

PATHS = architecture("llama").linears
BLOCK = list(PATHS.values())


@dataclasses.dataclass
class FakeDecoder:
    """Two blocks: 8 residual channels, 4 query heads of 2 on 2 key/value heads, 12 neurons."""

    names: list[str]
    weights: dict[str, torch.Tensor]
    head_dim: int = 2
    paths: Mapping[Role, str] = dataclasses.field(default_factory=lambda: PATHS)

    def linear(self, name: str) -> Linear:
        return Linear(self.weights[name], name=name)


@pytest.fixture
def decoder() -> FakeDecoder:
    shapes = {"k_proj": (4, 8), "v_proj": (4, 8), "gate_proj": (12, 8), "up_proj": (12, 8), "down_proj": (8, 12)}
    generator = torch.Generator().manual_seed(0)
    names = [f"model.layers.{index}.{name}" for index in range(2) for name in BLOCK]
    weights = {name: torch.randn(shapes.get(name.split(".")[-1], (8, 8)), generator=generator) for name in names}
    return FakeDecoder(names, weights)


def test_writers(decoder):
    found = {name.removeprefix("model.layers."): writer for name, writer in writers(decoder.names, PATHS).items()}
    for name in ("q_proj", "k_proj", "v_proj"):
        assert found[f"0.self_attn.{name}"] is None
        assert found[f"1.self_attn.{name}"] == "model.layers.0.mlp.down_proj"
    for index in range(2):
        block = f"model.layers.{index}"
        assert found[f"{index}.self_attn.o_proj"] == f"{block}.self_attn.v_proj"
        assert found[f"{index}.mlp.gate_proj"] == found[f"{index}.mlp.up_proj"] == f"{block}.self_attn.o_proj"
        assert found[f"{index}.mlp.down_proj"] == f"{block}.mlp.up_proj"


def test_writers_of_factors():
    names = [f"model.layers.0.mlp.{name}.{part}" for name in ("up_proj", "down_proj") for part in ("first", "second")]
    assert list(writers(names, PATHS).values()) == [None, names[0], names[1], names[2]]
    assert writers(["model.layers.0.other"], PATHS) == {"model.layers.0.other": None}


def test_outliers_are_the_inputs_whose_writers_vary_most(decoder):
    decoder.weights["model.layers.0.mlp.up_proj"][[3, 10]] *= 100
    decoder.weights["model.layers.0.mlp.down_proj"][5] *= 100
    found = plan(decoder, Options(bits=3, outliers=0.2))
    assert found["model.layers.0.mlp.down_proj"].inputs.tolist() == [3, 10]  # floor(0.2 * 12)
    assert found["model.layers.0.mlp.down_proj"].source == "model.layers.0.mlp.up_proj"
    assert found["model.layers.1.self_attn.q_proj"].inputs.tolist() == [5]
    assert found["model.layers.0.self_attn.q_proj"].inputs is None


def test_grouped_queries_share_the_deviation_of_their_values(decoder):
    # Row 3 is channel 1 of key/value head 1, which query heads 2 and 3 read.
    decoder.weights["model.layers.1.self_attn.v_proj"][3] *= 100
    found = plan(decoder, Options(bits=3, outliers=0.25))
    assert found["model.layers.1.self_attn.o_proj"].inputs.tolist() == [5, 7]


def test_a_constant_row_does_not_vary(decoder):
    decoder.weights["model.layers.0.mlp.up_proj"][4] = 1000
    assert 4 not in plan(decoder, Options(bits=3, outliers=0.5))["model.layers.0.mlp.down_proj"].inputs


def test_nothing_predicts_outliers(decoder):
    assert plan(decoder, Options(bits=3)) == {}
    few = plan(decoder, Options(bits=3, outliers=0.01))["model.layers.0.mlp.down_proj"]
    assert few.inputs is None and "of the 12 inputs of this layer is none" in few.source
    decoder.weights["model.layers.0.mlp.up_proj"] = torch.ones(5, 8)
    other = plan(decoder, Options(bits=3, outliers=0.2))["model.layers.0.mlp.down_proj"]
    assert other.inputs is None and "The 5 outputs" in other.source


def test_outliers_stay_and_the_rest_is_coded(linear):
    planned = dataclasses.replace(linear, plan=Proxy(torch.tensor([1, 20]), "up_proj"), storage=torch.bfloat16)
    found = compress(planned, None, Options(bits=3, block=32, outliers=0.1))
    assert torch.equal(dequantize(found)[:, [1, 20]], linear.weight[:, [1, 20]])
    assert found.record["outliers"] == 2 and found.record["outliers_from"] == "up_proj"
    # 440 codes of 3 bits, 14 scales and 40 weights of 16 bits, over 480 weights.
    assert found.record["bits_effective"] == pytest.approx((440 * 3 + 14 * 16 + 40 * 16) / 480)


@pytest.mark.parametrize("kind", ["int", "float", "dynamic", "quantile"])
@pytest.mark.parametrize("bits", [3, 4, 8])
def test_types(linear, kind, bits):
    found = compress(dataclasses.replace(linear, storage=torch.float16), None, Options(bits=bits, type=kind, block=-1))
    assert found.table.shape == (2**bits,) and found.codes.max() < 2**bits
    error = (dequantize(found) - linear.weight).norm() / linear.weight.norm()
    assert error < {3: 0.45, 4: 0.25, 8: 0.05}[bits]
    assert found.record["bits_effective"] == pytest.approx(bits + 16 / 480)


def test_four_bits_cost_a_quarter_bit_in_blocks_of_64():
    weight = torch.randn(16, 64, generator=torch.Generator().manual_seed(0))
    found = compress(Linear(weight, storage=torch.bfloat16), None, Options(bits=4, type="normal"))
    assert found.record["bits_effective"] == 4.25
    assert found.record["type"] == "normal" and found.block == 64


def test_pruned_weights_stay_zero(linear):
    mask = torch.rand(20, 24, generator=torch.Generator().manual_seed(0)) > 0.5
    for kind in ("int", "float", "dynamic", "quantile", "normal"):
        masked = Linear(linear.weight.masked_fill(~mask, 0), mask)
        values = dequantize(compress(masked, None, Options(bits=4, type=kind)))
        assert (values[~mask] == 0).all() and (values[mask] != 0).any()


def test_a_layer_of_zeros():
    for kind in ("int", "float", "dynamic", "quantile", "normal"):
        assert (dequantize(compress(Linear(torch.zeros(4, 8)), None, Options(bits=4, type=kind))) == 0).all()


def test_bad_inputs(linear):
    with pytest.raises(UserError, match="not finite"):
        compress(Linear(linear.weight * float("inf")), None, Options(bits=4))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 2}, "greater than or equal to 3"),
        ({"bits": 9}, "less than or equal to 8"),
        ({"bits": 3, "type": "normal"}, "has 4 bits, not 3"),
        ({"bits": 4, "type": "int", "exponent_bits": 2}, "requires the type float, not int"),
        ({"bits": 4, "type": "float", "exponent_bits": 4}, "take at most 3"),
        ({"bits": 4, "block": 16}, "at least 32 weights, or -1 for the whole matrix, not 16"),
        ({"bits": 4, "outliers": 0.6}, "less than or equal to 0.5"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValidationError, match=message):
        Options(**options)
