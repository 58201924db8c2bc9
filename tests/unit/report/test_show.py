"""One node's story, from manifests alone and with tables."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from fake_results import fake_study, log, write_results

from coppice.errors import UserError
from coppice.records.failure import SILENT
from coppice.records.layout import ResultsLayout
from coppice.report.show import chance, made_node, named, show
from coppice.results import collection as tables
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
    assert max(len(line) for line in text.splitlines() if "Make it anew" not in line) <= 120
    lines = text.splitlines()
    assert lines[0] == "small/laco-25/full-1m/gptq-4"
    assert "  small: dense (shipped small)" in lines
    assert "  gptq-4: quantize by gptq (bits 4, group_size 32, seed 0)" in lines
    # By hand: 392,000 parameters of 490,000, stored with 5 bits each: 4 bits a weight of the dense model.
    [parameters] = [line.split() for line in lines if line.startswith("parameters")]
    assert parameters[1:] == ["392k", "392k", "490k"]
    [bits] = [line.split() for line in lines if line.startswith("bits a weight of the dense model ")]
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
    assert "Recovery: 1M tokens (1.5 times through them) in 140 steps, 23.7 s, 71% of the loss" in text
    [losses] = [line for line in text.splitlines() if "held-out loss" in line]
    # Before, at 50k tokens and the four budgets; then the dense model's.
    assert len(losses.split()) == 3 + 6 + 1
    assert losses.split()[-1] == "1.800"
    assert "Made of it:   gptq-4" in text


def test_with_tables_it_tells_what_is_told_apart(after: Path) -> None:
    text = " ".join(show(after, "small/wanda-50").split())
    assert "of biographies less that of the dense model:" in text
    assert "not told apart" in text
    assert ": told apart." in text
    assert "the interval and the first p are of the pair alone; the second p is adjusted for all pairs" in text
    rows = read_table(after / "tables", "comparisons").to_pylist()
    [accuracy] = [
        row for row in rows if (row["node"], row["relation"], row["measure"]) == ("small/wanda-50", "dense", "accuracy")
    ]
    alone, adjusted = chance(accuracy["p_value"]), chance(accuracy["p_adjusted"])
    assert f"over 3 items, {alone}, adjusted for {accuracy['family']} pairs {adjusted}: not told apart;" in text
    # Its parent is the dense model: each test is told once.
    assert "that of its parent" not in text
    assert text.count("loss of stories less that of the dense model:") == 1


def test_a_recovery_of_an_earlier_version_is_told(before: Path, tmp_path: Path) -> None:
    results = shutil.copytree(before, tmp_path / "demo")
    path = results / "models/small/laco-25/full-1m/manifest.json"
    manifest = json.loads(path.read_text())
    del manifest["recovery"]["stopped_early"]
    path.write_text(json.dumps(manifest))
    assert "in 140 steps, 23.7 s" in show(results, "small/laco-25/full-1m")
    change(results, "small/laco-25/full-1m", "recovery", {"stopped_early": True})
    assert "in 140 steps, ended early, 23.7 s" in show(results, "small/laco-25/full-1m")


def test_a_p_value_is_no_more_exact_than_it_can_be() -> None:
    assert [chance(p) for p in (0.04321, 0.001, 3.8e-28)] == ["p 0.043", "p 0.0010", "p < 0.001"]


def test_a_failure_is_told_with_its_log(before: Path) -> None:
    text = show(before, "small/broken-9")
    assert "NOT THERE: compress (model.layers.3 has no such thing; choose another.)" in text
    assert "  Traceback ..." in text.splitlines()
    assert "Recipe" not in text
    log(before, "evaluate", "small/wanda-50/other", "killed")
    assert f"NOT THERE: evaluate ({SILENT})" in show(before, "small/wanda-50")


def test_a_node_that_has_to_be_made_is_told_from_one_that_failed(before: Path) -> None:
    assert made_node(before, "small/wand") == "small/wanda-50"
    with pytest.raises(UserError, match=r"'small/broken-9' was not made: compress \(model.layers.3 has no such thing;"):
        made_node(before, "small/broken-9/")
    with pytest.raises(UserError, match=r"There is no node 'small/brokn-8'. Did you mean 'small/broken-9'"):
        made_node(before, "small/brokn-8")


def test_costs_are_told(before: Path) -> None:
    text = show(before, "small")
    assert "Made in 12.5 s with 0.123 GB at most." in text
    assert "decode latency: 0.0110 +- 5.0e-04 s/token (cpu)" in text


@pytest.mark.parametrize(
    ("asked", "meant"),
    [
        ("small/laco-25", "small/laco-25"),
        ("medium/wanda-50", "medium/wanda-50"),
        ("small/wand", "small/wanda-50"),
    ],
)
def test_names_are_completed(before: Path, asked: str, meant: str) -> None:
    assert named(asked, ResultsLayout(before).nodes) == meant


@pytest.mark.parametrize(
    ("asked", "sentence"),
    [
        ("wanda-50", r"'wanda-50' may be medium/wanda-50 and small/wanda-50; write more of its name"),
        ("small/wanad-50", r"There is no node 'small/wanad-50'. Did you mean 'small/wanda-50'\?"),
        ("zzzz", r"There is no node 'zzzz'. Known: "),
    ],
)
def test_names_that_are_not_clear(before: Path, asked: str, sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        show(before, asked)


def test_results_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no folder; name the folder"):
        show(tmp_path / "none", "small")
    with pytest.raises(UserError, match="There is no node yet; run the study"):
        show(tmp_path, "small")
