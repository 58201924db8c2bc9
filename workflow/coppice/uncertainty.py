"""Intervals of measured means and ratios, paired comparisons of nodes, and what training with another seed changes.

Sources: Madaan et al., Quantifying Variance in Evaluation Benchmarks (arXiv 2406.10229), for the interval over
items, the variance over seeds, the signal-to-noise ratio and the monotonicity; lm-evaluation-harness for the standard
error of a mean (sample standard deviation over sqrt(n)); Wilson (Journal of the American Statistical Association 22,
1927) for the interval of a share; McNemar (Psychometrika 12, 1947) for paired right and wrong
answers; Holm (Scandinavian Journal of Statistics 6, 1979) for many tests at once.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np

_CHUNK = 1 << 22  # drawn items held in memory at once


@dataclass(frozen=True)
class PairedDifference:
    """Mean of first - second over shared items, its standard error and its interval, in the items' unit."""

    difference: float
    stderr: float
    low: float
    high: float


@dataclass(frozen=True)
class PairedBootstrap:
    """Of each pair [pairs]: the difference, its standard error and 95% interval, in the items' unit; its p value."""

    difference: np.ndarray
    stderr: np.ndarray
    low: np.ndarray
    high: np.ndarray
    p_value: np.ndarray


def mean_stderr(values: np.ndarray) -> float:
    """Standard error of the mean of `values` [n], n >= 2: s / sqrt(n), with s^2 = sum (x - mean)^2 / (n - 1).

    For 0/1 items this is the standard error that lm-eval prints next to an accuracy.
    """
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def mean_interval(mean: float, stderr: float, level: float = 0.95) -> tuple[float, float]:
    """Normal interval mean +- z stderr, with z = Phi^-1((1 + level) / 2), in the unit of `mean`."""
    half = NormalDist().inv_cdf((1 + level) / 2) * stderr
    return mean - half, mean + half


def interval(row: Mapping[str, Any]) -> tuple[float, float] | None:
    """The 95% interval of a measurement: its own (low, high), or the normal one of its stderr; None with neither."""
    if row["low"] is not None and row["high"] is not None:
        return row["low"], row["high"]
    return None if row["stderr"] is None else mean_interval(row["value"], row["stderr"])


def proportion_interval(right: int, items: int, level: float = 0.95) -> tuple[float, float]:
    """Wilson's score interval of the share p = right / items, items >= 1: within 0 to 1, and never without width.

    (p + z^2 / 2n +- z sqrt(p (1 - p) / n + z^2 / 4n^2)) / (1 + z^2 / n), z = Phi^-1((1 + level) / 2), n = items.
    """
    square = NormalDist().inv_cdf((1 + level) / 2) ** 2
    share = right / items
    centre = share + square / (2 * items)
    half = math.sqrt(square * (share * (1 - share) / items + square / (4 * items**2)))
    scale = 1 + square / items
    # The ends of none and of all are exact; rounding would miss them.
    low = 0.0 if right == 0 else (centre - half) / scale
    high = 1.0 if right == items else (centre + half) / scale
    return low, high


def percentile_interval(samples: np.ndarray, level: float = 0.95) -> tuple[float, float]:
    """Percentile interval of bootstrap `samples` [draws]: the quantiles (1 - level)/2 and (1 + level)/2."""
    low, high = np.quantile(samples, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def resampled_sums(columns: np.ndarray, resamples: int, seed: int) -> np.ndarray:
    """Sums of `columns` [n, k] over n rows drawn with replacement, `resamples` times: [resamples, k].

    A row is an item, or a cluster (a document, a run) whose sums were taken before.
    """
    generator = np.random.default_rng(seed)
    rows = len(columns)
    sums = np.empty((resamples, columns.shape[1]))
    step = max(1, _CHUNK // rows)
    for start in range(0, resamples, step):
        chunk = sums[start : start + step]
        drawn = generator.integers(rows, size=(len(chunk), rows), dtype=np.int32)
        first = rows * np.arange(len(chunk))[:, None]
        counts = np.bincount((drawn + first).ravel(), minlength=chunk.shape[0] * rows).reshape(drawn.shape)
        np.matmul(counts.astype(float), columns, out=chunk)
    return sums


def bootstrap_means(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of `values` [n] over items drawn with replacement: [resamples], in the unit of `values`."""
    return resampled_sums(np.asarray(values, float)[:, None], resamples, seed)[:, 0] / len(values)


def bootstrap_intervals(columns: np.ndarray, level: float = 0.95, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Percentile intervals [2, k] of the means of `columns` [n, k], in their units; the same rows are drawn for all."""
    columns = np.asarray(columns, float)
    means = resampled_sums(columns, resamples, seed) / len(columns)
    ends = np.quantile(means, [(1 - level) / 2, (1 + level) / 2], axis=0)
    # A mean lies between the items; its rounding need not.
    return np.clip(ends, columns.min(axis=0), columns.max(axis=0))


def ratio_of_sums(numerators: np.ndarray, denominators: np.ndarray) -> tuple[float, float]:
    """R = sum a / sum b over clusters [n >= 2], and its standard error by the delta method.

    se^2 = n / (n - 1) sum (a - R b)^2 / (sum b)^2. With a the negative log-likelihood (nats) and b the tokens of a
    document, R is the log perplexity, and the documents, not the tokens, are what was sampled.
    """
    numerators, denominators = np.asarray(numerators, float), np.asarray(denominators, float)
    ratio = numerators.sum() / denominators.sum()
    count = len(numerators)
    squares = np.sum((numerators - ratio * denominators) ** 2)
    return float(ratio), float(np.sqrt(count / (count - 1) * squares) / denominators.sum())


def bootstrap_ratios(
    numerators: np.ndarray, denominators: np.ndarray, resamples: int = 2000, seed: int = 0
) -> np.ndarray:
    """R = sum a / sum b over clusters drawn with replacement: [resamples]."""
    sums = resampled_sums(np.column_stack([numerators, denominators]).astype(float), resamples, seed)
    return sums[:, 0] / sums[:, 1]


def delta_stderr(gradient: np.ndarray | float, covariance: np.ndarray | float) -> float:
    """Standard error of f(x) from the gradient of f [k] and the covariance of x [k, k]: sqrt(g^T C g)."""
    slopes = np.atleast_1d(np.asarray(gradient, float))
    return float(np.sqrt(slopes @ np.atleast_2d(covariance) @ slopes))


def perplexity(
    log_losses: np.ndarray, tokens: np.ndarray, level: float = 0.95
) -> tuple[float, float, tuple[float, float]]:
    """exp(sum nll / sum tokens) over documents [n >= 2], its standard error, and its interval.

    The interval is the exponential of the log perplexity's, so it is never below zero.
    """
    log_perplexity, stderr = ratio_of_sums(log_losses, tokens)
    value = float(np.exp(log_perplexity))
    low, high = np.exp(mean_interval(log_perplexity, stderr, level))
    return value, delta_stderr(value, stderr**2), (float(low), float(high))


def paired_difference(first: np.ndarray, second: np.ndarray, level: float = 0.95) -> PairedDifference:
    """Mean of first - second over the same items [n >= 2] in the same order, with its normal interval.

    Var(first - second) = Var(first) + Var(second) - 2 Cov, so that what the two nodes share cancels.

    Raises ValueError where the two do not have the same number of items.
    """
    first, second = np.asarray(first, float), np.asarray(second, float)
    if first.shape != second.shape:
        raise ValueError(
            f"A paired comparison needs the same items on both sides, but one has {len(first)} and "
            f"the other {len(second)}."
        )
    differences = first - second
    mean, stderr = float(differences.mean()), mean_stderr(differences)
    low, high = mean_interval(mean, stderr, level)
    return PairedDifference(mean, stderr, low, high)


def paired_bootstrap(
    differences: np.ndarray, weights: np.ndarray, resamples: int = 2000, seed: int = 0
) -> PairedBootstrap:
    """Tests of sum d / sum w = 0 for many pairs of nodes over the same items, by one bootstrap of the items.

    `differences` [n, pairs] holds an item's score of one node less the other's, `weights` [n] what the sum is divided
    by: ones for a mean, the tokens of a document for nats per token.

    With k the smaller number of the B resamples on either side of zero, p = 2 (k + 1) / (B + 1), but never below that
    of Student's t of the difference over its standard error. A bootstrap of few items is too sure. Where k = 0, which B
    resamples cannot resolve, that of t is taken alone. A test that gives each of m nonzero differences a random sign
    cannot resolve less than 2^(1 - m), so p is never below that either.
    """
    columns = np.column_stack([differences, weights]).astype(float)
    sums = resampled_sums(columns, resamples, seed)
    samples = sums[:, :-1] / sums[:, -1:]
    difference = columns[:, :-1].sum(axis=0) / columns[:, -1].sum()
    stderr = samples.std(axis=0, ddof=1)
    low, high = np.quantile(samples, [0.025, 0.975], axis=0)
    crossing = np.minimum((samples <= 0).sum(axis=0), (samples >= 0).sum(axis=0))
    p_value = 2 * (crossing + 1) / (resamples + 1)
    tails = student_tails(columns[:, :-1], columns[:, -1])
    p_value = np.where(crossing == 0, tails, np.maximum(p_value, tails))
    signs = 2.0 ** (1 - np.count_nonzero(columns[:, :-1], axis=0))
    return PairedBootstrap(difference, stderr, low, high, np.clip(p_value, signs, 1.0))


def student_tails(differences: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Two-sided p of Student's t, n - 1 degrees of freedom, of R = sum d / sum w for each column of d [n, pairs].

    The standard error is that of `ratio_of_sums`. p is 0 where d is R w throughout, 1 where R is 0 or n is 1.
    """
    from scipy.special import stdtr

    items = len(differences)
    ratio = differences.sum(axis=0) / weights.sum()
    if items < 2:
        return np.ones(len(ratio))
    squares = np.sum((differences - weights[:, None] * ratio) ** 2, axis=0)
    stderr = np.sqrt(items / (items - 1) * squares) / weights.sum()
    size = np.divide(np.abs(ratio), stderr, out=np.where(ratio == 0, 0.0, np.inf), where=stderr > 0)
    return 2 * stdtr(items - 1, -size)


def flip_table(before: np.ndarray, after: np.ndarray) -> np.ndarray:
    """Items by whether they were right before and after: counts [2, 2], where [1, 0] is right, then wrong.

    The share of flips is ([1, 0] + [0, 1]) / n.
    """
    pairs = 2 * np.asarray(before, int) + np.asarray(after, int)
    return np.bincount(pairs, minlength=4).reshape(2, 2)


def mcnemar(right_to_wrong: int, wrong_to_right: int) -> float:
    """McNemar's exact p value, two-sided: of m items that flipped, each had an even chance of either direction.

    p = min(1, 2 sum_{i <= k} C(m, i) / 2^m), k the smaller count.
    """
    flips, fewer = right_to_wrong + wrong_to_right, min(right_to_wrong, wrong_to_right)
    drawn = np.arange(1, fewer + 1)
    # ln C(m, i) as a running sum, because C(m, i) itself is beyond floats where many items flipped.
    log_terms = np.concatenate([[0.0], np.cumsum(np.log((flips - drawn + 1) / drawn))])
    return float(min(1.0, 2 * np.exp(np.logaddexp.reduce(log_terms) - flips * math.log(2))))


def holm(p_values: np.ndarray) -> np.ndarray:
    """p values [m] adjusted for m tests at once: the largest (m - j + 1) p_(j) up to each one's rank, at most 1.

    Rejecting those below alpha makes any false rejection among the m at most alpha likely, however they depend.
    """
    p_values = np.asarray(p_values, float)
    order = np.argsort(p_values, kind="stable")
    steps = np.maximum.accumulate(p_values[order] * np.arange(len(p_values), 0, -1))
    adjusted = np.empty_like(p_values)
    adjusted[order] = np.minimum(steps, 1.0)
    return adjusted


def seed_deviation(scores: np.ndarray) -> float:
    """E(S, M) of `scores` [seeds >= 2, checkpoints]: standard deviation over seeds, averaged over checkpoints."""
    return float(np.std(scores, axis=0, ddof=1).mean())


def signal_to_noise(scores: np.ndarray) -> float | None:
    """Mean over standard deviation of `scores` [seeds >= 2]; None where the seeds do not differ."""
    deviation = np.std(scores, ddof=1)
    return float(np.mean(scores) / deviation) if deviation > 0 else None


def deviation_interval(deviation: float, count: int, level: float = 0.95) -> tuple[float, float]:
    """Interval of a standard deviation s of `count` normal draws: s sqrt((count - 1) / chi2), at both quantiles."""
    from scipy.special import gammaincinv

    freedom = count - 1
    quantiles = 2 * gammaincinv(freedom / 2, [(1 + level) / 2, (1 - level) / 2])
    low, high = deviation * np.sqrt(freedom / quantiles)
    return float(low), float(high)


def monotonicity(values: np.ndarray) -> float:
    """Kendall's tau-b of `values` [n] with their index: 1 if they only rise, -1 if they only fall, 0 if constant."""
    values = np.asarray(values, float)
    earlier, later = np.triu_indices(len(values), k=1)
    signs = np.sign(values[later] - values[earlier])
    untied = np.count_nonzero(signs)
    return float(signs.sum() / math.sqrt(len(signs) * untied)) if untied else 0.0
