"""One study of a real model, stories260K, from its folder to the laws, and what its tables say."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import duckdb
import numpy as np
import pandas as pd
import polars as pl
import pytest
import yaml

from coppice.evaluation.harness import write_task
from coppice.files import read_json
from coppice.text import load_windows
from coppice.uncertainty import paired_difference

EXAMPLE = Path(__file__).resolve().parents[2] / "config" / "examples" / "stories.yaml"
PAIRS = 100
# Accuracy of the dense model on the first hundred pairs (PROVENANCE.md of the data); chance is 0.5.
DENSE_ACCURACY = {
    "irregular_past_participle_verbs": 0.95,
    "existential_there_quantifiers_1": 0.88,
    "anaphor_gender_agreement": 0.76,
    "determiner_noun_agreement_1": 0.72,
    "determiner_noun_agreement_2": 0.62,
    "tough_vs_raising_1": 0.69,
}
EVERYWHERE = list(DENSE_ACCURACY)[:3]
TARGETS = ("laws", "report")


@dataclass(frozen=True)
class Finished:
    """A study that has run: its folder, what Snakemake was told, and its tables."""

    folder: Path
    words: list[str]
    tables: dict[str, pd.DataFrame]

    @property
    def results(self) -> Path:
        return self.folder / "results" / "stories"

    def checkpoint(self, node: str) -> Path:
        return self.results / "models" / node

    def value(self, node: str, metric: str) -> float:
        metrics = self.tables["metrics"]
        return metrics[(metrics.node == node) & (metrics.metric == metric)].value.item()

    def perplexity(self, node: str) -> float:
        return self.value(node, "perplexity_stories")

    def losses(self, node: str) -> tuple[np.ndarray, np.ndarray]:
        """Summed nats and scored tokens of each held-out story, in order."""
        items = self.tables["items"]
        rows = items[(items.node == node) & (items.task == "stories")]
        rows = rows.iloc[rows.item.astype(int).argsort()]
        return -rows.log_likelihood.to_numpy(), rows.length.to_numpy()

    def row(self, node: str) -> pd.Series:
        nodes = self.tables["nodes"]
        return nodes[nodes.node == node].iloc[0]


def pairs(path: Path) -> Iterator[dict[str, Any]]:
    """Minimal pairs as questions with nothing before two choices, the grammatical one first."""
    with open(path, encoding="utf-8") as file:
        for row in map(json.loads, file):
            yield {"context": "", "choices": [row["sentence_good"], row["sentence_bad"]], "answer": 0}


@pytest.fixture(scope="session")
def study(shared_data: Path, snakemake: Callable, tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """The example study with minimal pairs as benchmarks, run once for all tests here."""
    folder = tmp_path_factory.mktemp("stories")
    (folder / "tasks").mkdir()
    for task in DENSE_ACCURACY:
        write_task(folder / "tasks", task, pairs(shared_data / "bench_blimp" / f"{task}.jsonl"), delimiter="")
    described = yaml.safe_load(EXAMPLE.read_text().replace("../shared/data", str(shared_data)))
    asked = {"task_path": "tasks", "limit": PAIRS}
    described["evaluations"]["quality"] |= {"tasks": EVERYWHERE, **asked}
    others = [task for task in DENSE_ACCURACY if task not in EVERYWHERE]
    described["evaluations"]["grammar"] = {"kind": "quality", "tasks": others, **asked, "nodes": ["stories"]}
    (folder / "study.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    words = [*TARGETS, "--configfile", str(folder / "study.yaml")]
    done = snakemake(folder, *words)
    assert done.returncode == 0, done.stdout
    tables = {path.stem: pd.read_parquet(path) for path in (folder / "results/stories/tables").glob("*.parquet")}
    return Finished(folder, words, tables)


def test_the_dense_model_has_its_known_perplexity(study: Finished) -> None:
    assert study.perplexity("stories") == pytest.approx(4.2788, rel=0.005)
    metrics = study.tables["metrics"]
    measured = metrics[(metrics.node == "stories") & (metrics.metric == "perplexity_stories")].iloc[0]
    assert measured.n == 74606
    assert measured.low < measured.value < measured.high


@pytest.mark.parametrize("task", DENSE_ACCURACY)
def test_the_dense_model_has_its_known_accuracy(study: Finished, task: str) -> None:
    assert study.value("stories", f"{task}_acc") == pytest.approx(DENSE_ACCURACY[task])


# From an independent implementation in float64, on the dense model's statistics of the same 128 windows; EoRA's
# are here those of its parent.
@pytest.mark.parametrize(
    ("node", "perplexity"),
    [
        ("magnitude-50", 45.26),
        ("wanda-50", 21.06),
        ("sparsegpt-50", 19.87),
        ("rtn-3", 8.790),
        ("gptq-3", 6.635),
        ("svd-80", 208.5),
        ("svd-llm-80", 33.65),
        ("rtn-3/eora-4", 6.538),
    ],
)
def test_a_method_has_the_perplexity_of_an_independent_implementation(
    study: Finished, node: str, perplexity: float
) -> None:
    assert study.perplexity(f"stories/{node}") == pytest.approx(perplexity, rel=0.01)


@pytest.mark.parametrize(
    ("better", "worse"),
    [
        ("wanda-50", "magnitude-50"),
        ("sparsegpt-50", "magnitude-50"),
        ("gptq-3", "rtn-3"),
        ("svd-llm-80", "svd-80"),
        ("rtn-3/eora-4", "rtn-3"),
        ("wanda-50/full/gptq-3/eora-4", "wanda-50/full/gptq-3"),
        ("wanda-50/full", "wanda-50"),
        ("width-25/full", "width-25"),
        ("gptq-3/lora", "gptq-3"),
    ],
)
def test_a_method_beats_another_beyond_noise(study: Finished, better: str, worse: str) -> None:
    assert paired(study, better, worse).high < 0


def test_sparsegpt_is_no_worse_than_wanda(study: Finished) -> None:
    assert paired(study, "sparsegpt-50", "wanda-50").low < 0


def paired(study: Finished, first: str, second: str) -> Any:
    """The difference of two nodes' nats per token, story by story."""
    (losses, tokens), (others, _) = study.losses(f"stories/{first}"), study.losses(f"stories/{second}")
    return paired_difference(losses / tokens, others / tokens)


def test_eora_lowers_the_error_of_every_layer(study: Finished) -> None:
    from coppice.calibrate import block_statistics
    from coppice.checkpoint import load_model
    from coppice.layers import blocks, effective_weight, linears
    from coppice.methods.solvers.loss import relative_error

    statistics = study.results / "statistics" / "stories" / "rtn-3" / "default" / "moments"
    manifest = read_json(statistics / "manifest.json")
    models = [load_model(study.checkpoint(node)) for node in ("stories", "stories/rtn-3", "stories/rtn-3/eora-4")]
    checked = 0
    for index, (dense, rounded, compensated) in enumerate(zip(*map(blocks, models), strict=True)):
        moments = block_statistics(statistics, index, manifest, "cpu")
        for name, module in linears(dense).items():
            wanted, moment = effective_weight(module), moments[name].second_moment
            before, after = (
                relative_error(effective_weight(linears(block)[name]) - wanted, wanted, moment)
                for block in (rounded, compensated)
            )
            assert after < before, f"{index}.{name}"
            checked += 1
    assert checked == 5 * 7


@pytest.mark.parametrize("node", ["wanda-50/full", "width-25/full", "gptq-3/lora"])
def test_recovery_lowers_the_held_out_loss(study: Finished, node: str) -> None:
    curves, row = study.tables["curves"], study.row(f"stories/{node}")
    held_out = curves[(curves.node == f"stories/{node}") & (curves.split == "validation")].sort_values("tokens")
    assert held_out.loss.is_monotonic_decreasing
    assert held_out.tokens.iloc[0] == 0
    assert held_out.tokens.iloc[-1] >= row.recovery_tokens >= 100_000
    assert [budget for budget in (25_000, 50_000, 100_000) if (held_out.tokens >= budget).any()]
    assert 0 < row.recovered_share <= 1


def test_pruned_weights_stay_zero_when_the_node_is_trained_and_quantized(study: Finished) -> None:
    from coppice.checkpoint import load_model
    from coppice.layers import blocks, effective_weight, linears

    names = ("stories/wanda-50", "stories/wanda-50/full", "stories/wanda-50/full/gptq-3")
    models = [load_model(study.checkpoint(name)) for name in names]
    for pruned, *descendants in zip(*map(blocks, models), strict=True):
        for name, module in linears(pruned).items():
            zeros = effective_weight(module) == 0
            assert zeros.float().mean() == pytest.approx(0.5, abs=0.01)
            for block in descendants:
                weight = effective_weight(linears(block)[name])
                assert (weight[zeros] == 0).all()
                assert (weight[~zeros] != 0).any()


def test_no_document_has_two_roles(study: Finished) -> None:
    uses = ("calibration.default", "recovery.full", "validation.full", "evaluation.quality.stories")
    windows = {use: load_windows(study.results / "tokens" / "stories" / use) for use in uses}
    owned = {use: set(found.document_hashes.tolist()) for use, found in windows.items()}
    assert windows["calibration.default"].tokens.shape == (128, 512)
    assert windows["evaluation.quality.stories"].tokens.shape == (146, 512)
    assert 0 not in set().union(*owned.values())
    assert sum(map(len, owned.values())) == len(set().union(*owned.values()))


LOADED = """
import json, sys
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
windows = load_file(sys.argv[1])
tokens, documents = windows["tokens"][:16].long(), windows["documents"][:16].long()
whole = int(documents.max())  # the last document may go on in the next window
found = {}
for folder in sys.argv[2:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        scores = model(input_ids=tokens).logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None])[..., 0]
    owners = documents[:, 1:]
    found[folder] = [scores[owners == document].double().sum().item() for document in range(whole)]
assert "coppice" not in sys.modules
print(json.dumps(found))
"""


def test_stock_loaders_compute_what_the_tables_say(study: Finished) -> None:
    """Masked, narrower, shorter and packed nodes, by plain transformers in a process without Coppice."""
    nodes = [f"stories/{name}" for name in ("wanda-50/full", "width-25", "depth-1", "rtn-4")]
    folders = [str(study.checkpoint(node)) for node in nodes]
    windows = study.results / "tokens" / "stories" / "evaluation.quality.stories" / "tokens.safetensors"
    words = [sys.executable, "-c", LOADED, str(windows), *folders]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    loaded = json.loads(done.stdout.splitlines()[-1])
    for node, folder in zip(nodes, folders, strict=True):
        losses, _ = study.losses(node)
        assert len(loaded[folder]) > 10
        assert loaded[folder] == pytest.approx(-losses[: len(loaded[folder])], rel=1e-4)


def test_what_stock_loaders_cannot_read_says_so(study: Finished) -> None:
    """One grid for the whole model is all that transformers takes with zero points; factors are Coppice's own."""
    for node in ("gptq-3", "svd-llm-80", "rtn-3/eora-4"):
        folder = study.checkpoint(f"stories/{node}")
        config = read_json(folder / "config.json")
        assert "quantization_config" not in config
        assert config["auto_map"] == {"AutoModelForCausalLM": "modeling_coppice.CompressedForCausalLM"}
        assert (folder / "modeling_coppice.py").is_file()


def test_sizes_are_those_of_the_files(study: Finished) -> None:
    for row in study.tables["nodes"].itertuples():
        found = sum(path.stat().st_size for path in study.checkpoint(row.node).glob("model*.safetensors"))
        assert row.stored_bytes == found
    size = {node: study.row(f"stories/{node}").stored_bytes for node in ("wanda-50", "rtn-4", "rtn-3", "gptq-3")}
    dense = study.row("stories").stored_bytes
    assert size["wanda-50"] == pytest.approx(dense, rel=0.01)
    assert size["rtn-3"] < 0.4 * dense
    assert size["gptq-3"] < 0.4 * dense
    assert size["rtn-4"] < 0.4 * dense


def test_every_reader_reads_the_tables(study: Finished) -> None:
    for name, frame in study.tables.items():
        path = study.results / "tables" / f"{name}.parquet"
        rows = duckdb.sql(f"select count(*) from '{path}'").fetchall()
        assert [(len(frame),)] == [(len(pl.read_parquet(path)),)] == rows
    best = duckdb.sql(
        f"select node from '{study.results}/tables/metrics.parquet' where metric = 'perplexity_stories' order by value"
    ).fetchall()
    assert best[0] == ("stories",)
    assert len(best) == 17
    assert study.tables["failures"].empty


def test_every_number_is_finite(study: Finished) -> None:
    assert np.isfinite(study.tables["metrics"].value).all()
    assert np.isfinite(study.tables["items"].log_likelihood).all()
    report = read_json(study.results / "laws" / "p2" / "fit.json")
    # One run of one rate and one model tells nothing of rates and sizes.
    assert report["runs"] == 1
    assert {name for name, value in report["parameters"].items() if value["identified"]} <= {"D_C", "E", "beta"}


def test_a_second_run_does_nothing(study: Finished, snakemake: Callable) -> None:
    done = snakemake(study.folder, *study.words)
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout


def test_a_changed_method_makes_its_nodes_and_what_follows_anew(
    study: Finished, snakemake: Callable, repository: Path
) -> None:
    source = repository / "workflow" / "coppice" / "methods" / "prune" / "wanda.py"
    kept = shutil.copy2(source, repository / "wanda.py")
    try:
        source.write_text(source.read_text() + "\n")
        now = math.ceil(source.stat().st_mtime) + 1
        os.utime(source, (now, now))
        printed = snakemake(study.folder, *study.words, "--dry-run", "--printshellcmds").stdout
    finally:
        shutil.move(kept, source)
    made = set(re.findall(r"coppice (?:compress|recover) --node (\S+)", printed))
    below = {node for node in study.tables["nodes"].node if node.startswith("stories/wanda-50")}
    assert made == below
    assert set(re.findall(r"coppice evaluate --node (\S+)", printed)) == below
    assert not re.findall(r"coppice (?:root|tokenize) ", printed)
    assert "Nothing to be done" in snakemake(study.folder, *study.words, "--dry-run").stdout
