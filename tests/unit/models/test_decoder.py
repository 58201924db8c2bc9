"""A decoder as a method's plan sees it."""

from __future__ import annotations

import pytest
import torch
from tiny import ARCHITECTURES, logits, tiny_model, tiny_tokens
from torch.nn.functional import cross_entropy

from coppice.errors import UserError
from coppice.models import modules, surgery
from coppice.models.architectures.base import blocks
from coppice.models.contracts import Linear, Removal, Structure
from coppice.models.decoder import WholeDecoder


def decoder(model, tokens, kept=None) -> WholeDecoder:
    linears = {
        f"model.layers.{index}.{name}": module
        for index, block in enumerate(blocks(model))
        for name, module in modules.weight_matrices(block).items()
    }
    kept = torch.ones_like(tokens, dtype=torch.bool) if kept is None else kept
    return WholeDecoder(
        model, linears, lambda name, module: Linear(module.weight, name=name), dict, {}, tokens, kept, 0
    )


NAME = "model.layers.1.mlp.up_proj"


def test_the_loss_is_that_of_the_model() -> None:
    model, tokens = tiny_model(), tiny_tokens(windows=3)
    expected = cross_entropy(logits(model, tokens)[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    torch.testing.assert_close(decoder(model, tokens).loss().detach(), expected)


def test_padding_is_not_predicted() -> None:
    model, tokens = tiny_model(), tiny_tokens(windows=1)
    kept = torch.ones_like(tokens, dtype=torch.bool)
    kept[:, 7:] = False
    whole, cut = decoder(model, tokens, kept), decoder(model, tokens[:, :7])
    torch.testing.assert_close(whole.loss(), cut.loss())
    assert whole.logits(0).shape == (6, 61)


def test_weights_and_outputs_are_exchanged_for_one_call() -> None:
    model, tokens = tiny_model(), tiny_tokens(windows=2)
    seen = decoder(model, tokens)
    before = seen.loss()
    weight = dict(model.named_parameters())[f"{NAME}.weight"]
    halved = seen.loss(weights={NAME: weight / 2})
    through = seen.loss(outputs=lambda name, y: y / 2 if name == NAME else y)
    assert not torch.equal(before, halved)
    torch.testing.assert_close(halved, through)
    assert torch.equal(seen.loss(), before)
    assert dict(model.named_parameters())[f"{NAME}.weight"] is weight


def test_what_is_exchanged_can_be_differentiated() -> None:
    model, tokens = tiny_model(dtype=torch.float64), tiny_tokens(windows=1)
    seen = decoder(model, tokens)
    scale = torch.ones((), dtype=torch.float64, requires_grad=True)
    weight = dict(model.named_parameters())[f"{NAME}.weight"].detach()
    (slope,) = torch.autograd.grad(seen.loss(weights={NAME: weight * scale}), scale)
    step = 1e-4
    with torch.no_grad():
        ahead, behind = (seen.loss(weights={NAME: weight * (1 + sign * step)}) for sign in (1, -1))
    assert slope.item() == pytest.approx((ahead - behind).item() / (2 * step), rel=1e-2)


def test_gradients_are_those_of_each_batch() -> None:
    model, tokens = tiny_model(), tiny_tokens(windows=3)
    found = list(decoder(model, tokens).gradients(batch=2))
    assert len(found) == 2
    weight = dict(model.named_parameters())[f"{NAME}.weight"].requires_grad_()
    loss = cross_entropy(model(input_ids=tokens[2:]).logits[0, :-1], tokens[2, 1:])
    (expected,) = torch.autograd.grad(loss, weight)
    torch.testing.assert_close(found[1][NAME], expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("bypass", [[1], [0, 2]])
def test_a_bypassed_loss_is_that_of_the_model_without_those_blocks(architecture: str, bypass: list[int]) -> None:
    model, tokens = tiny_model(architecture), tiny_tokens(windows=2)
    whole = decoder(model, tokens)
    before = whole.loss()
    bypassed = whole.loss(bypass=bypass)
    assert torch.equal(whole.loss(), before)
    assert not torch.equal(bypassed, before)
    shorter = surgery.remove(model, Removal(blocks=tuple(bypass)))
    assert torch.equal(bypassed, decoder(shorter, tokens).loss())


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_hidden_states_are_those_of_transformers(architecture: str) -> None:
    model, tokens = tiny_model(architecture), tiny_tokens(windows=2)
    states = decoder(model, tokens).hidden_states(1)
    with torch.no_grad():
        expected = model(input_ids=tokens[1:], output_hidden_states=True, use_cache=False).hidden_states
        assert states.shape == (4, 12, 32)
        assert torch.equal(states[:3], torch.cat(expected[:3]))
        # transformers normalises the last ones.
        assert torch.equal(model.model.norm(states[3:]), expected[3])


def test_hidden_states_leave_padding_out() -> None:
    tokens = tiny_tokens(windows=1)
    kept = torch.ones_like(tokens, dtype=torch.bool)
    kept[:, 7:] = False
    assert decoder(tiny_model(), tokens, kept).hidden_states(0).shape == (4, 7, 32)


def test_units_are_counted() -> None:
    model = tiny_model("llama-gqa")
    assert decoder(model, tiny_tokens()).structure == Structure(blocks=3, kv_groups=4, neurons=48)


def test_windows_of_one_token_have_no_loss() -> None:
    with pytest.raises(UserError, match="No calibration window has two tokens"):
        decoder(tiny_model(), tiny_tokens(windows=2, length=1)).loss()
