from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

from coppice.laws import learning_curve
from coppice.laws.engine.points import Points
from coppice.laws.learning_curve import report
from coppice.laws.learning_curve.trends import (
    Trend,
    agreement_level,
    asymptotes,
    pays_too_little,
    prediction_level,
    stop_level,
    trend,
    trends,
    working_level,
)
from coppice.laws.stage import fit_law

TOKENS = 1000.0 * 2 ** np.arange(8)
LOSSES = 2 + 30 * TOKENS**-0.5
OPTIONS = learning_curve.Options(bootstrap=40)


def wrong(x: np.ndarray) -> np.ndarray:
    """Wrong answers in percent, towards 3: the source's accuracy in percent is 100 less it."""
    return 3 + 900 * np.asarray(x) ** -0.5


def observed(levels: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Wrong answers at evenly spaced sizes, with a noise of 0.2% of the right ones."""
    x = np.linspace(5e3, 5e3 * levels, levels)
    return x, wrong(x) - (100 - wrong(x)) * 0.002 * np.random.default_rng(seed).standard_normal(levels)


def test_an_anchor_is_an_observation_at_infinity() -> None:
    x, y = observed(8, 1)
    far = trend(np.append(x, 1e30), np.append(y, 3.0))
    assert trend(x, y, 3.0).asymptote == pytest.approx(far.asymptote, abs=1e-3)


def test_anchors_lower_the_variance() -> None:
    # Of curves of six levels. A trend needs the one before alone, so that two levels are enough.
    free, anchored = [], []
    for seed in range(60):
        x, y = observed(6, seed)
        before = trend(x[:5], y[:5]).asymptote
        free.append(trend(x, y).asymptote)
        anchored.append(trend(x, y, max(before, 0)).asymptote)
    assert np.var(anchored) < 0.8 * np.var(free)
    assert trends(x, y, anchored=True)[-1].asymptote == anchored[-1]


@pytest.mark.parametrize("exponent", [0.1, 0.5, 2.0])
def test_four_exact_points_give_the_asymptote(exponent: float) -> None:
    # Three unknowns.
    x = np.array([1e6, 2e6, 4e6, 8e6])
    found = trend(x, 3 + 0.5 * (x / 1e6) ** -exponent)
    assert found.asymptote == pytest.approx(3, abs=1e-6)
    assert found.scale == pytest.approx(0.5 * 1e6**exponent, rel=1e-6)
    assert found.exponent == pytest.approx(exponent, rel=1e-6)
    assert found.at(np.inf) == found.asymptote


def test_a_trend_is_the_least_squares() -> None:
    x, y = observed(12, 0)
    found = trend(x, y)
    least = np.sum((found.at(x) - y) ** 2)
    for c, a, b in [(1.001, 1, 1), (1, 1.01, 1), (1, 1, 1.01), (0.999, 0.99, 0.99)]:
        moved = Trend(found.asymptote * c, found.scale * a, found.exponent * b)
        assert np.sum((moved.at(x) - y) ** 2) > least


@pytest.mark.parametrize("y", [np.full(8, 2.0), 2 + TOKENS / 1e6])
def test_losses_that_do_not_fall_have_no_level(y: np.ndarray) -> None:
    found = trends(TOKENS, y)
    assert found[-1].scale == 0
    assert found[-1].asymptote == pytest.approx(y.mean())
    assert working_level(found) is None
    assert prediction_level(found) is None
    assert not pays_too_little(TOKENS, y, 1e9, 10.0)


def test_the_working_level_leaves_out_what_is_impossible() -> None:
    possible, impossible, flat = Trend(0.5, 1, 1), Trend(-0.5, 1, 1), Trend(0.5, 0, 1)
    assert working_level([possible, impossible, possible, possible]) == 5
    assert working_level([flat, possible]) == 4
    assert working_level([possible, impossible]) is None
    assert working_level([]) is None


def test_the_prediction_level_begins_the_last_monotone_part() -> None:
    def of(*sequence: float) -> int | None:
        return prediction_level([Trend(c, 1, 1) for c in sequence])

    assert of(5, 4, 3) == 3
    assert of(1, 5, 4, 3) == 4
    assert of(-1, 5, 4, 3) == 4
    assert of(3, 3, 4, 5) == 3
    assert of(5, 4, 5) is None
    assert of(5, 4) is None


def test_predictions_past_the_prediction_level_hold_at_four_times_the_data() -> None:
    # Noise of 0.2%, within half a point.
    told = 0
    for seed in range(8):
        x, y = observed(40, seed)
        found = trends(x, y)
        if prediction_level(found) is not None:
            told += 1
            assert abs(found[-1].at(4 * x[-1]) - wrong(4 * x[-1])) < 0.5
    assert told >= 2


def test_the_rule_stops_where_the_law_says() -> None:
    left = 30 * (TOKENS**-0.5 - TOKENS[-1] ** -0.5)
    for gain in (10.0, 0.1, 0.05, 0.01):
        expected = max(5, 1 + int(np.argmax(left <= gain)))
        assert stop_level(TOKENS, LOSSES, TOKENS[-1], gain) == expected
        stops = [pays_too_little(TOKENS[:n], LOSSES[:n], TOKENS[-1], gain) for n in range(1, 9)]
        assert stops == [n >= expected for n in range(1, 9)]
    # To infinity: the distance to the asymptote.
    assert stop_level(TOKENS, LOSSES, np.inf, 0.1) == 1 + int(np.argmax(LOSSES - 2 <= 0.1 + 1e-9)) == 8


def test_exact_losses_settle_at_once() -> None:
    assert agreement_level(TOKENS, LOSSES, TOKENS[-1], 1e-6) == 5
    assert asymptotes(trends(TOKENS, LOSSES)) == pytest.approx(2, abs=1e-6)


def runs(**curves: np.ndarray) -> Points:
    return {
        "run": np.concatenate([[name] * len(y) for name, y in curves.items()]),
        "tokens": np.concatenate([TOKENS[: len(y)] for y in curves.values()]),
        "loss": np.concatenate(list(curves.values())),
    }


def test_report_of_exact_runs() -> None:
    points = runs(one=LOSSES, two=LOSSES + 1, short=LOSSES[:3], flat=np.full(8, 2.0))
    said = report(points, OPTIONS.model_copy(update={"tau": 0.05}))
    one, flat, two = sorted(said["details"]["runs"], key=lambda entry: (entry["run"] != "one", entry["run"]))
    assert one["asymptote"] == {key: pytest.approx(2, abs=1e-6) for key in ("value", "low", "high")}
    assert two["asymptote"]["value"] == pytest.approx(3, abs=1e-6)
    assert (one["working_level"], one["prediction_level"], one["levels"]) == (3, 3, 8)
    assert one["predicted"][1]["tokens"] == 4 * TOKENS[-1]
    assert one["predicted"][1]["value"] == pytest.approx(2 + 30 * (4 * TOKENS[-1]) ** -0.5)
    # 30 (64000^-0.5 - 128000^-0.5) = 0.035 nats are left at the seventh level, 0.084 at the sixth.
    assert one["stop"] == {
        "level": 7,
        "tokens": 64000.0,
        "saved_tokens": 64000.0,
        "lost_loss": pytest.approx(LOSSES[6] - LOSSES[7]),
    }
    assert one["settled"]["error"] == pytest.approx(0, abs=1e-6)
    assert flat["stop"] is None
    assert np.isnan(said["predicted"][points["run"] == "short"]).all()
    assert said["held_out"]["later_tokens"]["learning-curve"]["rmse"] == pytest.approx(0, abs=1e-6)
    expected = np.sqrt(np.mean([(LOSSES[5] - LOSSES[n]) ** 2 for n in (6, 7)] * 2 + [0, 0]))
    # The short run holds out one of its three points, and two show no trend.
    assert said["held_out"]["later_tokens"]["last_loss"]["rmse"] == pytest.approx(expected)
    notes = " ".join(said["notes"])
    assert "1 runs have fewer than 4 held-out losses" in notes
    assert "The loss of flat does not fall" in notes
    assert "2 of the 3 runs would have ended early: 33% of all tokens saved" in notes
    assert [entry["run"] for entry in said["recommendation"]] == ["one", "two"]
    assert "would bring its held-out loss from 2.0839 to 2.0593" in said["recommendation"][0]["sentence"]


def test_the_interval_holds_the_asymptote() -> None:
    held = 0
    for seed in range(10):
        noisy = LOSSES + 0.005 * np.random.default_rng(seed).standard_normal(8)
        interval = report(runs(one=noisy), OPTIONS)["details"]["runs"][0]["asymptote"]
        held += interval["low"] <= 2 <= interval["high"]
    assert held >= 7


def test_trends_that_fail_their_test_predict_nothing() -> None:
    said = report(runs(one=np.append(LOSSES[:6], [1.0, 3.0])), OPTIONS)
    assert said["recommendation"] == []
    assert any(note.startswith("No loss is predicted, since the trends of the first 80%") for note in said["notes"])
    said = report(runs(one=LOSSES[:2]), OPTIONS)
    assert said["details"]["runs"] == []
    assert any("could not be tested: No run has three losses" in note for note in said["notes"])


def test_points_and_fit_json(tmp_path: Path) -> None:
    nodes = pd.DataFrame({"node": ["d", "d/p", "d/p/a", "d/p/b"], "family": [None, "prune", "recover", "recover"]})
    rows = [("d/p/a", x, "validation", y) for x, y in zip(TOKENS, LOSSES, strict=True)]
    rows += [("d/p/a", 0.0, "validation", 9.0), ("d/p/a", 1e3, "train", 9.0), ("d/p/b", 1e3, "validation", 9.0)]
    curves = pd.DataFrame(rows[::-1], columns=["node", "tokens", "split", "loss"])
    found = learning_curve.points({"nodes": nodes, "curves": curves}, OPTIONS.model_copy(update={"nodes": ["*/a"]}))
    assert found["run"].tolist() == ["d/p/a"] * 8
    assert found["tokens"].tolist() == TOKENS.tolist()
    assert found["loss"].tolist() == LOSSES.tolist()
    nodes.to_parquet(tmp_path / "nodes.parquet")
    curves.to_parquet(tmp_path / "curves.parquet")
    said = fit_law("learning-curve", tmp_path, {"bootstrap": 10}, tmp_path / "fit")
    (reason,) = said["passes"]["reasons"]
    assert reason.startswith("It rests on 2 runs")
    assert json.loads((tmp_path / "fit" / "fit.json").read_text())["details"]["runs"][0]["run"] == "d/p/a"
    table = pd.read_parquet(tmp_path / "fit" / "points.parquet")
    assert table["predicted"][table["run"] == "d/p/a"].to_numpy() == pytest.approx(LOSSES)
