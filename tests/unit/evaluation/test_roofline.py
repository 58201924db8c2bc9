"""The roofline: the table of oracles of the method's dossier (J.9), closed forms, and what checkpoints store."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace
from itertools import pairwise

import pytest

from coppice.evaluation import roofline
from coppice.evaluation.roofline import Shape
from coppice.hardware import DEVICES, Device

LLAMA = Shape(hidden=4096, intermediate=11008, layers=32, heads=32, kv_heads=32, head_dim=128, vocabulary=32000)
SMALL = Shape(hidden=64, intermediate=128, layers=2, heads=4, kv_heads=2, head_dim=16, vocabulary=100)
CONFIG = {
    "model_type": "llama",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "dtype": "bfloat16",
}
UP = "model.layers.0.mlp.up_proj"


def decode_ms(device, bits=(16, 16, 16), prompt=1024):
    return 1000 * roofline.latency(roofline.decode(roofline.uniform(LLAMA, *bits), 1, prompt), device)


# (device, bits of weights, states and cache, decode ms, prefill ms) of the paper's tool at b = 1, s = 1024, not fused.
# It counts half the head's operations and takes h for I in the activation: 0.01 % of decode, 2.5 % of prefill.
ORACLES = [
    ("A6000", (16, 16, 16), 17.927, 102.425),
    ("A6000", (4, 16, 16), 5.022, 102.169),
    ("A6000", (8, 8, 8), 8.963, 51.209),
    ("A100-40G", (16, 16, 16), 8.854, 50.791),
    ("A100-40G", (4, 16, 16), 2.481, 50.665),
    ("H100-SXM", (16, 16, 16), 4.482, 17.596),
    ("H100-SXM", (8, 8, 8), 2.241, 8.798),
]


@pytest.mark.parametrize(("device", "bits", "decode", "prefill"), ORACLES)
def test_the_times_of_the_papers_tool(device, bits, decode, prefill):
    model = roofline.uniform(LLAMA, *bits)
    found = roofline.latency(roofline.decode(model, 1, 1024, fused=False), DEVICES[device])
    assert 1000 * found == pytest.approx(decode, rel=5e-4)
    found = roofline.latency(roofline.prefill(model, 1, 1024, fused=False), DEVICES[device])
    assert 1000 * found == pytest.approx(prefill, rel=0.03)
    assert 1000 * found > prefill


def totals(operations):
    return [sum(getattr(one, name) * one.count for one in operations) for name in ("operations", "bytes")]


def test_the_operations_and_bytes_of_the_papers_tool():
    for weight_bits, kv_bits, expected in [(16, 16, 1.377e10), (4, 16, 3.857e9), (8, 8, 6.884e9)]:
        model = roofline.uniform(LLAMA, weight_bits, kv_bits, kv_bits)
        operations, passed = totals(roofline.decode(model, 1, 1024, fused=False))
        assert passed == pytest.approx(expected, rel=5e-4)
        assert operations == pytest.approx(1.363e10, rel=0.01)
        assert roofline.kv_cache_bytes(model, 1, 1024) == pytest.approx(0.5369e9 * kv_bits / 16, rel=1e-4)
        in_blocks = roofline.weight_bytes(model) - model.head[0].stored_bytes
        assert in_blocks == pytest.approx(12.952e9 * weight_bits / 16, rel=1e-4)
    operations, _ = totals(roofline.prefill(roofline.uniform(LLAMA), 1, 1024, fused=False))
    assert operations == pytest.approx(1.382e13, rel=1e-3)


def test_the_head_counts_two_operations_a_weight_and_the_last_token_alone():
    without = roofline.uniform(SMALL)._replace(head=())
    for passes in (roofline.prefill, roofline.decode):
        whole, part = totals(passes(roofline.uniform(SMALL), 3, 20)), totals(passes(without, 3, 20))
        assert whole[0] - part[0] == 2 * 64 * 100 * 3
        assert whole[1] - part[1] == 2 * (64 * 100 + 3 * (64 + 100))


def test_decoding_one_sequence_waits_for_memory_alone():
    base = DEVICES["A6000"]
    for bits in [(16, 16, 16), (4, 16, 16), (8, 8, 8)]:
        time = decode_ms(base, bits)
        assert decode_ms(replace(base, bandwidth=base.bandwidth / 2), bits) == pytest.approx(2 * time, rel=1e-12)
        assert decode_ms(replace(base, float16=2 * base.float16, int8=2 * base.int8), bits) == time
        _, passed = totals(roofline.decode(roofline.uniform(LLAMA, *bits), 1, 1024))
        assert time == pytest.approx(1000 * passed / base.bandwidth, rel=1e-12)


def test_reading_a_long_prompt_waits_for_the_units():
    base, model = DEVICES["A6000"], roofline.uniform(LLAMA)
    operations = [one for one in roofline.prefill(model, 1, 2048) if one.operations > 1e9]
    time = roofline.latency(operations, base)
    assert roofline.latency(operations, replace(base, float16=2 * base.float16)) == pytest.approx(time / 2)
    assert roofline.latency(operations, replace(base, bandwidth=2 * base.bandwidth)) == time


def test_times_grow_with_bits():
    for device in DEVICES.values():
        for place in range(3):
            times = []
            for bits in (2, 3, 4, 8, 16, 32):
                asked = [16, 16, 16]
                asked[place] = bits
                model = roofline.uniform(LLAMA, *asked)
                times.append(
                    [
                        roofline.latency(operations, device)
                        for operations in (roofline.prefill(model, 1, 512), roofline.decode(model, 1, 512))
                    ]
                )
            for first, second in pairwise(times):
                assert all(a <= b for a, b in zip(first, second, strict=True))
            assert times[0][1] < times[-1][1]


def test_a_generation_is_its_prefill_and_its_steps():
    model, device = roofline.uniform(SMALL), DEVICES["i9-13900K"]
    steps = [roofline.latency(roofline.decode(model, 2, 40, decoded), device) for decoded in range(7)]
    expected = roofline.latency(roofline.prefill(model, 2, 40), device) + sum(steps)
    assert roofline.latency(roofline.generation(model, 2, 40, 7), device) == pytest.approx(expected)
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]


def test_fused_attention_by_hand():
    # One sequence of 20 tokens, n = 4, n_kv = 2, d = 16, two bytes a number.
    (attention,) = [one for one in roofline.prefill(roofline.uniform(SMALL), 1, 20) if one.operations == 400 * 4 * 69]
    assert attention.count == 2
    assert attention.bytes == 2 * (2 * 20 * 4 * 16) + 2 * (2 * 20 * 2 * 16)


def test_fewer_key_heads_shrink_the_cache_and_their_linears():
    wide, narrow = roofline.uniform(LLAMA), roofline.uniform(LLAMA._replace(kv_heads=8))
    assert roofline.kv_cache_bytes(narrow, 1, 100) == roofline.kv_cache_bytes(wide, 1, 100) / 4
    assert roofline.weight_bytes(wide) - roofline.weight_bytes(narrow) == 2 * 32 * 2 * 4096 * 24 * 128


def test_calibration_by_one_measured_run():
    factor = roofline.efficiency(measured=0.02, predicted=0.015)
    assert factor == pytest.approx(0.75)
    assert 0.015 / factor == pytest.approx(0.02)


# What checkpoints store


def linears_of(planned, inputs=64, outputs=128, sparse=False):
    return roofline.products({UP: planned} if "type" in planned else planned, UP, inputs, outputs, 16, sparse)


def test_a_plain_node_is_the_uniform_model():
    assert roofline.model_of_node(CONFIG, {}) == roofline.uniform(SMALL)
    masked = {UP: {"type": "Masked"}}
    assert roofline.model_of_node(CONFIG, masked) == roofline.uniform(SMALL)


def test_factors_are_products_of_their_own():
    first, second = linears_of({"type": "LowRank", "rank": 8})
    assert (first.inputs, first.outputs, first.stored_bytes) == (64, 8, 2 * 64 * 8)
    assert (second.inputs, second.outputs, second.stored_bytes) == (8, 128, 2 * 8 * 128)
    sizes = [(one.inputs, one.outputs) for one in linears_of({"type": "CUR", "rank": 8})]
    assert sizes == [(64, 8), (8, 8), (8, 128)]
    half = 64 * 128 // (2 * (64 + 128))
    assert sum(one.multiplications for one in linears_of({"type": "LowRank", "rank": half})) <= 64 * 128 / 2


def test_a_correction_stands_beside_its_packed_linear():
    planned = {
        UP: {"type": "LowRankCorrection", "rank": 4},
        f"{UP}.base": {"type": "Quantized", "bits": 4, "group_size": 32, "symmetric": True},
        f"{UP}.compensation": {"type": "LowRank", "rank": 4},
    }
    base, first, second = linears_of(planned)
    assert base.stored_bytes == 64 * 128 / 2 + 2 * 128 * 2
    assert (first.outputs, second.inputs) == (4, 4)


@pytest.mark.parametrize(
    ("entry", "rounded", "integer"),
    [
        ({"type": "Quantized", "bits": 8, "group_size": -1, "symmetric": True}, None, False),
        ({"type": "Quantized", "bits": 8, "group_size": -1, "symmetric": True}, 8, True),
        ({"type": "Quantized", "bits": 4, "group_size": -1, "symmetric": True}, 4, True),
        ({"type": "Codebook", "bits": 4, "block": 64, "outliers": 0, "transposed": False}, 8, False),
        ({"type": "Linear"}, 8, False),
        ({"type": "FlattenQuant", "bits": 8, "expanded": 70}, None, True),
    ],
)
def test_integer_units_need_grids_on_both_sides(entry, rounded, integer):
    inputs = {} if rounded is None else {"quantized_activations": {"bits": rounded, "symmetric": True, "clip": 1.0}}
    (found,) = linears_of({**entry, **inputs})
    assert found.integer is integer
    assert found.input_bits == (rounded or (8 if entry["type"] == "FlattenQuant" else 16))


def test_a_sparse_kernel_is_an_assumption():
    (stored,), (assumed,) = linears_of({"type": "Masked"}), linears_of({"type": "Masked"}, sparse=True)
    assert assumed.stored_bytes == stored.stored_bytes * (1 / 2 + 1 / 16)
    device = Device(bandwidth=1e30, float16=1.0, int8=1.0, source="assumed")
    times = [
        roofline.latency(
            roofline.prefill(roofline.model_of_node(CONFIG, {UP: {"type": "Masked"}}, sparse), 1, 8), device
        )
        for sparse in (False, True)
    ]
    assert times[0] - times[1] == pytest.approx(64 * 128 * 8)
    (dense,) = linears_of({"type": "Linear"}, sparse=True)
    assert not dense.sparse


def test_bytes_are_those_of_the_modules():
    import torch

    from coppice.models import modules

    made = {
        "Quantized": modules.QuantizedLinear(64, 96, 3, 32, symmetric=False, dtype=torch.bfloat16),
        "Codebook": modules.CodebookLinear(64, 96, 3, 48, outliers=2, transposed=True, dtype=torch.bfloat16),
        "FlattenQuant": modules.FlattenQuantLinear(64, 96, 5, expanded=70, dtype=torch.bfloat16),
        "TensorTrain": modules.TensorTrainLinear([8, 8], [12, 8], [5], dtype=torch.bfloat16),
        "LowRank": modules.LowRankLinear(64, 96, 7, dtype=torch.bfloat16),
    }
    for name, module in made.items():
        tensors = [*module.parameters(), *(one for key, one in module.named_buffers() if key != "weight_shape")]
        expected = sum(one.numel() * one.element_size() for one in tensors)
        found = linears_of(modules.describe(module), 64, 96)
        assert sum(one.stored_bytes for one in found) == expected, name
    train = made["TensorTrain"]
    (found,) = linears_of(modules.describe(train), 64, 96)
    assert found.multiplications == min(train.multiplications()[0], 64 * 96)


def test_a_compressed_cache_weighs_what_it_holds():
    from coppice.models.modules import kv_cache

    for settings in (
        kv_cache.CacheSettings(bits=2, group_size=32, window=16),
        kv_cache.CacheSettings(bits=4, group_size=-1, window=20, rank=4, decode_rank=2, outliers=0.1),
    ):
        model = roofline.model_of_node(CONFIG, {"cache": {"type": "Cache", **settings._asdict()}})
        for prompt, decoded in [(1, 0), (50, 0), (50, 33), (80, 1), (10, 5)]:
            expected = 2 * kv_cache.cache_bytes(settings, 3, 2, 16, prompt, decoded, 2)
            assert roofline.kv_cache_bytes(model, 3, prompt, decoded) == expected
        dense = roofline.model_of_node(CONFIG, {})
        assert totals(roofline.decode(model, 1, 512))[1] < totals(roofline.decode(dense, 1, 512))[1]


def test_prompts_are_shortened_to_the_context():
    assert roofline.fit_to_context(1024, 128, 2048) == (1024, 128)
    assert roofline.fit_to_context(1024, 128, 128) == (113, 15)
    assert roofline.fit_to_context(1, 1000, 100) == (1, 99)


def test_nothing_heavy_is_imported():
    program = "import sys, coppice.evaluation.roofline; assert not {'torch', 'numpy', 'scipy'} & sys.modules.keys()"
    subprocess.run([sys.executable, "-c", program], check=True)
