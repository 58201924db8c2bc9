"""Whether the held-out error finds the law that made the data, at a noise of 0.5%: the oracle asks for 95% of the time.

The rivals of pruning are none a special case of another. Where one is, as Chinchilla's law without E, only the fuller
law can be found so: data without E are fitted as well by a law whose E ends near 0.
"""

from __future__ import annotations

import numpy as np
import pytest

from coppice.laws import chinchilla, pruning
from coppice.laws.engine.forms import Form
from coppice.laws.engine.held_out import held_out_test
from coppice.laws.engine.points import Points
from coppice.laws.engine.search import Effort

PRUNING: dict[str, Form] = {"power": pruning.FORM} | pruning.RIVALS
TRUTHS = {"power": {"P0": 0.97, "alpha": 0.73}, "exponential": {"k": 1.4}, "linear": {"k": 0.8}}
RATIOS = np.arange(1, 10) / 10

# With one exponent for both the law differs too little to be told apart so often.
CHINCHILLA = {"chinchilla": chinchilla.FORM, "without E": chinchilla.RIVALS["without_irreducible_loss"]}
LOSS = {"A": 0.4, "B": 0.6, "E": 1.7, "alpha": 0.35, "beta": 0.5}

EFFORT = Effort(starts=2, bootstrap=0)
SEEDS = range(12)


def noisy(form: Form, parameters: dict[str, float], points: Points, seed: int) -> Points:
    """The points with targets that the form predicts, times 1 + 0.5% of normal noise."""
    noise = 1 + 0.005 * np.random.default_rng(seed).standard_normal(len(points["run"]))
    return points | {form.target: form.predict(parameters, points) * noise}


def first(forms: dict[str, Form], points: Points, held_out: np.ndarray) -> str:
    """Name of the form with the lowest held-out error."""
    _, ranking = held_out_test(forms, points, held_out, EFFORT)
    return ranking[0]["form"]


@pytest.mark.parametrize("truth", PRUNING)
def test_the_law_that_made_the_scores_ranks_first(truth: str) -> None:
    # T-F4
    model = np.repeat(["small", "large"], len(RATIOS))
    design = {"run": model, "ratio": np.tile(RATIOS, 2), "dense_score": np.repeat([0.3, 0.4], len(RATIOS))}
    held_out = pruning.LAW.held_out["higher_ratio"](design)
    samples = [noisy(PRUNING[truth], TRUTHS[truth], design, seed) for seed in SEEDS]
    right = sum(first(PRUNING, points, held_out) == truth for points in samples)
    assert right >= 0.95 * len(SEEDS)


def test_the_law_with_an_irreducible_loss_ranks_first() -> None:
    # T-F4
    size, tokens = (axis.ravel() for axis in np.meshgrid([0.05, 0.1, 0.2, 0.4, 0.8, 1.6], [1, 3, 10, 30, 100]))
    design = {"run": size.astype(str), "parameters": size, "tokens": tokens}
    held_out = chinchilla.LAW.held_out["later_tokens"](design)
    samples = [noisy(chinchilla.FORM, LOSS, design, seed) for seed in SEEDS]
    right = sum(first(CHINCHILLA, points, held_out) == "chinchilla" for points in samples)
    assert right >= 0.95 * len(SEEDS)
