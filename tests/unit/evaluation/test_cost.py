from __future__ import annotations

import pytest
import torch
from forms import quantized_linear

from coppice.errors import UserError
from coppice.evaluation import cost
from coppice.methods.quantize import gear
from coppice.models import modules
from coppice.models.modules.kv_cache import install_cache

from .conftest import make_model

SETTINGS = {"batch": 2, "prompt": 8, "generate": 4, "repeats": 5, "warmup": 1}


def measured(model, monkeypatch, **changes):
    """The metrics when each reading of the clock comes `step` seconds after the one before."""
    times = iter(changes.pop("times"))
    monkeypatch.setattr(cost, "now", lambda model: next(times))
    metrics = cost.measure(model, **{**SETTINGS, **changes}, baseline_memory=0, simulated=False)
    return {metric["metric"]: metric for metric in metrics}


def test_times_become_medians_rates_and_quartile_ranges(model, monkeypatch):
    times = [0, 0.5, 1]  # the warm-up, which must not count
    for prefill, decode in [(1, 8), (2, 8), (3, 8), (4, 8), (50, 80)]:
        times += [0, prefill, prefill + decode]
    found = measured(model, monkeypatch, times=times)
    assert found["prefill_latency"]["value"] == 3
    assert found["prefill_latency"]["spread"] == 2
    assert found["prefill_throughput"]["value"] == pytest.approx(2 * 8 / 3)
    assert found["decode_latency"]["value"] == 2
    assert found["decode_latency"]["spread"] == 0
    assert found["decode_throughput"]["value"] == pytest.approx(2 / 2)
    units = {"prefill_latency": "s", "prefill_throughput": "tokens/s", "decode_latency": "s/token"}
    assert {name: found[name]["unit"] for name in units} == units
    assert found["decode_latency"]["settings"] == SETTINGS


def test_one_repeat_has_no_spread(model, monkeypatch):
    found = measured(model, monkeypatch, times=[0, 1, 2], repeats=1, warmup=0)
    assert found["prefill_latency"]["spread"] is None


def test_a_prompt_is_read_once_and_tokens_are_written_one_by_one_with_the_cache(model, monkeypatch):
    shapes = []
    forward = type(model).forward

    def spy(self, input_ids, **options):
        cache = options.get("past_key_values")
        shapes.append((*input_ids.shape, cache.get_seq_length() if cache else 0))
        return forward(self, input_ids=input_ids, **options)

    monkeypatch.setattr(type(model), "forward", spy)
    tokens = torch.randint(10, (2, 8))
    prefill, decode = cost.time_generation(model, tokens, 3)
    assert shapes == [(2, 8, 0), (2, 1, 8), (2, 1, 9), (2, 1, 10)]
    assert prefill > 0
    assert decode > 0


def test_memory_is_that_of_the_run(model):
    held = cost.resident_bytes()
    assert held > 10**7
    cost.reset_peak_memory(model)
    block = torch.ones(50_000_000)
    peak = cost.peak_memory(model, held)
    assert 1.9e8 < peak < 4e8
    del block
    assert cost.peak_memory(model, held) == pytest.approx(peak, rel=0.05)


def test_a_model_that_stores_integers_and_multiplies_floats_is_simulated():
    model = make_model(50)
    assert not cost.is_simulated(model)
    projection = model.model.layers[0].mlp.up_proj
    codes = torch.zeros(projection.weight.shape, dtype=torch.int32)
    scale = torch.ones(len(codes), 1)
    quantized = quantized_linear(codes, scale, torch.zeros_like(scale, dtype=torch.int32), 4, -1, True, None)
    model.model.layers[0].mlp.up_proj = quantized
    assert cost.is_simulated(model)


def test_a_model_that_rounds_inputs_or_keys_in_floats_is_simulated():
    rounding, caching = make_model(50), make_model(50)
    modules.quantize_activations(rounding.model.layers[0].mlp.up_proj, {"bits": 4, "symmetric": True, "clip": 1.0})
    install_cache(caching, gear.cache(gear.Options(bits=4, group_size=4, buffer=4)))
    assert cost.is_simulated(rounding)
    assert cost.is_simulated(caching)


def test_a_run_longer_than_the_context_is_refused(model):
    with pytest.raises(UserError, match="exceed the model's context of 64"):
        cost.measure(model, **{**SETTINGS, "prompt": 61}, baseline_memory=0, simulated=False)
