"""Intervals of measured means and ratios, and paired comparisons of two nodes.

Sources: Madaan et al., Quantifying Variance in Evaluation Benchmarks (arXiv 2406.10229), for the interval over
items; lm-evaluation-harness for the standard error of a mean (sample standard deviation over sqrt(n)).
"""

from __future__ import annotations

from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

_CHUNK = 1 << 22  # drawn items held in memory at once


@dataclass(frozen=True)
class PairedDifference:
    """Mean of first - second over shared items, its standard error and its interval, in the items' unit."""

    difference: float
    stderr: float
    low: float
    high: float


def mean_stderr(values: np.ndarray) -> float:
    """Standard error of the mean of `values` [n], n >= 2: s / sqrt(n), with s^2 = sum (x - mean)^2 / (n - 1).

    For 0/1 items this is the standard error that lm-eval prints beside an accuracy.
    """
    return float(np.std(values, ddof=1) / np.sqrt(len(values)))


def mean_interval(mean: float, stderr: float, level: float = 0.95) -> tuple[float, float]:
    """Normal interval mean +- z stderr, with z = Phi^-1((1 + level) / 2), in the unit of `mean`."""
    half = NormalDist().inv_cdf((1 + level) / 2) * stderr
    return mean - half, mean + half


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
        for column in range(columns.shape[1]):
            chunk[:, column] = columns[:, column][drawn].sum(axis=1)
    return sums


def bootstrap_means(values: np.ndarray, resamples: int = 2000, seed: int = 0) -> np.ndarray:
    """Means of `values` [n] over items drawn with replacement: [resamples], in the unit of `values`."""
    return resampled_sums(np.asarray(values, float)[:, None], resamples, seed)[:, 0] / len(values)


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


def delta_stderr(gradient: np.ndarray, covariance: np.ndarray) -> float:
    """Standard error of f(x) from the gradient of f [k] and the covariance of x [k, k]: sqrt(g^T C g)."""
    gradient = np.atleast_1d(np.asarray(gradient, float))
    return float(np.sqrt(gradient @ np.atleast_2d(covariance) @ gradient))


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
