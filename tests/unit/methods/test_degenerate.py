"""Every layer method on degenerate weights and statistics: a finite replacement of a sane loss, or a sentence.

Each row of `ROWS` meets each of `SITUATIONS` in both types, by the driver's own steps: plan, scales, compress, the
module that takes the linear's place, and its errors.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from rows import BLIND, CLEARING, ROWS, file_of
from tiny import tiny_model
from torch import Tensor, nn

from coppice.compression import layer_pass
from coppice.compression.allocation import allocate
from coppice.compression.inputs import Inputs
from coppice.compression.replacement import replace
from coppice.errors import UserError
from coppice.methods.options import MethodOptions
from coppice.methods.registry import Method, method, methods
from coppice.models import folding, modules
from coppice.models.architectures.base import blocks
from coppice.models.contracts import Linear, LinearStatistics
from coppice.models.replacements import Replacement, Unchanged

NAME = "model.layers.0.mlp.gate_proj"
LAYER_ROWS = {name: rows for name, rows in ROWS.items() if method(name).contract == "layer"}
LABELS = {f"{name}-{index}": (name, options) for name, rows in LAYER_ROWS.items() for index, options in enumerate(rows)}


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def statistics_of(inputs: Tensor) -> LinearStatistics:
    """Statistics of inputs x, [tokens, n]."""
    return LinearStatistics(
        inputs.T @ inputs / len(inputs), inputs.mean(0), inputs.abs().mean(0), inputs.abs().amax(0), len(inputs)
    )


@dataclass(frozen=True)
class Situation:
    """weight: [m, n]. inputs: [tokens, n], of the windows. damage: what then happens to the second moment.

    refusal: what a method that reads the statistics says, empty where it can work.
    """

    weight: Tensor
    inputs: Tensor
    damage: Callable[[LinearStatistics], LinearStatistics] = lambda statistics: statistics
    refusal: str = ""
    mask: Tensor | None = None

    def statistics(self, dtype: torch.dtype) -> LinearStatistics:
        return self.damage(statistics_of(self.inputs.to(dtype)))


def moment(change: Callable[[Tensor], Any]) -> Callable[[LinearStatistics], LinearStatistics]:
    """The second moment changed, in place or by what `change` returns."""

    def damage(statistics: LinearStatistics) -> LinearStatistics:
        found = statistics.second_moment.clone()
        changed = change(found)
        return dataclasses.replace(statistics, second_moment=found if changed is None else changed)

    return damage


def everywhere(value: float) -> Callable[[LinearStatistics], LinearStatistics]:
    def damage(statistics: LinearStatistics) -> LinearStatistics:
        parts = ("second_moment", "mean", "absmean", "absmax")
        return LinearStatistics(*(torch.full_like(getattr(statistics, part), value) for part in parts), 8)

    return damage


def one_entry(row: int, column: int, value: float) -> Callable[[LinearStatistics], LinearStatistics]:
    def change(found: Tensor) -> None:
        found[row, column] = found[column, row] = value

    return moment(change)


W, X = draw(12, 16), draw(64, 16, seed=1) @ draw(16, 16, seed=2)
LIVE = torch.arange(16) % 5 != 2
REPEATED = X[:, torch.arange(16) // 2]
NOT_FINITE, NEGATIVE = "not finite|not numbers|windows is nan", "negative"
# Every eigenvector but (1, .. 1) has power: there it is -6.5, far below what any damping makes up for.
INDEFINITE = 1.5 * torch.eye(16, dtype=torch.float64) - 0.5
SITUATIONS = {
    "ordinary": Situation(W, X),
    "in a subspace": Situation(W, X[:, :5] @ draw(5, 16, seed=3)),
    "inputs that repeat": Situation(W, REPEATED),
    "fewer tokens than inputs": Situation(W, X[:6]),
    "one token": Situation(W, X[:1]),
    "dead inputs": Situation(W, X * LIVE),
    "one live input": Situation(W, X * (torch.arange(16) == 3)),
    "tiny inputs": Situation(W, 1e-12 * X),
    "huge inputs": Situation(W, 1e12 * X),
    "primes": Situation(draw(13, 17), draw(64, 17, seed=1)),
    "one row": Situation(W[:1], X),
    "one column": Situation(W[:, :1], X[:, :1]),
    "one weight": Situation(W[:1, :1], X[:, :1]),
    "zero weights": Situation(torch.zeros_like(W), X),
    "constant weights": Situation(torch.full_like(W, 0.3), X),
    "weights of rank one": Situation(W[:, :1] @ W[:1], X),
    "a row and a column of zeros": Situation(W * (torch.arange(16) != 1) * (torch.arange(12) != 2)[:, None], X),
    "tiny weights": Situation(1e-12 * W, X),
    "all pruned": Situation(torch.zeros_like(W), X, mask=torch.zeros_like(W, dtype=torch.bool)),
    "an output pruned": Situation(
        W * (torch.arange(12) > 3)[:, None], X, mask=(torch.arange(12) > 3)[:, None].expand(12, 16).contiguous()
    ),
    "NaN": Situation(W, X, everywhere(math.nan), NOT_FINITE),
    "infinite": Situation(W, X, everywhere(math.inf), NOT_FINITE),
    "one NaN": Situation(W, X, one_entry(2, 5, math.nan), NOT_FINITE),
    "one NaN on the diagonal": Situation(W, X, one_entry(4, 4, math.nan), NOT_FINITE),
    "zero": Situation(W, 0 * X, refusal="zero"),
    "negative": Situation(W, X, everywhere(-1.0), NEGATIVE),
    "negative outputs": Situation(
        1 + 0.01 * W, X, moment(lambda found: INDEFINITE.to(found)), "not positive semidefinite"
    ),
    "indefinite": Situation(W, X, moment(lambda found: INDEFINITE.to(found))),
    "NaN weights": Situation(W.where(torch.arange(16) != 4, math.nan), X, refusal=NOT_FINITE),
    "infinite weights": Situation(W.where(torch.arange(16) != 4, math.inf), X, refusal=NOT_FINITE),
}
DTYPES = [torch.float32, torch.float64]


class FakeDecoder:
    """Tokens are predicted from the outputs of the one linear, in windows of 8 tokens."""

    windows, head_dim, seed, paths = 3, 1, 0, {"gate": "mlp.gate_proj"}

    def __init__(self, given: Linear, statistics: LinearStatistics | None, inputs: Tensor) -> None:
        self.names, self._linear, self._statistics = [NAME], given, statistics
        rows = torch.arange(24) % len(inputs)
        self._inputs = (inputs[rows] / inputs.abs().max().clamp(min=1e-30)).to(given.weight.dtype).view(3, 8, -1)
        self._head = draw(7, len(given.weight), seed=4).to(given.weight.dtype)
        self._tokens = torch.randint(7, (3, 8), generator=torch.Generator().manual_seed(5))

    def linear(self, name: str) -> Linear:
        return self._linear

    def statistics(self, name: str) -> LinearStatistics:
        return self._statistics

    def logits(self, window: int, outputs: Any = None, weight: Tensor | None = None) -> Tensor:
        y = self._inputs[window] @ (self._linear.weight if weight is None else weight).T
        return ((y if outputs is None else outputs(NAME, y)) @ self._head.T)[:-1]

    def loss(self, windows: Any = None, weights: Any = None, outputs: Any = None) -> Tensor:
        weight = (weights or {}).get(NAME)
        chosen = range(3) if windows is None else windows
        losses = [
            nn.functional.cross_entropy(self.logits(window, outputs, weight), self._tokens[window, 1:])
            for window in chosen
        ]
        return torch.stack(losses).mean()

    def gradients(self, batch: int = 1) -> Iterator[dict[str, Tensor]]:
        for window in range(3):
            weight = self._linear.weight.clone().requires_grad_()
            (gradient,) = torch.autograd.grad(self.loss([window], {NAME: weight}), [weight])
            if not torch.isfinite(gradient).all():
                raise UserError(f"{NAME}: its gradient is not finite; calibrate in a wider dtype.")
            yield {NAME: gradient}


@dataclass(frozen=True)
class Outcome:
    """weight: [m, n] what stands in the place of `before`; errors: the driver's."""

    linear: Linear
    replacement: Replacement
    weight: Tensor
    errors: dict[str, float] = field(default_factory=dict)


def reads(used: Method, options: MethodOptions) -> bool:
    return bool(used.needs(options) & {"moments", "sequential_moments"})


def outcome(label: str, situation: Situation, dtype: torch.dtype) -> Outcome:
    return outcome_of(*LABELS[label], situation, dtype)


def outcome_of(name: str, given: dict[str, Any], situation: Situation, dtype: torch.dtype) -> Outcome:
    """What the driver does with one linear. A method that needs no statistics is given none."""
    used = method(name)
    options = used.validate_options(given)
    weight = situation.weight.to(dtype)
    statistics = situation.statistics(dtype) if reads(used, options) else None
    reference = None
    if used.family == "compensate":
        scale = weight.abs().amax().clamp(min=torch.finfo(dtype).tiny)
        reference, weight = weight, torch.round(weight / scale) * scale
    linear = Linear(weight, situation.mask, reference, dtype, NAME, "gate", sequential=statistics)
    if used.layer.plan is not None:
        planned = used.layer.plan(FakeDecoder(linear, statistics, situation.inputs), options)
        linear = dataclasses.replace(linear, plan=planned.get(NAME))
    if used.layer.scales is not None:
        factors = used.layer.scales([linear], statistics, options)
        if factors is not None:
            assert torch.isfinite(factors).all()
            assert (factors > 0).all()
            linear = dataclasses.replace(linear, weight=weight * factors)
            statistics = folding.scale_statistics(statistics, factors)
    replacement = used.layer.compress(linear, statistics, options)
    block = nn.Module()
    block.linear = nn.Linear(weight.shape[1], len(weight), bias=False, dtype=dtype)
    block.linear.weight = nn.Parameter(linear.weight.clone())
    with torch.no_grad():
        replace(block, "linear", block.linear, replacement, dtype)
        new = modules.effective_weight(block.linear)
        return Outcome(linear, replacement, new, layer_pass.errors(new, linear, statistics))


def expected_refusal(label: str, situation: Situation) -> str:
    """What the sentence must hold, empty where there is to be a result."""
    name, given = LABELS[label]
    width = situation.weight.shape[1]
    if width % 4 and (given.get("pattern") or given.get("unit") == 4):
        return "divide"
    if width == 1 and given.get("profile"):
        return "add a smaller share to profile"
    if not torch.isfinite(situation.weight).all():
        return situation.refusal
    if name == "fwsvd" and not situation.inputs.any():
        return "zero on every window"
    used = method(name)
    if not situation.refusal or not reads(used, used.validate_options(given)):
        return ""
    blind = (name, LAYER_ROWS[name].index(given)) in BLIND
    return "" if blind and situation.refusal == "zero" else situation.refusal


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from more, and lose much where cores are shared."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_every_method_has_rows() -> None:
    """Of those that do not train."""
    for name, used in methods().items():
        if used.contract != "training":
            assert ROWS.get(name), f"Give {file_of(name)} a list ROWS of options for the tests of all methods."
    assert set(ROWS) <= set(methods()), "A test file has ROWS, and no method has its name."


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("label", LABELS)
def test_a_sane_result_or_a_sentence(label: str, dtype: torch.dtype) -> None:
    refused = "masked" in method(LABELS[label][0]).incompatible_with
    problems = {}
    for name, situation in SITUATIONS.items():
        if situation.mask is not None and refused:
            continue
        try:
            check(label, name, situation, dtype)
        except (
            Exception,
            pytest.fail.Exception,
        ) as problem:  # Every situation is tried; what went wrong is told below.
            problems[name] = f"{type(problem).__name__}: {problem}"
    assert not problems


def check(label: str, name: str, situation: Situation, dtype: torch.dtype) -> None:
    if refusal := expected_refusal(label, situation):
        with pytest.raises(UserError, match=refusal) as raised:
            outcome(label, situation, dtype)
        assert str(raised.value).endswith(".")
        return
    try:
        found = outcome(label, situation, dtype)
    except UserError as error:
        # Not every method looks where it shows.
        assert name == "indefinite"
        assert "not positive semidefinite" in str(error)
        return
    before, after, error = found.linear.weight, found.weight, max(found.errors.values())
    assert after.shape == before.shape
    assert torch.isfinite(after).all()
    # Without statistics nothing holds the outputs: they are as wrong as the weights.
    assert 0 <= error <= 3, error
    assert after.abs().max() <= 20 * before.abs().max()
    if not before.any():
        assert not after.any()
    if situation.mask is not None:
        assert not after[~situation.mask].any()
    if name in ("dead inputs", "one live input") and LABELS[label][0] in CLEARING:
        assert not after[:, ~situation.inputs.any(dim=0)].any()
    assert_finite_record(found.replacement.record)


def assert_finite_record(record: Any) -> None:
    for value in record.values() if isinstance(record, dict) else record:
        if isinstance(value, float):
            assert math.isfinite(value), record
        elif isinstance(value, dict | list):
            assert_finite_record(value)


# What the mathematics promises.

WORKABLE = [
    name
    for name, situation in SITUATIONS.items()
    if not situation.refusal and name != "indefinite" and situation.mask is None and min(situation.weight.shape) > 1
]


@pytest.mark.parametrize("dtype", DTYPES, ids=["float32", "float64"])
@pytest.mark.parametrize("name", WORKABLE)
def test_the_loss_of_svd_llm_is_what_it_leaves_out(name: str, dtype: torch.dtype) -> None:
    situation = SITUATIONS[name]
    found = outcome("svd-llm-0", situation, dtype)
    # In units in which no square underflows.
    values = torch.linalg.svdvals((situation.weight / scale_of(situation.weight)) @ situation.inputs.T).square()
    expected = (values[5:].sum() / values.sum()).item() if values.any() else 0.0
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12}[dtype]
    assert found.errors["error"] == pytest.approx(expected, rel=1e-3, abs=tolerance)
    assert found.replacement.record["truncation_error"] == pytest.approx(expected, rel=1e-3, abs=tolerance)


def scale_of(weight: Tensor) -> Tensor:
    return weight.abs().max().clamp(min=torch.finfo(weight.dtype).tiny)


@pytest.mark.parametrize("name", ["svd-llm", "eora"])
def test_outputs_of_the_rank_asked_are_exact(name: str) -> None:
    assert outcome_of(name, {"rank": 5}, SITUATIONS["in a subspace"], torch.float64).errors["error"] < 1e-20


# Damped by a number of its own unit; ranks and bits by differences of losses that stay the same.
SCALED = [label for label in LABELS if LABELS[label][0] != "obert"]


@pytest.mark.parametrize("label", SCALED)
def test_the_scale_of_weights_and_inputs_does_not_matter(label: str) -> None:
    names = ("ordinary", "tiny inputs", "tiny weights")
    errors = {name: outcome(label, SITUATIONS[name], torch.float32).errors for name in names}
    for name in names[1:]:
        assert errors[name] == pytest.approx(errors["ordinary"], rel=0.05, abs=1e-6), name


# Budgets at their ends.


@pytest.mark.parametrize(
    ("name", "given"),
    [
        *((name, {"sparsity": 0.0}) for name in ("magnitude", "wanda", "sparsegpt", "awp", "net-trim", "obert", "obr")),
        ("net-trim", {"epsilon": 0.0}),
        *((name, {"keep": 1.0}) for name in ("svd", "asvd", "svd-llm", "fwsvd", "curing", "compactifai")),
        ("asvd", {"keep": 1.0, "search": "spectrum"}),
        ("asvd", {"keep": 1.0, "search": "strs"}),
        ("dobi-svd", {"keep": 1.0, "remap": False, "learn": False}),
        ("dobi-svd", {"keep": 1.0, "remap": False, "steps": 2}),
    ],
)
def test_nothing_to_remove_is_the_identity(name: str, given: dict[str, Any]) -> None:
    found = outcome_of(name, given, SITUATIONS["ordinary"], torch.float32)
    assert isinstance(found.replacement, Unchanged)
    assert found.replacement.record["unchanged"].endswith(".")
    assert found.errors["weight_error"] == 0


@pytest.mark.parametrize("learn", [True, False])
def test_all_bytes_of_remapped_factors_keep_every_rank(learn: bool) -> None:
    found = outcome_of("dobi-svd", {"keep": 1.0, "learn": learn, "steps": 2}, SITUATIONS["ordinary"], torch.float64)
    assert found.replacement.record["rank"] == 12
    assert found.errors["weight_error"] < 1e-3


REFUSED = [
    *(
        (name, {"sparsity": value})
        for name in ("magnitude", "wanda", "sparsegpt", "awp", "net-trim", "obert", "obr")
        for value in (1.0, -0.1, math.nan)
    ),
    *((name, {"pattern": "4:4"}) for name in ("magnitude", "wanda", "sparsegpt", "awp", "obr")),
    ("net-trim", {"epsilon": 1.0}),
    *(
        (name, {"keep": value})
        for name in ("svd", "asvd", "svd-llm", "fwsvd", "dobi-svd", "curing", "compactifai")
        for value in (0.0, 1.1, math.nan)
    ),
    *((name, {"rank": 0}) for name in ("svd", "asvd", "svd-llm", "fwsvd", "curing", "eora")),
    ("compactifai", {"bond": 0}),
    *(
        (name, {"bits": value})
        for name in ("rtn", "gptq", "coordinate-descent", "awq", "learned-rounding", "k-bit", "activation-quant")
        for value in (1, 9, 4.5)
    ),
    ("flattenquant", {"bits": 3}),
    ("qpruner", {"bits_average": 9}),
    ("qpruner", {"bits_average": 5, "candidates": [1, 8]}),
    *((name, {"sparsity": 0.5, "bits": 1}) for name in ("sparsegpt", "awp", "obr")),
    ("rtn", {"bits": 4, "group_size": 0}),
    *((name, rows[0] | {"target_modules": []}) for name, rows in LAYER_ROWS.items()),
    *((name, rows[0] | {"no_such_option": 1}) for name, rows in LAYER_ROWS.items()),
]


@pytest.mark.parametrize(("name", "given"), REFUSED)
def test_options_out_of_range_are_refused_at_load(name: str, given: dict[str, Any]) -> None:
    with pytest.raises(UserError, match=f"The options of method {name!r} are not valid: ") as raised:
        method(name).validate_options(given)
    assert list(given)[-1] in str(raised.value)


@pytest.mark.parametrize("group_size", [2, 12, 32])
@pytest.mark.parametrize("name", ["sparsegpt", "awp", "obr", "rtn", "gptq", "coordinate-descent", "awq", "qpruner"])
def test_a_group_that_does_not_divide_the_width_is_refused_or_the_row(name: str, group_size: int) -> None:
    given = ROWS[name][-1] | {"group_size": group_size}
    with pytest.raises(UserError, match=f"group size of {group_size} does not divide the 17 inputs"):
        outcome_of(name, given, SITUATIONS["primes"], torch.float32)
    found = outcome_of(name, given | {"indivisible": "row"}, SITUATIONS["primes"], torch.float32)
    assert found.replacement.group_size == 17


def test_an_unknown_method_is_refused_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"'wandda' is not a method. Did you mean 'wanda'\?"):
        method("wandda")


# The budget of all linears.

RULES = [
    *(("wanda", {"sparsity": 0.5}, by) for by in ("sensitivity", "owl", "mosaic", "knapsack")),
    *(("svd-llm", {"keep": 0.6}, by) for by in ("sensitivity", "svd-llm-v2", "water-filling", "knapsack")),
    *(("rtn", {"bits": 4, "group_size": -1}, by) for by in ("sensitivity", "knapsack")),
    ("eora", {"rank": 2}, "water-filling"),
]


@pytest.mark.parametrize(("name", "given", "by"), RULES)
def test_an_allocation_is_within_its_budget_or_names_the_linear(name: str, given: dict[str, Any], by: str) -> None:
    options = method(name).validate_options(given | {"allocation": {"by": by}})
    problems = {}
    for label, situation in SITUATIONS.items():
        try:
            check_allocation(options, situation, torch.float32)
        except (
            Exception,
            pytest.fail.Exception,
        ) as problem:  # Every situation is tried; what went wrong is told below.
            problems[label] = f"{type(problem).__name__}: {problem}"
    assert not problems


def check_allocation(options: MethodOptions, situation: Situation, dtype: torch.dtype) -> None:
    """The degenerate linear between two ordinary ones."""
    ordinary = SITUATIONS["ordinary"]
    linears = []
    for block, each in enumerate((ordinary, situation, ordinary)):
        weight = each.weight.to(dtype)
        linear = Linear(
            weight, each.mask, torch.zeros_like(weight), dtype, f"model.layers.{block}.mlp.gate_proj", "gate"
        )
        linears.append((linear.name, linear, each.statistics(dtype)))
    power = linears[1][2].second_moment.diagonal()
    # Sparsities are spread by the diagonal alone; what is wrong beside it is found by the method.
    blind = (
        options.TARGET == "sparsity"
        and bool((power.isfinite() & (power >= 0)).all())
        and bool(situation.weight.isfinite().all())
    )
    if situation.refusal and not (blind and power.any()):
        with pytest.raises(UserError, match=r"^model\.layers\.1\.mlp\.gate_proj: (The|This) .*\.$"):
            allocate(linears, options)
        return
    try:
        options_of, record = allocate(linears, options)
    except UserError as error:
        assert "model.layers.1.mlp.gate_proj: " in str(error)
        assert "not positive semidefinite" in str(error)
        assert situation is SITUATIONS["indefinite"]
        return
    assert set(options_of) == {name for name, _, _ in linears}
    assert_finite_record(record)
    assert record["achieved"] <= record["asked"] + 1e-9


# The whole walk.


@pytest.fixture
def walk() -> Callable[..., layer_pass.LayerPass]:
    """Of one block, with moments as `damage` leaves them."""

    def make(name: str, given: dict[str, Any]) -> layer_pass.LayerPass:
        used = method(name)
        model = tiny_model(num_hidden_layers=1)
        return layer_pass.LayerPass(model, None, used, used.validate_options(given), Inputs(), torch.float32, 0, "cpu")

    return make


@pytest.mark.parametrize("given", [("awq", {"bits": 4, "group_size": -1}), ("flattenquant", {})])
def test_scales_of_damaged_statistics_name_the_layer(walk: Callable[..., layer_pass.LayerPass], given: Any) -> None:
    walked = walk(*given)
    block = blocks(walked.model)[0]
    nan = everywhere(math.nan)
    statistics = {
        name: nan(statistics_of(torch.ones(2, linear.in_features)))
        for name, linear in modules.replaceable_modules(block).items()
    }
    with pytest.raises(UserError, match=r"^model\.layers\.0\.self_attn\.q_proj: The statistics .* not finite"):
        layer_pass.scale_inputs(walked, 0, block, statistics)


def test_an_unknown_linear_is_refused_with_the_nearest(walk: Callable[..., layer_pass.LayerPass]) -> None:
    with pytest.raises(UserError, match=r"no linear of this model is named 'q_projj'. Did you mean 'q_proj'\?"):
        layer_pass.compress_layers(walk("magnitude", {"sparsity": 0.5, "target_modules": ["q_projj"]}))
