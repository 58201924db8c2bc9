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

from coppice.cli import main
from coppice.data.windows import load_windows
from coppice.evaluation.harness import write_task
from coppice.evaluation.roofline import DEVICES
from coppice.files import read_json
from coppice.models.architectures.base import blocks
from coppice.records.statistics import Statistics
from coppice.uncertainty import paired_difference

EXAMPLE = Path(__file__).resolve().parents[2] / "config" / "examples" / "stories.yaml"
PAIRS = 100
TRAINED = 12_000
# Accuracy of the dense model on the first hundred pairs (PROVENANCE.md of the data); chance is 0.5.
DENSE_ACCURACY = {
    "irregular_past_participle_verbs": 0.95,
    "existential_there_quantifiers_1": 0.88,
    "anaphor_gender_agreement": 0.76,
    "determiner_noun_agreement_1": 0.72,
    "determiner_noun_agreement_2": 0.62,
    "tough_vs_raising_1": 0.69,
}
EVERYWHERE = list(DENSE_ACCURACY)[:2]
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
def study(
    shared_data: Path, snakemake: Callable, forks: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Finished:
    """The example study with minimal pairs as benchmarks, run once for all tests here.

    Its jobs are forks; those of test_interruptions, which end with the same tables as others that are forks, are new
    interpreters.
    """
    folder = tmp_path_factory.mktemp("stories")
    (folder / "tasks").mkdir()
    for task in DENSE_ACCURACY:
        write_task(folder / "tasks", task, pairs(shared_data / "bench_blimp" / f"{task}.jsonl"), delimiter="")
    described = yaml.safe_load(EXAMPLE.read_text().replace("../shared/data", str(shared_data)))
    asked = {"task_path": "tasks", "limit": PAIRS}
    described["evaluations"]["quality"] |= {"tasks": EVERYWHERE, **asked}
    others = [task for task in DENSE_ACCURACY if task not in EVERYWHERE]
    described["evaluations"]["grammar"] = {"kind": "quality", "tasks": others, **asked, "nodes": ["stories"]}
    extend(described)
    (folder / "study.yaml").write_text(yaml.safe_dump(described, sort_keys=False))
    words = [*TARGETS, "--configfile", str(folder / "study.yaml")]
    done = snakemake(folder, *words, environment=forks)
    assert done.returncode == 0, done.stdout
    tables = {path.stem: pd.read_parquet(path) for path in (folder / "results/stories/tables").glob("*.parquet")}
    return Finished(folder, words, tables)


def extend(described: dict[str, Any]) -> None:
    """Adds to the example: the control from scratch with two seeds, their connectivity, hidden states, more laws.

    It trains an eighth as long, with more budgets on the way and fewer held-out windows.
    """
    described["budgets"] = [2_000, 4_000, 6_000, 9_000, TRAINED]
    for step in ("full", "lora"):
        described["steps"][step] |= {"tokens": TRAINED, "validation_windows": 16}
    described["steps"]["scratch"] = described["steps"]["full"] | {"method": "scratch", "tokens": 4_000}
    described["recipes"].append({"steps": ["width-25", "scratch"], "seeds": [0, 1]})
    described["evaluations"]["quality"]["intrinsic"] = {"protocol": "stories", "length": 32, "windows": 16}
    described["evaluations"]["basin"] = {
        "kind": "connectivity",
        "perplexity": {"brief": {"text": "validation", "length": 128, "windows": 8}},
        "points": 3,
    }
    described["laws"] |= {
        "trend": {"law": "learning-curve"},
        "pruning": {"law": "pruning", "metric": "perplexity_stories"},
        "bits": {"law": "k-bit", "metric": "perplexity_stories"},
    }


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
    from coppice.calibration.reading import block_statistics
    from coppice.methods.solvers.loss import relative_error
    from coppice.models.checkpoint import load_model
    from coppice.models.modules import effective_weight, replaceable_modules

    statistics = study.results / "statistics" / "stories" / "rtn-3" / "default" / "moments"
    manifest = Statistics.read(statistics / "manifest.json")
    models = [load_model(study.checkpoint(node)) for node in ("stories", "stories/rtn-3", "stories/rtn-3/eora-4")]
    checked = 0
    for index, (dense, rounded, compensated) in enumerate(zip(*map(blocks, models), strict=True)):
        moments = block_statistics(statistics, index, manifest, "cpu")
        for name, module in replaceable_modules(dense).items():
            wanted, moment = effective_weight(module), moments[name].second_moment
            before, after = (
                relative_error(effective_weight(replaceable_modules(block)[name]) - wanted, wanted, moment)
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
    assert held_out.tokens.iloc[-1] >= row.recovery_tokens >= TRAINED
    assert 0 < row.recovered_share <= 1


def test_pruned_weights_stay_zero_when_the_node_is_trained_and_quantized(study: Finished) -> None:
    from coppice.models.checkpoint import load_model
    from coppice.models.modules import effective_weight, replaceable_modules

    names = ("stories/wanda-50", "stories/wanda-50/full", "stories/wanda-50/full/gptq-3")
    models = [load_model(study.checkpoint(name)) for name in names]
    for pruned, *descendants in zip(*map(blocks, models), strict=True):
        for name, module in replaceable_modules(pruned).items():
            zeros = effective_weight(module) == 0
            assert zeros.float().mean() == pytest.approx(0.5, abs=0.01)
            for block in descendants:
                weight = effective_weight(replaceable_modules(block)[name])
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
    assert len(best) == 19
    assert study.tables["failures"].empty


def test_every_number_is_finite(study: Finished) -> None:
    assert np.isfinite(study.tables["metrics"].value).all()
    assert np.isfinite(study.tables["items"].log_likelihood).all()
    report = read_json(study.results / "laws" / "p2" / "fit.json")
    # One run of one rate and one model tells nothing of rates and sizes.
    assert report["runs"] == 1
    assert {name for name, value in report["parameters"].items() if value["identified"]} <= {"D_C", "E", "beta"}


def by_item(study: Finished, node: str, task: str) -> pd.DataFrame:
    """The items of a benchmark, one row a choice, in order."""
    items = study.tables["items"]
    rows = items[(items.node == node) & (items.task == task)]
    return rows.sort_values(["item", "choice"]).reset_index(drop=True)


def test_items_tell_the_right_choice_and_what_follows_from_it(study: Finished) -> None:
    items = study.tables["items"]
    assert items[items.correct.isna()].answer.isna().all()
    task = EVERYWHERE[0]
    rows = by_item(study, "stories", task)
    assert (rows.answer == (rows.choice == 0)).all()
    first, second = (rows[rows.choice == choice] for choice in (0, 1))
    assert len(first) == len(second) == PAIRS
    margin = first.log_likelihood.to_numpy() - second.log_likelihood.to_numpy()
    assert (first.correct.to_numpy(bool) == (margin > 0)).all()
    chance = 1 / (1 + np.exp(-margin))  # of the right one of two choices
    assert study.value("stories", f"{task}_choice_probability") == pytest.approx(chance.mean())
    assert study.value("stories", f"{task}_brier") == pytest.approx((2 * (1 - chance) ** 2).mean())
    assert study.value("stories", f"{task}_log_probability") == pytest.approx(first.log_likelihood.mean())


def test_pairs_of_nodes_add_up_with_their_items(study: Finished) -> None:
    pairs = study.tables["comparisons"]
    accuracy = pairs[pairs.measure == "accuracy"]
    assert set(accuracy.task) == set(EVERYWHERE)  # the others were asked of one node alone
    assert (accuracy.n == PAIRS).all()
    gained = accuracy.wrong_to_right - accuracy.right_to_wrong
    assert accuracy.difference.to_numpy() == pytest.approx((gained / accuracy.n).to_numpy(float))
    for task in EVERYWHERE:
        node, dense = (by_item(study, name, task) for name in ("stories/rtn-3", "stories"))
        node, dense = (rows[rows.choice == 0].correct.to_numpy(bool) for rows in (node, dense))
        [pair] = accuracy[
            (accuracy.task == task) & (accuracy.node == "stories/rtn-3") & (accuracy.relation == "dense")
        ].itertuples()
        assert pair.other == "stories"
        assert (pair.right_to_wrong, pair.wrong_to_right) == ((dense & ~node).sum(), (node & ~dense).sum())
    assert (pairs.p_adjusted >= pairs.p_value).all()
    assert pairs.difference.between(pairs.low, pairs.high).all()
    # All but the dense model are compared with it, and all but the best with the next better one.
    losses = pairs[(pairs.measure == "loss") & (pairs.task == "stories")]
    nodes = set(study.tables["nodes"].node)
    assert set(losses[losses.relation == "dense"].node) == nodes - {"stories"}
    assert set(losses[losses.relation == "next"].node) == nodes - {"stories"}
    known = losses[(losses.node == "stories/gptq-3") & (losses.relation == "dense")].iloc[0]
    assert known.difference == pytest.approx(math.log(study.perplexity("stories/gptq-3") / study.perplexity("stories")))
    assert known.distinguishable


def test_seeds_give_signals(study: Finished) -> None:
    signals, group = study.tables["signals"], "stories/width-25/scratch"
    [signal] = signals[(signals.group == group) & (signals.metric == "perplexity_stories")].itertuples()
    values = [study.perplexity(node) for node in (group, f"{group}@1")]
    assert (signal.mean, signal.std) == pytest.approx((np.mean(values), np.std(values, ddof=1)))
    assert signal.seeds == 2
    assert signal.low < signal.std < signal.high
    assert signal.snr == pytest.approx(signal.mean / signal.std)
    assert set(signals[signals.evaluation.notna()].group) == {group}
    steady = signals[signals.metric == "validation_loss_monotonicity"].set_index("group")["mean"]
    trained = {"wanda-50/full", "width-25/full", "gptq-3/lora", "width-25/scratch"}
    assert set(steady.index) == {f"stories/{node}" for node in trained}
    assert steady["stories/width-25/full"] == 1


def test_inherited_weights_are_ahead_of_drawn_ones(study: Finished) -> None:
    curves = study.tables["curves"]
    held_out = curves[curves.split == "validation"]
    drawn = held_out[held_out.node == "stories/width-25/scratch"].sort_values("tokens")
    kept = held_out[held_out.node == "stories/width-25/full"].sort_values("tokens")
    assert drawn.loss.iloc[0] == pytest.approx(math.log(512), rel=0.05)  # a guess among the vocabulary
    assert drawn.loss.iloc[-1] < drawn.loss.iloc[0]
    assert kept.loss.iloc[0] < drawn.loss.iloc[-1]


def test_two_seeds_from_scratch_are_told_apart(study: Finished) -> None:
    metrics = study.tables["metrics"]
    basin = metrics[metrics.evaluation == "basin"].set_index("metric")
    assert set(basin.node) == {"stories/width-25/scratch@1"}
    assert 0 < basin.value["cka_brief"] < 1
    assert basin.value["barrier_loss_brief"] >= 0
    details = json.loads(basin.details["mode_connectivity_brief"])
    assert details["other"] == "stories/width-25/scratch"
    assert details["path"] == [0, 0.5, 1]
    assert details["regime"] in ("I", "II-A", "II-B")


def test_hidden_states_are_measured_on_every_node(study: Finished) -> None:
    metrics = study.tables["metrics"]
    entropy = metrics[metrics.metric == "matrix_entropy_stories"]
    assert set(entropy.node) == set(study.tables["nodes"].node)
    assert (entropy.n == 16).all()
    assert entropy.value.between(0, 1).all()
    rank = metrics[metrics.metric == "effective_rank_stories"]
    assert rank.value.between(1, 32).all()  # texts of 32 tokens span no more


def test_every_node_has_its_roofline(study: Finished) -> None:
    costs = study.tables["costs"]
    predicted = costs[costs.device.fillna("").str.endswith("(roofline)")]
    assert (predicted.value > 0).all()
    assert predicted.simulated.all()
    latency = predicted[predicted.metric == "decode_latency"].pivot(index="node", columns="device", values="value")
    assert set(latency.index) == set(study.tables["nodes"].node)
    assert set(latency.columns) == {f"{device} (roofline)" for device in DEVICES}
    assert latency.notna().all(axis=None)
    assert (latency.loc["stories/rtn-4"] < latency.loc["stories"]).all()
    assert (latency.loc["stories/depth-1"] < latency.loc["stories"]).all()


def test_laws_are_fitted_with_what_their_points_tell(study: Finished) -> None:
    fits = {law: read_json(study.results / "laws" / law / "fit.json") for law in ("p2", "trend", "pruning", "bits")}
    for law, fit in fits.items():
        points, samples = (
            pd.read_parquet(study.results / "laws" / law / f"{name}.parquet") for name in ("points", "samples")
        )
        assert len(points) == fit["points"] > 0
        assert set(samples.columns) <= set(fit["parameters"])
        assert isinstance(fit["passes"]["ok"], bool)
    # Five budgets of each of the two recoveries and of the adapter; the control's are too few for a trend.
    runs = {entry["run"]: entry for entry in fits["trend"]["details"]["runs"]}
    assert set(runs) == {f"stories/{node}" for node in ("wanda-50/full", "width-25/full", "gptq-3/lora")}
    assert all(entry["levels"] == 5 and entry["falls"] for entry in runs.values())
    assert any("fewer than 4 held-out losses" in note for note in fits["trend"]["notes"])
    pruned = pd.read_parquet(study.results / "laws/pruning/points.parquet")
    assert {run.split()[1] for run in pruned.run} == {"magnitude", "wanda", "sparsegpt", "shortgpt", "llm-pruner"}
    assert fits["pruning"]["parameters"]["alpha"]["value"] > 0
    assert len(pd.read_parquet(study.results / "laws/pruning/samples.parquet")) > 0
    # One model has one size, so no precision has a curve.
    assert any("There is one size of 3-bit models" in note for note in fits["bits"]["notes"])
    assert not fits["bits"]["passes"]["ok"]


def test_recommendations_rest_on_laws_that_pass_their_tests(
    study: Finished, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["recommend", "--results", str(study.results)]) == 0
    told = " ".join(capsys.readouterr().out.split())
    for law in ("p2", "trend", "pruning", "bits"):
        passes = read_json(study.results / "laws" / law / "fit.json")["passes"]
        if passes["ok"]:
            assert f"Held-out error of law {law}" in told
        else:
            assert f"Nothing is recommended from law {law}, which fails its own test." in told
            assert all(" ".join(reason.split()) in told for reason in passes["reasons"])
    assert "Best at each size: perplexity_stories (quality)" in told

    limit = study.row("stories").stored_bytes // 2
    words = ["--metric", "perplexity_stories", "--max-bytes", str(limit), "--json"]
    assert main(["recommend", "--results", str(study.results), *words]) == 0
    [answer] = json.loads(capsys.readouterr().out)
    small = study.tables["nodes"].query("stored_bytes <= @limit").node
    best = min(small, key=study.perplexity)
    assert best in answer["sentences"][0]


def test_a_second_run_does_nothing(study: Finished, snakemake: Callable) -> None:
    done = snakemake(study.folder, *study.words)
    assert done.returncode == 0
    assert "Nothing to be done" in done.stdout


def test_a_changed_method_makes_its_nodes_and_what_follows_again(
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
