"""Points for tests of laws: meshes of designs, and a power law along runs."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import numpy as np

from coppice.laws.engine.forms import Form, Objective, Parameter, Parameters
from coppice.laws.engine.points import Points, count


def mesh(**axes: Iterable[float]) -> Points:
    """Every combination of the axes' values, the last axis fastest, as columns; a run is a point."""
    columns = np.meshgrid(*(np.asarray(list(axis), float) for axis in axes.values()), indexing="ij")
    points = {name: column.ravel() for name, column in zip(axes, columns, strict=True)}
    return {"run": np.arange(columns[0].size).astype(str), **points}


def spread(points: Points, deviation: float, seed: int = 0) -> np.ndarray:
    """Factors 1 + deviation * standard normal [n]: relative noise of each point."""
    return 1 + deviation * np.random.default_rng(seed).standard_normal(count(points))


# A power law along runs


def power(parameters: Parameters, points: Points) -> np.ndarray:
    return parameters["floor"] + parameters["scale"] * points["tokens"] ** -parameters["exponent"]


POWER = Form(
    {
        "floor": Parameter(bounds=(0, 10), start=(0, 3)),
        "scale": Parameter(bounds=(1e-6, 1e6), start=(0.1, 10), logarithmic=True),
        "exponent": Parameter(bounds=(0.01, 3), start=(0.1, 2), logarithmic=True),
    },
    power,
)
# Huber's loss and logarithmic residuals.
HUBER = replace(POWER, objective=Objective("logarithmic", huber=1e-3))
TRUTH = {"floor": 1.5, "scale": 2.0, "exponent": 0.5}


def curve(
    runs: int = 1,
    tokens: Iterable[float] = (1.0, 2.0, 4.0, 8.0, 16.0),
    noise: float = 0.0,
    shift: float = 0.0,
) -> Points:
    """Losses of the true power law; noise: of each point, shift: of each run, standard deviations."""
    generator = np.random.default_rng(0)
    tokens = np.asarray(list(tokens), float)
    points = {
        "run": np.repeat([f"run-{number}" for number in range(runs)], len(tokens)),
        "tokens": np.tile(tokens, runs),
    }
    shifts = np.repeat(shift * generator.standard_normal(runs), len(tokens))
    return points | {"loss": power(TRUTH, points) + shifts + noise * generator.standard_normal(len(shifts))}


def heavy_tailed(runs: int = 60) -> Points:
    """Losses of the true power law with noise of Student's t, two degrees of freedom."""
    points = curve(runs)
    noise = 0.01 * np.random.default_rng(1).standard_t(2, count(points))
    return points | {"loss": points["loss"] * np.exp(noise)}
