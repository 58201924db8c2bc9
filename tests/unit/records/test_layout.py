from __future__ import annotations

from pathlib import Path

from coppice.records.layout import ResultsLayout


def test_paths_are_below_the_results_folder() -> None:
    layout = ResultsLayout(Path("results/demo"))
    assert str(layout.manifest("small/rtn-4")) == "results/demo/models/small/rtn-4/manifest.json"
    assert str(layout.statistics("small", "lives", "moments")) == (
        "results/demo/statistics/small/lives/moments/manifest.json"
    )
    assert str(layout.metrics("small", "quality")) == "results/demo/evaluations/small/quality/metrics.json"
    assert str(layout.log("evaluate", "small/quality")) == "results/demo/logs/evaluate/small/quality.log"
    assert str(layout.log("tables", "tables")) == "results/demo/logs/tables.log"
    assert str(layout.benchmark("fit", "p2")) == "results/demo/benchmarks/fit/p2.jsonl"


def test_paths_can_be_relative_to_the_results() -> None:
    assert str(ResultsLayout(Path()).tokens("small", "recovery.full")) == "tokens/small/recovery.full/manifest.json"
