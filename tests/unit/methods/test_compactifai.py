from __future__ import annotations

import dataclasses
import itertools
from types import SimpleNamespace

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.decompose.compactifai import Options, compress, least_increase, plan
from coppice.methods.solvers.tensor_train import contract, split
from coppice.models.contracts import Linear
from coppice.models.replacements import TensorTrain, Unchanged

# Read by tests/rows.py.
ROWS = [
    {"keep": 0.6},
    {"bond": 2, "sites": 3, "scaling": "absmean"},
    {"keep": 0.6, "profile": [0.1, 0.2, 0.3], "scaling": "absmean"},
]


def named(linear: Linear, name: str = "model.layers.0.self_attn.q_proj") -> Linear:
    return dataclasses.replace(linear, name=name)


def relative(cores: TensorTrain, weight: torch.Tensor) -> float:
    return ((contract(cores.cores) - weight).square().sum() / weight.square().sum()).item()


@pytest.mark.parametrize("sites", [2, 3, 4])
def test_cores_meet_the_share_and_their_record_is_true(linear, sites):
    made = compress(named(linear), None, Options(sites=sites, keep=0.5))
    parameters = sum(core.numel() for core in made.cores)
    assert made.record["keep"] == parameters / 480
    assert parameters <= 240
    assert made.record["truncation_error"] == pytest.approx(relative(made, linear.weight), rel=1e-9)
    assert made.record["bonds"] == [core.shape[3] for core in made.cores[:-1]]
    assert made.record["bond"] == max(made.record["bonds"])
    more = split(20, 24, sites).parameters(made.record["bond_asked"] + 1)
    assert more > 240 or made.record["bond_asked"] == max(split(20, 24, sites).bonds(480))


def test_costs_are_on_record(linear):
    made = compress(named(linear), None, Options(bond=2))
    (outer, inner), (first, last) = made.record["out_shape"], made.record["in_shape"]
    assert made.record["macs_per_token"] == 2 * (first * last * inner + first * outer * inner)
    assert made.record["dense_macs_per_token"] == 480


def test_error_falls_with_the_bond(linear):
    errors = [compress(named(linear), None, Options(bond=bond)).record["truncation_error"] for bond in range(1, 8)]
    assert errors == sorted(errors, reverse=True)


@pytest.mark.parametrize("options", [{"keep": 1}, {"bond": 1000}])
def test_stays_dense_from_break_even(linear, options):
    made = compress(named(linear), None, Options(**options))
    assert isinstance(made, Unchanged)
    assert "save no parameters" in made.record["unchanged"]


def test_excluded_linears_stay_dense(linear):
    down = named(linear, "model.layers.0.mlp.down_proj")
    made = compress(down, None, Options(bond=2))
    assert isinstance(made, Unchanged)
    assert "down_proj" in made.record["unchanged"]
    assert isinstance(compress(down, None, Options(bond=2, exclude=[])), TensorTrain)


def test_prime_widths_say_so():
    weight = torch.randn(13, 12, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    made = compress(Linear(weight, name="q_proj"), None, Options(bond=2))
    assert "13 outputs have no 2 factors above 1" in made.record["indivisible"]
    assert "inputs" not in made.record["indivisible"]
    assert made.record["truncation_error"] == pytest.approx(relative(made, weight), rel=1e-9)


def test_a_vector_stays_dense():
    assert isinstance(compress(Linear(torch.ones(1, 7), name="q_proj"), None, Options(bond=1)), Unchanged)


def test_result_has_the_type_of_the_weight(linear):
    made = compress(named(Linear(linear.weight.float())), None, Options(bond=3))
    assert {core.dtype for core in made.cores} == {torch.float32}


class TestScaling:
    def scaled(self, linear, statistics, **options):
        return compress(named(linear), statistics, Options(scaling="absmean", **options))

    def test_helps_where_inputs_differ_by_products(self, linear, statistics_with):
        factors = torch.logspace(-1.5, 1.5, 6, dtype=torch.float64)[:, None] * torch.ones(4, dtype=torch.float64)
        scale = factors.flatten()
        statistics = dataclasses.replace(statistics_with(torch.diag(scale.square())), absmean=scale)
        ours = self.scaled(linear, statistics, bond=4)
        plain = compress(named(linear), None, Options(bond=4))
        ours_loss, plain_loss = (
            ((contract(made.cores) - linear.weight) * scale).square().sum() for made in (ours, plain)
        )
        assert ours.record["scaling_explained"] == pytest.approx(1)
        assert ours_loss < plain_loss
        total = (linear.weight * scale).square().sum()
        assert ours.record["truncation_error"] == pytest.approx((ours_loss / total).item(), rel=1e-9)

    def test_constant_magnitudes_change_nothing(self, linear, statistics_with):
        eye = statistics_with(torch.eye(24, dtype=torch.float64))
        statistics = dataclasses.replace(eye, absmean=torch.full((24,), 3.0, dtype=torch.float64))
        ours = self.scaled(linear, statistics, bond=4)
        plain = compress(named(linear), None, Options(bond=4))
        torch.testing.assert_close(contract(ours.cores), contract(plain.cores), rtol=1e-10, atol=1e-10)

    def test_dead_inputs_are_counted_and_give_finite_cores(self, linear, statistics):
        absmean = statistics.absmean.clone()
        absmean[[2, 9]] = 0
        made = self.scaled(linear, dataclasses.replace(statistics, absmean=absmean), bond=4)
        assert made.record["dead_inputs"] == 2
        assert all(torch.isfinite(core).all() for core in made.cores)

    @pytest.mark.parametrize("value", [0.0, float("nan"), -1.0])
    def test_damaged_magnitudes(self, linear, statistics, value):
        damaged = dataclasses.replace(statistics, absmean=torch.full((24,), value))
        with pytest.raises(UserError, match="calibrate"):
            self.scaled(linear, damaged, bond=4)


class FakeDecoder:
    """Each linear's loss is its fragility times the squared error of the weight put in its place."""

    windows, seed = 12, 0

    def __init__(self, fragility: dict[str, float], statistics=None) -> None:
        generator = torch.Generator().manual_seed(9)
        self.fragility, self.names = fragility, list(fragility)
        self.weights = {name: torch.randn(12, 16, generator=generator, dtype=torch.float64) for name in self.names}
        self.read = statistics
        self.asked = []

    def linear(self, name):
        return Linear(self.weights[name], name=name)

    def statistics(self, name):
        return self.read

    def loss(self, windows=None, weights=None, outputs=None):
        self.asked.append(list(windows))
        loss = torch.tensor(2.0, dtype=torch.float64)
        for name, weight in (weights or {}).items():
            loss = loss + self.fragility[name] * (weight - self.weights[name]).square().sum()
        return loss


FRAGILITY = {"layers.0.q_proj": 100.0, "layers.1.q_proj": 1.0, "layers.2.q_proj": 1.0, "layers.2.down_proj": 1.0}


class TestProfile:
    options = Options(keep=0.5, profile=[0.25, 0.5, 0.75], profile_windows=3)

    def test_fragile_linears_keep_more_and_the_budget_holds(self):
        decoder = FakeDecoder(FRAGILITY)
        planned = plan(decoder, self.options)
        assert list(planned) == list(FRAGILITY)[:3]
        sites = split(12, 16, 2)
        kept = {
            name: sites.weights if it["bond"] is None else sites.parameters(it["bond"]) for name, it in planned.items()
        }
        assert sum(kept.values()) <= 0.5 * 3 * 12 * 16
        assert kept["layers.0.q_proj"] > kept["layers.1.q_proj"]
        assert {tuple(windows) for windows in decoder.asked} == {(0, 1, 2)}

    def test_profile_is_the_loss_with_one_linear_replaced_and_reaches_the_record(self):
        decoder = FakeDecoder(FRAGILITY)
        name = "layers.1.q_proj"
        planned = plan(decoder, self.options)[name]
        linear = dataclasses.replace(decoder.linear(name), plan={**planned, "bond": 2})
        made = compress(linear, None, self.options)
        assert made.record["profile"] == planned["profile"]
        assert made.record["bond"] == 2
        for entry in planned["profile"][1:]:
            replaced = compress(decoder.linear(name), None, Options(bond=entry["bond"]))
            error = (contract(replaced.cores) - linear.weight).square().sum().item()
            assert entry["loss_increase"] == pytest.approx(error, rel=1e-9)

    def test_dense_by_the_profile(self):
        linear = Linear(torch.ones(12, 16), name="q_proj", plan={"bond": None, "profile": []})
        assert isinstance(compress(linear, None, self.options), Unchanged)

    def test_share_that_the_profile_cannot_reach(self):
        with pytest.raises(UserError, match="add a smaller share"):
            plan(FakeDecoder(FRAGILITY), Options(keep=0.2, profile=[0.5, 0.75]))

    def test_loss_that_is_not_finite(self):
        decoder = FakeDecoder(FRAGILITY)
        decoder.loss = lambda *_, **__: torch.tensor(float("nan"))
        with pytest.raises(UserError, match="loss on the calibration windows is nan"):
            plan(decoder, self.options)

    def test_profile_scales_as_the_walk_does(self, statistics_with):
        scale = torch.logspace(-1, 1, 16, dtype=torch.float64)
        statistics = dataclasses.replace(statistics_with(torch.diag(scale.square())), absmean=scale)
        options = Options(keep=0.5, profile=[0.25], scaling="absmean")
        decoder = FakeDecoder({"layers.0.q_proj": 1.0}, statistics)
        (entry,) = plan(decoder, options)["layers.0.q_proj"]["profile"][1:]
        made = compress(decoder.linear("layers.0.q_proj"), statistics, Options(bond=entry["bond"], scaling="absmean"))
        error = (contract(made.cores) - decoder.weights["layers.0.q_proj"]).square().sum().item()
        assert entry["loss_increase"] == pytest.approx(error, rel=1e-9)

    def test_nothing_is_planned_without_one(self):
        assert plan(SimpleNamespace(names=["a"]), Options(bond=2)) == {}


def best(sizes, increases, budget):
    choices = itertools.product(*(range(len(size)) for size in sizes))
    return min(
        sum(increases[item][index] for item, index in enumerate(choice))
        for choice in choices
        if sum(sizes[item][index] for item, index in enumerate(choice)) <= budget
    )


def test_choice_is_within_the_budget_and_near_the_best_of_all():
    generator = torch.Generator().manual_seed(2)
    for _ in range(20):
        sizes = [[100, 60, 40, 20] for _ in range(5)]
        increases = [[0.0, *torch.rand(3, generator=generator).sort().values.tolist()] for _ in range(5)]
        for budget in (100, 180, 300, 499):
            chosen = least_increase(sizes, increases, budget)
            assert sum(size[index] for size, index in zip(sizes, chosen, strict=True)) <= budget
            reached = sum(increase[index] for increase, index in zip(increases, chosen, strict=True))
            least = best(sizes, increases, budget)
            assert least <= reached + 1e-12
            # A step of the hull that overshoots costs at most one item's largest increase.
            assert reached <= least + max(map(max, increases))


def test_choice_is_the_best_of_all_where_a_step_meets_the_budget():
    sizes = [[100, 50], [100, 50], [100, 50]]
    increases = [[0.0, 3.0], [0.0, 1.0], [0.0, 2.0]]
    assert least_increase(sizes, increases, 300) == [0, 0, 0]
    assert least_increase(sizes, increases, 250) == [0, 1, 0]
    assert least_increase(sizes, increases, 200) == [0, 1, 1]


def test_choice_takes_what_lowers_the_loss_and_leaves_what_breaks_it():
    assert least_increase([[10, 5, 2]], [[0.0, -1.0, float("nan")]], 10) == [1]
    assert least_increase([[10, 5], [10, 5]], [[0.0, float("inf")], [0.0, 4.0]], 15) == [0, 1]


@pytest.mark.parametrize(
    ("options", "needs"),
    [
        ({"bond": 2}, set()),
        ({"keep": 0.5, "profile": [0.5]}, {"windows"}),
        ({"keep": 0.5, "scaling": "absmean"}, {"moments"}),
    ],
)
def test_needs(options, needs):
    assert Options(**options).needs == needs


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({}, "exactly one"),
        ({"keep": 0.5, "bond": 3}, "exactly one"),
        ({"bond": 3, "profile": [0.5]}, "give 'keep' instead of 'bond'"),
        ({"keep": 0.5, "profile": [0.5, 1.5]}, "above 0 and below 1"),
        ({"keep": 0, "sites": 2}, "greater than 0"),
        ({"keep": 0.5, "sites": 1}, "greater than or equal to 2"),
    ],
)
def test_options_that_do_not_go_together(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        Options(**options)
