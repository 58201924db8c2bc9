from __future__ import annotations

import copy

import pytest
import torch
from tiny import ARCHITECTURES, NORMS_ACROSS_HEADS, tiny_model, tiny_tokens

from coppice.calibration.gradients import IMPORTANCES, fold, salience, unit_scores
from coppice.errors import UserError

TOKENS = tiny_tokens(windows=5, length=10)
MASK = torch.arange(10) < torch.tensor([10, 10, 7, 4, 10])[:, None]


def window_loss(model, tokens):
    """Mean next-token cross entropy of one window without padding."""
    logits = model(input_ids=tokens[None], use_cache=False).logits[0, :-1]
    return torch.nn.functional.cross_entropy(logits, tokens[1:])


def slow_scores(model, tokens, mask):
    """The definition, one window, one weight tensor and one unit at a time, by autograd on the weights."""
    r = model.config.num_attention_heads // model.config.num_key_value_heads
    groups, neurons = model.config.num_key_value_heads, model.config.intermediate_size
    scores = {
        f"{unit}.{name}": torch.zeros(len(model.model.layers), count, dtype=torch.float64)
        for unit, count in (("kv_groups", groups), ("neurons", neurons))
        for name in IMPORTANCES
    }
    gradients = []
    for window, valid in zip(tokens, mask, strict=True):
        model.zero_grad()
        window_loss(model, window[valid]).backward()
        gradients.append({name: parameter.grad.clone() for name, parameter in model.named_parameters()})
    parameters = dict(model.named_parameters())
    for block in range(len(model.model.layers)):
        attention, mlp = f"model.layers.{block}.self_attn", f"model.layers.{block}.mlp"
        h = model.model.layers[block].self_attn.head_dim
        for unit, index, module, transposed, channels in (
            *(
                ("kv_groups", g, f"{attention}.{p}_proj", 0, range(g * h, g * h + h))
                for g in range(groups)
                for p in "kv"
            ),
            *(("kv_groups", g, f"{attention}.q_proj", 0, range(g * r * h, (g + 1) * r * h)) for g in range(groups)),
            *(("kv_groups", g, f"{attention}.o_proj", 1, range(g * r * h, (g + 1) * r * h)) for g in range(groups)),
            *(("neurons", c, f"{mlp}.{p}_proj", 0, [c]) for c in range(neurons) for p in ("gate", "up")),
            *(("neurons", c, f"{mlp}.down_proj", 1, [c]) for c in range(neurons)),
        ):
            for channel in channels:

                def members(tensors, module=module, channel=channel, transposed=transposed):
                    weight = tensors[f"{module}.weight"]
                    row = weight.T[channel] if transposed else weight[channel]
                    bias = tensors.get(f"{module}.bias")
                    return row if transposed or bias is None else torch.cat([row, bias[channel : channel + 1]])

                w = members(parameters).detach()
                per_window = torch.stack([members(window) for window in gradients])
                g, a = per_window.mean(0), per_window.square().mean(0)
                for name, value in (
                    ("vector", (w * g).sum().abs()),
                    ("first", (w * g).abs().sum()),
                    ("second", (w.square() * a).abs().sum()),
                    ("mixed", (w * g - w.square() * a / 2).abs().sum()),
                ):
                    scores[f"{unit}.{name}"][block, index] += value
    return scores


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_scores_are_their_definition(architecture):
    model = tiny_model(architecture, dtype=torch.float64, num_hidden_layers=2, intermediate_size=10)
    scores = unit_scores(model, TOKENS, MASK, batch=2)
    expected = slow_scores(model, TOKENS, MASK)
    assert scores.keys() == expected.keys()
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-8, atol=1e-14, msg=name)


def test_biases_of_columns_belong_to_no_unit():
    fields = {"attention_bias": True, "mlp_bias": True, "num_hidden_layers": 1, "intermediate_size": 6}
    model = tiny_model("llama-gqa", dtype=torch.float64, **fields)
    scores, expected = unit_scores(model, TOKENS, MASK, batch=5), slow_scores(model, TOKENS, MASK)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-8, atol=1e-14, msg=name)


def test_the_batch_changes_nothing():
    model = tiny_model("qwen2", dtype=torch.float64)
    expected = unit_scores(model, TOKENS, MASK, batch=1)
    for batch in (2, 5, 8):
        for name, score in unit_scores(model, TOKENS, MASK, batch=batch).items():
            torch.testing.assert_close(score, expected[name], rtol=1e-9, atol=1e-14, msg=f"{name} at {batch}")


def test_what_padding_holds_changes_nothing():
    model = tiny_model("mistral", dtype=torch.float64)
    expected = unit_scores(model, TOKENS, MASK, batch=3)
    scores = unit_scores(model, torch.where(MASK, TOKENS, 7), MASK, batch=3)
    for name, score in scores.items():
        torch.testing.assert_close(score, expected[name], rtol=1e-9, atol=1e-14, msg=name)


def test_windows_without_a_loss_do_not_count():
    model = tiny_model(dtype=torch.float64)
    alone = torch.zeros(1, 10, dtype=torch.bool)
    alone[0, 0] = True
    expected = unit_scores(model, TOKENS, MASK, batch=2)
    scores = unit_scores(model, torch.cat([TOKENS[:1], TOKENS]), torch.cat([alone, MASK]), batch=2)
    assert all(torch.allclose(score, expected[name], rtol=1e-9) for name, score in scores.items())
    with pytest.raises(UserError, match="two tokens in a row"):
        unit_scores(model, TOKENS[:1], alone, batch=1)


def test_the_model_is_left_as_it_was():
    model = tiny_model("qwen3")
    model.model.embed_tokens.weight.requires_grad_(False)
    before = copy.deepcopy(model.state_dict())
    trainable = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    unit_scores(model, TOKENS.int(), MASK, batch=2)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trainable
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(module._forward_hooks for module in model.modules())


def test_half_precision_is_summed_in_float32():
    model = tiny_model()
    expected = unit_scores(model, TOKENS, MASK, batch=2)
    scores = unit_scores(tiny_model(dtype=torch.bfloat16), TOKENS, MASK, batch=2)
    for name, score in scores.items():
        assert score.dtype == torch.float32
        assert torch.corrcoef(torch.stack([score.flatten(), expected[name].flatten()]))[0, 1] > 0.98, name


def test_query_heads_of_a_group_are_contiguous():
    """Of 8 query heads over 2 key/value heads, head j scoring j: [6, 22], and not the interleaved [12, 16]."""
    assert fold(torch.arange(8.0), 2).tolist() == [6, 22]
    assert fold(torch.arange(8.0).repeat_interleave(3), 2).tolist() == [18, 66]


def test_elements_are_never_less_than_their_vector():
    scores = unit_scores(tiny_model(), TOKENS, MASK, batch=5)
    for unit in ("kv_groups", "neurons"):
        assert (scores[f"{unit}.first"] >= scores[f"{unit}.vector"] * (1 - 1e-6)).all()


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_units_without_an_output_score_nothing(architecture):
    model = tiny_model(architecture, dtype=torch.float64)
    attention = model.model.layers[1].self_attn
    width = attention.num_key_value_groups * attention.head_dim
    with torch.no_grad():
        attention.o_proj.weight[:, width : 2 * width] = 0
        model.model.layers[2].mlp.down_proj.weight[:, 17] = 0
    scores = unit_scores(model, TOKENS, MASK, batch=5)
    for importance in IMPORTANCES:
        groups, neurons = scores[f"kv_groups.{importance}"], scores[f"neurons.{importance}"]
        assert (neurons == 0).nonzero().tolist() == [[2, 17]]
        # Under a norm across heads, a head's queries and keys change those of the others.
        assert (groups == 0).nonzero().tolist() == ([] if architecture in NORMS_ACROSS_HEADS else [[1, 1]])


def test_first_order_is_the_slope_of_the_loss():
    """(L(w) - L(w - s w)) / s tends to w g for a neuron whose only weights are those of its down column."""
    model = tiny_model(dtype=torch.float64, num_hidden_layers=1)
    scores = unit_scores(model, TOKENS[:2], MASK[:2], batch=2)
    down, gate, up = (getattr(model.model.layers[0].mlp, f"{name}_proj").weight for name in ("down", "gate", "up"))

    def loss():
        with torch.no_grad():
            return sum(window_loss(model, window) for window in TOKENS[:2]) / 2

    # A neuron is linear in up and in down, so scaling either has the same slope; vector sums |slope| of three tensors.
    slopes = []
    for weight, index in ((gate, (3,)), (up, (3,)), (down, (slice(None), 3))):
        original, dense, step = weight.detach().clone(), loss(), 1e-6
        with torch.no_grad():
            weight[index] *= 1 - step
        slopes.append((dense - loss()) / step)
        with torch.no_grad():
            weight.copy_(original)
    assert slopes[1].item() == pytest.approx(slopes[2].item(), rel=1e-4)
    assert scores["neurons.vector"][0, 3].item() == pytest.approx(sum(abs(slope) for slope in slopes).item(), rel=1e-4)


def test_mixed_is_exact_on_a_diagonal_quadratic():
    """L(w) = 1/2 sum A (w - b)^2: |L(w) - L(w with w_ij = 0)| = |w g - A w^2 / 2| with g = A (w - b)."""
    w, b, curvature = torch.randn(3, 4, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    curvature = curvature.abs()

    def loss(weight):
        return (curvature * (weight - b).square()).sum() / 2

    change = torch.zeros_like(w)
    for i in range(4):
        for j in range(5):
            without = w.clone()
            without[i, j] = 0
            change[i, j] = (loss(w) - loss(without)).abs()
    scores = salience(w, curvature * (w - b), curvature, reduced=1)
    torch.testing.assert_close(scores["mixed"], change.sum(1))
    assert not torch.allclose(scores["first"], change.sum(1))


def test_an_output_that_is_not_finite_is_named():
    model = tiny_model()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[0, 0] = float("inf")
    with pytest.raises(UserError, match=r"output of model\.layers\.1\.mlp\.up_proj is not finite"):
        unit_scores(model, TOKENS, MASK, batch=2)


def test_a_loss_that_is_not_finite_is_told():
    model = tiny_model()
    with torch.no_grad():
        model.lm_head.weight[5] = float("nan")
    with pytest.raises(UserError, match="loss of a calibration window is not finite"):
        unit_scores(model, TOKENS, MASK, batch=2)


def test_a_gradient_that_is_not_finite_is_named():
    model = tiny_model()
    model.model.layers[2].mlp.down_proj.register_full_backward_pre_hook(
        lambda _, gradients: (gradients[0] * torch.inf,)
    )
    with pytest.raises(UserError, match=r"gradient of model\.layers\.2\.mlp\.\w+_proj is not finite"):
        unit_scores(model, TOKENS, MASK, batch=5)
