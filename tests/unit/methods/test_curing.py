from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from coppice.errors import UserError
from coppice.methods.decompose.curing import (
    Options,
    affordable_rank,
    break_even,
    chosen_rank,
    compress,
    interpolation_indices,
    leading_vectors,
    paper_link,
    parameters,
    plan,
    select,
)
from coppice.models.contracts import Linear, Role
from coppice.models.replacements import CUR, Unchanged

# Read by tests/rows.py.
ROWS = [{"keep": 0.8}, {"rank": 3, "link": "data"}, {"rank": 3, "importance": "weight"}]
BLIND_ROWS = [2]


def random(*shape: int, seed: int = 11) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def named(weight: torch.Tensor, name: str = "model.layers.1.self_attn.q_proj", role: Role = "q", **fields) -> Linear:
    return Linear(weight, name=name, role=role, **fields)


def product(skeleton: CUR) -> torch.Tensor:
    return skeleton.columns @ skeleton.link @ skeleton.rows


def by_definition(vectors: torch.Tensor) -> list[int]:
    """The discrete empirical interpolation method as it is written down."""
    picked = [int(vectors[:, 0].abs().argmax())]
    for column in range(1, vectors.shape[1]):
        coefficients = torch.linalg.solve(vectors[picked, :column], vectors[picked, column])
        picked.append(int((vectors[:, column] - vectors[:, :column] @ coefficients).abs().argmax()))
    return picked


def weighted_loss(difference: torch.Tensor, moment: torch.Tensor) -> float:
    return (difference @ moment * difference).sum().item()


@pytest.mark.parametrize("seed", range(5))
def test_indices_are_those_of_the_definition(seed):
    basis = torch.linalg.qr(random(30, 12, seed=seed)).Q
    indices = interpolation_indices(basis)
    assert indices.tolist() == by_definition(basis)
    assert len(set(indices.tolist())) == 12


@pytest.mark.parametrize("shape", [(20, 24), (24, 20), (12, 12)])
def test_leading_vectors_are_singular_vectors(shape):
    matrix = random(*shape).abs()
    left, right = leading_vectors(matrix, 5)
    exact_left, _, exact_right = torch.linalg.svd(matrix)
    torch.testing.assert_close((left.T @ exact_left[:, :5]).abs(), torch.eye(5).double(), rtol=0, atol=1e-9)
    torch.testing.assert_close((exact_right[:5] @ right).abs(), torch.eye(5).double(), rtol=0, atol=1e-9)


def test_rows_and_columns_are_picked_by_weight_times_input(linear, statistics):
    made = compress(named(linear.weight), statistics, Options(rank=4))
    scores = linear.weight.abs() * statistics.second_moment.diagonal().sqrt()
    left, _, right = torch.linalg.svd(scores)
    assert torch.equal(made.rows, linear.weight[by_definition(left[:, :4])])
    assert torch.equal(made.columns, linear.weight[:, by_definition(right[:4].T)])


def test_importance_of_weights_alone_ignores_the_inputs(linear, statistics, statistics_with):
    options = Options(rank=4, importance="weight")
    one, other = (
        compress(named(linear.weight), each, options) for each in (statistics, statistics_with(torch.eye(24)))
    )
    assert torch.equal(one.rows, other.rows)
    assert not torch.equal(one.columns, compress(named(linear.weight), statistics, Options(rank=4)).columns)


@pytest.mark.parametrize("link", ["paper", "data"])
def test_matrix_of_that_rank_is_exact(statistics, link):
    weight = random(20, 4) @ random(4, 24, seed=12)
    made = compress(named(weight), statistics, Options(rank=4, link=link))
    torch.testing.assert_close(product(made), weight, rtol=1e-9, atol=1e-9)
    rows = [next(i for i in range(20) if torch.equal(weight[i], row)) for row in made.rows]
    columns = [next(j for j in range(24) if torch.equal(weight[:, j], column)) for column in made.columns.T]
    assert len(set(rows)) == len(set(columns)) == 4
    torch.testing.assert_close(made.link @ weight[rows][:, columns], torch.eye(4).double(), rtol=0, atol=1e-8)


@pytest.mark.parametrize("link", ["paper", "data"])
def test_matrix_of_a_lower_rank_is_exact(statistics, link):
    weight = random(20, 3) @ random(3, 24, seed=12)
    made = compress(named(weight), statistics, Options(rank=6, link=link))
    torch.testing.assert_close(product(made), weight, rtol=1e-8, atol=1e-8)


def test_zero_weights_are_exact(statistics):
    made = compress(named(torch.zeros(20, 24).double()), statistics, Options(rank=5))
    assert not product(made).any()


@pytest.mark.parametrize("shape", [(12, 16), (16, 12)])
def test_full_rank_is_exact(shape):
    weight = random(*shape)
    rows, columns = select(weight.abs(), 12)
    link = paper_link(weight, rows, columns)
    torch.testing.assert_close(weight[:, columns] @ link @ weight[rows], weight, rtol=1e-8, atol=1e-8)


def test_permuted_outputs_and_inputs_permute_the_factors(linear, statistics, statistics_with):
    generator = torch.Generator().manual_seed(4)
    outputs, inputs = torch.randperm(20, generator=generator), torch.randperm(24, generator=generator)
    made = compress(named(linear.weight), statistics, Options(rank=5))
    moved = compress(
        named(linear.weight[outputs][:, inputs]),
        statistics_with(statistics.second_moment[inputs][:, inputs]),
        Options(rank=5),
    )
    assert torch.equal(moved.rows, made.rows[:, inputs])
    assert torch.equal(moved.columns, made.columns[outputs])
    torch.testing.assert_close(moved.link, made.link, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_loss_is_between_the_truncated_decomposition_and_any_other_link(linear, statistics, rank):
    weight = linear.weight
    made = compress(named(weight), statistics, Options(rank=rank))
    loss = (weight - product(made)).square().sum()
    assert loss >= torch.linalg.svdvals(weight)[rank:].square().sum()
    for seed in range(3):
        other = made.link + 0.01 * random(rank, rank, seed=seed)
        assert (weight - made.columns @ other @ made.rows).square().sum() > loss


@pytest.mark.parametrize("rank", [1, 4, 8])
def test_link_on_the_data_is_the_least_squares_of_the_outputs(linear, inputs, statistics, rank):
    weight, moment = linear.weight, statistics.second_moment
    paper = compress(named(weight), statistics, Options(rank=rank))
    data = compress(named(weight), statistics, Options(rank=rank, link="data"))
    assert torch.equal(data.rows, paper.rows)
    assert torch.equal(data.columns, paper.columns)
    # Least squares over the r^2 entries of U as a vector: y = sum_ab U_ab C_a (R x)_b.
    seen = inputs @ data.rows.T
    design = torch.einsum("ma,tb->tmab", data.columns, seen).reshape(-1, rank**2)
    expected = torch.linalg.lstsq(design, (inputs @ weight.T).reshape(-1, 1)).solution.reshape(rank, rank)
    torch.testing.assert_close(data.link, expected, rtol=1e-6, atol=1e-8)
    assert weighted_loss(weight - product(data), moment) < weighted_loss(weight - product(paper), moment)
    assert data.record["directions"] == rank


def test_white_inputs_give_the_link_of_the_paper(linear, statistics_with):
    white = statistics_with(2 * torch.eye(24, dtype=torch.float64))
    paper, data = (compress(named(linear.weight), white, Options(rank=5, link=link)) for link in ("paper", "data"))
    torch.testing.assert_close(data.link, paper.link, rtol=1e-9, atol=1e-9)


def test_fewer_tokens_than_rows_leave_unseen_directions_to_the_paper_link(linear, inputs, statistics_with):
    few = inputs[:3]
    statistics = statistics_with(few.T @ few / 3)
    paper, data = (compress(named(linear.weight), statistics, Options(rank=6, link=link)) for link in ("paper", "data"))
    assert data.record["directions"] == 3
    moment = statistics.second_moment
    assert weighted_loss(linear.weight - product(data), moment) < weighted_loss(linear.weight - product(paper), moment)
    unseen = torch.linalg.svd(few @ data.rows.T).Vh[3:]
    torch.testing.assert_close(data.link @ unseen.T, paper.link @ unseen.T, rtol=1e-6, atol=1e-8)


def test_dead_inputs_are_not_picked(linear, statistics):
    moment = statistics.second_moment.clone()
    moment[[3, 7], :] = 0
    moment[:, [3, 7]] = 0
    made = compress(named(linear.weight), dataclasses.replace(statistics, second_moment=moment), Options(rank=6))
    for dead in (3, 7):
        assert not (made.columns == linear.weight[:, dead, None]).all(0).any()


def test_float32_keeps_rows_and_columns_bit_for_bit(linear, statistics):
    weight = linear.weight.float()
    made = compress(named(weight), statistics, Options(rank=5, link="data"))
    assert made.link.dtype == torch.float32
    assert all((weight == row).all(1).any() for row in made.rows)
    assert all((column == weight.T).all(1).any() for column in made.columns.T)


@pytest.mark.parametrize(
    ("shape", "rank"),
    [((4096, 4096), 1696), ((1024, 4096), 718), ((14336, 4096), 2769), ((896, 896), 371), ((128, 896), 101)],
)
def test_break_even(shape, rank):
    assert break_even(*shape) == rank
    size = shape[0] * shape[1]
    assert parameters(rank, *shape) <= size < parameters(rank + 1, *shape)


def test_parameters_saved_by_the_paper_s_setting():
    saved = sum(m * n - parameters(256, m, n) for m, n in ((4096, 4096), (1024, 4096), (14336, 4096)))
    assert saved == pytest.approx(71.4e6, rel=1e-3)


def test_rank_of_a_share():
    for keep in (0.1, 0.37, 0.9):
        rank = chosen_rank(Options(keep=keep), 100, 140)
        assert parameters(rank, 100, 140) <= keep * 14000 < parameters(rank + 1, 100, 140)
    assert chosen_rank(Options(keep=0.001), 100, 140) == 1
    assert chosen_rank(Options(), 100, 140) == 256
    assert affordable_rank(3, 1, 1) == 1


@pytest.mark.parametrize("options", [{"keep": 1}, {"rank": 9}, {}])
def test_stays_dense_from_break_even(linear, statistics, options):
    made = compress(named(linear.weight), statistics, Options(**options))
    assert isinstance(made, Unchanged)
    assert "save nothing" in made.record["unchanged"]


def test_a_single_output_stays_dense(statistics):
    assert isinstance(compress(named(random(1, 24)), statistics, Options(rank=1)), Unchanged)


def test_share_is_on_record(linear, statistics):
    made = compress(named(linear.weight), statistics, Options(keep=0.6))
    stored = made.rows.numel() + made.link.numel() + made.columns.numel()
    assert made.record["keep"] == stored / 480 <= 0.6


def test_only_the_paper_s_linears_unless_others_are_named(linear, statistics):
    down = named(linear.weight, "model.layers.1.mlp.down_proj", "down")
    made = compress(down, statistics, Options(rank=3))
    assert isinstance(made, Unchanged)
    assert "down_proj" in made.record["unchanged"]
    assert isinstance(compress(down, statistics, Options(rank=3, target_modules=["down_proj"])), CUR)


def test_linear_of_a_block_that_is_not_chosen_stays_dense(linear, statistics):
    made = compress(named(linear.weight, plan=False), statistics, Options(rank=3, blocks=2))
    assert isinstance(made, Unchanged)
    assert "not among the 2" in made.record["unchanged"]
    assert isinstance(compress(named(linear.weight, plan=True), statistics, Options(rank=3, blocks=2)), CUR)


class TestBlocks:
    def chosen(self, blocks, distance):
        names = [f"model.layers.{index}.self_attn.q_proj" for index in range(len(distance))]
        tensors = {"blocks": {"angular_distance": torch.tensor(distance, dtype=torch.float64)}}
        decoder = SimpleNamespace(names=names, tensors=tensors.__getitem__)
        planned = plan(decoder, Options(blocks=blocks))
        assert list(planned) == names
        return [index for index, name in enumerate(names) if planned[name]]

    def test_least_distance_between_first_and_last(self):
        assert self.chosen(2, [0.0, 0.4, 0.1, 0.3, 0.2, 0.0]) == [2, 4]
        assert self.chosen(4, [0.0, 0.4, 0.1, 0.3, 0.2, 0.0]) == [1, 2, 3, 4]

    def test_all_where_none_are_asked_for(self):
        assert self.chosen(None, [0.1, 0.2, 0.3]) == [0, 1, 2]

    def test_more_than_there_are(self):
        with pytest.raises(UserError, match="decompose 3 blocks, but this model has 2 between"):
            self.chosen(3, [0.1, 0.2, 0.3, 0.4])

    def test_distance_that_is_not_finite(self):
        with pytest.raises(UserError, match="not finite"):
            self.chosen(1, [0.1, float("nan"), 0.3, 0.4])


def test_needs_blocks_where_some_are_to_be_chosen():
    assert Options().needs == frozenset()
    assert Options(blocks=3).needs == {"blocks"}


def test_one_budget():
    with pytest.raises(ValueError, match="at most one"):
        Options(rank=3, keep=0.5)


@pytest.mark.parametrize("link", ["paper", "data"])
def test_unfit_statistics_and_weights(linear, statistics, statistics_with, link):
    options = Options(rank=3, link=link)
    for damaged, sentence in ((statistics.second_moment * float("nan"), "not finite"), (torch.zeros(24, 24), "zero")):
        with pytest.raises(UserError, match=sentence):
            compress(named(linear.weight), statistics_with(damaged), options)
    with pytest.raises(UserError, match="weights hold values that are not finite"):
        compress(named(linear.weight * float("inf")), statistics, options)
