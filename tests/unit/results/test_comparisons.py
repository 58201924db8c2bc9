from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pytest

from coppice.evaluation.harness import choice_scores, continuous_rows, item_rows
from coppice.results import comparisons
from coppice.results.comparisons import compare, relations, signals
from coppice.results.schemas import SCHEMAS
from coppice.uncertainty import bootstrap_ratios, mcnemar, mean_stderr, paired_difference

PROTOCOLS = {"quality": ["stories"]}


def node(name: str) -> dict[str, Any]:
    return {"node": name, "model": name.partition("/")[0], "parent": name.rpartition("/")[0] or None}


def items(rows: list[dict[str, Any]]) -> pa.Table:
    shared = {"evaluation": "quality", "choice": 0, "correct": None, "answer": None}
    return pa.Table.from_pylist([shared | row for row in rows], schema=SCHEMAS["items"])


def questions(
    name: str, right: np.ndarray, log_probabilities: np.ndarray | None = None, task: str = "quiz"
) -> pa.Table:
    """Questions of two choices, of which the second is the right one."""
    scores = np.where(right, -1.0, -3.0) if log_probabilities is None else log_probabilities
    return items(
        [
            {
                "node": name, "task": task, "item": str(item), "choice": choice, "length": 5,
                "log_likelihood": float(scores[item]) if choice else -2.0, "correct": bool(right[item]),
                "answer": choice == 1,
            }
            for item in range(len(right))
            for choice in range(2)
        ]
    )  # fmt: skip


def documents(name: str, losses: np.ndarray, tokens: np.ndarray) -> pa.Table:
    return items(
        [
            {"node": name, "task": "stories", "item": str(item), "log_likelihood": -float(loss), "length": int(count)}
            for item, (loss, count) in enumerate(zip(losses, tokens, strict=True))
        ]
    )


def by_pair(rows: list[dict[str, Any]], measure: str) -> dict[tuple[str, str, str], dict[str, Any]]:
    return {(row["relation"], row["node"], row["other"]): row for row in rows if row["measure"] == measure}


# From log-likelihoods to an accuracy (Schaeffer et al., arXiv 2406.04391)


def test_the_same_choice_probability_can_be_right_and_wrong() -> None:
    # T-H1
    spread = choice_scores(np.log([0.4, 0.2, 0.2, 0.2]), np.ones(4), 0)
    with np.errstate(divide="ignore"):
        rival = choice_scores(np.log([0.4, 0.6, 0.0, 0.0]), np.ones(4), 0)
    for scores, right in ((spread, True), (rival, False)):
        assert scores["log_probability"] == pytest.approx(np.log(0.4))
        assert scores["choice_probability"] == pytest.approx(0.4)
        assert scores["incorrect"] == pytest.approx(np.log(0.6))
        assert scores["acc"] == right
    assert spread["brier"] == pytest.approx(0.6**2 + 3 * 0.2**2)
    assert rival["brier"] == pytest.approx(0.6**2 + 0.6**2)


def test_choice_probability_does_not_know_the_mass_of_all_choices() -> None:
    whole = choice_scores(np.array([-1.0, -2.0, -4.0]), np.array([2, 8, 3]), 1)
    rare = choice_scores(np.array([-1.0, -2.0, -4.0]) - 30, np.array([2, 8, 3]), 1)
    assert rare["choice_probability"] == pytest.approx(whole["choice_probability"])
    assert rare["brier"] == pytest.approx(whole["brier"])
    assert rare["log_probability"] == whole["log_probability"] - 30
    assert not whole["acc"]
    assert whole["acc_norm"]


def test_probabilities_rank_as_their_logarithms_do() -> None:
    # T-H2
    from scipy.stats import kendalltau, spearmanr

    generator = np.random.default_rng(0)
    scale, scores = np.arange(20), generator.normal(-5, 2, 20) + 0.1 * np.arange(20)
    for rank in (spearmanr, kendalltau):
        assert rank(scale, scores).statistic == pytest.approx(rank(scale, np.exp(scores)).statistic)


def correlations(scores: np.ndarray, scale: np.ndarray) -> np.ndarray:
    """Pearson's correlation of scores [..., models] with scale [models], 0 for scores that are constant."""
    scores, scale = scores - scores.mean(axis=-1, keepdims=True), scale - scale.mean()
    norms = np.sqrt((scores**2).sum(axis=-1) * (scale**2).sum())
    return np.divide(scores @ scale, norms, out=np.zeros(norms.shape), where=norms > 0)


def test_each_step_to_an_accuracy_loses_correlation_with_scale() -> None:
    # T-H3: 200 benchmarks x 50 items x 10 models x 4 choices; the mass on wrong choices walks at random
    generator = np.random.default_rng(0)
    shape, scale = (200, 50, 10), np.linspace(0, 6, 10)
    right = generator.uniform(-8, -4, (200, 50, 1)) + generator.uniform(0.3, 0.9, (200, 50, 1)) * scale
    right += generator.normal(0, 0.1, shape)
    walks = np.cumsum(generator.normal(0, 0.7, (*shape, 3)), axis=-2)
    log_likelihoods = np.concatenate([right[..., None], generator.uniform(-8, -4, (200, 50, 1, 3)) + walks], axis=-1)
    scores = choice_scores(log_likelihoods, np.ones(4), np.zeros(shape, int))
    assert scores["brier"].min() >= 0  # T-H4
    assert scores["brier"].max() <= 2
    ladder = [scores["log_probability"], scores["choice_probability"], -scores["brier"], scores["acc"].astype(float)]
    found = np.array([correlations(rung, scale).mean(axis=1) for rung in ladder])
    assert (np.diff(found, axis=0) < 0).all(axis=0).mean() >= 0.9


def test_the_brier_score_is_within_its_bounds() -> None:
    # T-H4
    assert choice_scores(np.array([0.0, -800.0]), np.ones(2), 0)["brier"] == pytest.approx(0)
    assert choice_scores(np.array([0.0, -800.0]), np.ones(2), 1)["brier"] == pytest.approx(2)


class Task:
    """What `item_rows` asks of a task of the harness: contexts may be the choices."""

    def __init__(self, contexts: bool = False) -> None:
        self.multiple_input = 2 if contexts else 0

    def doc_to_text(self, document: dict[str, Any]) -> int:
        return document["answer"]


def sample(target: Any, choices: list[str], acc: float | None = 1.0, **more: Any) -> dict[str, Any]:
    return {
        "doc_id": 0, "doc": {"answer": 1}, "target": target, "arguments": [("Q:", f" {choice}") for choice in choices],
        "resps": [[(-1.0 - place, False)] for place in range(len(choices))],
    } | ({} if acc is None else {"acc": acc}) | more  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "contexts", "answers"),
    [
        (sample(1, ["a", "b", "c"]), False, [False, True, False]),
        (sample("b", ["a", "b"]), False, [False, True]),
        (sample(" word", ["word"]), False, [True]),
        (sample([0, 2], ["a", "b", "c"]), False, [True, False, True]),
        (sample("the end", ["the end", "the end"]), True, [False, True]),
        (sample("d", ["a", "b"], acc=0.0), False, [False, False]),
        (sample(0, ["a", "b"], acc=0.3), False, [None, None]),  # graded by a share: no single right choice
        (sample("a", ["a"], acc=None), False, [None]),
        (sample(1, ["a", "b", "a", "b"], acc_mutual_info=1.0), False, [False, True]),
    ],
)
def test_the_right_choice_is_known_however_a_task_names_it(
    entry: dict[str, Any], contexts: bool, answers: list[bool | None]
) -> None:
    assert [row["answer"] for row in item_rows({"t": [entry]}, {"t": Task(contexts)})] == answers


def test_generated_answers_have_no_rows() -> None:
    entry = {"doc_id": 0, "doc": {}, "target": 1.5, "arguments": [("Q:", {"until": []})], "resps": [["text"]]}
    assert item_rows({"t": [entry | {"exact_match": 1.0}]}, {"t": Task()}) == []


def test_means_of_the_continuous_scores() -> None:
    entries = [
        sample(0, ["a", "b"]),
        sample(1, ["a", "b", "c"], acc=0.0) | {"doc_id": 1},
        sample([0, 1], ["a", "b"]) | {"doc_id": 2},
    ]
    results = {"n-shot": {"t": 5}, "versions": {"t": 2}}
    found = {row["metric"]: row for row in continuous_rows(item_rows({"t": entries}, {"t": Task()}), results)}
    assert set(found) == {"t_log_probability", "t_choice_probability", "t_brier"}
    row = found["t_log_probability"]
    # The third has two right choices.
    assert (row["value"], row["stderr"], row["n"]) == (-1.5, pytest.approx(mean_stderr(np.array([-1.0, -2.0]))), 2)
    assert (row["unit"], row["shots"], row["version"], row["task"]) == ("nats", 5, 2, "t")
    shares = [1 / (1 + np.exp(-1)), 1 / (1 + np.e + np.exp(-1))]
    assert found["t_choice_probability"]["value"] == pytest.approx(np.mean(shares))
    alone = continuous_rows(item_rows({"t": entries[:1]}, {"t": Task()}), results)
    assert [row["stderr"] for row in alone] == [None, None, None]


# Pairs of nodes


def test_relations() -> None:
    nodes = [node(name) for name in ("m", "m/a", "m/a/b", "m/c", "other", "other/a")]
    goodness = {"m": 3.0, "m/a": 2.0, "m/a/b": 4.0, "other": 9.0, "other/a": 9.0}
    assert sorted(relations(nodes, goodness)) == [
        ("dense", "m/a", "m"),
        ("dense", "m/a/b", "m"),
        ("dense", "other/a", "other"),
        ("next", "m", "m/a/b"),
        ("next", "m/a", "m"),
        ("next", "other/a", "other"),
        ("parent", "m/a", "m"),
        ("parent", "m/a/b", "m/a"),
        ("parent", "other/a", "other"),
    ]
    assert relations(nodes, {"m/a/b": 1.0, "m/c": 2.0}) == [("next", "m/a/b", "m/c")]


def test_accuracies_are_compared_item_by_item() -> None:
    generator = np.random.default_rng(0)
    dense = generator.random(400) < 0.7
    flipped = generator.random(400) < 0.3
    pruned, same = np.where(flipped, False, dense), dense.copy()
    same[:2] = ~same[:2]
    tables = [questions("m", dense), questions("m/a", pruned), questions("m/a/b", same)]
    rows = compare([node("m"), node("m/a"), node("m/a/b")], tables, PROTOCOLS)
    assert rows == compare([node("m"), node("m/a"), node("m/a/b")], tables[::-1], PROTOCOLS)
    found = by_pair(rows, "accuracy")
    row = found["dense", "m/a", "m"]
    expected = paired_difference(pruned, dense)
    assert row["difference"] == pytest.approx(expected.difference)
    assert row["stderr"] == pytest.approx(expected.stderr, rel=0.05)
    assert (row["low"], row["high"]) == pytest.approx((expected.low, expected.high), abs=0.005)
    lost = int((dense & ~pruned).sum())
    assert (row["right_to_wrong"], row["wrong_to_right"], row["n"]) == (lost, 0, 400)
    assert row["flip_rate"] == lost / 400
    assert row["mcnemar_p"] == mcnemar(lost, 0)
    assert row["distinguishable"]
    assert not found["dense", "m/a/b", "m"]["distinguishable"]
    # m, m/a and m/a/b: three different pairs, whatever they are called.
    assert {row["family"] for row in rows} == {3}
    turned = found["parent", "m/a/b", "m/a"]
    assert turned["difference"] > 0
    assert turned["low"] < turned["difference"] < turned["high"]
    assert turned["wrong_to_right"] > turned["right_to_wrong"]


def test_log_probabilities_of_right_choices_tell_apart_what_an_accuracy_does_not() -> None:
    generator = np.random.default_rng(0)
    right, scores = np.ones(200, bool), generator.normal(-1, 0.3, 200)
    tables = [questions("m", right, scores), questions("m/a", right, scores - 0.1 + generator.normal(0, 0.1, 200))]
    rows = compare([node("m"), node("m/a")], tables, PROTOCOLS)
    assert by_pair(rows, "accuracy")["dense", "m/a", "m"]["p_adjusted"] == 1
    row = by_pair(rows, "log_probability")["next", "m/a", "m"]
    assert row["difference"] == pytest.approx(-0.1, abs=0.03)
    assert row["distinguishable"]
    assert (row["unit"], "flip_rate" in row) == ("nats", False)


def test_losses_are_ratios_of_sums_over_documents() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(20, 200, size=60)
    losses = tokens * generator.normal(2.0, 0.3, 60)
    worse = losses + tokens * generator.normal(0.05, 0.1, 60)
    rows = compare(
        [node("m"), node("m/a")], [documents("m", losses, tokens), documents("m/a", worse, tokens)], PROTOCOLS
    )
    row = by_pair(rows, "loss")["next", "m/a", "m"]
    assert row["difference"] == pytest.approx((worse.sum() - losses.sum()) / tokens.sum())
    assert row["stderr"] == pytest.approx(bootstrap_ratios(worse - losses, tokens).std(), rel=0.06)
    assert (row["n"], row["unit"], row["task"]) == (60, "nats/token", "stories")


def test_a_task_and_a_protocol_of_one_name_are_two_measures() -> None:
    right, tokens = np.arange(30) % 3 > 0, np.arange(10, 40)
    tables = [
        pa.concat_tables([questions(name, right, task="stories"), documents(name, factor * tokens, tokens)])
        for name, factor in (("m", 1.0), ("m/a", 1.1))
    ]
    rows = compare([node("m"), node("m/a")], tables, PROTOCOLS)
    assert {row["measure"]: row["n"] for row in rows} == {"accuracy": 30, "log_probability": 30, "loss": 30}
    assert by_pair(rows, "loss")["parent", "m/a", "m"]["difference"] == pytest.approx(0.1)


def test_nodes_of_different_items_are_not_compared() -> None:
    tokens = np.arange(10, 40)
    tables = [
        questions("m", np.ones(20, bool)), questions("m/a", np.ones(19, bool)), questions("m/b", np.zeros(20, bool)),
        documents("m", tokens, tokens), documents("m/a", tokens, tokens + 1),
    ]  # fmt: skip
    rows = compare([node("m"), node("m/a"), node("m/b")], tables, PROTOCOLS)
    assert {(row["node"], row["other"]) for row in rows} == {("m/b", "m")}


def test_what_knowledge_asks_is_not_compared() -> None:
    asked = items(
        [
            {"node": name, "task": "knowledge", "item": "0", "choice": choice, "log_likelihood": -1.0, "length": 3}
            for name in ("m",)
            for choice in range(3)
        ]
    )
    assert compare([node("m")], [asked, asked.slice(0, 0)], PROTOCOLS) == []


def test_holm_counts_all_pairs_of_a_measure() -> None:
    generator = np.random.default_rng(0)
    dense = generator.random(300) < 0.6
    names = ["m"] + [f"m/{place:02}" for place in range(30)]
    tables = [questions("m", dense)]
    tables += [questions(name, dense ^ (generator.random(300) < 0.05)) for name in names[1:]]
    rows = by_pair(compare([node(name) for name in names], tables, PROTOCOLS), "accuracy").values()
    assert all(row["p_adjusted"] >= row["p_value"] for row in rows)
    smallest = min(rows, key=lambda row: row["p_value"])
    pairs = {frozenset((row["node"], row["other"])) for row in rows}
    assert smallest["family"] == len(pairs) > 30
    assert smallest["p_adjusted"] == pytest.approx(min(1, len(pairs) * smallest["p_value"]))


def test_a_difference_must_exceed_what_seeds_change() -> None:
    nodes = ["m", "m/a", "m/a@1", "m/a@2", "m/b", "m/b@1", "m/b@2"]
    share = dict(zip(nodes, (1.0, 0.80, 0.60, 0.70, 0.50, 0.30, 0.40), strict=True))
    tables = [questions(name, np.arange(500) < 500 * share[name]) for name in nodes]
    found = by_pair(compare([node(name) for name in nodes], tables, PROTOCOLS), "accuracy")
    # Three seeds have the variance .1^2, so .28 is the least that counts; dense models have no seeds.
    assert found["next", "m/b", "m/a@1"]["p_adjusted"] < 1e-3
    assert not found["next", "m/b", "m/a@1"]["distinguishable"]
    assert found["dense", "m/b", "m"]["distinguishable"]
    tables = [questions(name, np.arange(500) < 500 * share[name]) for name in nodes if "@" not in name]
    found = by_pair(compare([node(name) for name in nodes if "@" not in name], tables, PROTOCOLS), "accuracy")
    assert found["next", "m/b", "m/a"]["distinguishable"]


def test_p_values_below_the_resolution_of_resampling_still_rank() -> None:
    right = np.ones(1000, bool)
    tables = [questions("m", right)] + [questions(f"m/{k}", np.arange(1000) >= 20 * k) for k in range(1, 9)]
    found = by_pair(compare([node("m"), *(node(f"m/{k}") for k in range(1, 9))], tables, PROTOCOLS), "accuracy")
    p_values = [found["dense", f"m/{k}", "m"]["p_value"] for k in range(1, 9)]
    assert p_values == sorted(p_values, reverse=True)
    assert p_values[0] < 2 / comparisons.RESAMPLES


# Seeds


def metric(name: str, value: float, stderr: float | None = 0.1) -> dict[str, Any]:
    return {
        "node": name,
        "evaluation": "quality",
        "metric": "acc",
        "value": value,
        "stderr": stderr,
        "unit": "accuracy",
    }


def test_signals_of_metrics_over_seeds() -> None:
    rows = [metric("m/a/full", 1.0), metric("m/a/full@1", 2.0, 0.3), metric("m/a/full@2", 3.0, 0.2), metric("m", 9.0)]
    (row,) = signals(rows, [])
    assert row | {"low": None, "high": None} == {
        "group": "m/a/full", "evaluation": "quality", "metric": "acc", "mean": 2.0, "std": 1.0, "low": None,
        "high": None, "seeds": 3, "snr": 2.0, "item_stderr": pytest.approx(0.2), "unit": "accuracy",
    }  # fmt: skip
    assert row["low"] < 1 < row["high"]
    (row,) = signals([metric("m/f@1", 1.0), metric("m/f@2", 1.0, None)], [])
    assert (row["std"], row["snr"], row["item_stderr"]) == (0, None, None)


def curve(name: str, losses: dict[int, float]) -> list[dict[str, Any]]:
    return [
        {"node": name, "tokens": tokens, "split": split, "loss": loss}
        for tokens, loss in reversed(losses.items())
        for split in ("validation", "train")
    ]


def test_signals_of_recovery_curves() -> None:
    first, second = {0: 5.0, 10: 3.0, 20: 2.0}, {0: 5.0, 11: 2.0, 15: 2.5, 21: 1.0}
    rows = signals([], curve("m/f", first) + curve("m/f@1", second) + curve("m/g", {0: 1.0, 10: 2.0}))
    found = {(row["group"], row["metric"]): row for row in rows}
    assert set(found) == {
        ("m/f", "validation_loss_monotonicity"), ("m/f", "validation_loss"), ("m/f", "validation_loss_seed_deviation"),
        ("m/g", "validation_loss_monotonicity"),
    }  # fmt: skip
    assert found["m/g", "validation_loss_monotonicity"]["mean"] == -1
    assert found["m/g", "validation_loss_monotonicity"]["seeds"] == 1
    # 1, and (5 - 1) of the 6 pairs
    assert found["m/f", "validation_loss_monotonicity"]["mean"] == pytest.approx((1 + 4 / 6) / 2)
    last = found["m/f", "validation_loss"]
    assert (last["mean"], last["std"], last["seeds"]) == (1.5, pytest.approx(0.5**0.5), 2)
    # Of the rungs that both have after the first tokens: 3 and 2, 2 and 2.5
    assert found["m/f", "validation_loss_seed_deviation"]["mean"] == pytest.approx((1 + 0.5) / 2 * 0.5**0.5)
    assert {row["evaluation"] for row in rows} == {None}
