from __future__ import annotations

import dataclasses
from itertools import pairwise

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.prune.obert import Options, compress, fisher, invert, plan, saliency
from coppice.models.contracts import Linear
from coppice.models.replacements import Masked, Unchanged

# Read by tests/rows.py.
ROWS = [{"sparsity": 0.5, "block": 8}, {"sparsity": 0.5, "block": 8, "unit": 4, "update": "joint", "scope": "layer"}]

SHAPES = {"model.layers.0.a": (6, 8), "model.layers.1.b": (5, 12)}


class FakeDecoder:
    """Linears and gradients that are given: gradients[k][name] [m, n]."""

    def __init__(self, linears, gradients):
        self.linears, self.given = linears, gradients
        self.names, self.windows, self.seed = list(linears), len(gradients), 0
        self.asked = []

    def linear(self, name):
        return self.linears[name]

    def gradients(self, batch=1):
        self.asked.append(batch)
        yield from self.given


def decoder(seed=0, gradients=40, shapes=SHAPES, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def random(shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    linears = {name: Linear(random(shape), name=name) for name, shape in shapes.items()}
    return FakeDecoder(
        linears, [{name: scale * random(shape) for name, shape in shapes.items()} for _ in range(gradients)]
    )


def compressed(fake, options):
    planned = plan(fake, options)
    return {
        name: compress(dataclasses.replace(linear, plan=planned[name]), None, options)
        for name, linear in fake.linears.items()
    }


def inverses(fake, options):
    matrices, _ = fisher(fake, fake.linears, options)
    for name, found in matrices.items():
        invert(found, name, options.dampening)
    return matrices


def whole_fisher(fake, name, options):
    """F of a linear as one matrix, zero between blocks: the definition."""
    g = torch.stack([each[name].flatten() for each in fake.given])
    index = torch.arange(g.shape[1]) // options.block
    same = index[:, None] == index
    return (g.T @ g / len(g)) * same + options.dampening * torch.eye(g.shape[1], dtype=g.dtype)


@pytest.mark.parametrize("gradients", [3, 40])
@pytest.mark.parametrize("block", [7, 8, 50])
def test_the_inverse_is_that_of_the_dampened_fisher_matrix(gradients, block):
    fake, options = decoder(gradients=gradients), Options(sparsity=0.5, block=block, dampening=1e-3)
    for name, found in inverses(fake, options).items():
        size = fake.linears[name].weight.numel()
        assert found.shape == (-(-size // block), block, block)
        expected = torch.linalg.inv(whole_fisher(fake, name, options))
        ours = torch.block_diag(*found)[:size, :size]
        torch.testing.assert_close(ours, expected, rtol=1e-8, atol=1e-8)


def test_the_inverse_is_that_of_updates_by_one_gradient_at_a_time():
    fake, options = decoder(gradients=5), Options(sparsity=0.5, block=8, dampening=1e-4)
    name = fake.names[0]
    expected = torch.eye(8, dtype=torch.float64) / options.dampening
    for each in fake.given:
        image = expected @ each[name].flatten()[:8]
        expected = expected - torch.outer(image, image) / (5 + each[name].flatten()[:8] @ image)
    torch.testing.assert_close(inverses(fake, options)[name][0], expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("update", ["independent", "joint"])
def test_one_unit_is_removed_exactly(unit, update):
    # On a quadratic loss with this curvature the prediction is the rise.
    fake = decoder(shapes={"model.layers.0.a": (3, 8)})
    options = Options(sparsity=unit / 24, unit=unit, block=12, dampening=1e-2, update=update)
    (name,) = fake.names
    linear = fake.linears[name]
    pruned = compressed(fake, options)[name]
    assert int((~pruned.mask).sum()) == unit
    assert (pruned.weight[~pruned.mask] == 0).all()
    F = whole_fisher(fake, name, options)
    d = (pruned.weight - linear.weight).flatten()
    rise = d @ F @ d / 2
    assert pruned.record["predicted_loss_increase"] == pytest.approx(rise.item(), rel=1e-10)

    inverse, w = torch.linalg.inv(F), linear.weight.flatten()
    rises = []
    for b in torch.arange(24).split(unit):
        expected = -inverse[:, b] @ torch.linalg.solve(inverse[b][:, b], w[b])
        rises.append(expected @ F @ expected / 2)
        if not pruned.mask.flatten()[b].any():
            torch.testing.assert_close(d, expected, rtol=1e-9, atol=1e-9)
    assert min(rises) == pytest.approx(rise.item(), rel=1e-10)
    scores = saliency(inverses(fake, options)[name], linear.weight, unit)
    torch.testing.assert_close(scores.flatten(), torch.stack(rises), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("unit", [1, 4])
def test_the_joint_update_is_the_best_for_what_goes(unit):
    fake = decoder()
    options = Options(sparsity=0.5, unit=unit, block=24, dampening=1e-2)
    independent = compressed(fake, options)
    joint = compressed(fake, options.model_copy(update={"update": "joint"}))
    for name, linear in fake.linears.items():
        assert torch.equal(joint[name].mask, independent[name].mask)
        F, w = whole_fisher(fake, name, options), linear.weight.flatten()
        mask = joint[name].mask.flatten()
        d = joint[name].weight.flatten() - w
        torch.testing.assert_close(d[~mask], -w[~mask], rtol=1e-12, atol=0)
        gradient = F @ d
        assert gradient[mask].abs().max() < 1e-9 * gradient.abs().max()
        other = independent[name].weight.flatten() - w
        assert d @ F @ d < other @ F @ other

        inverse = torch.linalg.inv(F)
        summed = sum(
            -inverse[:, b] @ torch.linalg.solve(inverse[b][:, b], w[b])
            for b in torch.arange(len(w)).split(unit)
            if not mask[b].any()
        )
        torch.testing.assert_close(other[mask], summed[mask], rtol=1e-9, atol=1e-9)
        assert (independent[name].weight.flatten()[~mask] == 0).all()


@pytest.mark.parametrize("unit", [1, 4])
def test_large_dampening_is_magnitude_pruning_without_update(unit):
    fake = decoder()
    pruned = compressed(fake, Options(sparsity=0.5, unit=unit, block=24, dampening=1e12))
    sizes = torch.cat(
        [each.weight.unflatten(1, (-1, unit)).square().sum(2).flatten() for each in fake.linears.values()]
    )
    threshold = sizes.sort().values[len(sizes) // 2]
    for name, linear in fake.linears.items():
        norms = linear.weight.unflatten(1, (-1, unit)).square().sum(2).repeat_interleave(unit, dim=1)
        assert torch.equal(pruned[name].mask, norms >= threshold)
        torch.testing.assert_close(pruned[name].weight, linear.weight * pruned[name].mask, rtol=0, atol=1e-9)


def test_blocks_of_one_weight_do_not_compensate():
    fake = decoder()
    options = Options(sparsity=0.4, block=1, dampening=1e-3)
    pruned = compressed(fake, options)
    for name, linear in fake.linears.items():
        assert torch.equal(pruned[name].weight, linear.weight * pruned[name].mask)
        diagonal = whole_fisher(fake, name, options).diagonal().view_as(linear.weight)
        scores = linear.weight.square() * diagonal / 2
        torch.testing.assert_close(saliency(inverses(fake, options)[name], linear.weight, 1), scores)


def test_scopes():
    fake = decoder()
    # Gradients of the second linear are a hundred times larger: all that goes globally is in the first.
    for each in fake.given:
        each["model.layers.1.b"] *= 100
    first, second = compressed(fake, Options(sparsity=0.4, block=10, dampening=1e-6)).values()
    assert int((~first.mask).sum()) + int((~second.mask).sum()) == 43
    assert first.record["sparsity"] > 0.8 and second.record["sparsity"] < 0.05
    first, second = compressed(fake, Options(sparsity=0.4, block=10, dampening=1e-6, scope="layer")).values()
    assert [int((~each.mask).sum()) for each in (first, second)] == [19, 24]
    assert first.record["sparsity_asked"] == 0.4 and first.record["gradients"] == 40


@pytest.mark.parametrize("unit", [1, 4])
@pytest.mark.parametrize("update", ["independent", "joint"])
def test_what_is_pruned_never_revives(unit, update):
    fake = decoder()
    before = compressed(fake, Options(sparsity=0.3, block=8, dampening=1e-3))
    parent = {name: Linear(each.weight, each.mask, name=name) for name, each in before.items()}
    again = FakeDecoder(parent, fake.given)
    after = compressed(again, Options(sparsity=0.6, unit=unit, block=8, dampening=1e-3, update=update))
    for name, each in after.items():
        assert isinstance(each, Masked)
        assert not (each.mask & ~before[name].mask).any()
        assert (each.weight[~each.mask] == 0).all()
    if unit == 1:
        assert sum(int((~each.mask).sum()) for each in after.values()) == 64
    same = compressed(again, Options(sparsity=0.3, block=8, dampening=1e-3, update=update))
    for name, each in same.items():
        assert torch.equal(each.mask, before[name].mask) and torch.equal(each.weight, before[name].weight)
        assert each.record["predicted_loss_increase"] == 0


def test_gradients_of_pruned_weights_do_not_count():
    fake, options = decoder(), Options(sparsity=0.5, block=8, dampening=1e-3)
    name = fake.names[0]
    mask = torch.ones(6, 8, dtype=torch.bool)
    mask[:, 3] = False
    fake.linears[name] = Linear(fake.linears[name].weight * mask, mask, name=name)
    found = inverses(fake, options)[name]
    torch.testing.assert_close(found[:, 3, 3], torch.full((6,), 1 / options.dampening, dtype=torch.float64))
    assert (found[:, 3, :3] == 0).all() and (found[:, 3, 4:] == 0).all()


def test_a_sparsity_of_zero_asks_for_no_gradients():
    fake = decoder()
    assert plan(fake, Options(sparsity=0)) == {}
    assert fake.asked == []
    assert isinstance(compress(fake.linears[fake.names[0]], None, Options(sparsity=0)), Unchanged)


def test_layers_without_gradients_and_types():
    fake = decoder()
    for each in fake.given:
        each["model.layers.0.a"] *= 0
    fake.linears = {
        name: dataclasses.replace(linear, weight=linear.weight.float()) for name, linear in fake.linears.items()
    }
    first, second = compressed(fake, Options(sparsity=0.3, block=10, batch=2)).values()
    assert fake.asked == [2]
    # Without curvature, weights go by size, before all that the loss feels.
    assert int((~first.mask).sum()) == 32 and second.mask.all()
    assert torch.equal(first.weight, fake.linears["model.layers.0.a"].weight * first.mask)
    assert first.weight.dtype == second.weight.dtype == torch.float32


def test_the_more_goes_the_more_it_costs():
    fake = decoder()
    costs = [
        sum(each.record["predicted_loss_increase"] for each in compressed(fake, Options(sparsity=share)).values())
        for share in (0.1, 0.5, 0.9)
    ]
    assert all(less < more for less, more in pairwise(costs))


def test_bad_input():
    with pytest.raises(UserError, match=r"model\.layers\.0\.a has 6"):
        plan(decoder(shapes={"model.layers.0.a": (4, 6)}), Options(sparsity=0.5, unit=4, block=8))
    with pytest.raises(UserError, match="is lost in rounding next to the Fisher matrix"):
        plan(decoder(gradients=3, scale=1e6), Options(sparsity=0.5, dampening=1e-12))
    with pytest.raises(ValidationError, match="such as 48"):
        Options(sparsity=0.5, unit=4)
    for wrong in ({"sparsity": 1}, {"sparsity": 0.5, "unit": 2}, {"sparsity": 0.5, "dampening": 0}, {}):
        with pytest.raises(ValidationError):
            Options(**wrong)
