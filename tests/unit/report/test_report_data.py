from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from fake_results import BUDGETS, fake_study, log

from coppice.errors import UserError
from coppice.records.fit import FitRecord
from coppice.records.layout import ResultsLayout
from coppice.report import data as page
from coppice.report.law_lines import law_lines
from coppice.report.layer_records import layer_records
from coppice.report.show import place_lines
from coppice.report.stage import write_report
from coppice.results import collection as tables
from coppice.results.reading import read_table

RUN = "small/laco-25/full-1m"


@pytest.fixture(scope="module")
def data(kept: Path) -> dict[str, Any]:
    return data_of(kept)


def data_of(results: Path, study: Any = None) -> dict[str, Any]:
    """The data of the page as a browser reads them."""
    write_report(study or fake_study(), results, results / "report")
    text = (results / "report/index.html").read_text(encoding="utf-8")
    return json.loads(re.search(r'<script type="application/json" id="study">(.*?)</script>', text, re.DOTALL)[1])


def rows_of(results: Path, table: str) -> list[dict[str, Any]]:
    return read_table(results / "tables", table).to_pylist()


def test_every_number_is_the_tables(kept: Path, data: dict[str, Any]) -> None:
    assert (data["study"], data["models"], data["seed"]) == ("demo", ["small", "medium"], 0)
    assert "2 nodes failed" in data["lead"]
    nodes = {node["node"]: node for node in data["nodes"]}
    rows = rows_of(kept, "nodes")
    assert len(nodes) == len(rows) == 10
    for row in rows:
        node = nodes[row["node"]]
        for name in ("parent", "model", "method", "traits", "parameters", "fingerprint"):
            assert node[name] == row[name]
        for name in ("bits_per_weight", "bits_per_linear_weight", "rho", "rho_nonzero", "wall_seconds"):
            assert node[name] == pytest.approx(row[name], rel=1e-5)
        assert node["stored_mb"] == pytest.approx(row["stored_bytes"] / 1e6, rel=1e-5)
    for row in rows_of(kept, "metrics"):
        value, low, high = data["values"][f"{row['evaluation']}/{row['metric']}"][row["node"]]
        assert value == pytest.approx(row["value"], rel=1e-5)
        # The fake metrics have a standard error and no interval of their own.
        assert (low, high) == pytest.approx(
            (row["value"] - 1.96 * row["stderr"], row["value"] + 1.96 * row["stderr"]), rel=1e-3
        )
    qualities = {quality["id"]: quality for quality in data["qualities"]}
    assert list(qualities) == ["quality/perplexity_stories", "quality/biographies_acc"]
    assert [quality["better"] for quality in qualities.values()] == ["lower", "higher"]
    assert [quality["log"] for quality in qualities.values()] == [True, False]


def test_path_budget_and_command_of_a_node(data: dict[str, Any]) -> None:
    nodes = {node["node"]: node for node in data["nodes"]}
    node = nodes[f"{RUN}/gptq-4"]
    assert (node["family"], node["composition"], node["budget"]) == (
        "quantize",
        "prune > recover > quantize",
        1_000_000,
    )
    assert [step["step"] for step in node["path"]] == ["laco-25", "full-1m", "gptq-4"]
    assert node["path"][2]["options"] == {"bits": 4, "group_size": 32}
    assert node["command"] == (
        "snakemake --cores all --configfile results/demo/study.yaml "
        "--force results/demo/models/small/laco-25/full-1m/gptq-4/manifest.json"
    )
    assert (nodes["small"]["composition"], nodes["small"]["family"], nodes["small"]["budget"]) == ("dense", "dense", 0)
    assert nodes[RUN]["recovered_share"] == pytest.approx(0.71, abs=0.01)


def test_the_command_of_a_node_is_what_show_prints(data: dict[str, Any]) -> None:
    command = next(node["command"] for node in data["nodes"] if node["node"] == RUN)
    assert place_lines(Path("results/demo"), RUN, [RUN])[-1] == f"Recompute:   {command}"


def test_costs_are_sizes_too(kept: Path, data: dict[str, Any]) -> None:
    sizes = {size["id"]: size for size in data["sizes"]}
    assert next(iter(sizes)) == "stored_mb"
    assert sizes["cost/decode_latency/cpu"]["simulated"] is False
    # The fake spread, which is an interquartile range, is 0.001.
    assert data["values"]["cost/decode_latency/cpu"] == {
        node: [0.011, 0.0105, 0.0115] for node in data["values"]["cost/decode_latency/cpu"]
    }
    bound = sizes["roofline/decode_latency/H200 (roofline)"]
    assert bound["simulated"] is True
    assert bound["title"].endswith("simulated")
    (row,) = (
        row
        for row in rows_of(kept, "costs")
        if (row["node"], row["metric"], row["device"]) == ("medium", "decode_latency", "H200 (roofline)")
    )
    assert data["values"][bound["id"]]["medium"] == [pytest.approx(row["value"], rel=1e-5), None, None]
    assert {size["id"] for size in data["sizes"]} - set(data["values"]) == {
        "stored_mb", "bits_per_weight", "bits_per_linear_weight", "parameters",
    }  # fmt: skip


def test_pairs_are_the_comparisons(kept: Path, data: dict[str, Any]) -> None:
    rows = [row for row in rows_of(kept, "comparisons") if row["measure"] == "loss"]
    alike = {(row["node"], row["other"]) for row in rows if row["relation"] == "next" and not row["distinguishable"]}
    assert {(a, b) for a, b, _ in data["alike"].get("quality/perplexity_stories", [])} == alike
    assert data["alike"]["quality/biographies_acc"]
    pairs = {(pair["a"], pair["b"]): pair for pair in data["pairs"]["quality/perplexity_stories"]}
    assert set(pairs) == {(row["node"], row["other"]) for row in rows}
    for row in rows:
        pair = pairs[row["node"], row["other"]]
        for name in ("difference", "low", "high", "p_adjusted"):
            assert pair[name] == pytest.approx(row[name], rel=1e-5)
        assert (pair["items"], pair["distinguishable"], pair["flips"]) == (row["n"], row["distinguishable"], None)
    for pair in data["pairs"]["quality/biographies_acc"]:
        assert pair["flips"] == {"lost": 0, "gained": 0, "p": 1}


def test_a_line_is_the_law_and_its_band_the_refits(kept: Path, data: dict[str, Any]) -> None:
    folder = kept / "laws/p2"
    fit = json.loads((folder / "fit.json").read_text())
    lines = law_lines(FitRecord.model_validate(fit), folder, {RUN, "another"})
    assert list(lines) == [RUN]
    line = lines[RUN]
    assert line.tokens[[0, -1]].tolist() == pytest.approx([BUDGETS[0] / 2, 4 * BUDGETS[-1]])
    assert line.fitted_to == BUDGETS[-1]
    assert line.fitted_to in line.tokens.tolist()

    def law(drawn: dict[str, float], tokens: float) -> float:
        size = 0.49  # millions, as the fit's units say
        excess = drawn["N_C"] * size ** -drawn["alpha"] + drawn["D_C"] * (tokens / 1e6) ** -drawn["beta"] + drawn["E"]
        return 1.8 + size ** -drawn["delta"] * excess

    value = {name: entry["value"] for name, entry in fit["parameters"].items()}
    assert line.loss.tolist() == pytest.approx([law(value, tokens) for tokens in line.tokens.tolist()])
    samples = pq.read_table(folder / "samples.parquet").to_pylist()
    last = [law(drawn, float(line.tokens[-1])) for drawn in samples]
    assert (line.low[-1], line.high[-1]) == pytest.approx((min(last), max(last)))  # of eight
    runs = data["laws"]["p2"]["runs"]
    assert runs[RUN]["loss"] == pytest.approx(line.loss.tolist(), rel=1e-5)
    assert runs[RUN]["fitted_to"] in runs[RUN]["tokens"]


def test_no_line_of_a_law_without_values_and_no_band_without_refits(results: Path) -> None:
    folder = results / "laws/p2"
    fit = json.loads((folder / "fit.json").read_text())
    (folder / "samples.parquet").unlink()
    assert law_lines(FitRecord.model_validate(fit), folder, {RUN})[RUN].low is None
    fit["parameters"]["beta"]["value"] = None
    assert law_lines(FitRecord.model_validate(fit), folder, {RUN}) == {}
    other = FitRecord.model_validate(fit | {"law": "learning-curve", "parameters": {}, "held_out": {}, "profiles": {}})
    assert law_lines(other, folder, {RUN}) == {}


def test_a_damaged_fit_is_refused_by_name(results: Path) -> None:
    folder = results / "laws/p2"
    fit = FitRecord.read(folder / "fit.json")
    with pytest.raises(UserError, match=r"fit\.json lacks the parameter 'D_C'; fit the law again\."):
        law_lines(fit.model_copy(update={"parameters": {}}), folder, {RUN})
    for name in ("samples.parquet", "points.parquet"):
        (folder / name).write_bytes(b"PAR1")
        with pytest.raises(UserError, match=rf"{name} is not a whole Parquet file"):
            law_lines(fit, folder, {RUN})


def with_layers(results: Path, node: str, **changes: Any) -> None:
    path = results / "models" / node / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_layers_are_the_manifests_records(results: Path) -> None:
    linear = "model.layers.1.mlp.up_proj"
    with_layers(
        results, "small/wanda-50", layers={linear: {"sparsity_asked": 0.5, "sparsity": 0.49, "weight_error": 0.1}}
    )
    units = {
        "blocks": {"removed": 1, "of": 3, "share": 1 / 3},
        "kv_groups": {"removed": 0, "of": 2, "share": 0.0},
        "neurons": {"removed": 32, "of": 128, "share": 0.25},
    }
    with_layers(
        results, "small/laco-25", achieved={"units": units, "removed_blocks": [1], "block_influence": [0.9, 0.1, 0.2]}
    )
    with_layers(
        results,
        f"{RUN}/gptq-4",
        layers={
            linear: {"bits": 4, "error": 0.02},
            "model.layers.0.mlp.up_proj": {"unchanged": "No reason.", "bits": 8},
        },
    )
    found = layer_records(rows_of(results, "nodes"), ResultsLayout(results))
    assert found["small/wanda-50"] == {
        "modules": ["layers.1.mlp.up_proj"],
        "columns": {"sparsity": [0.49], "weight error": [0.1]},
    }
    blocks = {
        "modules": ["layers.0", "layers.1", "layers.2"],
        "columns": {"blocks kept": [1, 0, 1], "neurons kept": [96, 0, 96], "block influence": [0.9, 0.1, 0.2]},
    }
    assert found["small/laco-25"] == blocks
    assert found[RUN] == blocks  # what is removed stays removed
    assert found[f"{RUN}/gptq-4"] == {
        "modules": ["layers.1.mlp.up_proj", "layers.0.mlp.up_proj"],
        "columns": {"bits": [4, 8], "error": [0.02, None]},
    }
    assert "small" not in found


def test_linears_keep_what_earlier_steps_made_of_them(results: Path) -> None:
    linear = "model.layers.0.mlp.up_proj"
    with_layers(results, "small/laco-25", layers={linear: {"sparsity": 0.5, "error": 0.3}})
    with_layers(results, f"{RUN}/gptq-4", layers={linear: {"bits": 4, "error": 0.02}})
    found = layer_records(rows_of(results, "nodes"), ResultsLayout(results))
    assert found[RUN]["columns"] == {"sparsity": [0.5]}  # the error is that of the step, and training has changed it
    assert found[f"{RUN}/gptq-4"]["columns"] == {"sparsity": [0.5], "bits": [4], "error": [0.02]}


def test_what_is_no_number_becomes_null_and_no_tag_is_closed(results: Path) -> None:
    path = results / "evaluations/small/quality/metrics.json"
    content = json.loads(path.read_text())
    content["metrics"][0] |= {"value": math.inf, "stderr": None}
    path.write_text(json.dumps(content))
    log(results, "compress", "small/broken-9", "error: </script><!-- no\n")
    tables.write_tables(fake_study(), results, results / "tables", partial=True)
    data = data_of(results)
    assert data["values"]["quality/perplexity_stories"]["small"] == [None, None, None]
    assert [row["error"] for row in data["failures"] if row["node"] == "small/broken-9"] == ["</script><!-- no"]


def test_passwords_of_addresses_are_masked(results: Path) -> None:
    text = "study: demo\ntracking: {uri: 'postgresql://coppice:secret@db.example/mlflow'}\n"
    (results / "study.yaml").write_text(text)
    assert data_of(results)["config"] == text.replace("secret", "...")


def test_failures_alone(tmp_path: Path) -> None:
    results = tmp_path / "demo"
    results.mkdir()
    (results / "study.yaml").write_text("study: demo\n")
    log(results, "root", "small", "error: The folder is empty.\n")
    tables.write_tables(fake_study(), results, results / "tables", partial=True)
    data = data_of(results)
    assert data["failures"] == [
        {"node": "small", "stage": "root", "error": "The folder is empty.", "log": "logs/root/small.log"}
    ]
    for name in ("nodes", "qualities", "values", "alike", "pairs", "layers", "recoveries", "laws", "versions"):
        assert not data[name]


def test_numbers_have_six_digits() -> None:
    assert page._plain({"a": [1 / 3, math.nan, 1234567, True]}) == {"a": [0.333333, None, 1234567, True]}
