"""Training from scratch: windows, scores, the written model, and going on after a kill."""

from __future__ import annotations

import argparse
import json
import math
import shlex
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import pretraining
import pretraining_metrics
from coppice.data import biographies
from coppice.data.biographies import World
from coppice.errors import UserError
from pretraining import Architecture, Schedule

WORLD = World(people=8)
ARCHITECTURE = Architecture(hidden=32, layers=1, heads=2, key_value_heads=2, head_dim=16, intermediate=32)
SCHEDULE = Schedule(tokens=4 * 2 * 64, batch=2, window=64)


@pytest.fixture(scope="module")
def tokenizer():
    return biographies.tokenizer(WORLD)


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return ARCHITECTURE.build(tokenizer, window=64).eval()


def train(folder: Path, **options) -> dict:
    settings = {"world": WORLD, "architecture": ARCHITECTURE, "schedule": SCHEDULE, **options}
    return pretraining.pretrain(**settings, output=folder / "model", state=folder / "state")


def test_the_rate_warms_up_stays_and_falls_to_zero() -> None:
    schedule = Schedule(tokens=1000 * 8 * 128, learning_rate=1.0)
    rates = [schedule.rate(step) for step in range(schedule.steps)]
    assert schedule.steps == 1000
    assert rates[:3] == pytest.approx([0.01, 0.02, 0.03])
    assert set(rates[99:701]) == {1.0}
    assert rates[700:] == pytest.approx([1 - i / 300 for i in range(300)])


def test_windows_begin_with_a_document_and_drop_what_does_not_fit(tokenizer) -> None:
    texts = list(biographies.documents(WORLD, "train", 40))
    rows = list(pretraining_metrics.windows(iter(texts), tokenizer, 100))
    remaining = [[*tokenizer(text)["input_ids"], tokenizer.eos_token_id] for text in texts]
    for row in rows:
        assert len(row) == 100
        while row:
            document = remaining.pop(0)
            assert row[: len(document)] == document[: len(row)]
            row = row[len(document) :]


def test_scores_are_those_of_single_sentences_without_padding(model, tokenizer) -> None:
    pairs = [("", "Alia"), *(pair for asked in biographies.knowledge_prompts(WORLD, [0, 1]) for pair in asked.values())]
    scores = pretraining_metrics.log_likelihood(model, tokenizer, batch=4)(pairs)
    for (prefix, continuation), score in zip(pairs, scores, strict=True):
        prefix_tokens, tokens = tokenizer(prefix)["input_ids"], tokenizer(prefix + continuation)["input_ids"]
        assert tokens[: len(prefix_tokens)] == prefix_tokens
        with torch.no_grad():
            logs = model(torch.tensor([tokens])).logits[0].double().log_softmax(-1)
        expected = sum(logs[i - 1, tokens[i]].item() for i in range(len(prefix_tokens), len(tokens)))
        assert score == pytest.approx(expected, abs=1e-5)


def test_accuracy_counts_the_likeliest_choice() -> None:
    items = biographies.questions(WORLD, 40)
    right = {item["context"] + " " + item["choices"][item["answer"]] for item in items[:30]}

    def score(pairs: list[tuple[str, str]]) -> list[float]:
        return [0.0 if prefix + choice in right else -1.0 - len(choice) / 100 for prefix, choice in pairs]

    assert pretraining_metrics.accuracy(score, items[:30]) == 1.0
    wrong = [item for item in items[30:] if min(map(len, item["choices"])) < len(item["choices"][item["answer"]])]
    assert wrong
    assert pretraining_metrics.accuracy(score, wrong) == 0.0


def test_an_untrained_model_holds_almost_nothing(model, tokenizer) -> None:
    measured = pretraining_metrics.measure(model, tokenizer, WORLD, 64)
    assert measured["parameters"] == model.num_parameters()
    assert measured["held_out_loss"] == pytest.approx(math.log(len(tokenizer)), rel=0.15)
    assert measured["knowledge"]["bits_per_person"] < 0


def test_the_model_is_written_whole_with_its_record(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    record = train(tmp_path)
    folder = tmp_path / "model"
    assert json.loads((folder / "training.json").read_text()) == record
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]
    assert record["tokens"] == SCHEDULE.tokens
    assert record["curve"][-1]["tokens"] == SCHEDULE.tokens
    assert record["exposures"] == 2  # 8 windows, 2 biographies begun in each, 8 people
    assert {tensor.dtype for tensor in load_file(folder / "model.safetensors").values()} == {torch.bfloat16}
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert model.num_parameters() == record["parameters"]
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert model.config.head_dim == 16
    assert pretraining_metrics.measure(model, tokenizer, WORLD, 64)["knowledge"] == record["knowledge"]


def test_a_killed_training_goes_on_to_the_same_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretraining, "SEGMENT", 2)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    train(whole)
    segment = pretraining.train_segment

    def kill_in_the_second(*arguments) -> None:
        if arguments[-1]["step"] == 2:
            raise KeyboardInterrupt
        segment(*arguments)

    monkeypatch.setattr(pretraining, "train_segment", kill_in_the_second)
    with pytest.raises(KeyboardInterrupt):
        train(killed)
    assert not (killed / "model").exists()
    monkeypatch.setattr(pretraining, "train_segment", segment)
    with pytest.raises(UserError, match="another --layers and --tokens;"):
        train(killed, architecture=replace(ARCHITECTURE, layers=2), schedule=replace(SCHEDULE, tokens=10_000))
    record = train(killed)
    assert [point["tokens"] for point in record["curve"]] == [256, 512]
    weights = [load_file(folder / "model" / "model.safetensors") for folder in (whole, killed)]
    assert weights[0].keys() == weights[1].keys()
    assert all(torch.equal(tensor, weights[1][name]) for name, tensor in weights[0].items())


def test_a_training_may_be_lengthened_until_its_rate_falls(tmp_path: Path, tokenizer) -> None:
    plan = {"world": asdict(WORLD), "architecture": asdict(ARCHITECTURE), "schedule": asdict(SCHEDULE)}
    model = ARCHITECTURE.build(tokenizer, window=64)
    optimizer = torch.optim.AdamW(model.parameters())
    longer = {**plan, "schedule": asdict(replace(SCHEDULE, tokens=10_000))}
    assert SCHEDULE.fall == 2
    pretraining.save_state(tmp_path / "state", plan, {"step": 2}, model, optimizer)
    assert pretraining.resume(tmp_path / "state", longer, model, optimizer) == {"step": 2}
    pretraining.save_state(tmp_path / "state", plan, {"step": 3}, model, optimizer)
    with pytest.raises(UserError, match="another --tokens;"):
        pretraining.resume(tmp_path / "state", longer, model, optimizer)


def test_the_recorded_command_gives_the_same_plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = {"world": WORLD, "architecture": ARCHITECTURE, "schedule": SCHEDULE}
    text = pretraining.command({name: asdict(group) for name, group in plan.items()}, Path("a model"))
    assert text.startswith("python resources/pretraining.py --world-people 8 --hidden 32 ")
    parser = argparse.ArgumentParser()
    pretraining.add_arguments(parser)
    called = {}

    def note(*groups, **options) -> dict:
        called.update(groups=groups, **options)
        return {"parameters": 1, "held_out_loss": 1.0, "question_accuracy": 1.0, "knowledge": knowledge}

    knowledge = {"bits_per_person": 1.0, "bits_per_person_max": 1.0, "bits_per_parameter": 1.0}
    monkeypatch.setattr(pretraining, "pretrain", note)
    pretraining.run(parser.parse_args(shlex.split(text)[2:]))
    assert called == {
        "groups": tuple(plan.values()),
        "output": Path("a model"),
        "state": Path(".a model.state"),
        "threads": 1,
    }
