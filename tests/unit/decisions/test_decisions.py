"""Decisions by closed forms: normal comparisons, linear Gaussian posteriors, and the law's own formulas."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from fake_results import fake_study, write_results

from coppice.cli import main
from coppice.decisions import limits, recipe
from coppice.decisions.budget import expected_loss, predictive_interval, tokens_to_buy
from coppice.decisions.fitted import Fitted
from coppice.decisions.limits import Limit, choose_latencies
from coppice.decisions.next_run import next_runs, variance_reduction
from coppice.decisions.recipe import (
    Compared,
    best_at_each_size,
    best_within,
    choose_metric,
    draw_jointly,
    lower_is_better,
    probabilities_of_best,
)
from coppice.errors import UserError
from coppice.laws import p2, registry
from coppice.records.fit import FitRecord
from coppice.results import collection as tables
from coppice.results.comparisons import Scores
from coppice.results.reading import read_table
from coppice.results.schemas import SCHEMAS

PHI = NormalDist().cdf
TRUTH = {"N_C": 0.3, "D_C": 0.9, "E": 0.55, "alpha": 0.45, "beta": 0.4, "gamma": -1.1, "delta": 0.25}


# Mathematics


def test_the_reduction_is_that_of_the_exact_posterior() -> None:
    generator = np.random.default_rng(0)
    theta = generator.standard_normal((400, 3)) @ generator.standard_normal((3, 3))
    aim, rows, noise = generator.standard_normal(3), generator.standard_normal((5, 3)), 0.7
    prior = np.cov(theta.T)
    expected = [
        aim @ (prior - np.linalg.inv(np.linalg.inv(prior) + np.outer(row, row) / noise**2)) @ aim for row in rows
    ]
    np.testing.assert_allclose(variance_reduction(theta @ aim, theta @ rows.T, noise), expected, rtol=1e-9)


def test_a_run_without_noise_at_the_target_takes_all_and_a_sure_one_nothing() -> None:
    target = np.random.default_rng(0).standard_normal(50)
    found = variance_reduction(target, np.column_stack([target, np.ones(50)]), 0.0)
    np.testing.assert_allclose(found, [np.var(target, ddof=1), 0.0])


def test_the_interval_of_a_new_measurement_adds_variances() -> None:
    samples = np.array([NormalDist(2, 3).inv_cdf((place + 0.5) / 1000) for place in range(1000)])
    low, high = predictive_interval(samples, 4.0)
    assert (low, high) == pytest.approx((2 - 1.96 * 5, 2 + 1.96 * 5), abs=0.1)
    assert predictive_interval(np.array([1.0, 1.0]), 0.0) == (1, 1)


def test_two_nodes_by_their_standard_errors() -> None:
    rows = [{"node": "a", "value": 1.0, "stderr": 0.3}, {"node": "b", "value": 1.3, "stderr": 0.4}]
    draws = draw_jointly(rows, {}, np.asarray, draws=40_000)
    assert probabilities_of_best(draws, lower=True) == pytest.approx([PHI(0.3 / 0.5), 1 - PHI(0.3 / 0.5)], abs=0.01)
    assert probabilities_of_best(draws, lower=False)[1] == pytest.approx(PHI(0.3 / 0.5), abs=0.01)


def test_ties_are_shared() -> None:
    draws = np.array([[1.0, 1.0, 2.0], [1.0, 3.0, 3.0]])
    np.testing.assert_allclose(probabilities_of_best(draws, lower=True), [0.75, 0.25, 0])


def shared_scores(gap: float, common: float = 1.0) -> tuple[list[dict[str, Any]], dict[str, Scores]]:
    """Two nodes on 400 documents whose difficulty they share; the second is worse by `gap` on average."""
    generator = np.random.default_rng(0)
    hard, tokens = common * generator.standard_normal(400), np.ones(400)
    own = 0.1 * generator.standard_normal(400)
    own += gap - own.mean()
    scores = {"a": Scores(b"same", 3 + hard, tokens), "b": Scores(b"same", 3 + hard + own, tokens)}
    rows = [
        {"node": node, "value": float(each.mean), "stderr": float(each.values.std(ddof=1) / 20)}
        for node, each in scores.items()
    ]
    return rows, scores


def test_nodes_on_the_same_items_are_compared_more_sharply() -> None:
    rows, scores = shared_scores(gap=0.01)
    joint = probabilities_of_best(draw_jointly(rows, scores, np.asarray), lower=True)
    apart = probabilities_of_best(draw_jointly(rows, {}, np.asarray), lower=True)
    deviation = (scores["b"].values - scores["a"].values).std() / 20
    assert joint[0] == pytest.approx(PHI(0.01 / deviation), abs=0.02)  # 0.98
    assert apart[0] == pytest.approx(PHI(0.01 / (rows[0]["stderr"] * 2**0.5)), abs=0.03)  # 0.56


def test_different_items_are_drawn_apart_and_items_that_do_not_give_the_value_not_at_all() -> None:
    rows, scores = shared_scores(gap=0.01)
    other = {"a": scores["a"], "b": Scores(b"other", scores["b"].values, scores["b"].weights)}
    draws = draw_jointly(rows, other, np.asarray)
    assert abs(np.corrcoef(draws.T)[0, 1]) < 0.1
    assert np.corrcoef(draw_jointly(rows, scores, np.asarray).T)[0, 1] > 0.99
    # Of the wrong value: by normal(value, stderr), which is 0 here.
    wrong = [row | {"value": 9.0, "stderr": None} for row in rows]
    assert (draw_jointly(wrong, scores, np.asarray) == 9).all()


def test_perplexities_are_exponentials_of_ratios_of_sums() -> None:
    scores = {"a": Scores(b"", np.array([1.0, 6.0]), np.array([1.0, 2.0]))}
    draws = draw_jointly([{"node": "a", "value": math.exp(7 / 3), "stderr": 1.0}], scores, np.exp)
    assert set(np.round(np.log(draws[:, 0]), 9)) == {1.0, round(7 / 3, 9), 3.0}


# Laws


def fitted(missing: tuple[int, float] | None = None, spread: float = 0.02, **report: Any) -> Fitted:
    """The true P2 law at two sizes and two ratios, 1 to 8 tokens (in thousands), with samples around it."""
    cases = [(size, rho) for size in (1, 3) for rho in (0.15, 0.3) if (size, rho) != missing]
    mesh = [(size, rho, float(tokens)) for size, rho in cases for tokens in (1, 2, 4, 8)]
    size, rho, tokens = np.transpose(mesh)
    points = {
        "run": np.array([f"m{a:g}/cut-{100 * b:.0f}/full" for a, b in zip(size, rho, strict=True)]),
        "model": np.array([f"m{a:g}" for a in size]),
        "dense_parameters": size,
        "rho": rho,
        "tokens": tokens,
        "dense_loss": 2 - 0.1 * size,
    }
    points["loss"] = p2.predict(TRUTH, points)
    generator = np.random.default_rng(0)
    samples = {
        name: value * (1 + spread * generator.standard_normal((300 if spread else 0, 1)))
        for name, value in TRUTH.items()
    }
    known = {"low": None, "high": None, "identified": True, "spread": 0.0}
    whole: dict[str, Any] = {
        "law": "p2",
        "source": {"title": "P2", "equation": "L"},
        "options": {"gain": 0.01},
        "units": {
            "loss": {"unit": "nats per token", "scale": 1.0},
            "tokens": {"unit": "tokens", "scale": 1e3},
            "dense_parameters": {"unit": "parameters", "scale": 1e6},
        },
        "parameters": {name: {"value": value, **known} for name, value in TRUTH.items()},
        "metrics": {"rmse": 0.01},
        "held_out": {"later_tokens": {"p2": {"rmse": 0.02, "relative": 0.01, "low": 0.01, "high": 0.03}}},
        "ranking": {},
        "points": len(size),
        "runs": len(cases),
        "recommendation": [],
        "notes": [],
        "converged": True,
        "target": "loss",
        "passes": {"ok": True, "reasons": []},
    }
    return Fitted(
        "recovery",
        registry.load("p2"),
        FitRecord.model_validate(whole | report),
        points,
        samples,
    )


def node_rows(fit: Fitted) -> list[dict[str, Any]]:
    """The rows of nodes: dense models, what was pruned, and what was recovered."""
    runs = sorted(set(fit.points["run"]))
    names = sorted({name for run in runs for name in (run, run.rpartition("/")[0], run.split("/")[0])})
    return [{"node": name, "parent": name.rpartition("/")[0] or None} for name in names]


@pytest.mark.parametrize("node", ["m3/cut-15", "m3/cut-15/full"])
def test_tokens_to_buy_are_those_of_the_law(node: str) -> None:
    fit = fitted()
    answer = tokens_to_buy(fit, node_rows(fit), node, gain=0.02)
    (entry,) = answer["tokens"]
    first = 0.15**1.1 * 3**-0.25 * 0.9 * (1 - 2**-0.4)
    assert entry["tokens"] == pytest.approx(1e3 * (first / 0.02) ** (1 / 0.4))
    assert entry["low"] < entry["tokens"] < entry["high"]
    assert answer["sentences"][0] == entry["sentence"]
    assert answer["sentences"][-1] == (
        "Held-out error of law recovery, later tokens: rmse 0.0200 [0.0100, 0.0300] nats per token, 1.00% of the loss."
    )
    assert tokens_to_buy(fit, node_rows(fit), node)["tokens"][0]["gain"] == 0.01


def test_the_expected_loss_is_that_of_the_law() -> None:
    fit = fitted()
    answer = expected_loss(fit, node_rows(fit), "m1/cut-30", 32e3)
    excess = 0.3**1.1 * (0.3 + 0.9 * 32**-0.4 + 0.55)
    assert answer["value"] == pytest.approx(1.9 + excess)
    assert answer["extrapolation"]
    assert "This is an extrapolation: 1k to 8k tokens were measured." in answer["sentences"]
    assert not expected_loss(fit, node_rows(fit), "m1/cut-30", 3e3)["extrapolation"]
    # The noise of a measurement is in the interval, beside the fit's uncertainty.
    point = {name: column[4:5] for name, column in fit.points.items()} | {"tokens": np.array([32.0])}
    deviation = np.hypot(p2.predict(fit.samples, point).std(), fit.noise)
    assert answer["high"] - answer["low"] == pytest.approx(2 * 1.96 * deviation, rel=0.1)


def test_the_noise_of_a_measurement_counts_the_parameters_that_were_fitted() -> None:
    fit = fitted()
    points, free = fit.report.points, len(TRUTH)
    assert fit.noise == pytest.approx(0.01 * (points / (points - free)) ** 0.5)


def test_without_resamples_there_is_no_interval() -> None:
    fit = fitted(spread=0)
    answer = expected_loss(fit, node_rows(fit), "m1/cut-30", 32e3)
    assert (answer["low"], answer["high"]) == (None, None)
    assert "No interval" in " ".join(answer["sentences"])
    assert next_runs(fit, node_rows(fit))["runs"] == []


def test_a_law_that_fails_its_test_is_refused() -> None:
    fit = fitted(passes={"ok": False, "reasons": ["Its error in 'later tokens' is 20%."]})
    rows = node_rows(fit)
    for answer in (
        tokens_to_buy(fit, rows, "m1/cut-30"),
        expected_loss(fit, rows, "m1/cut-30", 1e5),
        next_runs(fit, rows),
    ):
        assert answer["refused"]
        assert answer["sentences"] == [
            "Nothing is recommended from law recovery, which fails its own test. Its error in 'later tokens' is 20%."
        ]


@pytest.mark.parametrize("ok", [True, False])
def test_nodes_that_the_law_does_not_know(ok: bool) -> None:
    fit = fitted(passes={"ok": ok, "reasons": []})
    with pytest.raises(UserError, match=r"There is no node 'm1/cut-3'\. Did you mean 'm1/cut-30'"):
        expected_loss(fit, node_rows(fit), "m1/cut-3", 1e5)
    with pytest.raises(UserError, match="No recovery of 'm1' is among the points of law recovery; they belong to: m1/"):
        tokens_to_buy(fit, node_rows(fit), "m1")
    with pytest.raises(UserError, match=r"There is no node 'm1/cut-3'"):
        next_runs(fit, node_rows(fit), "m1/cut-3")


def test_a_law_without_points_knows_no_node() -> None:
    fit = fitted()
    empty = replace(fit, points={name: column[:0] for name, column in fit.points.items()})
    with pytest.raises(
        UserError, match=r"No recovery of 'm1/cut-30' is among the points of law recovery; it has none\."
    ):
        tokens_to_buy(empty, node_rows(fit), "m1/cut-30")


def test_next_runs_are_those_that_tell_most_of_the_target() -> None:
    fit = fitted(missing=(3, 0.3))
    answer = next_runs(fit, node_rows(fit), "m1/cut-30", 64e3, top=100)
    runs = answer["runs"]
    # Three starting points, each at two more budgets and with another seed; and the ratio that the large model lacks.
    assert len(runs) == 3 * 3 + 1
    (design,) = (run for run in runs if run["kind"] == "design")
    assert (design["model"], design["rho"], design["tokens"]) == ("m3", pytest.approx(0.3), 8e3)
    assert design["run"] == "prune m3 to rho 0.30, train it on 8k tokens"
    reductions = [run["variance_reduction"] for run in runs]
    assert reductions == sorted(reductions, reverse=True)

    def predicted(rho: float, size: float, tokens: float) -> np.ndarray:
        where = {"rho": rho, "dense_parameters": size, "tokens": tokens, "dense_loss": 2 - 0.1 * size}
        return p2.predict(fit.samples, where)[:, 0]

    aim, candidate = predicted(0.3, 1, 64), predicted(0.3, 1, 32)
    covariance = np.cov(aim, candidate)
    expected = covariance[0, 1] ** 2 / (covariance[1, 1] + fit.noise**2)
    found = next(run for run in runs if run["run"] == "train m1/cut-30 on 32k tokens")
    assert found["variance_reduction"] == pytest.approx(expected)
    assert found["part"] == pytest.approx(expected / covariance[0, 0])
    assert found["deviation_after"] == pytest.approx((covariance[0, 0] - expected) ** 0.5)
    assert found["part_per_token"] == pytest.approx(found["part"] / 32e3)


def test_the_target_is_what_is_known_worst() -> None:
    fit = fitted()
    answer = next_runs(fit, node_rows(fit), top=2)
    widths = {
        node: np.ptp(np.quantile(p2.predict(fit.samples, point)[:, 0], [0.025, 0.975]))
        for node, point in (
            (f"m{size}/cut-{100 * rho:.0f}", {"rho": rho, "dense_parameters": size, "tokens": 8, "dense_loss": 0})
            for size in (1, 3)
            for rho in (0.15, 0.3)
        )
    }
    assert answer["node"] == max(widths, key=widths.get)
    assert answer["at_tokens"] == 8e3
    assert len(answer["runs"]) == 2


# Measurements


WITHOUT_ENDS = {"low": None, "high": None}


def compared(values: list[float], sizes: list[int], draws: np.ndarray | None = None) -> Compared:
    rows = [
        {"node": f"n{place}", "value": value, "stderr": 0.1, "stored_bytes": size, "path_recovery_tokens": 1000 * place}
        | WITHOUT_ENDS
        for place, (value, size) in enumerate(zip(values, sizes, strict=True))
    ]
    drawn = draw_jointly(rows, {}, np.asarray, 20_000) if draws is None else draws
    return Compared("quality", "perplexity_text", True, rows, drawn, ["lost"])


def test_the_best_within_a_limit_and_its_rivals() -> None:
    found = compared([1.0, 1.1, 1.0, 3.0], [400, 100, 50, 50])
    sizes = {row["node"]: row["stored_bytes"] for row in found.rows}
    answer = best_within(found, [Limit("at most 100 stored bytes", 100, sizes)])
    assert [row["node"] for row in answer["nodes"]] == ["n2", "n1"]  # n3 is not needed to cover 95%
    expected = PHI(0.1 / (0.1 * 2**0.5))
    assert answer["nodes"][0]["probability"] == pytest.approx(expected, abs=0.02)
    assert answer["sentences"][0].startswith("Best of 3 nodes with at most 100 stored bytes: n2, perplexity_text 1.00")
    assert "Not compared, since they have no finite perplexity_text: lost." in answer["sentences"]
    assert len(best_within(found, [])["nodes"]) == 3
    sure = best_within(found, [Limit("at most 3000 recovery tokens", 50, sizes)])
    assert [row["node"] for row in sure["nodes"]] == ["n2"]


def test_nodes_that_are_nearly_the_same_do_not_lose_to_a_worse_one() -> None:
    # Three clones share what they win, so that the worse node alone is the best more often than each of them.
    clone, worse = np.random.default_rng(0).normal([1.0, 1.01], 0.1, size=(20_000, 2)).T
    answer = best_within(compared([1.0, 1.0, 1.0, 1.01], [1] * 4, np.column_stack([clone, clone, clone, worse])), [])
    probability = {row["node"]: row["probability"] for row in answer["nodes"]}
    assert probability["n3"] > 1.3 * probability["n0"]
    assert answer["nodes"][0]["node"] == "n0"
    # A value that is hardly known is a rival, where a surely worse one between them is none.
    draws = np.column_stack([np.full(20_000, 1.0), np.full(20_000, 1.5), 2 + 2 * (worse - 1.01) / 0.1])
    assert [row["node"] for row in best_within(compared([1.0, 1.5, 2.0], [1] * 3, draws), [])["nodes"]] == ["n0", "n2"]


def test_what_a_limit_does_not_know_is_named_and_nothing_within_is_an_error() -> None:
    found = compared([1.0, 1.1], [400, 100])
    answer = best_within(found, [Limit("a latency", 1.0, {"n1": 0.5})])
    assert "Not compared, since what the limits bound is unknown for them: n0." in answer["sentences"]
    with pytest.raises(UserError) as refused:
        best_within(found, [Limit("at most 9 bytes", 9, {"n0": 400, "n1": 100}, "{} bytes".format)])
    assert str(refused.value) == (
        "No node whose perplexity_text was measured has at most 9 bytes: the least that one has is 100 bytes. Raise a "
        "limit."
    )


def test_of_nodes_that_tie_the_smallest_is_named() -> None:
    # n0 and n3 are as small, and n3 was trained less; n4 is worse.
    found = compared([1.0, 1.0, 1.0, 1.0, 1.2], [100, 400, 300, 100, 10], np.ones((50, 5)) * [1, 1, 1, 1, 1.2])
    found.rows[0]["path_recovery_tokens"] = 9000
    answer = best_within(found, [])
    assert [row["node"] for row in answer["nodes"]] == ["n3", "n0", "n2", "n1"]
    assert answer["tied"] == 4
    assert "4 nodes tie; the smallest is n3, 1.00e-04 MB." in answer["sentences"]
    # Chance makes one of two that tie the best more often; neither that nor the order of the rows decides.
    draws = np.array([[1.0, 1.1]] * 30 + [[1.1, 1.0]] * 20)
    assert best_within(compared([1.0, 1.0], [400, 100], draws), [])["nodes"][0]["node"] == "n1"
    alone = best_within(compared([1.0, 1.1], [400, 100]), [])
    assert alone["tied"] == 1
    assert not any("nodes tie" in sentence for sentence in alone["sentences"])


def test_each_step_of_the_ladder_is_the_best_at_its_size() -> None:
    found = compared([1.0, 1.1, 2.0, 1.05], [400, 200, 100, 300])
    steps = best_at_each_size(found)["nodes"]
    assert [step["node"] for step in steps] == ["n2", "n1", "n3", "n0"]
    assert steps[0]["probability"] == 1
    assert steps[1]["probability"] == pytest.approx(1, abs=1e-3)
    assert steps[2]["probability"] == pytest.approx(PHI(0.05 / (0.1 * 2**0.5)), abs=0.02)
    assert [step["compared"] for step in steps] == [1, 2, 3, 4]


def test_missing_values_and_values_that_are_no_number_are_named() -> None:
    nodes = [{"node": name, "stored_bytes": 1, "path_recovery_tokens": 0} for name in "abcd"]
    metrics = [
        {"node": node, "evaluation": "e", "metric": "perplexity_t", "value": value, "stderr": stderr} | WITHOUT_ENDS
        for node, value, stderr in (("a", 2.0, 0.1), ("b", math.nan, 0.1), ("c", 3.0, None))
    ]
    items = pa.table({name: [] for name in SCHEMAS["items"].names}, schema=SCHEMAS["items"])
    found = recipe.compare(nodes, metrics, items, ("e", "perplexity_t"), True)
    assert found.unmeasured == ["b", "d"]
    assert [row["node"] for row in found.rows] == ["a", "c"]
    assert found.notes() == [
        "Probabilities are over the items measured, not over the seeds of training.",
        "Not compared, since they have no finite perplexity_t: b and d.",
        "Taken as exact, since their perplexity_t has no standard error: c.",
    ]


def cost(node: str, device: str, value: float | None, evaluation: str | None = "cost") -> dict[str, Any]:
    return {
        "node": node, "device": device, "evaluation": evaluation, "metric": "decode_latency", "value": value,
        "simulated": node == "q",
    }  # fmt: skip


def test_latencies_are_measured_unless_a_roofline_is_named() -> None:
    rows = [
        cost("a", "cpu", 0.01),
        cost("q", "cpu", 0.02),
        cost("a", "H200 (roofline)", 1e-5, None),
        cost("b", "cpu", None),
    ]
    device, found = choose_latencies(rows, None, None)
    assert (device, sorted(found)) == ("cpu", ["a", "q"])
    assert choose_latencies(rows, "H200 (roofline)", None)[1]["a"]["value"] == 1e-5
    with pytest.raises(UserError, match="--device gpu: no decode_latency is known on it"):
        choose_latencies(rows, "gpu", None)
    with pytest.raises(UserError, match=r"choose by --device where it holds.*cpu; cuda"):
        choose_latencies([*rows, cost("a", "cuda", 1.0)], None, None)
    with pytest.raises(UserError, match=r"several evaluations .*cost and long.*--cost"):
        choose_latencies([*rows, cost("a", "cpu", 1.0, "long")], None, None)
    with pytest.raises(UserError, match="no decode_latency was measured"):
        choose_latencies([], None, None)
    bounds, notes = limits.read_limits([], rows, max_latency=0.015)
    assert (bounds[0].admits("a"), bounds[0].admits("q"), bounds[0].admits("z")) == (True, False, False)
    assert notes == ["Their latency is that of a simulation: q."]
    _, notes = limits.read_limits([], rows, max_latency=1, device="H200 (roofline)")
    assert notes == ["The latencies on H200 (roofline) are predictions, not measurements."]


def test_which_way_is_better() -> None:
    assert lower_is_better("perplexity_text", "perplexity")
    assert not lower_is_better("arc_acc", "accuracy")
    assert lower_is_better("strange", "", "lower")
    with pytest.raises(UserError, match="--prefer lower or --prefer higher"):
        lower_is_better("strange", "nats")


def test_the_metric_must_be_clear() -> None:
    rows = [
        {"evaluation": evaluation, "metric": metric}
        for evaluation, metric in (("a", "perplexity_x"), ("b", "perplexity_x"), ("b", "task_acc"))
    ]
    assert choose_metric(rows, "task_acc", None) == ("b", "task_acc")
    assert choose_metric(rows, None, "a") == ("a", "perplexity_x")
    for metric, evaluation, words in (
        ("task_ac", None, "Did you mean 'task_acc'"),
        ("task_acc", "c", "--evaluation c"),
        ("perplexity_x", None, r"several evaluations measured it \(a and b\)"),
        ("task_acc", "a", "the evaluation 'a' did not measure it"),
        (None, None, "Choose what is to be best by --metric"),
    ):
        with pytest.raises(UserError, match=words):
            choose_metric(rows, metric, evaluation)


# The command


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read by many tests, and changed by none."""
    folder = write_results(tmp_path_factory.mktemp("results") / "demo")
    tables.write_tables(fake_study(), folder, folder / "tables", partial=True)
    return folder


@pytest.fixture
def copied(results: Path, tmp_path: Path) -> Path:
    for part in ("tables", "laws"):
        shutil.copytree(results / part, tmp_path / part)
    return tmp_path


def recommend(results: Path, capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert main(["recommend", "--results", str(results), *words]) == 0
    return capsys.readouterr().out


def test_scores_are_found_in_the_table_of_items(results: Path) -> None:
    items = read_table(results / "tables", "items")
    rows = {(row["node"], row["metric"]): row["value"] for row in read_table(results / "tables", "metrics").to_pylist()}
    found = recipe.scores_of(items, "quality", "perplexity_stories")
    assert len(found) == 10
    for node, scores in found.items():
        assert math.exp(scores.mean) == pytest.approx(rows[node, "perplexity_stories"])
    accuracy = recipe.scores_of(items, "quality", "biographies_acc")
    assert accuracy["small"].mean == pytest.approx(2 / 3)
    assert recipe.scores_of(items, "quality", "nothing_acc") == {}


def test_every_question_has_an_answer(results: Path, capsys: pytest.CaptureFixture[str]) -> None:
    everything = recommend(results, capsys)
    assert everything.isascii()
    assert max(len(line) for line in everything.splitlines()) <= 120
    for words in ("Law p2", "Best at each size: perplexity_stories (quality)", "Next run", "Held-out error of law p2"):
        assert words in everything
    assert recommend(results, capsys) == everything  # seeded
    text = recommend(results, capsys, "--node", "small/laco-25", "--gain", "0.02", "--tokens", "1e9")
    assert "Recovery tokens to buy for small/laco-25" in text
    assert "small/laco-25 after 1B tokens: loss" in text
    assert "This is an extrapolation: 50k to 1M tokens were measured." in text
    text = recommend(results, capsys, "--max-bytes", "5e5", "--max-latency", "0.02", "--max-recovery-tokens", "1e6")
    assert "Best of 1 node with at most 500,000 stored bytes, at most 1M recovery tokens on the path and a" in text
    (answer,) = json.loads(recommend(results, capsys, "--next", "--top", "2", "--json"))
    assert len(answer["runs"]) == 2
    assert answer["held_out"]["later_tokens"]["rmse"] == 0.012
    (answer,) = json.loads(recommend(results, capsys, "--metric", "biographies_acc", "--json"))
    assert sum(row["probability"] for row in answer["nodes"]) >= 0.95
    assert answer["nodes"][0]["value"] == max(row["value"] for row in answer["nodes"])


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["--tokens", "1e9"], "--tokens and --gain are about one node"),
        (["--device", "cpu"], "--device and --cost choose the measurement for --max-latency"),
        (["--next", "--top", "0"], "--top 0 is not a number of runs"),
        (["--node", "smal/laco-25"], "Did you mean 'small/laco-25'"),
        (["--next", "--law", "p3"], "--law p3: no law of that name was fitted. Did you mean 'p2'"),
        (["--metric", "perplexity_story"], "Did you mean 'perplexity_stories'"),
        (["--max-bytes", "10"], "No node whose perplexity_stories was measured has at most 10 stored bytes: the"),
    ],
)
def test_what_cannot_be_answered_is_a_sentence(
    results: Path, capsys: pytest.CaptureFixture[str], words: list[str], sentence: str
) -> None:
    assert main(["recommend", "--results", str(results), *words]) == 1
    assert sentence in capsys.readouterr().err


def test_a_study_without_a_law_of_recoveries(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "laws/p2/fit.json").unlink()
    assert main(["recommend", "--results", str(copied), "--next"]) == 1
    assert "No law of recoveries was fitted" in capsys.readouterr().err


def test_nothing_to_recommend_is_a_sentence(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (copied / "laws/p2/fit.json").unlink()
    metrics = read_table(copied / "tables", "metrics")
    accuracies = metrics.filter(pc.equal(metrics["metric"], "biographies_acc"))
    pq.write_table(accuracies, copied / "tables/metrics.parquet")
    text = recommend(copied, capsys)
    assert text.startswith("Nothing to recommend\n  No law was fitted in ")
    assert "Choose one of the metrics measured by --metric: biographies_acc." in " ".join(text.split())
    pq.write_table(metrics.slice(0, 0), copied / "tables/metrics.parquet")
    assert "--metric" not in recommend(copied, capsys)


def test_an_older_fit_is_not_trusted(copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = copied / "laws/p2/fit.json"
    fit = json.loads(path.read_text())
    del fit["passes"]
    path.write_text(json.dumps(fit))
    text = recommend(copied, capsys)
    assert "Nothing is recommended from law p2, whose fit records no test; fit it again." in text
    assert "Next run" not in text
