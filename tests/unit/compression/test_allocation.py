from __future__ import annotations

import math
from itertools import product

import numpy
import pytest
import torch
from pydantic import ValidationError

from coppice.compression.allocation import allocate, outliers, sensitivity, spreading, svd_llm_v2
from coppice.errors import UserError
from coppice.methods.decompose import svd_llm
from coppice.methods.prune import magnitude, wanda
from coppice.methods.quantize import rtn
from coppice.methods.solvers import demand
from coppice.methods.solvers.truncation import break_even, chosen_rank
from coppice.models.contracts import Linear, LinearStatistics

SHAPES = {"self_attn.q_proj": (16, 16), "self_attn.k_proj": (8, 16), "mlp.up_proj": (40, 16), "mlp.down_proj": (16, 40)}


def statistics_with(moment):
    blank = torch.zeros(len(moment), dtype=moment.dtype)
    return LinearStatistics(moment, blank, blank, blank, 1)


def decoder(blocks=4, seed=0):
    """Linears of very different singular values, outliers and scales."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    linears = []
    for block in range(blocks):
        for kind, (rows, columns) in SHAPES.items():
            decay = torch.linspace(0, -2.0 * draw(1).abs().item() - 0.2, columns, dtype=torch.float64).exp()
            weight = draw(rows, columns) * draw(rows, columns).abs() ** (block + 1) * (block + 1)
            inputs = draw(100, columns) * decay
            statistics = statistics_with(inputs.T @ inputs / 100)
            linears.append((f"model.layers.{block}.{kind}", Linear(weight), statistics))
    return linears


def equal_linears(count=4):
    """The same linear over and over."""
    _, linear, statistics = decoder(1)[2]
    return [(f"model.layers.{block}.mlp.up_proj", linear, statistics) for block in range(count)]


LINEARS = decoder()
SIZES = [linear.weight.numel() for _, linear, _ in LINEARS]
REQUESTED = {"sparsity": (wanda.Options, 0.6), "keep": (svd_llm.Options, 0.5), "bits": (rtn.Options, 4)}
RULES = [
    *(("sparsity", by) for by in ("uniform", "sensitivity", "owl", "mosaic", "knapsack")),
    *(("keep", by) for by in ("uniform", "sensitivity", "svd-llm-v2", "water-filling", "knapsack")),
    *(("bits", by) for by in ("uniform", "sensitivity", "knapsack")),
]


def options_with(target, by, value=None, **rule):
    kind, requested = REQUESTED[target]
    more = {"group_size": 8} if target == "bits" else {}
    return kind(**{target: requested if value is None else value}, allocation={"by": by, **rule}, **more)


def cost(options, linear):
    """Weights kept, parameters or bits that a method spends under these options."""
    rows, columns = linear.weight.shape
    if hasattr(options, "bits"):
        return options.bits * rows * columns
    if hasattr(options, "keep"):
        rank = chosen_rank(options, rows, columns)
        return rows * columns if rank >= break_even(rows, columns) else rank * (rows + columns)
    return rows * columns - round(options.sparsity * rows * columns)


def costs(options_of, linears=LINEARS):
    return [cost(options_of[name], linear) for name, linear, _ in linears]


# The whole way.


@pytest.mark.parametrize(("target", "by"), RULES)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.8])
def test_the_budget_is_met_to_one_quantum_and_never_exceeded(target, by, share):
    value = {"sparsity": 1 - share, "keep": share, "bits": round(2 + 5 * share)}[target]
    options_of, record = allocate(LINEARS, options_with(target, by, value))
    spent, size = sum(costs(options_of)), sum(SIZES)
    if by == "uniform":
        assert all(getattr(options, target) == value for options in options_of.values())
        return
    if target == "sparsity":
        assert spent - (1 - value) * size == pytest.approx(0, abs=1)
        assert size - spent <= value * size + 1e-6
    elif target == "keep":
        # One rank of the largest linear, or the step from below break-even to dense.
        assert value * size - 2 * max(map(sum, SHAPES.values())) < spent <= value * size
    else:
        assert value * size - min(SIZES) < spent <= value * size
    assert record["achieved"] == pytest.approx(
        (size - spent) / size if target == "sparsity" else spent / size, rel=1e-12
    )


@pytest.mark.parametrize(("target", "by"), RULES)
def test_each_linear_gets_at_least_the_floor(target, by):
    for floor in (0.25, 0.9):
        options = options_with(target, by, **({} if by == "uniform" else {"floor": floor}))
        options_of, _ = allocate(LINEARS, options)
        uniform, _ = allocate(LINEARS, options_with(target, "uniform"))
        for spent, least in zip(costs(options_of), costs(uniform), strict=True):
            assert spent >= math.floor(floor * least)


@pytest.mark.parametrize(("target", "by"), RULES)
def test_equal_linears_get_the_same(target, by):
    linears = equal_linears()
    options_of, _ = allocate(linears, options_with(target, by))
    uniform, _ = allocate(linears, options_with(target, "uniform"))
    spent, expected = costs(options_of, linears), costs(uniform, linears)
    if (target, by) in {("sparsity", "knapsack"), ("bits", "knapsack")}:
        # The summed loss may be lower where equal linears differ; no rule says that it is not.
        assert sum(spent) == sum(expected)
    else:
        quantum = sum(SHAPES["mlp.up_proj"]) if target == "keep" else 1
        assert max(spent) - min(spent) <= quantum and all(
            abs(a - b) <= quantum for a, b in zip(spent, expected, strict=True)
        )


@pytest.mark.parametrize(("target", "by"), [each for each in RULES if each[1] != "uniform"])
def test_a_floor_of_one_is_uniform(target, by):
    linears = equal_linears()
    options_of, record = allocate(linears, options_with(target, by, floor=1))
    assert record["achieved"] == pytest.approx(REQUESTED[target][1], abs=0.06)
    assert max(costs(options_of, linears)) - min(costs(options_of, linears)) <= sum(SHAPES["mlp.up_proj"])


@pytest.mark.parametrize(("target", "by"), RULES)
def test_what_comes_back_is_options_of_the_method_without_an_allocation(target, by):
    options = options_with(target, by)
    options_of, record = allocate(iter(LINEARS), options)
    assert list(options_of) == [name for name, _, _ in LINEARS] == list(record["linears"])
    for each in options_of.values():
        assert each.allocation.by == "uniform"
        assert type(options).model_validate(each.model_dump()) == each
    assert record["by"] == by and record["asked"] == REQUESTED[target][1]


@pytest.mark.parametrize(("target", "by"), RULES)
def test_deterministic(target, by):
    assert allocate(LINEARS, options_with(target, by)) == allocate(LINEARS, options_with(target, by))


@pytest.mark.parametrize("by", ["sensitivity", "owl", "mosaic", "knapsack"])
def test_nothing_to_prune(by):
    options_of, record = allocate(LINEARS, options_with("sparsity", by, 0.0))
    assert all(options.sparsity == 0 for options in options_of.values()) and record["achieved"] == 0


@pytest.mark.parametrize("by", ["sensitivity", "svd-llm-v2", "water-filling", "knapsack"])
@pytest.mark.parametrize("align", [1, 4])
def test_all_parameters_keep_every_linear_dense(by, align):
    options = svd_llm.Options(keep=1, align=align, allocation={"by": by})
    options_of, record = allocate(LINEARS, options)
    assert costs(options_of) == SIZES and record["achieved"] == 1


@pytest.mark.parametrize("by", ["sensitivity", "svd-llm-v2", "water-filling", "knapsack"])
def test_aligned_ranks(by):
    options = svd_llm.Options(keep=0.6, align=3, allocation={"by": by})
    options_of, record = allocate(LINEARS, options)
    for name, linear, _ in LINEARS:
        assert chosen_rank(options_of[name], *linear.weight.shape) == options_of[name].rank
    assert 0.6 * sum(SIZES) - 2 * 3 * 56 < sum(costs(options_of)) <= 0.6 * sum(SIZES)
    assert record["achieved"] == pytest.approx(sum(costs(options_of)) / sum(SIZES), rel=1e-12)


def test_the_allocated_sparsity_is_what_the_method_prunes():
    options_of, record = allocate(LINEARS, magnitude.Options(sparsity=0.37, allocation={"by": "owl"}))
    pruned = 0
    for name, linear, statistics in LINEARS:
        mask = magnitude.compress(linear, statistics, options_of[name]).mask
        pruned += int((~mask).sum())
    assert pruned == math.floor(0.37 * sum(SIZES))
    assert record["achieved"] == pruned / sum(SIZES)


def test_bits_eight_leave_nothing_to_choose():
    for by in ("sensitivity", "knapsack"):
        options_of, _ = allocate(LINEARS, options_with("bits", by, 8))
        assert {options.bits for options in options_of.values()} == {8}


def test_two_bits_leave_nothing_to_choose():
    for by in ("sensitivity", "knapsack"):
        options_of, _ = allocate(LINEARS, options_with("bits", by, 2))
        assert {options.bits for options in options_of.values()} == {2}


def test_scale_of_weights_and_inputs_does_not_matter_to_relative_rules():
    scaled = [
        (name, Linear(weight.weight * factor), statistics_with(statistics.second_moment / factor**3))
        for (name, weight, statistics), factor in zip(LINEARS, 2.0 ** numpy.arange(-8, 8), strict=True)
    ]
    for target, by in [("sparsity", "sensitivity"), ("sparsity", "mosaic"), ("bits", "sensitivity")]:
        assert allocate(scaled, options_with(target, by))[0] == allocate(LINEARS, options_with(target, by))[0]
    for by in ("svd-llm-v2", "sensitivity"):
        measures = [allocate(linears, options_with("keep", by))[1]["measures"] for linears in (scaled, LINEARS)]
        assert measures[0] == pytest.approx(measures[1], rel=1e-9)
    relative = options_with("keep", "water-filling", relative=True)
    assert allocate(scaled, relative)[1]["linears"] == allocate(LINEARS, relative)[1]["linears"]


def test_a_linear_of_zeros_does_not_break_a_rule():
    name, linear, statistics = LINEARS[0]
    linears = [(name, Linear(torch.zeros_like(linear.weight)), statistics), *LINEARS[1:]]
    for target, by in RULES:
        options_of, _ = allocate(linears, options_with(target, by))
        assert sum(costs(options_of, linears)) > 0
        if by in ("sensitivity", "water-filling"):
            # Its floor: half of 0.4 of the weights, of rank 4, of 4 bits.
            assert costs(options_of, linears)[0] == {"sparsity": 51, "keep": 2 * 32, "bits": 2 * 256}[target]


def test_the_failing_linear_is_named():
    name, linear, statistics = LINEARS[3]
    damaged = statistics_with(statistics.second_moment * float("nan"))
    linears = [*LINEARS[:3], (name, linear, damaged)]
    for target, by in RULES:
        if by != "uniform":
            with pytest.raises(UserError, match=rf"^{name}: .*not finite"):
                allocate(linears, options_with(target, by))


def test_levels_that_cannot_meet_the_budget():
    with pytest.raises(UserError, match=r"comes to bits 4, and 3 is requested"):
        allocate(LINEARS, options_with("bits", "knapsack", 3, levels=[4, 8]))
    with pytest.raises(UserError, match=r"comes to sparsity 0.4.*, and 0.6 is requested"):
        allocate(LINEARS, options_with("sparsity", "knapsack", 0.6, levels=[0.2, 0.4]))
    with pytest.raises(UserError, match="No level of the allocation reaches its floor"):
        allocate(LINEARS, options_with("bits", "knapsack", 8, levels=[2, 3]))


def test_no_linears():
    with pytest.raises(UserError, match="No linear is left"):
        allocate([], options_with("sparsity", "owl"))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"sparsity": 0.5, "allocation": {"by": "water-filling"}}, "choose one of knapsack, mosaic, owl, sensitivity"),
        ({"sparsity": 0.5, "allocation": {"by": "owl", "levels": [0.5]}}, "leave them out"),
        ({"sparsity": 0.5, "allocation": {"by": "owl", "relative": True}}, "requires water-filling or knapsack"),
        ({"sparsity": 0.5, "allocation": {"by": "knapsack", "levels": []}}, "one or more different targets"),
        ({"sparsity": 0.5, "allocation": {"by": "knapsack", "levels": [0.5, 1.0]}}, "at least 0 and less than 1"),
        ({"pattern": "2:4", "allocation": {"by": "owl"}}, "sparsity"),
        ({"sparsity": 0.5, "allocation": {"by": "owl", "floor": 1.5}}, "less than or equal to 1"),
    ],
)
def test_allocations_that_are_not_possible(options, sentence):
    with pytest.raises(ValidationError, match=sentence):
        wanda.Options(**options)


def test_levels_of_other_budgets():
    with pytest.raises(ValidationError, match="bits are an integer from 2 to 8"):
        rtn.Options(bits=4, allocation={"by": "knapsack", "levels": [4, 4.5]})
    with pytest.raises(ValidationError, match="more than 0 and at most 1"):
        svd_llm.Options(keep=0.5, allocation={"by": "knapsack", "levels": [0]})


def test_an_uneven_allocation_needs_moments():
    assert magnitude.Options(sparsity=0.5).needs == frozenset()
    assert magnitude.Options(sparsity=0.5, allocation={"by": "owl"}).needs == {"moments"}


# The rules.


def shares_of(target, by, **rule):
    _, record = allocate(LINEARS, options_with(target, by, **rule))
    return record["linears"]


def test_owl_spreads_blocks_by_their_outliers():
    sparsities = shares_of("sparsity", "owl", outlier_factor=2, spread=0.05)
    by_block = [{round(s, 2) for name, s in sparsities.items() if f".{block}." in name} for block in range(4)]
    flat = [s for name, s in sparsities.items() if "up_proj" in name]
    # Later blocks have heavier tails: more outliers, so less is pruned.
    measures = allocate(LINEARS, options_with("sparsity", "owl", outlier_factor=2))[1]["measures"]
    order = [measures[name] for name, _, _ in LINEARS if "up_proj" in name]
    assert numpy.argsort(order).tolist() == numpy.argsort(flat)[::-1].tolist()
    assert all(len(block) <= 2 for block in by_block)
    assert max(flat) - min(flat) == pytest.approx(2 * 0.05, abs=2 / min(SIZES))


def test_owl_counts_the_outliers_of_a_block_together():
    _, record = allocate(LINEARS, options_with("sparsity", "owl", outlier_factor=2))
    scores = [demand.outlier_scores(linear.weight, statistics.second_moment) for _, linear, statistics in LINEARS[:4]]
    assert record["measures"][LINEARS[0][0]] == record["measures"][LINEARS[3][0]] == demand.outlier_share(scores, 2)


def test_mosaic_keeps_the_mean_of_each_projection():
    sparsities = shares_of("sparsity", "mosaic", outlier_factor=2, spread=0.05)
    for kind in SHAPES:
        of_kind = [s for name, s in sparsities.items() if name.endswith(kind)]
        assert sum(of_kind) / len(of_kind) == pytest.approx(0.6, abs=1 / 128)
        assert max(of_kind) - min(of_kind) == pytest.approx(2 * 0.05, abs=2 / 128)


def test_mosaic_of_one_projection_is_owl():
    linears = [each for each in LINEARS if each[0].endswith("up_proj")]
    found = [allocate(linears, options_with("sparsity", by, outlier_factor=2))[0] for by in ("owl", "mosaic")]
    assert found[0] == found[1]


@pytest.mark.parametrize("by", ["owl", "mosaic"])
def test_a_spread_of_zero_is_uniform(by):
    sparsities = shares_of("sparsity", by, outlier_factor=2, spread=0)
    assert list(sparsities.values()) == pytest.approx([0.6] * len(LINEARS), abs=1 / min(SIZES))


def test_by_outliers():
    shares_of_outliers, sizes = numpy.array([0.0, 1.0, 4.0]), numpy.array([10.0, 20.0, 30.0])
    shares = outliers.by_outliers(shares_of_outliers, sizes, 0.08, 0.3)
    assert (shares * sizes).sum() / sizes.sum() == pytest.approx(0.3, rel=1e-12)
    assert numpy.ptp(shares) == pytest.approx(0.16, rel=1e-12)
    assert shares[1] - shares[0] == pytest.approx(0.04, rel=1e-12)
    assert outliers.by_outliers(numpy.ones(3), sizes, 0.08, 0.3) == pytest.approx([0.3] * 3, rel=1e-12)


def test_sensitivity_is_in_proportion_to_the_relative_error():
    _, record = allocate(LINEARS, options_with("sparsity", "sensitivity", floor=0))
    name, linear, statistics = LINEARS[1]
    lost, power = demand.masking_losses(linear.weight, statistics.second_moment, [0.6, 1.0])
    assert record["measures"][name] == pytest.approx(math.sqrt(lost / power), rel=1e-12)
    kept = numpy.array(list(record["linears"].values())) * -1 + 1
    errors = numpy.array(list(record["measures"].values()))
    uncut = kept < 1
    factor = (kept * SIZES)[uncut].sum() / (errors * SIZES)[uncut].sum()
    assert uncut.sum() > 8
    assert (kept * SIZES)[uncut] == pytest.approx((factor * errors * SIZES)[uncut], abs=1)


def test_proportional():
    ones, worth = numpy.ones(3), numpy.array([1.0, 2.0, 5.0])
    whole = spreading.proportional(worth, 8 * ones, 0 * ones, 100 * ones, 16.0)
    assert whole == pytest.approx([2, 4, 10], rel=1e-12)
    cut = spreading.proportional(worth, 8 * ones, 3 * ones, 8 * ones, 16.0)
    assert cut == pytest.approx([3, 5, 8], rel=1e-12)
    assert spreading.proportional(0 * ones, 8 * ones, 0 * ones, 8 * ones, 12.0) == pytest.approx([4] * 3, rel=1e-12)
    # What is worth nothing gets what the others cannot use.
    last = spreading.proportional(numpy.array([0.0, 1.0, 1.0]), 8 * ones, 0 * ones, 8 * ones, 20.0)
    assert last == pytest.approx([4, 8, 8], rel=1e-9)


def test_logarithmic_gives_a_bit_more_for_each_doubling():
    ones = numpy.ones(3)
    costs = sensitivity.logarithmic(numpy.array([0.1, 0.2, 0.8]), ones, 0 * ones, 8 * ones, 12.0)
    assert costs == pytest.approx([4 - 4 / 3, 5 - 4 / 3, 7 - 4 / 3], rel=1e-12)


def test_svd_llm_v2_keeps_the_mean_of_the_group():
    draw = numpy.random.default_rng(0)
    losses, sizes = draw.uniform(10, 1e5, 6), numpy.full(6, 400.0)
    wanted = svd_llm_v2.group_costs(losses, spreading.Limits(sizes, 0.1 * sizes, sizes), 0.8 * sizes.sum())
    removed = 1 - wanted / sizes
    assert removed.mean() == pytest.approx(0.2, rel=1e-12)
    assert removed * numpy.log(losses) == pytest.approx([removed[0] * math.log(losses[0])] * 6, rel=1e-9)
    equal = svd_llm_v2.group_costs(numpy.full(6, 30.0), spreading.Limits(sizes, 0.1 * sizes, sizes), 0.8 * sizes.sum())
    assert equal == pytest.approx([320] * 6, rel=1e-12)


def test_svd_llm_v2_loses_at_most_what_the_floor_allows():
    sizes = numpy.full(4, 100.0)
    wanted = svd_llm_v2.group_costs(
        numpy.array([0.0, 1.0, 1e9, 1e9]), spreading.Limits(sizes, 0.4 * sizes, sizes), 240.0
    )
    assert wanted.sum() == pytest.approx(240, rel=1e-12)
    assert wanted[:2] == pytest.approx([40, 40], rel=1e-9) and wanted[2:] == pytest.approx([80, 80], rel=1e-9)


def test_svd_llm_v2_spreads_within_a_kind():
    _, record = allocate(LINEARS, options_with("keep", "svd-llm-v2"))
    for kind, shape in SHAPES.items():
        keeps = [keep for name, keep in record["linears"].items() if name.endswith(kind)]
        # A rank of each linear is lost by rounding, and one of another kind may come.
        assert sum(keeps) / 4 == pytest.approx(0.5, abs=sum(shape) / math.prod(shape))
    assert record["loss_tokens"] == 524288


def test_water_filling_is_the_best_of_all_ranks():
    linears = [each for each in decoder(3, seed=5) if each[0].endswith("q_proj")]
    options_of, _ = allocate(linears, options_with("keep", "water-filling", 0.5, floor=0))
    tails = [demand.truncation_losses(linear.weight, statistics.second_moment) for _, linear, statistics in linears]
    ranks = [options_of[name].rank for name, _, _ in linears]
    # 16 x 16: break-even is rank 8, a rank costs 32 of the 384 parameters that half of three linears have.
    best = min(
        sum(tail[rank] for tail, rank in zip(tails, choice, strict=True))
        for choice in product(range(1, 8), repeat=3)
        if 32 * sum(choice) <= 384
    )
    assert sum(tail[rank] for tail, rank in zip(tails, ranks, strict=True)) == pytest.approx(best, rel=1e-12)
    assert max(ranks) <= 8


@pytest.mark.parametrize("target", ["sparsity", "keep", "bits"])
def test_the_knapsack_loses_the_least(target):
    linears = decoder(1, seed=2)[:3]
    levels = {"sparsity": [0.25, 0.5, 0.75], "keep": [0.3, 0.5, 0.7], "bits": [2, 3, 4, 8]}[target]
    value = {"sparsity": 0.5, "keep": 0.5, "bits": 4}[target]
    rule = {"floor": 0, "levels": levels}
    options_of, _ = allocate(linears, options_with(target, "knapsack", value, **rule))
    spent = costs(options_of, linears)

    def loss(linear, statistics, options):
        moment = statistics.second_moment
        if target == "sparsity":
            return demand.masking_losses(linear.weight, moment, [options.sparsity])[0]
        if target == "keep":
            dense = options.rank >= break_even(*linear.weight.shape)
            return 0.0 if dense else demand.truncation_losses(linear.weight, moment)[options.rank]
        return demand.rounding_losses(linear, moment, options, [options.bits])[0]

    found = sum(loss(linear, statistics, options_of[name]) for name, linear, statistics in linears)
    plain, capacity = (
        options_with(target, "uniform", value),
        math.ceil(sum(cost(options_with(target, "uniform", value), each[1]) for each in linears)),
    )
    if target == "keep":
        capacity = value * sum(linear.weight.numel() for _, linear, _ in linears)
    losses = []
    for choice in product(levels, repeat=3):
        chosen = [plain.model_copy(update={target: level}) for level in choice]
        if target == "keep":
            chosen = [
                each.model_copy(update={"keep": None, "rank": chosen_rank(each, *linear.weight.shape)})
                for each, (_, linear, _) in zip(chosen, linears, strict=True)
            ]
        if sum(cost(each, linear) for each, (_, linear, _) in zip(chosen, linears, strict=True)) <= capacity:
            losses.append(
                sum(loss(linear, stats, each) for each, (_, linear, stats) in zip(chosen, linears, strict=True))
            )
    assert sum(spent) <= capacity
    # What the levels leave over is spent too.
    assert found <= min(losses) * (1 + 1e-9)


def test_relative_losses_change_what_the_knapsack_chooses():
    absolute, relative = (shares_of("bits", "knapsack", relative=relative) for relative in (False, True))
    assert absolute != relative


# Whole numbers.


def test_whole_costs_sum_to_the_total():
    wanted = numpy.array([1.5, 2.25, 3.25, 4.0])
    assert spreading.round_to_total(wanted, 11) == [2, 2, 3, 4]
    assert spreading.round_to_total(numpy.array([3 - 1e-9, 5.0]), 8) == [3, 5]


def test_spend_takes_the_steps_that_are_worth_the_most():
    costs = [[0, 2, 4], [0, 3, 6], [0, 1]]
    worth = [[5, 1], [4, 3], [2]]
    assert spreading.raise_levels([0, 0, 0], costs, lambda i, level: worth[i][level], 8) == [1, 2, 0]
    assert spreading.raise_levels([0, 0, 0], costs, lambda i, level: worth[i][level], 2) == [1, 0, 0]
    assert spreading.raise_levels([0, 0, 0], costs, lambda i, level: worth[i][level], 1) == [0, 0, 1]
    assert spreading.raise_levels([0, 0, 0], costs, lambda i, level: worth[i][level], 100, [0, 2]) == [2, 0, 1]


def test_shifted():
    ones = numpy.ones(3)
    assert spreading.shift_shares([0.1, 0.2, 0.3], 10 * ones, 0 * ones, 10 * ones, 9) == pytest.approx(
        [2, 3, 4], rel=1e-12
    )
    cut = spreading.shift_shares([0.1, 0.5, 0.9], 10 * ones, 2 * ones, 8 * ones, 15)
    assert cut == pytest.approx([2, 5, 8], abs=1e-9)
