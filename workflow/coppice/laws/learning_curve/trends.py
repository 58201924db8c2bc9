"""Trends of a falling curve: the power law of its first observations, and when the rest of it pays too little.

The pattern, its symbols, the levels and the rules are in `coppice.laws.learning_curve`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

FEWEST = 3  # observations that a trend needs: as many as it has unknowns
_EXPONENTS = (0.01, 10.0)
_CANDIDATES = np.linspace(0, 1, 65)
_ZOOMS = 9  # each narrows the interval of ln b to a 32nd: below 1e-12 at the end
_MONOTONE_STEPS = 2
_EQUAL = 1e-9  # asymptotes closer than this part of their size are one


@dataclass(frozen=True)
class Trend:
    """c + a x^-b; asymptote c and scale a in the unit of y."""

    asymptote: float
    scale: float
    exponent: float

    def at(self, x: float | np.ndarray) -> np.ndarray:
        """The value at x > 0, a number or an array; at infinity the asymptote."""
        return self.asymptote + self.scale * np.asarray(x, float) ** -self.exponent

    def gain(self, x: float, target: float) -> float:
        """How much it falls, in the unit of y, from x to `target` >= x."""
        return float(self.at(x) - self.at(target))


def trend(x: np.ndarray, y: np.ndarray, anchor: float | None = None) -> Trend:
    """Least squares of y [n] at x [n] > 0, n >= 3, over c, a >= 0 and 0.01 <= b <= 10; `anchor`: y at infinity.

    Where y does not fall a is 0 and b has no meaning.
    """
    if anchor is not None:
        x, y = np.append(x, np.inf), np.append(y, anchor)
    c, a, b = fit_rows(x, np.asarray(y, float)[None])
    return Trend(float(c[0]), float(a[0]), float(b[0]))


def fit_rows(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """c, a and b [k] for each row of y [k, n] at x [n]."""
    x = np.asarray(x, float)
    center = np.exp(np.mean(np.log(x[np.isfinite(x)])))
    low, high = (np.full(len(y), np.log(bound)) for bound in _EXPONENTS)
    rows = np.arange(len(y))
    for _ in range(_ZOOMS):
        candidates = low[:, None] + (high - low)[:, None] * _CANDIDATES
        c, a, costs = _linear(x / center, y, np.exp(candidates))
        best = np.argmin(costs, axis=1)
        step = (high - low) * _CANDIDATES[1]
        low, high = np.maximum(low, candidates[rows, best] - step), np.minimum(high, candidates[rows, best] + step)
    b = np.exp(candidates[rows, best])
    return c[rows, best], a[rows, best] * center**b, b


def _linear(x: np.ndarray, y: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """c, a >= 0 and the summed squares [k, m] of y [k, n] = c + a u at each b [k, m], u = x^-b [k, m, n]."""
    u = x ** -b[..., None]
    mean_u, mean_y = u.mean(axis=-1), y.mean(axis=-1)[:, None]
    u_away, y_away = u - mean_u[..., None], y[:, None] - mean_y[..., None]
    variation = np.sum(u_away**2, axis=-1)
    # At one x alone nothing varies, and the trend is flat.
    a = np.maximum(np.sum(u_away * y_away, axis=-1), 0) / np.where(variation > 0, variation, 1)
    return mean_y - a * mean_u, a, np.sum((y_away - a[..., None] * u_away) ** 2, axis=-1)


def trends(x: np.ndarray, y: np.ndarray, anchored: bool = False) -> list[Trend]:
    """The trends of the levels 3 .. n of y [n] at increasing x [n].

    anchored: each from the second on has the asymptote of the free trend before it, but not below 0, at infinity.
    """
    free = [trend(x[:level], y[:level]) for level in range(FEWEST, len(x) + 1)]
    if not anchored:
        return free
    anchors = enumerate(free[:-1], FEWEST + 1)
    return free[:1] + [trend(x[:level], y[:level], max(before.asymptote, 0)) for level, before in anchors]


def asymptotes(levels: list[Trend]) -> np.ndarray:
    """c_i of each trend, in the unit of y."""
    return np.array([each.asymptote for each in levels])


def working_level(levels: list[Trend]) -> int | None:
    """The first level from which on every trend in `levels` (levels 3 ..) is possible; None where the last is not."""
    possible = _last_in_a_row(np.array([each.scale > 0 and each.asymptote >= 0 for each in levels], bool))
    return FEWEST + len(levels) - possible if possible else None


def prediction_level(levels: list[Trend]) -> int | None:
    """The first level, past the working level, from which on the asymptotes are monotone over two steps or more."""
    first = working_level(levels)
    if first is None:
        return None
    sequence = asymptotes(levels[first - FEWEST :])
    steps = np.diff(sequence)
    steps[np.abs(steps) <= _EQUAL * np.abs(sequence).max()] = 0
    monotone = max(_last_in_a_row(steps >= 0), _last_in_a_row(steps <= 0))
    return FEWEST + len(levels) - 1 - monotone if monotone >= _MONOTONE_STEPS else None


def _last_in_a_row(flags: np.ndarray) -> int:
    """How many flags [n] at the end are set without a gap."""
    return len(flags) if flags.all() else int(np.argmin(flags[::-1]))


# Rules: each looks at no observation past the level that it speaks of.


def pays_too_little(x: np.ndarray, y: np.ndarray, target: float, gain: float) -> bool:
    """Whether the losses y [n] at tokens x [n] predict that going on to `target` tokens gains at most `gain`.

    That is L_n(x_n) - L_n(target) <= gain past the prediction level; with target infinity the rule of the source.
    """
    return _pays_too_little(trends(x, y), x, target, gain)


def _pays_too_little(levels: list[Trend], x: np.ndarray, target: float, gain: float) -> bool:
    return prediction_level(levels) is not None and levels[-1].gain(x[FEWEST + len(levels) - 2], target) <= gain


def _agrees(levels: list[Trend], target: float, tolerance: float) -> bool:
    """Whether the last two trends, past the prediction level, agree on the loss at `target` within `tolerance`."""
    if prediction_level(levels) is None:
        return False
    return float(abs(levels[-1].at(target) - levels[-2].at(target))) <= tolerance


def stop_level(x: np.ndarray, y: np.ndarray, target: float, gain: float) -> int | None:
    """The first level at which `pays_too_little`: where training with that rule would have ended."""
    return _first_level(trends(x, y), lambda levels: _pays_too_little(levels, x, target, gain))


def agreement_level(x: np.ndarray, y: np.ndarray, target: float, tolerance: float) -> int | None:
    """The first level at which two consecutive trends agree on the loss at `target` within `tolerance`."""
    return _first_level(trends(x, y), lambda levels: _agrees(levels, target, tolerance))


def _first_level(levels: list[Trend], holds: Callable[[list[Trend]], bool]) -> int | None:
    """The first level whose trends up to there do what `holds` requires."""
    counts = (count for count in range(1, len(levels) + 1) if holds(levels[:count]))
    return next((FEWEST + count - 1 for count in counts), None)
