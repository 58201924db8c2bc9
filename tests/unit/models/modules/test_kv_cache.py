from __future__ import annotations

import copy
import json
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError
from tiny import logits, tiny_model, tiny_tokens
from transformers import DynamicCache, StaticCache

from coppice.methods.registry import method
from coppice.models.modules.kv_cache import (
    CacheSettings,
    CompressedCache,
    CompressedCacheLayer,
    cache_bytes,
    compress_states,
    decompress_states,
    install_cache,
    outlier_count,
    power_iteration,
)

KIVI = {"bits": 2, "group_size": 4, "window": 8}
GEAR = KIVI | {"rank": 2, "decode_rank": 1, "outliers": 0.2, "loops": 3}


def random_states(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def read_back(states: torch.Tensor, by_channel: bool, rank: int = 0, **settings) -> torch.Tensor:
    return decompress_states(compress_states(states, by_channel, CacheSettings(**settings), rank))


def vectors(states: torch.Tensor, by_channel: bool) -> torch.Tensor:
    return states.transpose(2, 3) if by_channel else states.transpose(1, 2).flatten(2)


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_error_is_at_most_half_a_step(by_channel, bits):
    states = random_states(2, 3, 16, 8)
    error = vectors((read_back(states, by_channel, bits=bits, group_size=8) - states).abs(), by_channel)
    groups = vectors(states, by_channel).unflatten(-1, (-1, 8))
    step = (groups.amax(-1) - groups.amin(-1)) / (2**bits - 1)
    worst = error.unflatten(-1, (-1, 8)).amax(-1)
    assert (worst <= step / 2 * (1 + 1e-9)).all()
    assert worst.max() > 0


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("bits", range(2, 9))
def test_what_lies_on_the_grid_is_exact(by_channel, bits):
    """All 2^b levels and no more: with 2^b, or b^2 - 1, steps between the ends this fails."""
    levels = torch.arange(256).remainder(2**bits).double().view(1, 256)
    one = levels * 0.25 - 3
    states = one.view(1, 1, 256, 1) if by_channel else one.view(1, 1, 1, 256)
    assert torch.equal(read_back(states, by_channel, bits=bits, group_size=-1), states)
    assert not torch.equal(read_back(states, by_channel, bits=2, group_size=-1), states) or bits == 2


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("group_size", [1, 3, 5, 64, -1])
def test_group_sizes_that_divide_nothing(by_channel, group_size):
    states = random_states(2, 3, 7, 4)
    error = (read_back(states, by_channel, bits=8, group_size=group_size) - states).abs().max()
    assert error <= 10 / 255 / 2
    if group_size == 1:
        assert error == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_groups_without_range(dtype):
    states = torch.full((1, 2, 8, 4), -3.5, dtype=dtype)
    for by_channel in (True, False):
        back = read_back(states, by_channel, rank=2, **{"bits": 2, "group_size": 4, "outliers": 0.3})
        assert back.dtype == dtype and torch.equal(back, states)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_narrow_types(dtype):
    # A large offset beside a small range, as channels of keys have; the minimum is one of the values, so it is exact.
    states = (random_states(1, 2, 32, 8) + 20).to(dtype)
    error = (read_back(states, True, bits=8, group_size=-1).double() - states.double()).abs().max()
    assert error <= 16 * torch.finfo(dtype).eps + 8 / 255


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("shape", [(1, 2, 8, 4), (2, 1, 5, 3)])
def test_all_values_outliers_is_exact(by_channel, shape):
    states = random_states(*shape)
    states[0, 0] = 1.0  # ties
    assert torch.equal(read_back(states, by_channel, bits=2, outliers=1.0), states)


@pytest.mark.parametrize("by_channel", [True, False])
def test_largest_and_smallest_values_are_exact(by_channel):
    states = random_states(2, 3, 20, 4)
    back = vectors(read_back(states, by_channel, bits=2, group_size=-1, outliers=0.2), by_channel)
    rows, back = vectors(states, by_channel).flatten(0, -2), back.flatten(0, -2)
    count = outlier_count(CacheSettings(2, outliers=0.2), rows.shape[1])
    assert count == 4
    order = rows.argsort(1)
    for chosen in (order[:, : count // 2], order[:, -count // 2 :]):
        assert torch.equal(back.gather(1, chosen), rows.gather(1, chosen))
    kept = rows.sort(1).values[:, count // 2 : -count // 2]
    step = (kept.amax(1) - kept.amin(1)) / 3
    assert ((back - rows).abs().amax(1) <= step / 2 * (1 + 1e-9)).all()


def test_outliers_come_in_pairs_within_the_vector():
    assert [outlier_count(CacheSettings(2, outliers=s), 100) for s in (0, 0.001, 0.02, 0.03, 0.14, 1)] == [
        0,
        2,
        2,
        4,
        14,
        100,
    ]
    assert outlier_count(CacheSettings(2, outliers=1), 5) == 5


def test_power_iteration_finds_what_has_low_rank():
    E = random_states(2, 3, 20, 2) @ random_states(2, 3, 2, 8, seed=1)
    Q, P = power_iteration(E, 2, 3)
    torch.testing.assert_close(Q @ P.mT, E, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(Q.mT @ Q, torch.eye(2, dtype=E.dtype).expand(2, 3, 2, 2))
    Q, P = power_iteration(torch.zeros_like(E), 2, 3)
    assert not (Q @ P.mT).any()


def test_power_iteration_nears_the_best_approximation():
    E = random_states(1, 1, 40, 8) * torch.logspace(0, -2, 8, dtype=torch.float64)
    values = torch.linalg.svdvals(E[0, 0])
    Q, P = power_iteration(1e-12 * E, 3, 3)
    error = (1e-12 * E - Q @ P.mT).norm() / 1e-12
    assert error == pytest.approx(values[3:].norm().item(), rel=1e-2)


@pytest.mark.parametrize("by_channel", [True, False])
def test_full_rank_is_exact(by_channel):
    states = random_states(2, 3, 12, 5)
    torch.testing.assert_close(read_back(states, by_channel, rank=5, bits=2), states, rtol=0, atol=1e-13)
    short = random_states(2, 3, 3, 5)
    torch.testing.assert_close(read_back(short, by_channel, rank=9, bits=2, outliers=0.4), short, rtol=0, atol=1e-13)


@pytest.mark.parametrize("by_channel", [True, False])
@pytest.mark.parametrize("outliers", [0.0, 0.1])
def test_error_falls_with_the_rank_and_the_bits(by_channel, outliers):
    states = random_states(1, 2, 24, 6)
    common = {"group_size": 8, "outliers": outliers}
    by_rank = [(read_back(states, by_channel, rank, bits=2, **common) - states).norm() for rank in range(7)]
    assert all(after <= before * (1 + 1e-9) for before, after in pairwise(by_rank))
    by_bits = [(read_back(states, by_channel, 2, bits=bits, **common) - states).norm() for bits in range(2, 9)]
    assert all(after < before for before, after in pairwise(by_bits))


def fed(settings: dict, keys: torch.Tensor, values: torch.Tensor, *steps: int) -> CompressedCacheLayer:
    layer = CompressedCacheLayer(CacheSettings(**settings))
    start = 0
    for step in steps:
        layer.seen = layer.update(keys[:, :, start : start + step], values[:, :, start : start + step])
        start += step
    assert start == keys.shape[2]
    return layer


def test_one_token_at_a_time_is_the_whole_prompt():
    keys, values = random_states(2, 3, 29, 8), random_states(2, 3, 29, 8, seed=1)
    whole = fed(KIVI, keys, values, 29)
    for steps in ([1] * 29, [8] + [1] * 21, [5, 20, 4]):
        parts = fed(KIVI, keys, values, *steps)
        assert torch.equal(parts.seen[0], whole.seen[0]) and torch.equal(parts.seen[1], whole.seen[1])
        assert len(parts.chunks) == 3 and len(whole.chunks) == 1


def test_chunks_behind_the_prompt_do_not_depend_on_the_steps():
    keys, values = random_states(1, 2, 41, 8), random_states(1, 2, 41, 8, seed=1)
    together = fed(GEAR, keys, values, 20, 21)
    for steps in ([20] + [1] * 21, [20, 3, 18]):
        parts = fed(GEAR, keys, values, *steps)
        assert torch.equal(parts.seen[0], together.seen[0]) and torch.equal(parts.seen[1], together.seen[1])
    ranks = [key.tokens.shape[-1] for key, _ in together.chunks]
    assert ranks == [2, 1, 1, 1] and together.keys.shape[2] == 1
    equal_ranks = GEAR | {"decode_rank": 2}
    one = fed(equal_ranks, keys[:, :, :8], values[:, :, :8], 8)
    other = fed(equal_ranks, keys[:, :, :8], values[:, :, :8], *[1] * 8)
    assert torch.equal(one.seen[0], other.seen[0])


def test_newest_tokens_are_exact():
    keys, values = random_states(1, 2, 21, 8), random_states(1, 2, 21, 8, seed=1)
    layer = fed(GEAR, keys, values, 21)
    assert layer.get_seq_length() == 21 and layer.get_mask_sizes(3) == (24, 0)
    assert torch.equal(layer.seen[0][:, :, 16:], keys[:, :, 16:])
    assert torch.equal(layer.seen[1][:, :, 16:], values[:, :, 16:])
    assert not torch.equal(layer.seen[0][:, :, :16], keys[:, :, :16])
    layer.reset()
    assert layer.get_seq_length() == 0 and layer.stored_bytes == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("settings", [KIVI, GEAR, GEAR | {"bits": 3, "group_size": -1, "window": 5}])
@pytest.mark.parametrize(("prompt", "decoded"), [(3, 0), (16, 0), (21, 30), (2, 9)])
def test_bytes_are_as_predicted(dtype, settings, prompt, decoded):
    keys, values = (
        random_states(2, 3, prompt + decoded, 6, dtype=dtype),
        random_states(2, 3, prompt + decoded, 6, dtype=dtype),
    )
    layer = fed(settings, keys, values, prompt, *[1] * decoded)
    predicted = cache_bytes(CacheSettings(**settings), 2, 3, 6, prompt, decoded, dtype.itemsize)
    assert layer.stored_bytes == predicted
    held = [layer.keys, layer.values]
    held += [part for chunk in layer.chunks for states in chunk for part in states if isinstance(part, torch.Tensor)]
    assert sum(part.untyped_storage().nbytes() for part in held) == predicted


def test_two_bits_take_two_bits():
    settings = CacheSettings(2, 64, 64)
    keys = torch.zeros(1, 2, 128, 64)
    layer = fed(settings._asdict(), keys, keys, 128)
    # 2 bits a value, and a scale and a minimum of 32 bits for each 64.
    assert layer.stored_bytes * 8 == 2 * keys.numel() * (2 + 2 * 32 / 64)


def test_long_vectors_have_wide_indices():
    states = random_states(1, 1, 2**15 + 1, 1, dtype=torch.float32)
    settings = CacheSettings(2, outliers=0.001, window=2**15 + 1)
    stored = compress_states(states, True, settings, 0)
    assert stored.index.dtype == torch.int32
    last = torch.tensor(2**15)
    states[0, 0, last, 0] = 100
    assert decompress_states(compress_states(states, True, settings, 0))[0, 0, last, 0] == 100


@pytest.fixture(scope="module")
def plain():
    return tiny_model("llama-gqa")


@pytest.mark.parametrize("architecture", ["llama-gqa", "qwen3"])
def test_long_window_leaves_the_model_as_it_is(architecture):
    model, tokens = tiny_model(architecture), tiny_tokens(2, 20)
    expected = logits(model, tokens)
    install_cache(model, GEAR | {"window": 21})
    assert torch.equal(logits(model, tokens), expected)


def test_sliding_attention_sees_the_same_tokens():
    model, tokens = tiny_model("mistral", sliding_window=6), tiny_tokens(2, 20)
    expected = logits(model, tokens)
    install_cache(model, GEAR | {"window": 64})
    assert torch.equal(logits(model, tokens), expected)
    with torch.no_grad():
        past = None
        for step in range(20):
            output = model(input_ids=tokens[:, step : step + 1], past_key_values=past, use_cache=True)
            past = output.past_key_values
            torch.testing.assert_close(output.logits[:, 0], expected[:, step], rtol=1e-4, atol=1e-4)


def test_compression_changes_the_logits_less_with_more_bits(plain):
    tokens = tiny_tokens(2, 32)
    expected, errors = logits(plain, tokens), []
    for bits in (2, 4, 8):
        model = copy.deepcopy(plain)
        install_cache(model, KIVI | {"bits": bits})
        errors.append((logits(model, tokens) - expected).norm().item())
    assert errors[0] > errors[1] > errors[2] > 0
    install_cache(model, KIVI | {"bits": 8, "outliers": 1.0})
    assert model.model.cache_settings["outliers"] == 1.0
    torch.testing.assert_close(logits(model, tokens), expected)


@pytest.mark.parametrize("window", [4, 64])
def test_generates_as_step_by_step(plain, window):
    model, tokens = copy.deepcopy(plain), tiny_tokens(2, 9)
    install_cache(model, GEAR | {"window": window})
    generated = model.generate(tokens, max_new_tokens=7, min_new_tokens=7, do_sample=False)
    with torch.no_grad():
        output = model(input_ids=tokens, use_cache=True)
        steps = []
        for _ in range(7):
            assert isinstance(output.past_key_values, CompressedCache)
            scores = output.logits[:, -1].clone()
            scores[:, 2] = -torch.inf
            steps.append(scores.argmax(-1, keepdim=True))
            output = model(input_ids=steps[-1], past_key_values=output.past_key_values, use_cache=True)
    assert torch.equal(generated[:, 9:], torch.cat(steps, dim=1))
    assert output.past_key_values.get_seq_length() == 16
    assert output.past_key_values.stored_bytes == 3 * cache_bytes(
        CacheSettings(**GEAR | {"window": window}), 2, 4, 4, 9, 7, 4
    )
    if window == 64:
        assert torch.equal(generated, plain.generate(tokens, max_new_tokens=7, min_new_tokens=7, do_sample=False))


def test_gradients_pass_as_if_nothing_was_rounded(plain):
    model, tokens = copy.deepcopy(plain), tiny_tokens(2, 16)
    install_cache(model, KIVI)
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    for projection in (model.model.layers[0].self_attn.k_proj, model.model.layers[0].self_attn.v_proj):
        assert projection.weight.grad.norm() > 0
    new = random_states(1, 1, 16, 4).requires_grad_()
    seen, _ = CompressedCacheLayer(CacheSettings(**KIVI)).update(new, new)
    assert torch.equal(torch.autograd.grad(seen.sum(), new)[0], torch.ones_like(new))


def test_other_caches_are_turned_away(plain):
    model, tokens = copy.deepcopy(plain), tiny_tokens(1, 5)
    install_cache(model, KIVI)
    with pytest.raises(ValueError, match="StaticCache"):
        model(input_ids=tokens, past_key_values=StaticCache(config=model.config, max_cache_len=8))
    full = DynamicCache(config=model.config)
    for layer in range(3):
        full.update(torch.zeros(1, 4, 2, 4), torch.zeros(1, 4, 2, 4), layer)
    with pytest.raises(ValueError, match="DynamicCache"):
        model(input_ids=tokens, past_key_values=full)
    with pytest.raises(NotImplementedError, match="beam"):
        model.generate(tokens, num_beams=2, max_new_tokens=3)
    with pytest.raises(NotImplementedError, match="shortened"):
        CompressedCacheLayer(CacheSettings(2)).crop(-1)


def test_methods_give_settings():
    kivi, gear = method("kv-cache"), method("gear")
    assert kivi.contract == gear.contract == "cache"
    assert kivi.adds_traits == gear.adds_traits == {"quantized-cache"}
    simple = kivi.cache.cache(kivi.validated({"bits": 2}))
    assert CacheSettings(**simple) == CacheSettings(2, 64, 64)
    full = gear.cache.cache(gear.validated({"bits": 2}))
    assert json.loads(json.dumps(full)) == full
    assert CacheSettings(**full) == CacheSettings(2, 64, 64, 4, 2, 0.02, 3)
    whole_vectors = gear.cache.cache(gear.validated({"bits": 4, "group_size": -1}))
    assert (whole_vectors["group_size"], whole_vectors["window"]) == (-1, 20)
    for wrong in ({"bits": 1}, {"bits": 9}, {"bits": 2, "group_size": 0}, {"bits": 2, "outliers": 1.1}):
        with pytest.raises(ValidationError):
            gear.options(**wrong)
