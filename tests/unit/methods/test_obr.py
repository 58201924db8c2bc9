from __future__ import annotations

import dataclasses

import pytest
import torch
from pydantic import ValidationError

from coppice.errors import UserError
from coppice.methods.prune import wanda
from coppice.methods.prune.obr import Options, compress, restore, traits
from coppice.methods.solvers.grid import Grid, decode, dequantize, fit_groups
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import Masked, Quantized, Unchanged

# Read by tests/rows.py.
ROWS = [
    {"sparsity": 0.5},
    {"sparsity": 0.5, "bits": 4, "group_size": -1},
    {"sparsity": 0.5, "bits": 4, "form": "rtn", "group_size": -1},
]
CLEARS_UNSEEN_INPUTS = True

OUTPUTS = 5
PAPER = {"sparsity": 0.5, "symmetric": True, "group_size": -1}
# None is a multiple of 256, and no half of one a multiple of the sweep's block.
WIDTHS = (172, 96, 250)


def problem(width, tokens=None):
    generator = torch.Generator().manual_seed(width)
    mixing = torch.randn(width, width, generator=generator, dtype=torch.float64)
    inputs = torch.randn(tokens or 2 * width, width, generator=generator, dtype=torch.float64) @ mixing
    inputs *= torch.logspace(-1, 1, width, dtype=torch.float64)
    weight = torch.randn(OUTPUTS, width, generator=generator, dtype=torch.float64)
    blank = torch.zeros(width, dtype=torch.float64)
    return Linear(weight), LinearStatistics(inputs.T @ inputs / len(inputs), blank, blank, blank, len(inputs))


def damped(statistics, share=0.01):
    moment = statistics.second_moment
    return moment + share * moment.diagonal().mean() * torch.eye(len(moment), dtype=moment.dtype)


def loss(difference, moment):
    return ((difference @ moment) * difference).sum().item()


def per_row(error, free, moment):
    """d_R = H_RR^-1 H_RE e_E, row by row and by the textbook."""
    d = torch.zeros_like(error)
    for row in range(len(error)):
        r = free[row]
        d[row, r] = torch.linalg.solve(moment[r][:, r], moment[r][:, ~r] @ error[row, ~r])
    return d


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("budget", [{"sparsity": 0.5}, {"pattern": "1:2"}])
def test_without_bits_it_is_the_least_squares_refit_of_wandas_mask(width, budget):
    linear, statistics = problem(width)
    pruned = compress(linear, statistics, Options(**budget))
    chosen = wanda.compress(linear, statistics, wanda.Options(**budget))
    assert isinstance(pruned, Masked)
    assert torch.equal(pruned.mask, chosen.mask)
    assert (pruned.weight[~pruned.mask] == 0).all()
    moment, w = damped(statistics), linear.weight
    expected = chosen.weight + per_row(w.masked_fill(pruned.mask, 0), pruned.mask, moment)
    torch.testing.assert_close(pruned.weight, expected, rtol=1e-8, atol=1e-8)
    gradient = (w - pruned.weight) @ moment
    assert gradient[pruned.mask].abs().max() < 1e-9 * gradient.abs().max()
    # In the loss without damping too, from which the sign of the correction would stand out.
    assert loss(w - pruned.weight, statistics.second_moment) < loss(w - chosen.weight, statistics.second_moment)


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("alpha", [0.5, 0.3])
def test_rounding_errors_before_the_split_are_made_up_for_behind_it(width, alpha):
    linear, statistics = problem(width)
    options = Options(bits=3, alpha=alpha, form="rtn", **PAPER)
    quantized = compress(linear, statistics, options)
    assert isinstance(quantized, Quantized)
    refit = compress(linear, statistics, Options(sparsity=0.5))
    moment, split = damped(statistics), int(alpha * width)
    assert quantized.record["split"] == split
    grid = Grid(3, True, torch.float64)
    scale, zero_point = fit_groups(grid, linear.weight, width)

    def rounded(weight):
        return decode(grid.encode(weight, scale, zero_point), scale, zero_point)

    front = torch.arange(width) < split
    error = (refit.weight - rounded(refit.weight)).masked_fill(~front, 0)
    correction = per_row(error, refit.mask & ~front, moment)
    expected = rounded(refit.weight - error + correction)
    torch.testing.assert_close(dequantize(quantized), expected, rtol=1e-9, atol=1e-9)
    # Of the front's errors alone, and of all that has happened so far.
    assert loss(error - correction, moment) < loss(error, moment)
    total = linear.weight - refit.weight + error
    assert loss(total - correction, moment) < loss(total, moment)
    wrong = total + correction
    assert loss(wrong, moment) > loss(total, moment)


def test_the_correction_is_the_best_for_pruning_and_rounding_together():
    linear, statistics = problem(96)
    moment, refit = damped(statistics), compress(linear, statistics, Options(sparsity=0.5))
    behind = torch.arange(96) >= 48
    settled = torch.where(behind, refit.weight, torch.round(refit.weight))
    free = refit.mask & behind
    both = restore(refit.weight, settled, free, moment)
    gradient = (linear.weight - both) @ moment
    assert gradient[free].abs().max() < 1e-9 * gradient.abs().max()
    assert torch.equal(both[~free], settled[~free])


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_sweep_reaches_every_input_behind_the_split(width, symmetric):
    linear, statistics = problem(width)
    moment = damped(statistics)
    results = {
        form: compress(linear, statistics, Options(sparsity=0.5, bits=4, form=form, symmetric=symmetric, group_size=-1))
        for form in ("rtn", "gptq")
    }
    mask = compress(linear, statistics, Options(sparsity=0.5)).mask
    split = width // 2
    assert torch.equal(results["rtn"].codes[:, :split], results["gptq"].codes[:, :split])
    swept = dequantize(results["gptq"])
    assert (swept[~mask] == 0).all() and (dequantize(results["rtn"])[~mask] == 0).all()
    # Rows of kept weights do not come out empty just behind the split.
    assert (swept[:, split : split + 20][mask[:, split : split + 20]] != 0).double().mean() > 0.7
    losses = {form: loss(linear.weight - dequantize(result), moment) for form, result in results.items()}
    assert losses["gptq"] < losses["rtn"]


def test_the_sweep_does_not_depend_on_its_block():
    linear, statistics = problem(172)
    one, other = (
        compress(linear, statistics, Options(sparsity=0.5, bits=4, group_size=43, block=block)).codes
        for block in (128, 7)
    )
    assert torch.equal(one, other)


def test_beats_rounding_what_wanda_left():
    linear, statistics = problem(96)
    moment = statistics.second_moment
    chosen = wanda.compress(linear, statistics, wanda.Options(sparsity=0.5)).weight
    grid = Grid(4, True, torch.float64)
    scale, zero_point = fit_groups(grid, linear.weight, 96)
    naive = loss(linear.weight - decode(grid.encode(chosen, scale, zero_point), scale, zero_point), moment)
    for form in ("rtn", "gptq"):
        ours = compress(linear, statistics, Options(bits=4, form=form, **PAPER))
        assert loss(linear.weight - dequantize(ours), moment) < naive


def test_the_ends_of_alpha():
    linear, statistics = problem(96)
    refit = compress(linear, statistics, Options(sparsity=0.5)).weight
    grid = Grid(4, True, torch.float64)
    nearest = grid.encode(refit, *fit_groups(grid, linear.weight, 96))
    for alpha, form in ((0, "rtn"), (1, "rtn"), (1, "gptq")):
        codes = compress(linear, statistics, Options(bits=4, alpha=alpha, form=form, **PAPER)).codes
        assert torch.equal(codes, nearest)
    swept = compress(linear, statistics, Options(bits=4, alpha=0, form="gptq", **PAPER)).codes
    assert not torch.equal(swept, nearest)


def test_groups_and_the_record():
    linear, statistics = problem(96)
    quantized = compress(linear, statistics, Options(pattern="2:4", bits=3, group_size=32, symmetric=False))
    assert quantized.scale.shape == (OUTPUTS, 3) and quantized.codes.min() >= 0 and quantized.codes.max() <= 7
    assert ((dequantize(quantized) != 0).view(OUTPUTS, -1, 4).sum(2) <= 2).all()
    expected = {"sparsity": 0.5, "bits": 3, "group_size": 32, "damping": 0.01, "dead_inputs": 0, "split": 48}
    assert expected.items() <= quantized.record.items()


def test_what_is_pruned_stays_pruned():
    linear, statistics = problem(96)
    kept = torch.ones(OUTPUTS, 96, dtype=torch.bool)
    kept[:2, ::3] = False
    kept[3] = False
    parent = Linear(linear.weight * kept, kept)
    pruned = compress(parent, statistics, Options(sparsity=0.5))
    assert not (pruned.mask & ~kept).any()
    assert [int(row.sum()) for row in pruned.mask] == [48, 48, 48, 0, 48]
    assert (pruned.weight[~pruned.mask] == 0).all()
    codes = compress(parent, statistics, Options(bits=4, **PAPER)).codes
    assert (codes[~pruned.mask] == 0).all()


def test_nothing_to_prune():
    linear, statistics = problem(96)
    assert isinstance(compress(linear, statistics, Options(sparsity=0)), Unchanged)
    quantized = compress(linear, statistics, Options(sparsity=0, bits=8, form="rtn", group_size=-1))
    assert quantized.record["sparsity"] == 0
    torch.testing.assert_close(dequantize(quantized), linear.weight, rtol=0, atol=0.2)


def test_fewer_tokens_than_inputs_and_dead_inputs():
    linear, statistics = problem(96, tokens=30)
    pruned = compress(linear, statistics, Options(sparsity=0.5))
    assert loss(linear.weight - pruned.weight, damped(statistics)) < loss(
        linear.weight * ~pruned.mask, damped(statistics)
    )
    moment = statistics.second_moment.clone()
    moment[:60] = moment[:, :60] = 0
    dead = dataclasses.replace(statistics, second_moment=moment)
    for bits in (None, 4):
        result = compress(
            linear, dead, Options(sparsity=0.5, bits=bits) if bits is None else Options(bits=bits, **PAPER)
        )
        weight = result.weight if bits is None else dequantize(result)
        assert (weight[:, :60] == 0).all() and weight[:, 60:].any()
        assert result.record["dead_inputs"] == 60


def test_storage_type_rounds_the_scales():
    linear, statistics = problem(96)
    single = Linear(linear.weight.float(), storage=torch.bfloat16)
    quantized = compress(single, statistics, Options(bits=4, **PAPER))
    assert quantized.scale.dtype == torch.float32
    assert torch.equal(quantized.scale, quantized.scale.bfloat16().float())
    assert compress(single, statistics, Options(sparsity=0.5)).weight.dtype == torch.float32


def test_marks():
    parent = frozenset({"rotated"})
    assert traits(parent, Options(sparsity=0.5)) == {"rotated", "masked"}
    assert traits(parent, Options(sparsity=0.5, bits=4)) == {"rotated", "masked", "quantized"}


def test_bad_input():
    linear, statistics = problem(96)
    with pytest.raises(UserError, match="does not divide"):
        compress(linear, statistics, Options(sparsity=0.5, bits=4, group_size=64))
    with pytest.raises(UserError, match="needs a number of inputs"):
        compress(linear, statistics, Options(pattern="2:5"))
    for factor, sentence in ((float("nan"), "not finite"), (0.0, "zero everywhere"), (-1.0, "negative")):
        damaged = dataclasses.replace(statistics, second_moment=factor * statistics.second_moment)
        with pytest.raises(UserError, match=sentence):
            compress(linear, damaged, Options(sparsity=0.5))


@pytest.mark.parametrize(
    ("wrong", "sentence"),
    [
        ({"sparsity": 0.5, "bits": 1}, "greater than or equal to 2"),
        ({"sparsity": 0.5, "bits": 4, "alpha": 1.5}, "less than or equal to 1"),
        ({"bits": 4}, "exactly one of"),
        ({"sparsity": 0.5, "pattern": "2:4"}, "exactly one of"),
        ({"sparsity": 1}, "less than 1"),
        ({"sparsity": 0.5, "alpha": 0.3}, "'alpha' requires 'bits'"),
        ({"sparsity": 0.5, "form": "rtn"}, "'form' requires 'bits'"),
        ({"sparsity": 0.5, "symmetric": True}, "requires 'bits'"),
    ],
)
def test_wrong_options(wrong, sentence):
    with pytest.raises(ValidationError, match=sentence):
        Options(**wrong)
