from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from fake_results import fake_study

from coppice.errors import UserError
from coppice.records.fit import FitRecord
from coppice.report import summary
from coppice.results import collection as tables

ROOT = Path(__file__).parents[3]


def line_of(text: str, start: str) -> str:
    return next(line for line in text.splitlines() if line.strip().startswith(start))


def test_summary(results: Path) -> None:
    (results / "report").mkdir()
    (results / "report/index.html").write_text("")
    text = summary.summary(results)
    assert max(len(line) for line in text.splitlines()) <= 120
    assert text.isascii()
    assert "Study demo: 10 nodes, 2 failures" in text
    # By hand: dense perplexity e^1.8, 1.96 * 5% to either side; 1M tokens regained 71%.
    assert line_of(text, "small").split()[1:6] == ["1.96", "32.00", "6.05", "+-", "0.59"]
    assert line_of(text, "full-1m").split()[-1] == "71%"
    assert line_of(text, "wanda-50").startswith("  wanda-50")
    assert "model.layers.3 has no such thing" in text
    assert "D_C         0.0500   [0.0400, 0.0600]" in text
    assert "Not identified by these points: N_C, alpha, gamma." in text
    assert line_of(text, "Law p2:").endswith("R2 0.9910, rmse 0.0100 nats per token, passes its own tests")
    held_out = "Held out, later tokens: rmse 0.0120 [0.0100, 0.0200] nats per token, 0.40% of the loss."
    assert f"{held_out} Best of 2 forms." in text
    assert "small at rho 0.20: train on 1.4M tokens [900k, 2M]" in text
    # Accuracies that are all equal do not differ significantly; losses that differ in every document do.
    assert line_of(text, "wanda-50").endswith("7.55 +- 0.74  0.749 +- 0.039 ~")
    assert "~" not in line_of(text, "small")
    assert "46 pairs compared, Holm-adjusted within each of 3 measures." in " ".join(text.split())
    assert "report/index.html" in text
    assert "make ui" in text
    # By hand: of the perplexities e^loss (1 + 0.35 i mod 0.8), none as small is below that of laco-25/full-1m/gptq-4.
    assert "Best at each size: perplexity_stories (quality)" in text
    assert line_of(text, "small/laco-25/full-1m/gptq-4").split()[-2:] == ["100%", "1"]
    assert "The predicted loss of small/laco-25 after 1M tokens has a standard deviation of" in text
    assert "  1. " in text


def test_a_study_without_laws_and_evaluations(results: Path) -> None:
    study = fake_study().model_copy(update={"recipes": [], "evaluations": {}})
    tables.write_tables(study, results, results / "tables")
    (results / "laws/p2/fit.json").unlink()
    text = summary.summary(results)
    assert line_of(text, "small").split() == ["small", "1.96", "32.00"]
    assert "Law" not in text


def test_a_fit_of_nothing(results: Path) -> None:
    path = results / "laws/p2/fit.json"
    fit = json.loads(path.read_text())
    empty = {"value": None, "low": None, "high": None, "identified": False, "spread": None}
    fit |= {
        "parameters": dict.fromkeys(fit["parameters"], empty),
        "metrics": dict.fromkeys(fit["metrics"]),
        "held_out": {"later_tokens": {"p2": {"reason": "There are no points."}}},
        "ranking": {"later_tokens": []},
        "points": 0,
        "runs": 0,
        "recommendation": [],
        "notes": ["There are no points to fit."],
        "passes": {"ok": False, "reasons": ["No held-out test of it could be made."]},
    }
    path.write_text(json.dumps(fit))
    text = summary.summary(results)
    assert "There are no points to fit." in text
    assert "Nothing is recommended from law p2, which fails its own test. No held-out test of it" in text
    assert "Next run" not in text
    assert "Held out, later tokens: There are no points." in text


def test_one_node_and_one_failure_are_no_plurals(results: Path) -> None:
    tables = {"nodes": [{}], "failures": [{}]}
    assert summary._heading(results, tables) == "Study demo: 1 node, 1 failure"


def test_a_parameter_at_its_bound_has_no_interval(results: Path) -> None:
    fit = json.loads((results / "laws/p2/fit.json").read_text())
    fit["parameters"]["beta"] |= {"value": 2.0, "low": 0.01, "high": 2.0, "at_bound": True}
    fit["parameters"]["delta"] |= {"value": 0.0, "low": 0.0, "high": 0.0, "at_bound": True}
    fit["parameters"]["E"]["at_bound"] = False
    lines = summary.law_lines("p2", FitRecord.model_validate(fit))
    assert [line.split() for line in lines if "its bound" in line] == [
        ["beta", "2.00", "at", "its", "bound"],
        ["delta", "0", "at", "its", "bound"],
    ]
    assert "  E            0.100   [0.0500, 0.200]" in lines


def test_a_law_of_another_target_has_its_unit(results: Path) -> None:
    fit = json.loads((results / "laws/p2/fit.json").read_text())
    fit |= {"target": "negative_log_accuracy", "units": {"negative_log_accuracy": {"unit": "nats", "scale": 1.0}}}
    fit["ranking"]["later_tokens"].reverse()
    fit["passes"] = {"ok": False, "reasons": ["It is too far off."]}
    lines = summary.law_lines("tasks", FitRecord.model_validate(fit))
    assert lines[0] == "Law tasks: 10 points of 2 runs, R2 0.9910, rmse 0.0100 nats"
    text = " ".join(" ".join(lines).split())
    assert "rmse 0.0120 [0.0100, 0.0200] nats, 0.40% of the negative log accuracy." in text
    assert "Best of 2 forms: without delta, rmse 0.0200." in text
    assert "which fails its own test. It is too far off." in text
    fit.pop("target")
    lines = summary.law_lines("tasks", FitRecord.model_validate(fit))
    assert "rmse 0.0120 [0.0100, 0.0200], 0.40% of the value." in " ".join(lines)


def test_long_names_stay_within_the_width(results: Path) -> None:
    rows = [
        {"node": "a" * 90, "depth": 0, "stored_bytes": 10**12, "bits_per_weight": 16.0, "recovered_share": None},
    ]
    metrics = [
        {
            "node": "a" * 90,
            "evaluation": "quality",
            "metric": name,
            "value": 123456.789,
            "stderr": 1e9,
            "low": None,
            "high": None,
        }
        for name in (f"perplexity_{'p' * 60}", f"{'t' * 60}_acc")
    ]
    assert max(len(line) for line in summary._node_lines(rows, metrics, [])) <= 120


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0, "0"),
        (0.123456, "0.123"),
        (12345.6, "12346"),
        (1e9, "1.00e+09"),
        (1e-7, "1.00e-07"),
        (None, ""),
        (-2.5, "-2.50"),
    ],
)
def test_number(value: float | None, text: str) -> None:
    assert summary.number(value) == text


def test_tables_must_be_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        summary.summary(tmp_path)


def test_no_model_library_is_imported() -> None:
    program = "import sys, coppice.report.summary; print({'torch', 'pandas', 'scipy', 'mlflow'} & set(sys.modules))"
    environment = os.environ | {"PYTHONPATH": str(ROOT / "workflow")}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
