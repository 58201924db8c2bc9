"""One node in the terminal, from manifests alone and with tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fake_results import fake_study, log, write_results

from coppice.errors import UserError
from coppice.records.failure import SILENT
from coppice.records.layout import ResultsLayout
from coppice.report.show import p_value, show
from coppice.results import collection as tables
from coppice.results.lookup import complete_node, match_node
from coppice.results.reading import read_table


@pytest.fixture(scope="module")
def before(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results before there are tables."""
    results = write_results(tmp_path_factory.mktemp("before") / "demo")
    change(results, "small/laco-25/full-1m", "recovery", {"steps": 140, "epochs": 1.5, "seconds": 23.7})
    change(results, "small/laco-25/full-1m", "recovery", {"stopped_early": False})
    record = {
        f"model.layers.{index}.mlp.up_proj": {"bits": 4, "bits_asked": 4, "symmetric": True, "error": error}
        for index, error in enumerate((0.01, 0.03, 0.02))
    }
    change(results, "small/laco-25/full-1m/gptq-4", "layers", record)
    return results


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Results with tables."""
    results = write_results(tmp_path_factory.mktemp("after") / "demo")
    tables.write_tables(fake_study(), results, results / "tables", partial=True)
    return results


def change(results: Path, node: str, key: str, entries: dict) -> None:
    path = results / "models" / node / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest[key] |= entries
    path.write_text(json.dumps(manifest))


def test_before_tables(before: Path) -> None:
    text = show(before, "small/laco-25/full-1m/gptq-4")
    assert max(len(line) for line in text.splitlines() if "Recompute" not in line) <= 120
    lines = text.splitlines()
    assert lines[0] == "small/laco-25/full-1m/gptq-4"
    assert "  small: dense (shipped small)" in lines
    assert "  gptq-4: quantize by gptq (bits 4, group_size 32, seed 0)" in lines
    # By hand: 392,000 parameters of 490,000, stored with 5 bits each: 4 bits a weight of the dense model.
    [parameters] = [line.split() for line in lines if line.startswith("parameters")]
    assert parameters[1:] == ["392k", "392k", "490k"]
    [bits] = [line.split() for line in lines if line.startswith("bits per weight  ")]
    assert bits[-3:] == ["4.00", "25.60", "32.00"]
    [perplexity] = [line for line in lines if line.startswith("perplexity stories (quality)")]
    assert perplexity.count("+-") == 3
    [error] = [line.split() for line in lines if line.startswith("error ")]
    assert error == ["error", "0.0100", "0.0200", "0.0300"]
    assert "bits asked" not in text
    assert "Largest error: layers.1.mlp.up_proj (0.0300)," in text
    assert "Paired tests" not in text
    assert "The same in each: bits 4." in lines
    # The target is where the workflow writes, not where these results lie.
    assert text.endswith("--force results/demo/models/small/laco-25/full-1m/gptq-4/manifest.json")


def test_a_recovery(before: Path) -> None:
    text = show(before, "small/laco-25/full-1m")
    assert "Recovery: 1M tokens (1.5 epochs) in 140 steps, 23.7 s, 71% of the loss increase regained." in text
    [losses] = [line for line in text.splitlines() if "held-out loss" in line]
    # Before, at 50k tokens and the four budgets; then the dense model's.
    assert len(losses.split()) == 3 + 6 + 1
    assert losses.split()[-1] == "1.800"
    assert "Downstream:  gptq-4" in text


def test_with_tables_it_shows_significant_differences(after: Path) -> None:
    text = " ".join(show(after, "small/wanda-50").split())
    assert "of biographies minus that of the dense model:" in text
    assert ": not significantly different" in text
    assert ": significantly different." in text
    assert "the Holm-adjusted p decides significance." in text
    rows = read_table(after / "tables", "comparisons").to_pylist()
    [accuracy] = [
        row for row in rows if (row["node"], row["relation"], row["measure"]) == ("small/wanda-50", "dense", "accuracy")
    ]
    alone, adjusted = p_value(accuracy["p_value"]), p_value(accuracy["p_adjusted"])
    assert (
        f"over 3 items, {alone}, adjusted for {accuracy['family']} pairs {adjusted}: not significantly different;"
        in text
    )
    # Its parent is the dense model: each test is printed once.
    assert "that of its parent" not in text
    assert text.count("loss of stories minus that of the dense model:") == 1


def test_a_recovery_of_an_earlier_version(before: Path, tmp_path: Path) -> None:
    results = shutil.copytree(before, tmp_path / "demo")
    path = results / "models/small/laco-25/full-1m/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["recovery"]["stopped_early"]
    path.write_text(json.dumps(manifest))
    assert "in 140 steps, 23.7 s" in show(results, "small/laco-25/full-1m")
    change(results, "small/laco-25/full-1m", "recovery", {"stopped_early": True})
    assert "in 140 steps, stopped early, 23.7 s" in show(results, "small/laco-25/full-1m")


def test_a_p_value_is_no_more_exact_than_it_can_be() -> None:
    assert [p_value(p) for p in (0.04321, 0.001, 3.8e-28)] == ["p 0.043", "p 0.0010", "p < 0.001"]


def test_a_failure_is_shown_with_its_log(before: Path) -> None:
    text = show(before, "small/broken-9")
    assert "MISSING: compress (model.layers.3 has no such thing; choose another.)" in text
    assert "  Traceback ..." in text.splitlines()
    assert "Recipe" not in text
    log(before, "evaluate", "small/wanda-50/other", "killed")
    assert f"MISSING: evaluate ({SILENT})" in show(before, "small/wanda-50")


def test_a_node_without_checkpoint_is_refused_with_its_failure(before: Path) -> None:
    assert complete_node(before, "small/wand") == "small/wanda-50"
    with pytest.raises(
        UserError, match=r"'small/broken-9' has no checkpoint: compress \(model.layers.3 has no such thing;"
    ):
        complete_node(before, "small/broken-9/")
    with pytest.raises(UserError, match=r"There is no node 'small/brokn-8'. Did you mean 'small/broken-9'"):
        complete_node(before, "small/brokn-8")


def test_costs(before: Path) -> None:
    text = show(before, "small")
    assert "Computed in 12.5 s, peak memory 0.123 GB." in text
    assert "decode latency: 0.0110 +- 5.0e-04 s/token (cpu)" in text


@pytest.mark.parametrize(
    ("pattern", "meant"),
    [
        ("small/laco-25", "small/laco-25"),
        ("medium/wanda-50", "medium/wanda-50"),
        ("small/wand", "small/wanda-50"),
    ],
)
def test_names_are_completed(before: Path, pattern: str, meant: str) -> None:
    assert match_node(pattern, ResultsLayout(before).nodes) == meant


@pytest.mark.parametrize(
    ("pattern", "sentence"),
    [
        ("wanda-50", r"'wanda-50' matches medium/wanda-50 and small/wanda-50; give more of the name"),
        ("small/wanad-50", r"There is no node 'small/wanad-50'. Did you mean 'small/wanda-50'\?"),
        ("zzzz", r"There is no node 'zzzz'. Known: "),
    ],
)
def test_names_that_are_not_clear(before: Path, pattern: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        show(before, pattern)


def test_results_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not a folder; give the folder"):
        show(tmp_path / "none", "small")
    with pytest.raises(UserError, match="No node exists yet; run the study"):
        show(tmp_path, "small")
