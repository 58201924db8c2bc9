from __future__ import annotations

import argparse
import json
import math
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow.parquet as pq
import pytest
from fake_results import AnyOptions, fake_study, log, write_results
from manifests import token_set

from coppice.errors import UserError
from coppice.hardware import DEVICES
from coppice.records.failure import SILENT
from coppice.records.layout import ResultsLayout
from coppice.results import collection as tables
from coppice.results.failures import failures
from coppice.results.formats import formats_page
from coppice.results.measurements import is_two_to_four
from coppice.results.nodes import recovery_losses
from coppice.results.reading import read_table
from coppice.results.schemas import SCHEMAS
from coppice.study.schema import FileText, Roofline, ShippedModel, Step, Study

ROOT = Path(__file__).parents[3]


@pytest.fixture
def results(tmp_path: Path) -> Path:
    folder = write_results(tmp_path / "demo")
    for model in ("small", "medium"):
        node = folder / "models" / model / "broken-9"
        whole = folder / "models" / model / "wanda-50" / "manifest.json"
        node.mkdir()
        broken = json.loads(whole.read_text()) | {"node": f"{model}/broken-9"}
        broken["step"] |= {"name": "broken-9", "method": "broken", "options": {}}
        (node / "manifest.json").write_text(json.dumps(broken))
        for file in ("config.json", "compression.json"):
            shutil.copy(whole.with_name(file), node / file)
        for evaluation in (folder / "evaluations" / model / "wanda-50").iterdir():
            shutil.copytree(evaluation, folder / "evaluations" / model / "broken-9" / evaluation.name)
    return folder


@pytest.fixture
def partial(tmp_path: Path) -> Path:
    """Results that lack the nodes that failed."""
    return write_results(tmp_path / "demo")


def read(folder: Path, name: str) -> pd.DataFrame:
    return pd.read_parquet(folder / "tables" / f"{name}.parquet")


def test_whole_results(results: Path) -> None:
    written = tables.write_tables(fake_study(), results, results / "tables")
    assert {name: len(table) for name, table in written.items()} == {
        "nodes": 12, "metrics": 24, "items": 264, "curves": 22, "costs": 330, "comparisons": 90, "signals": 2,
        "failures": 0,
    }  # fmt: skip
    nodes = read(results, "nodes").set_index("node")
    row = nodes.loc["small/laco-25/full-1m"]
    assert row["parent"] == "small/laco-25"
    assert row["recipe"] == "laco-25/full-1m"
    assert row["source"] == "small"
    assert row["recovery_tokens"] == 1_000_000
    assert pd.isna(nodes.loc["small/laco-25/full-1m/gptq-4", "recovery_tokens"])
    assert nodes.loc["small/laco-25", "calibration"] == "default"
    assert pd.isna(row["calibration"])
    assert nodes.loc["small/laco-25/full-1m/gptq-4", "path_recovery_tokens"] == 1_000_000
    assert json.loads(row["options"])["learning_rate"] == 0.001
    # By hand: the loss falls from 0.9 above the dense one to 0.2 * 0.9 + 0.3 * 0.9 / sqrt(10) above it.
    assert row["recovered_share"] == pytest.approx(1 - (0.2 + 0.3 / 10**0.5))
    assert pd.isna(nodes.loc["small/laco-25", "recovered_share"])
    assert list(nodes.loc["small/wanda-50", "traits"]) == ["masked"]
    curves = read(results, "curves")
    assert set(curves[curves["tokens"] == 0]["split"]) == {"validation"}
    costs = read(results, "costs")
    decode = costs[costs["metric"] == "decode_latency"]
    assert set(decode[decode["evaluation"].notna()]["device"]) == {"cpu"}


@pytest.mark.parametrize(
    ("before", "after", "dense", "share"),
    [(2.0, 1.5, 1.0, 0.5), (2.0, 0.9, 1.0, 1.1), (1.0, 0.9, 1.0, None), (2.0, 2.5, 1.0, -0.5), (2.0, 1.5, None, None)],
)
def test_recovered_share(before: float, after: float, dense: float | None, share: float | None) -> None:
    rows = [
        {"tokens": 10, "loss": after, "dense_loss": dense},
        {"tokens": 0, "loss": before, "dense_loss": dense},
    ]
    assert recovery_losses(rows)["recovered_share"] == pytest.approx(share)


def test_recovered_share_needs_the_loss_before() -> None:
    assert recovery_losses([{"tokens": 5, "loss": 1.0, "dense_loss": 0.5}])["recovered_share"] is None
    assert recovery_losses([])["loss_after"] is None


def test_every_node_has_lower_bounds_of_its_times(results: Path) -> None:
    tables.write_tables(fake_study(), results, results / "tables")
    costs = read(results, "costs")
    bounds = costs[costs["evaluation"].isna() & costs["simulated"]]
    assert set(bounds["node"]) == set(read(results, "nodes")["node"])
    decode = bounds[bounds["metric"] == "decode_latency"].set_index(["device", "node"])["value"]
    assert len(decode.loc["H200 (roofline)"]) == 12
    on_h200 = decode.loc["H200 (roofline)"]
    assert on_h200["small/laco-25/full-1m/gptq-4"] < on_h200["small/laco-25"] < on_h200["small"]
    assert on_h200["small/wanda-50"] == on_h200["small"], "zeros that are stored save nothing"
    cache = bounds[bounds["metric"] == "kv_cache_bytes"].set_index("node")["value"]
    assert cache["small"] == 2 * 2 * 2 * 16 * (1024 + 128) * 4
    details = json.loads(bounds[bounds["device"] == "H200 (roofline)"]["details"].iloc[0])
    assert details == {"batch": 1, "generate": 128, "prompt": 1024, "source": DEVICES["H200"].source}


def test_lower_bounds_are_those_that_the_study_asks_for(results: Path) -> None:
    asked = Roofline(devices=["A6000"], batch=2, prompt=8, generate=0)
    costs = tables.collect(fake_study().model_copy(update={"roofline": asked}), results)["costs"]
    found = {(row.get("device"), row["metric"]) for row in costs if row["node"] == "small" and row["simulated"]}
    latencies = {"prefill_latency", "decode_latency", "generation_latency"}
    assert found == {("A6000 (roofline)", metric) for metric in latencies} | {(None, "kv_cache_bytes")}
    none = tables.collect(fake_study().model_copy(update={"roofline": None}), results)["costs"]
    assert not any(row["simulated"] for row in none)


def test_a_pattern_is_kept_along_the_path() -> None:
    steps = {
        "half": Step.model_validate({"method": "wanda", "pattern": "2:4"}),
        "any": Step.model_validate({"method": "wanda", "sparsity": 0.5}),
        "whole": Step.model_validate({"method": "rtn", "bits": 4}),
    }
    study = fake_study().model_copy(update={"steps": steps})
    found = [is_two_to_four(study, node) for node in ("small", "small/any", "small/half@1", "small/half/whole")]
    assert found == [False, False, True, True]


def test_same_results_give_the_same_bytes(results: Path) -> None:
    tables.write_tables(fake_study(), results, results / "tables")
    first = {path.name: path.read_bytes() for path in (results / "tables").iterdir()}
    study = fake_study()
    reordered = study.model_copy(
        update={"recipes": study.recipes[::-1], "models": dict(reversed(study.models.items()))}
    )
    tables.write_tables(reordered, results, results / "again")
    assert {path.name: path.read_bytes() for path in (results / "again").iterdir()} == first
    assert len(first) == len(SCHEMAS) == 8


def test_every_reader_reads_every_table(results: Path) -> None:
    tables.write_tables(fake_study(), results, results / "tables")
    for name, schema in SCHEMAS.items():
        path = results / "tables" / f"{name}.parquet"
        stored = pq.read_schema(path)
        assert stored.equals(schema, check_metadata=False)
        assert all(field.metadata[b"description"] and b"unit" in field.metadata for field in stored)
        rows = pq.read_metadata(path).num_rows
        assert len(pd.read_parquet(path)) == rows
        assert len(pl.read_parquet(path)) == rows
        assert duckdb.sql(f"select count(*) from '{path}'").fetchall() == [(rows,)]
        assert pl.read_parquet(path).columns == schema.names == list(pd.read_parquet(path).columns)
    smaller = duckdb.sql(
        f"select node from '{results}/tables/nodes.parquet' where list_contains(traits, 'smaller')"
    ).fetchall()
    assert len(smaller) == 6


def test_nodes_outside_the_study_are_left_out(results: Path) -> None:
    study = fake_study()
    smaller = study.model_copy(update={"recipes": study.recipes[:1]})
    written = tables.write_tables(smaller, results, results / "tables")
    assert written["nodes"]["node"].to_pylist() == ["medium", "medium/wanda-50", "small", "small/wanda-50"]
    for name in ("metrics", "items", "costs", "comparisons"):
        assert set(written[name]["node"].to_pylist()) <= set(written["nodes"]["node"].to_pylist())
    assert len(written["curves"]) == 0


def test_a_missing_result_is_named(partial: Path) -> None:
    with pytest.raises(UserError, match=r"small/broken-9/manifest.json does not exist"):
        tables.write_tables(fake_study(), partial, partial / "tables")
    assert not (partial / "tables").exists()


@pytest.mark.parametrize(
    ("path", "content", "message"),
    [
        ("models/small/wanda-50/manifest.json", b'{"node": ', "not valid JSON"),
        ("models/small/wanda-50/manifest.json", b"{}", "lacks 'node'"),
        ("models/small/wanda-50/config.json", b"{}", "config.json lacks 'model_type'"),
        ("evaluations/small/quality/metrics.json", b'{"metrics": []}', "lacks 'fingerprint'"),
        ("evaluations/small/quality/items.parquet", b"PAR1", "not a whole Parquet file"),
        ("models/small/laco-25/full-1m/curve.parquet", b"", "not a whole Parquet file"),
    ],
)
def test_a_broken_result_is_named(results: Path, path: str, content: bytes, message: str) -> None:
    (results / path).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        tables.write_tables(fake_study(), results, results / "tables")
    assert path in str(caught.value)
    written = tables.write_tables(fake_study(), results, results / "tables", partial=True)
    (failure,) = written["failures"].to_pylist()
    assert failure["stage"] == "tables"
    assert failure["log"] == path
    assert message in failure["error"]


def remade(study: Study, step: str, **options: Any) -> Study:
    """The study with other options of a step."""
    changed = study.steps[step].model_copy(update={"options": AnyOptions(**options)})
    return study.model_copy(update={"steps": {**study.steps, step: changed}})


def remeasured(study: Study) -> Study:
    quality = study.evaluations["quality"].model_copy(update={"shots": 3})
    return study.model_copy(update={"evaluations": {**study.evaluations, "quality": quality}})


@pytest.mark.parametrize(
    ("study", "path", "said"),
    [
        (
            remade(fake_study(), "laco-25", ratio=0.3),
            "models/medium/laco-25/manifest.json",
            r"The node 'medium/laco-25' was made before the study's step 'laco-25' changed: ratio \(was 0.25, is 0.3\)",
        ),
        (
            fake_study().model_copy(update={"models": {"small": ShippedModel(shipped="tiny")}}),
            "models/small/manifest.json",
            r"the study's model 'small' changed: shipped \(was small, is tiny\)",
        ),
        (
            fake_study().model_copy(update={"seed": 7}),
            "models/medium/manifest.json",
            r"the study's model 'medium' changed: seed \(was 0, is 7\)",
        ),
        (
            remeasured(fake_study()),
            "evaluations/medium/quality/metrics.json",
            r"'quality' of 'medium' was made before the study's evaluation 'quality' changed: shots \(was 0, is 3\)",
        ),
    ],
)
def test_results_of_another_study_are_refused(results: Path, study: Study, path: str, said: str) -> None:
    study = study.model_copy(update={"models": dict(sorted(study.models.items()))})
    with pytest.raises(UserError, match=said) as caught:
        tables.write_tables(study, results, results / "tables")
    assert f"a new name, or remove {results / path} from where the results are stored" in str(caught.value)
    assert not (results / "tables").exists()


def test_partial_tables_leave_out_what_was_made_of_another_study(results: Path) -> None:
    study = remade(fake_study(), "laco-25", ratio=0.3)
    written = tables.write_tables(study, results, results / "tables", partial=True)
    failed = {row["node"]: row["error"] for row in written["failures"].to_pylist() if row["node"].startswith("small/")}
    assert set(failed) == {"small/laco-25", "small/laco-25/full-1m", "small/laco-25/full-1m/gptq-4"}
    assert "ratio (was 0.25, is 0.3)" in failed["small/laco-25"]
    assert failed["small/laco-25/full-1m"] == "It was made from small/laco-25, which the tables leave out."
    for name in ("nodes", "metrics", "items", "costs", "curves"):
        assert not failed.keys() & set(written[name]["node"].to_pylist())
    # What was measured otherwise is left out; the nodes stay.
    written = tables.write_tables(remeasured(fake_study()), results, results / "tables", partial=True)
    assert len(written["nodes"]) == len(written["failures"]) == 12
    assert (len(written["metrics"]), len(written["items"])) == (0, 0)


def test_a_node_below_a_broken_one_failed_only_if_it_was_made(results: Path) -> None:
    """Every failure names a file that is there; what was not made yet is no failure."""
    (results / "models/small/laco-25/manifest.json").write_text('{"half')
    shutil.rmtree(results / "models/small/laco-25/full-1m/gptq-4")
    written = tables.write_tables(fake_study(), results, results / "tables", partial=True)
    failed = {row["node"]: row["log"] for row in written["failures"].to_pylist()}
    assert failed == {node: f"models/{node}/manifest.json" for node in ("small/laco-25", "small/laco-25/full-1m")}
    assert all((results / place).exists() for place in failed.values())
    assert not [node for node in written["nodes"]["node"].to_pylist() if node.startswith("small/laco-25")]


def test_a_node_of_another_calibrations_tokens_is_refused(results: Path) -> None:
    """Under its name the table shows no calibration that it was not made with."""
    tokens = results / "tokens/small/calibration.default/manifest.json"
    tokens.parent.mkdir()
    described = {"text": {"path": "stories.txt"}, "windows": 128, "length": 2048}
    token_set(**described, fingerprint="c" * 64).write(tokens)
    written = tables.write_tables(fake_study(), results, results / "tables")
    assert written["nodes"].num_rows == 12
    token_set(**described, fingerprint="d" * 64).write(tokens)
    with pytest.raises(UserError, match=r"small/wanda-50' .* tokens of calibration 'default' \(was c{12}, is d{12}\)"):
        tables.write_tables(fake_study(), results, results / "tables")


def test_partial_tables_leave_out_what_was_trained_or_measured_on_another_text(results: Path) -> None:
    study = fake_study().model_copy(update={"texts": {"stories": FileText(path="others.txt")}})
    written = tables.write_tables(study, results, results / "tables", partial=True)
    failed = {row["node"]: row["error"] for row in written["failures"].to_pylist()}
    changed = "was made before the study's text 'stories' changed: path (was stories.txt, is others.txt)"
    assert f"The token set 'recovery.full-1m' {changed}" in failed["small/laco-25/full-1m"]
    assert f"The token set 'evaluation.quality.stories' {changed}" in failed["small/laco-25"]
    assert (len(written["metrics"]), len(written["curves"])) == (0, 0)
    assert "small/laco-25" in written["nodes"]["node"].to_pylist()


def test_options_that_a_version_did_not_know_are_no_change(results: Path) -> None:
    """`gpus` and `precision` were not recorded; and on how many GPUs a step trains changes nothing."""
    path = results / "models/small/laco-25/full-1m/manifest.json"
    manifest = json.loads(path.read_text())
    step = Step.model_validate({"method": "full", "text": "stories", "validation": "stories", "tokens": 9, "gpus": 2})
    options = step.options.model_dump(mode="json", exclude={"gpus", "precision"})
    path.write_text(json.dumps(manifest | {"step": {**manifest["step"], "options": options}}))
    study = fake_study()
    study = study.model_copy(
        update={"steps": {**study.steps, "full-1m": step}, "models": {"small": study.models["small"]}}
    )
    tables.write_tables(study, results, results / "tables")
    options["precision"] = "float32"
    path.write_text(json.dumps(manifest | {"step": {**manifest["step"], "options": options}}))
    with pytest.raises(UserError, match=r"precision \(was float32, is auto\)"):
        tables.write_tables(study, results, results / "tables")


def test_missing_items_are_named(results: Path) -> None:
    (results / "evaluations/small/quality/items.parquet").unlink()
    with pytest.raises(UserError, match=r"small/quality/items\.parquet does not exist"):
        tables.write_tables(fake_study(), results, results / "tables")


def test_items_of_an_older_format_are_named(results: Path) -> None:
    path = results / "evaluations/small/quality/items.parquet"
    pq.write_table(pq.read_table(path).drop_columns("answer"), path)
    with pytest.raises(UserError, match=r"items\.parquet has no column 'answer'; remove it and run again"):
        tables.write_tables(fake_study(), results, results / "tables")


def test_pairs_of_nodes_are_compared(results: Path) -> None:
    tables.write_tables(fake_study(), results, results / "tables")
    comparisons = read(results, "comparisons")
    assert set(comparisons["measure"]) == {"accuracy", "log_probability", "loss"}
    row = comparisons.query("node == 'small/wanda-50' and relation == 'parent' and measure == 'loss'").iloc[0]
    # By hand: every document's perplexity is 1.35 times that of the dense model; of each model 5 pairs with the dense
    # one, 2 more with a parent and 4 more with the next better one.
    assert row["difference"] == pytest.approx(math.log(1.35))
    assert (row["task"], row["n"], row["family"], row["distinguishable"]) == ("stories", 16, 22, True)
    assert pd.isna(row["flip_rate"])
    answered = comparisons.query("measure == 'accuracy'")
    assert (answered["difference"] == 0).all()
    assert not answered["distinguishable"].any()
    signals = read(results, "signals").set_index("group")
    assert signals.loc["small/laco-25/full-1m", "mean"] == 1
    assert set(signals["metric"]) == {"validation_loss_monotonicity"}


def test_partial_tables_hold_what_there_is_and_are_outdated(partial: Path) -> None:
    log(partial, "evaluate", "small/wanda-50/quality", "loading\n")
    (partial / "evaluations/small/wanda-50/quality/metrics.json").unlink()
    log(partial, "calibrate", "medium/laco-25/default/moments", "error: out of disk; make room.\n")
    log(partial, "compress", "elsewhere/wanda-50", "error: of another study.\n")
    log(partial, "fit", "p2", "error: no tables.\n")
    written = tables.write_tables(fake_study(), partial, partial / "tables", partial=True)
    rows = [(row["node"], row["stage"], row["error"]) for row in written["failures"].to_pylist()]
    sentence = "model.layers.3 has no such thing; choose another."
    assert rows == [
        ("medium/laco-25", "calibrate", "out of disk; make room."),
        ("medium/broken-9", "compress", sentence),
        ("small/broken-9", "compress", sentence),
        ("small/wanda-50", "evaluate", SILENT),
    ]
    assert len(written["nodes"]) == 10
    assert {os.stat(path).st_mtime for path in (partial / "tables").iterdir()} == {0.0}
    for row in written["failures"].to_pylist():
        assert (partial / row["log"]).exists()
    (partial / "laws/p2/fit.json").unlink()
    failed = failures(ResultsLayout(partial), fake_study(), {})
    assert [(row["node"], row["stage"], row["error"]) for row in failed] == [(None, "fit", "no tables.")]


def test_errors_of_an_earlier_run_are_no_failures_of_a_whole_one(results: Path) -> None:
    log(results, "fit", "p2", "error: no tables.\n")
    (results / "laws/p2/fit.json").unlink()  # laws are fitted after the tables
    log(results, "calibrate", "medium/laco-25/default/gradients", "error: of a step that the study had before.\n")
    assert tables.write_tables(fake_study(), results, results / "tables")["failures"].num_rows == 0


def test_command(results: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tables, "load_study", lambda path: fake_study())
    parser = argparse.ArgumentParser()
    tables.add_arguments(parser)
    arguments = ["--study", "study.yaml", "--results", str(results), "--output", str(results / "tables")]
    tables.run(parser.parse_args(arguments))
    assert read_table(results / "tables", "nodes").num_rows == 12
    with pytest.raises(UserError, match="does not exist"):
        read_table(results, "nodes")


def test_tables_of_older_versions_are_read_under_the_names_of_this_one(results: Path) -> None:
    tables.write_tables(fake_study(), results, results / "tables")
    path, now = results / "tables" / "nodes.parquet", read_table(results / "tables", "nodes")
    old = {"traits": "marks", "requested": "asked"}
    pq.write_table(now.rename_columns([old.get(name, name) for name in now.column_names]), path)
    assert read_table(results / "tables", "nodes").equals(now)


def test_manifests_of_format_1_give_the_same_tables(results: Path) -> None:
    now = tables.write_tables(fake_study(), results, results / "tables")
    for path in (results / "models").rglob("manifest.json"):
        manifest = json.loads(path.read_text())
        manifest |= {"format_version": 1, "marks": manifest.pop("traits"), "asked": manifest.pop("requested")}
        if manifest["recovery"]:
            manifest["recovery"]["tokens_asked"] = manifest["recovery"].pop("tokens_requested")
        if manifest["step"] and "sequential" in manifest["step"]["options"]:
            manifest["step"]["options"]["propagate"] = manifest["step"]["options"].pop("sequential")
        path.write_text(json.dumps(manifest))
    assert tables.write_tables(fake_study(), results, results / "tables") == now


def test_no_model_library_is_imported() -> None:
    program = "import sys, coppice.results.collection; print({'torch', 'pandas', 'transformers'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


def test_the_page_of_formats_is_generated_from_the_schemas() -> None:
    page = (ROOT / "docs" / "formats.md").read_text(encoding="utf-8")
    assert page == formats_page(page), "run `python -m coppice.documentation`"
