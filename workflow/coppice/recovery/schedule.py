"""What a run reads at each step, and its learning rate.

Symbols: W windows, B windows a step, S steps.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

from coppice.methods.options import RecoverOptions


@dataclass(frozen=True)
class BatchSchedule:
    """order: [S, B] indices of windows; tokens: [S] int64, read by the end of each step."""

    order: np.ndarray
    tokens: np.ndarray

    @property
    def steps(self) -> int:
        return len(self.order)


def batch_schedule(sizes: np.ndarray, batch_size: int, tokens: int, seed: int) -> BatchSchedule:
    """Epochs, each a permutation drawn from (seed, epoch), cut into steps until `tokens` have been read.

    sizes: [W] tokens of each window, padding left out. A step may extend into the next epoch.
    """
    epochs = math.ceil(tokens / sizes.sum()) + math.ceil(batch_size / len(sizes))
    visited = np.concatenate([np.random.default_rng((seed, epoch)).permutation(len(sizes)) for epoch in range(epochs)])
    order = visited[: len(visited) // batch_size * batch_size].reshape(-1, batch_size)
    read = sizes[order].sum(axis=1).cumsum()
    steps = int(np.searchsorted(read, tokens)) + 1
    return BatchSchedule(order[:steps], read[:steps].astype(np.int64))


def learning_rate(options: RecoverOptions, step: int, steps: int) -> float:
    """Of the step with that index: linear warm-up to options.learning_rate, then constant or half a cosine to zero.

    The scheduler also evaluates the index `steps`, after the last step, where warm-up may just have ended.
    """
    warmup = min(steps, math.ceil(options.warmup * steps if options.warmup < 1 else options.warmup))
    if step < warmup:
        return options.learning_rate * (step + 1) / warmup
    if options.schedule == "constant" or warmup == steps:
        return options.learning_rate
    return options.learning_rate * (1 + math.cos(math.pi * (step - warmup) / (steps - warmup))) / 2
