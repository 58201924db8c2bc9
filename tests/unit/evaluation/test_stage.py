from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys

import pyarrow.parquet
import pytest
import torch

from coppice.data.windows import load_windows, save_windows, tokenize
from coppice.errors import UserError
from coppice.evaluation import stage
from coppice.models import checkpoint as checkpoints

from .conftest import WORLD, make_model, save

QUALITY = {"kind": "quality", "perplexity": {"people": {"text": "biographies"}}, "tasks": [], "knowledge": False}
COST = {"kind": "cost", "batch": 1, "prompt": 8, "generate": 2, "repeats": 2, "warmup": 1}


@pytest.fixture(scope="module")
def tokens(checkpoint, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokens")
    save_windows(tokenize(checkpoint, WORLD, "evaluation", 4, 48), folder)
    return folder


def evaluate(checkpoint, tokens, output, evaluation=QUALITY):
    stage.evaluate("tiny", checkpoint, "quality", evaluation, {"people": tokens}, output)
    metrics = json.loads((output / "metrics.json").read_text())
    return metrics, pyarrow.parquet.read_table(output / "items.parquet")


def test_quality_is_written_with_its_items(checkpoint, tokens, tmp_path):
    report, items = evaluate(checkpoint, tokens, tmp_path / "a", {**QUALITY, "tasks": ["biographies"], "limit": 3})
    assert (report["node"], report["evaluation"], report["kind"]) == ("tiny", "quality", "quality")
    assert report["model_fingerprint"] == checkpoints.read_manifest(checkpoint).fingerprint
    assert report["tokens_fingerprints"] == {"people": load_windows(tokens).manifest.fingerprint}
    names = [metric["metric"] for metric in report["metrics"]]
    scores = ["acc", "acc_norm", "log_probability", "choice_probability", "brier"]
    assert names == ["loss_people", "perplexity_people", *(f"biographies_{score}" for score in scores)]
    assert report["versions"]["lm-eval"]
    assert items.column_names == ["node", "task", "item", "choice", "log_likelihood", "length", "correct", "answer"]
    assert set(items["task"].to_pylist()) == {"people", "biographies"}
    assert set(items["node"].to_pylist()) == {"tiny"}


def test_the_same_evaluation_gives_the_same_numbers(checkpoint, tokens, tmp_path):
    first, second = (evaluate(checkpoint, tokens, tmp_path / name) for name in "ab")
    assert first[0]["metrics"] == second[0]["metrics"]
    assert first[0]["fingerprint"] == second[0]["fingerprint"]
    assert (tmp_path / "a" / "items.parquet").read_bytes() == (tmp_path / "b" / "items.parquet").read_bytes()


def test_knowledge_takes_its_world_from_the_windows_or_from_the_evaluation(checkpoint, tokens, tmp_path):
    report, _ = evaluate(checkpoint, tokens, tmp_path / "a", {**QUALITY, "knowledge": True})
    assert "knowledge_bits_per_person" in {metric["metric"] for metric in report["metrics"]}
    alone = {"kind": "quality", "knowledge": True}
    with pytest.raises(UserError, match="no built-in text is named"):
        evaluate(checkpoint, tokens, tmp_path / "b", alone)
    other, _ = evaluate(checkpoint, tokens, tmp_path / "b", {**alone, "world": {**WORLD, "people": 7}})
    assert other["metrics"][0]["n"] == 7


def test_cost_is_written_without_items(checkpoint, tokens, tmp_path):
    report, items = evaluate(checkpoint, tokens, tmp_path / "cost", COST)
    assert report["device"] == "cpu"
    assert len(items) == 0
    assert all(metric["value"] >= 0 and metric["simulated"] is False for metric in report["metrics"])
    assert {metric["metric"] for metric in report["metrics"]} == {
        "prefill_latency",
        "prefill_throughput",
        "decode_latency",
        "decode_throughput",
        "peak_memory",
    }


def test_broken_weights_are_refused_by_name_and_nothing_is_written(tokenizer, tokens, tmp_path):
    model = make_model(len(tokenizer))
    with torch.no_grad():
        model.model.layers[0].mlp.up_proj.weight.fill_(float("nan"))
    folder = save(model, tmp_path / "broken")
    with pytest.raises(UserError, match="The node 'tiny' gives numbers that are not finite in 'people'"):
        evaluate(folder, tokens, tmp_path / "output")
    assert not list(tmp_path.glob("output/*"))


def test_windows_of_another_tokenizer_and_missing_ones_are_refused(checkpoint, tokens, tmp_path):
    with pytest.raises(UserError, match="'people' has no windows; give them with `--tokens people=DIR`"):
        stage.evaluate("tiny", checkpoint, "quality", QUALITY, {}, tmp_path / "output")
    other = tmp_path / "tokens"
    shutil.copytree(tokens, other)
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "tokenizer": "another"}))
    with pytest.raises(UserError, match="with another tokenizer"):
        evaluate(checkpoint, other, tmp_path / "output")


def test_arguments_reach_the_measurement(checkpoint, tokens, tmp_path):
    parser = argparse.ArgumentParser()
    stage.add_arguments(parser)
    parser.add_argument("--device", default="cpu")
    words = ["--node", "tiny", "--model", checkpoint, "--name", "quality", "--evaluation", json.dumps(QUALITY)]
    stage.run(parser.parse_args([*map(str, words), "--tokens", f"people={tokens}", "--output", str(tmp_path / "out")]))
    assert (tmp_path / "out" / "metrics.json").exists()


def test_a_job_imports_only_what_it_needs(checkpoint, tokens, tmp_path):
    program = (
        "import sys; from pathlib import Path; from coppice.evaluation import stage\n"
        "assert not {'torch', 'transformers', 'pyarrow'} & sys.modules.keys()\n"
        f"stage.evaluate('tiny', Path({str(checkpoint)!r}), 'quality', {QUALITY!r}, "
        f"{{'people': Path({str(tokens)!r})}}, Path(sys.argv[1]))\n"
        "assert not {'lm_eval', 'datasets', 'mlflow', 'peft', 'snakemake'} & sys.modules.keys()"
    )
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "output")], check=True)
