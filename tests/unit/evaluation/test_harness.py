from __future__ import annotations

import json
from itertools import islice

import numpy as np
import pytest
import torch

from coppice.data import biographies, sources
from coppice.errors import UserError
from coppice.evaluation import harness, knowledge
from coppice.uncertainty import bootstrap_means, percentile_interval, proportion_interval

from .conftest import WORLD, make_model


def by_name(metrics):
    return {metric["metric"]: metric for metric in metrics}


def test_the_built_in_task_asks_questions_about_the_world(model, tokenizer, checkpoint):
    world = sources.world(WORLD)
    metrics, items = harness.measure(model, tokenizer, ["biographies"], limit=20, world=world)
    again = harness.measure(model, tokenizer, ["biographies"], limit=20, world=world)
    assert (metrics, items) == again

    questions = biographies.questions(world, 20)
    score = knowledge.log_likelihood(model, checkpoint)
    right = normed = 0
    for item, question in enumerate(questions):
        expected = score([(question["context"], " " + choice) for choice in question["choices"]])
        found = [row for row in items if row["item"] == str(item)]
        assert [row["choice"] for row in found] == [0, 1, 2, 3]
        assert [row["log_likelihood"] for row in found] == pytest.approx(expected, rel=1e-4)
        assert [row["length"] for row in found] == [len(choice) for choice in question["choices"]]
        answered = expected.index(max(expected)) == question["answer"]
        assert {row["correct"] for row in found} == {answered}
        right += answered
        each = [value / len(choice) for value, choice in zip(expected, question["choices"], strict=True)]
        normed += each.index(max(each)) == question["answer"]
    found = by_name(metrics)
    share = right / 20
    assert found["biographies_acc"]["value"] == share
    assert found["biographies_acc"]["stderr"] == pytest.approx((share * (1 - share) / 19) ** 0.5)
    assert found["biographies_acc"]["n"] == 20
    assert found["biographies_acc"]["unit"] == "accuracy"
    assert found["biographies_acc_norm"]["value"] == normed / 20
    for metric, count in (("acc", right), ("acc_norm", normed)):
        row = found[f"biographies_{metric}"]
        assert (row["low"], row["high"]) == proportion_interval(count, 20)


def test_a_small_world_is_asked_all_its_facts(model, tokenizer):
    world = biographies.World(people=2)
    metrics, _ = harness.measure(model, tokenizer, ["biographies"], world=world)
    assert by_name(metrics)["biographies_acc"]["n"] == 2 * len(biographies.ATTRIBUTES)


def test_solved_examples_change_what_is_read(model, tokenizer):
    world = sources.world(WORLD)
    none, one = (
        harness.measure(model, tokenizer, ["biographies"], limit=3, world=world, shots=shots) for shots in (0, 1)
    )
    assert none[0][0]["shots"] == 0
    assert one[0][0]["shots"] == 1
    assert none[1][0]["log_likelihood"] != one[1][0]["log_likelihood"]


def test_a_head_of_its_own_stays_what_it_is(tokenizer):
    """The harness ties weights again where the config says so, although the head was replaced."""
    model = make_model(len(tokenizer))
    model.lm_head.weight = torch.nn.Parameter(torch.randn_like(model.lm_head.weight))
    before = model.lm_head.weight
    harness.measure(model, tokenizer, ["biographies"], limit=1, world=sources.world(WORLD))
    assert model.lm_head.weight is before
    assert model.config.tie_word_embeddings
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_unknown_tasks_and_worlds_are_named(model, tokenizer, monkeypatch):
    with pytest.raises(UserError, match="needs to know its world"):
        harness.measure(model, tokenizer, ["biographies"])

    class Manager:
        def __init__(self, include_path, include_defaults=True):
            self.all_tasks = ["hellaswag"] if include_defaults else []

    import lm_eval.tasks

    monkeypatch.setattr(lm_eval.tasks, "TaskManager", Manager)
    with pytest.raises(UserError, match="'helaswag' is not a task; did you mean 'hellaswag'"):
        harness.measure(model, tokenizer, ["helaswag"])
    with pytest.raises(UserError, match="'x' is not a task; `lm-eval ls tasks`"):
        harness.measure(model, tokenizer, ["x"])


def test_data_that_cannot_be_reached_are_one_sentence(model, tokenizer, tmp_path, monkeypatch):
    import datasets

    harness.write_task(tmp_path, "remote", [{"context": "a", "choices": ["b", "c"], "answer": 0}])

    def unreachable(*arguments, **options):
        raise ConnectionError("Couldn't reach 'org/data' on the Hub\nand more")

    monkeypatch.setattr(datasets, "load_dataset", unreachable)
    with pytest.raises(
        UserError, match=r"tasks remote could not be read \(Couldn't reach 'org/data' on the Hub\)"
    ) as caught:
        harness.measure(model, tokenizer, ["remote"], task_path=tmp_path)
    assert "\n" not in str(caught.value)


# Accuracies of stories260K on the first 100 pairs, by the same rule in another program.
@pytest.mark.parametrize(("name", "share"), [("anaphor_gender_agreement", 0.76), ("tough_vs_raising_1", 0.69)])
def test_minimal_pairs_have_the_reference_accuracy(stories, shared_data, tmp_path, name, share):
    with open(shared_data / "bench_blimp" / f"{name}.jsonl") as file:
        pairs = [json.loads(line) for line in islice(file, 100)]
    items = [{"context": "", "choices": [pair["sentence_good"], pair["sentence_bad"]], "answer": 0} for pair in pairs]
    harness.write_task(tmp_path, name, items, delimiter="")
    metrics, _ = harness.measure(*stories, [name], task_path=tmp_path)
    assert by_name(metrics)[f"{name}_acc"]["value"] == pytest.approx(share)


def test_public_items_pass_through(stories, shared_data, tmp_path):
    with open(shared_data / "bench_zero_shot" / "openbook_qa.jsonl") as file:
        rows = [json.loads(line) for line in islice(file, 8)]
    items = [{"context": row["query"], "choices": row["choices"], "answer": row["gold"]} for row in rows]
    harness.write_task(tmp_path, "openbook", items)
    metrics, found = harness.measure(*stories, ["openbook"], task_path=tmp_path, limit=6)
    assert by_name(metrics)["openbook_acc"]["n"] == 6
    assert len(found) == sum(len(item["choices"]) for item in items[:6])


def test_the_probabilities_behind_an_accuracy_are_measured(model, tokenizer):
    world = sources.world(WORLD)
    metrics, items = harness.measure(model, tokenizer, ["biographies"], limit=20, world=world)
    found = by_name(metrics)
    answers = [question["answer"] for question in biographies.questions(world, 20)]
    assert [row["choice"] for row in items if row["answer"]] == answers
    scores = np.array([row["log_likelihood"] for row in items]).reshape(20, 4)
    lengths = np.array([row["length"] for row in items]).reshape(20, 4)
    expected = harness.choice_scores(scores, lengths, np.array(answers))
    for metric in ("acc", "acc_norm", "log_probability", "choice_probability", "brier"):
        assert found[f"biographies_{metric}"]["value"] == pytest.approx(expected[metric].mean())
        assert found[f"biographies_{metric}"]["n"] == 20
    shares = np.exp(scores) / np.exp(scores).sum(axis=1, keepdims=True)
    assert expected["choice_probability"] == pytest.approx(shares[np.arange(20), answers])
    for metric in ("log_probability", "choice_probability", "brier"):
        low, high = percentile_interval(bootstrap_means(expected[metric]))
        assert (found[f"biographies_{metric}"]["low"], found[f"biographies_{metric}"]["high"]) == pytest.approx(
            (low, high)
        )
    row = found["biographies_log_probability"]
    assert row["stderr"] == pytest.approx(scores[np.arange(20), answers].std(ddof=1) / 20**0.5)
    assert (row["unit"], row["shots"]) == ("nats", 0)


def harness_results(samples, **results):
    """What the harness returns of tasks with these samples, all by the filter `none`; and of a group of them all."""
    return {
        "results": results,
        "samples": {
            task: [{"filter": "none", "doc_id": place, **entry} for place, entry in enumerate(entries)]
            for task, entries in samples.items()
        },
        "group_subtasks": {"group": list(samples)},
        "n-samples": {task: {"effective": len(entries)} for task, entries in samples.items()},
        "n-shot": {},
        "versions": {},
    }


def test_what_is_right_or_wrong_an_item_is_a_share_and_other_means_are_drawn_again():
    scores = np.random.default_rng(0).random(40)
    samples = [{"exact_match": np.bool_(score < 2), "f1": score} for score in scores]
    task = {"exact_match,none": 1.0, "exact_match_stderr,none": 0.0, "f1,none": scores.mean()}
    found = by_name(harness.metric_rows(harness_results({"t": samples}, t=task)))
    row = found["t_exact_match"]
    assert (row["low"], row["high"]) == proportion_interval(40, 40)
    assert (row["value"], row["stderr"], row["n"]) == (1.0, 0.0, 40)
    ends = percentile_interval(bootstrap_means(scores))
    assert (found["t_f1"]["low"], found["t_f1"]["high"]) == pytest.approx(ends)


def test_the_items_of_each_filter_are_its_own():
    task = {"exact_match,strict": 0.25, "exact_match,loose": 0.75}
    results = harness_results({"t": []}, t=task)
    for name, right in (("strict", 5), ("loose", 15)):
        entries = [{"filter": name, "exact_match": float(place < right)} for place in range(20)]
        results["samples"]["t"] += entries
    found = by_name(harness.metric_rows(results))
    for name, right in (("strict", 5), ("loose", 15)):
        row = found[f"t_exact_match_{name}"]
        assert (row["low"], row["high"]) == proportion_interval(right, 20)


def test_a_group_has_the_interval_of_its_items_unless_it_weighs_its_tasks():
    samples = {"a": [{"acc": 1.0}] * 30, "b": [{"acc": 0.0}] * 10}
    pooled = harness_results(samples, group={"acc,none": 0.75, "sample_len": 40})
    [row] = harness.metric_rows(pooled)
    assert (row["low"], row["high"]) == proportion_interval(30, 40)
    [row] = harness.metric_rows(harness_results(samples, group={"acc,none": 0.5, "sample_len": 40}))
    assert not {"low", "high"} & set(row)


def test_metrics_that_are_no_means_of_their_items_have_a_standard_error_alone():
    samples = [{"perplexity": -1.0 - place, "word_perplexity": (-3.0, 2)} for place in range(20)]
    task = {"perplexity,none": float(np.exp(10.5)), "perplexity_stderr,none": 0.5, "word_perplexity,none": 4.5}
    for row in harness.metric_rows(harness_results({"t": samples}, t=task)):
        assert not {"low", "high"} & set(row)
