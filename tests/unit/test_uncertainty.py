from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest, ttest_1samp

from coppice.uncertainty import (
    bootstrap_intervals,
    bootstrap_means,
    bootstrap_ratios,
    delta_stderr,
    deviation_interval,
    flip_table,
    holm,
    mcnemar,
    mean_interval,
    mean_stderr,
    monotonicity,
    paired_bootstrap,
    paired_difference,
    percentile_interval,
    perplexity,
    proportion_interval,
    ratio_of_sums,
    resampled_sums,
    seed_deviation,
    signal_to_noise,
    student_tails,
)


def accuracy_items(right: int, items: int) -> np.ndarray:
    return np.arange(items) < right


def test_interval_of_an_accuracy_is_the_analytic_one_and_the_bootstrap_agrees() -> None:
    # T-G3: S = .7008, n = 10042, half-width 1.96 sqrt(S (1 - S) / n) = .00895
    items = accuracy_items(round(0.7008 * 10042), 10042)
    low, high = mean_interval(items.mean(), mean_stderr(items))
    assert (high - low) / 2 == pytest.approx(0.00895, rel=1e-3)
    drawn = bootstrap_means(items, resamples=2000, seed=1)
    drawn_low, drawn_high = percentile_interval(drawn)
    assert drawn_high - drawn_low == pytest.approx(high - low, rel=0.05)
    assert 1.96 * drawn.std() == pytest.approx(0.00895, rel=0.03)


def test_stderr_is_the_sample_standard_deviation_over_root_n() -> None:
    assert mean_stderr(np.array([0, 1, 1, 1])) == pytest.approx(0.25)
    values = np.array([1.0, 2.0, 4.0])
    assert mean_stderr(values) == pytest.approx(np.sqrt(((values - 7 / 3) ** 2).sum() / 2 / 3))


def test_a_level_sets_the_width() -> None:
    low, high = mean_interval(1.0, 2.0, level=0.6826894921370859)
    assert (low, high) == pytest.approx((-1.0, 3.0))
    assert percentile_interval(np.arange(101.0), level=0.8) == pytest.approx((10, 90))


@pytest.mark.parametrize(("right", "items"), [(0, 1), (1, 1), (0, 40), (3, 40), (20, 40), (299, 300), (7037, 10042)])
@pytest.mark.parametrize("level", [0.8, 0.95])
def test_the_interval_of_a_share_is_wilsons(right: int, items: int, level: float) -> None:
    expected = binomtest(right, items).proportion_ci(level, method="wilson")
    assert proportion_interval(right, items, level) == pytest.approx((expected.low, expected.high), abs=1e-12)


def test_all_right_is_no_certainty() -> None:
    low, high = proportion_interval(300, 300)
    assert low == pytest.approx(0.98736, abs=5e-6)
    assert high == 1
    assert proportion_interval(0, 300) == (0, pytest.approx(1 - low))


def test_bootstrap_intervals_stay_among_the_items() -> None:
    generator = np.random.default_rng(0)
    columns = np.column_stack([generator.exponential(size=12) ** 4, np.full(12, 0.1), -generator.random(12)])
    low, high = bootstrap_intervals(columns)
    assert (columns.min(axis=0) <= low).all()
    assert (high <= columns.max(axis=0)).all()
    assert mean_interval(columns[:, 0].mean(), mean_stderr(columns[:, 0]))[0] < 0 < low[0]
    assert low[1] == high[1] == 0.1


def test_bootstrap_intervals_are_the_same_each_time_and_of_each_column_alone() -> None:
    columns = np.random.default_rng(1).normal(size=(50, 2))
    ends = bootstrap_intervals(columns)
    assert np.array_equal(ends, bootstrap_intervals(columns))
    assert not np.array_equal(ends, bootstrap_intervals(columns, seed=1))
    for column, end in zip(columns.T, ends.T, strict=True):
        assert tuple(end) == pytest.approx(percentile_interval(bootstrap_means(column)))


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
    drawn = np.random.default_rng(3).integers(5000, size=(1, 5000), dtype=np.int32)
    assert sums[0, 0] == pytest.approx(columns[drawn[0], 0].sum())


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


def test_paired_bootstrap_is_that_of_the_differences() -> None:
    generator = np.random.default_rng(0)
    tokens = generator.integers(20, 60, size=300)
    first, second, third = (tokens * generator.normal(mean, 0.3, size=300) for mean in (2.0, 2.02, 3.0))
    found = paired_bootstrap(np.column_stack([first - second, first - third]), tokens, resamples=2000, seed=5)
    alone = bootstrap_ratios(first - second, tokens, resamples=2000, seed=5)
    ratio, stderr = ratio_of_sums(first - second, tokens)
    assert found.difference[0] == pytest.approx(ratio)
    assert found.stderr[0] == pytest.approx(alone.std(ddof=1)) == pytest.approx(stderr, rel=0.05)
    assert (found.low[0], found.high[0]) == pytest.approx(percentile_interval(alone))
    fewer = min((alone <= 0).sum(), (alone >= 0).sum())
    assert fewer > 0
    tail = student_tails((first - second)[:, None], tokens)[0]
    assert found.p_value[0] == pytest.approx(max(2 * (fewer + 1) / 2001, tail))
    assert found.high[1] < 0
    assert found.p_value[1] < 1e-6


def test_a_paired_interval_by_resampling_is_narrower_than_an_unpaired_one() -> None:
    # T-G4
    generator = np.random.default_rng(0)
    difficulty = generator.random(1000)
    dense = difficulty < 0.7
    pruned = dense ^ (generator.random(1000) < 0.05)
    found = paired_bootstrap((dense.astype(int) - pruned)[:, None], np.ones(1000))
    unpaired = np.hypot(bootstrap_means(dense).std(), bootstrap_means(pruned, seed=1).std())
    assert found.high[0] - found.low[0] < 0.5 * 2 * 1.96 * unpaired
    assert found.stderr[0] == pytest.approx(paired_difference(dense, pruned).stderr, rel=0.05)


def test_p_values_of_equals_are_uniform_and_do_not_reject_too_often() -> None:
    differences = np.random.default_rng(0).normal(size=(200, 1000))
    p_values = paired_bootstrap(differences, np.ones(200), resamples=1000).p_value
    assert np.mean(p_values < 0.05) == pytest.approx(0.05, abs=0.025)
    assert np.mean(p_values) == pytest.approx(0.5, abs=0.03)
    assert holm(p_values).min() > 0.05


def test_few_flips_prove_nothing() -> None:
    differences = np.zeros((500, 3))
    differences[:3, 0] = 1  # three items flipped, all one way: a fair coin does so one time in four
    differences[:10, 1] = 1
    p_values = paired_bootstrap(differences, np.ones(500)).p_value
    assert p_values[0] >= 0.25 == pytest.approx(mcnemar(0, 3))
    assert pytest.approx(mcnemar(10, 0)) == 2**-9 <= p_values[1] < 0.02
    assert p_values[2] == 1


def test_student_tails_are_those_of_the_paired_t_test() -> None:
    differences = np.random.default_rng(0).standard_normal((12, 5)) + 0.4
    assert student_tails(differences, np.ones(12)) == pytest.approx(ttest_1samp(differences, 0).pvalue)
    # One value throughout, none at all, and a difference far beyond what 1 - Phi resolves.
    sure = np.column_stack([np.ones(4), np.zeros(4)])
    assert student_tails(sure, np.ones(4)).tolist() == [0, 1]
    far = student_tails(5 + 1e-3 * differences, np.ones(12))
    assert np.all((far > 0) & (far < 1e-20))
    assert student_tails(np.ones((1, 1)), np.ones(1)).tolist() == [1]


def test_p_values_of_few_items_are_no_surer_than_the_t_test() -> None:
    generator = np.random.default_rng(0)
    null = generator.standard_normal((10, 2000))
    found = paired_bootstrap(null, np.ones(10), resamples=400)
    assert np.mean(found.p_value < 0.05) == pytest.approx(0.05, abs=0.015)


def test_flips_sum_to_the_items() -> None:
    before, after = np.array([1, 1, 1, 0, 0, 1], bool), np.array([1, 0, 0, 1, 0, 1], bool)
    table = flip_table(before, after)
    assert table.tolist() == [[1, 1], [2, 2]]
    assert table.sum() == len(before)
    assert table[1].sum() == before.sum()
    assert table[:, 1].sum() == after.sum()


@pytest.mark.parametrize(("lost", "gained"), [(0, 0), (1, 0), (3, 9), (12, 12), (60, 21), (4000, 4200), (0, 3000)])
def test_mcnemar_is_the_exact_binomial_test(lost: int, gained: int) -> None:
    from scipy.stats import binomtest

    expected = binomtest(lost, lost + gained, 0.5).pvalue if lost + gained else 1.0
    assert mcnemar(lost, gained) == pytest.approx(expected, rel=1e-9, abs=1e-300)
    assert mcnemar(lost, gained) == mcnemar(gained, lost)


def test_holm_by_hand() -> None:
    # Ranked .01 * 4, .02 * 3, .03 * 2 (not below the one before), .9 * 1
    assert holm(np.array([0.02, 0.9, 0.01, 0.03])) == pytest.approx([0.06, 0.9, 0.04, 0.06])
    assert holm(np.array([0.4, 0.5])) == pytest.approx([0.8, 0.8])
    assert holm(np.array([0.7, 0.8])) == pytest.approx([1, 1])
    assert len(holm(np.array([]))) == 0


def test_holm_keeps_false_alarms_among_many_tests_at_the_level() -> None:
    p_values = np.random.default_rng(0).random((2000, 20))
    alarms = np.mean([holm(row).min() < 0.05 for row in p_values])
    assert alarms == pytest.approx(0.05, abs=0.015)


def test_deviation_over_seeds_of_known_noise() -> None:
    # T-G1: 10 seeds x 21 checkpoints, scores mu_t + N(0, sigma)
    generator = np.random.default_rng(0)
    levels = np.linspace(0.25, 0.7, 21)
    found = [seed_deviation(levels + generator.normal(0, 0.008, size=(10, 21))) for _ in range(100)]
    assert np.mean(np.abs(np.array(found) / 0.008 - 1) < 0.1) > 0.9
    # The sample deviation of 10 normal draws is .9727 sigma on average.
    assert np.mean(found) == pytest.approx(0.9727 * 0.008, rel=0.01)


def test_interval_of_a_deviation_is_that_of_chi_square() -> None:
    from scipy.stats import chi2

    low, high = deviation_interval(2.0, 5)
    assert (low, high) == pytest.approx((2 * np.sqrt(4 / chi2.ppf(0.975, 4)), 2 * np.sqrt(4 / chi2.ppf(0.025, 4))))
    deviations = np.random.default_rng(0).normal(0, 1, size=(2000, 5)).std(axis=1, ddof=1)
    intervals = np.outer(deviations, deviation_interval(1.0, 5))
    assert np.mean((intervals[:, 0] < 1) & (intervals[:, 1] > 1)) == pytest.approx(0.95, abs=0.015)


def test_signal_to_noise() -> None:
    assert signal_to_noise(np.array([1.0, 2.0, 3.0])) == pytest.approx(2.0)
    assert signal_to_noise(np.array([2.0, 2.0])) is None


def test_monotonicity_of_what_only_rises_only_falls_and_stays() -> None:
    # T-G2
    rising = np.cumsum(np.random.default_rng(0).random(21))
    assert monotonicity(rising) == 1
    assert monotonicity(rising[::-1]) == -1
    assert monotonicity(np.full(21, 0.3)) == monotonicity(np.array([1.0])) == 0


def test_monotonicity_is_the_rank_correlation_with_the_step() -> None:
    from scipy.stats import kendalltau

    values = np.random.default_rng(0).integers(0, 6, size=30)
    assert monotonicity(values) == pytest.approx(kendalltau(np.arange(30), values).statistic)
