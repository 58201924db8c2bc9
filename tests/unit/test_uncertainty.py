from __future__ import annotations

import numpy as np
import pytest

from coppice.uncertainty import (
    bootstrap_means,
    bootstrap_ratios,
    delta_stderr,
    mean_interval,
    mean_stderr,
    paired_difference,
    percentile_interval,
    perplexity,
    ratio_of_sums,
    resampled_sums,
)


def accuracy_items(right: int, items: int) -> np.ndarray:
    return np.arange(items) < right


def test_interval_of_an_accuracy_is_the_analytic_one_and_the_bootstrap_agrees() -> None:
    # T-G3: S = .7008, n = 10042, half-width 1.96 sqrt(S (1 - S) / n) = .00895
    items = accuracy_items(round(0.7008 * 10042), 10042)
    low, high = mean_interval(items.mean(), mean_stderr(items))
    assert (high - low) / 2 == pytest.approx(0.00895, rel=1e-3)
    drawn_low, drawn_high = percentile_interval(bootstrap_means(items, resamples=2000, seed=1))
    assert drawn_high - drawn_low == pytest.approx(high - low, rel=0.05)
    assert 1.96 * bootstrap_means(items, resamples=2000, seed=1).std() == pytest.approx(0.00895, rel=0.03)


def test_stderr_is_the_sample_standard_deviation_over_root_n() -> None:
    assert mean_stderr(np.array([0, 1, 1, 1])) == pytest.approx(0.25)
    values = np.array([1.0, 2.0, 4.0])
    assert mean_stderr(values) == pytest.approx(np.sqrt(((values - 7 / 3) ** 2).sum() / 2 / 3))


def test_a_level_sets_the_width() -> None:
    low, high = mean_interval(1.0, 2.0, level=0.6826894921370859)
    assert (low, high) == pytest.approx((-1.0, 3.0))
    assert percentile_interval(np.arange(101.0), level=0.8) == pytest.approx((10, 90))


def test_intervals_cover_the_truth_as_often_as_they_say() -> None:
    generator = np.random.default_rng(0)
    draws = generator.normal(3.0, 2.0, size=(2000, 60))
    normal = [low <= 3.0 <= high for low, high in (mean_interval(x.mean(), mean_stderr(x)) for x in draws)]
    assert np.mean(normal) == pytest.approx(0.95, abs=0.02)
    intervals = [percentile_interval(bootstrap_means(x, 500, seed)) for seed, x in enumerate(draws[:400])]
    assert np.mean([low <= 3.0 <= high for low, high in intervals]) == pytest.approx(0.95, abs=0.035)


def test_resampling_is_seeded_and_draws_whole_rows() -> None:
    columns = np.arange(5000.0)[:, None] * [1.0, 2.0]
    sums = resampled_sums(columns, resamples=1000, seed=3)
    assert np.array_equal(sums, resampled_sums(columns, resamples=1000, seed=3))
    assert not np.array_equal(sums, resampled_sums(columns, resamples=1000, seed=4))
    assert len(np.unique(sums[:, 0])) > 990
    assert np.allclose(sums[:, 1], 2 * sums[:, 0])


def test_log_perplexity_takes_documents_as_clusters() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(50, 400, size=300)
    difficulty = generator.normal(3.0, 0.4, size=300)
    losses = tokens * difficulty
    ratio, stderr = ratio_of_sums(losses, tokens)
    assert ratio == pytest.approx(losses.sum() / tokens.sum())
    assert stderr == pytest.approx(bootstrap_ratios(losses, tokens, 4000).std(), rel=0.05)
    # Tokens taken as independent would give an error about sqrt(225) times too small.
    assert stderr > 5 * 0.4 / np.sqrt(tokens.sum())


def test_ratio_of_equal_clusters_is_a_mean() -> None:
    values = np.array([1.0, 2.0, 4.0, 9.0])
    ratio, stderr = ratio_of_sums(5 * values, np.full(4, 5))
    assert (ratio, stderr) == pytest.approx((values.mean(), mean_stderr(values)))


def test_perplexity_interval_is_the_exponential_of_the_log() -> None:
    losses, tokens = np.array([30.0, 44.0, 25.0]), np.array([10, 20, 10])
    log_perplexity, log_stderr = ratio_of_sums(losses, tokens)
    value, stderr, (low, high) = perplexity(losses, tokens)
    assert value == pytest.approx(np.exp(99 / 40))
    assert stderr == pytest.approx(value * log_stderr)
    assert np.log([low, high]) == pytest.approx(mean_interval(log_perplexity, log_stderr))


def test_delta_stderr_of_a_product() -> None:
    # Var(x y) = y^2 Var x + x^2 Var y + 2 x y Cov
    assert delta_stderr([3.0, 2.0], [[0.1, 0.02], [0.02, 0.3]]) == pytest.approx(np.sqrt(0.9 + 1.2 + 0.24))


def test_paired_interval_is_narrower_than_unpaired_where_items_are_shared() -> None:
    # T-G4
    generator = np.random.default_rng(0)
    difficulty = generator.random(1000)
    dense = difficulty < 0.7
    pruned = dense ^ (generator.random(1000) < 0.05)
    paired = paired_difference(dense, pruned)
    unpaired = np.hypot(mean_stderr(dense), mean_stderr(pruned))
    assert paired.difference == pytest.approx(dense.mean() - pruned.mean())
    assert paired.stderr < 0.5 * unpaired
    assert (paired.low, paired.high) == pytest.approx(mean_interval(paired.difference, paired.stderr))


def test_pairing_refuses_different_items() -> None:
    with pytest.raises(ValueError, match="one has 3 and the other 2"):
        paired_difference(np.zeros(3), np.zeros(2))
