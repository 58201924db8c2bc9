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


def test_what_was_made_is_found_by_its_records(tmp_path: Path) -> None:
    layout = ResultsLayout(tmp_path)
    assert (layout.nodes, layout.fits, layout.metrics_of("small")) == ([], {}, [])
    for path in (
        layout.manifest("small/rtn-4"),
        layout.manifest("small"),
        layout.fit("p2"),
        layout.metrics("small", "quality"),
        layout.metrics("small/rtn-4", "cost"),
    ):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    assert layout.nodes == ["small", "small/rtn-4"]
    assert layout.fits == {"p2": layout.fit("p2")}
    assert layout.metrics_of("small") == [layout.metrics("small", "quality")]
