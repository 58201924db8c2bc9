"""How long do the bootstraps of a law take, and how long would one search of scipy's for each of them?

240 points of a five-parameter law (Chinchilla's form at its replicated parameters, heavy-tailed noise), Huber's loss of
log residuals, 4,000 refits by the engine, against `scipy.optimize.minimize(method="BFGS")` with the exact gradient on
the first of the same resamples. Prints the time of each, their ratio by refit, and how far apart their optima are.
"""

from __future__ import annotations

import argparse
import os
import time

import numpy as np
from scipy.optimize import minimize

from coppice.laws import chinchilla
from coppice.laws.engine.forms import parameter_columns
from coppice.laws.engine.inference import bootstrap
from coppice.laws.engine.points import select
from coppice.laws.engine.problem import Problem
from coppice.laws.engine.search import fit_form

TRUTH = {"A": 482.01, "B": 2085.43, "E": 1.8169, "alpha": 0.3478, "beta": 0.3659}  # arXiv 2404.10102
UNITS = {"parameters": 1e6, "tokens": 1e9}


def points(noise: float = 0.006, seed: int = 0) -> dict[str, np.ndarray]:
    """12 amounts of compute, each spent on 20 sizes; a run is a point."""
    generator = np.random.default_rng(seed)
    compute, size = (axis.ravel() for axis in np.meshgrid(np.geomspace(6e18, 3e21, 12), np.geomspace(4e7, 2e10, 20)))
    found = {"run": np.arange(240).astype(str), "parameters": size, "tokens": compute / (6 * size)}
    loss = chinchilla.predict(TRUTH, found) * np.exp(noise * generator.standard_t(3, 240))
    return {name: column / UNITS.get(name, 1) if name != "run" else column for name, column in found.items()} | {
        "loss": loss
    }


def resampled(found: dict[str, np.ndarray], drawn: np.ndarray) -> Problem:
    """Chinchilla's form on the points, each as often as it was drawn [240]."""
    return Problem(chinchilla.FORM, select(found, np.repeat(np.arange(240), drawn.astype(int))))


def by_scipy(found: dict[str, np.ndarray], start: dict[str, float], drawn: np.ndarray) -> np.ndarray:
    """The optimum on a resample: what the engine searches, by logarithms, with the exact gradient."""
    form, problem = chinchilla.FORM, resampled(found, drawn)

    def value(searched: np.ndarray) -> tuple[float, np.ndarray]:
        at = dict(zip(form.parameters, np.exp(searched), strict=True))
        pull = np.clip(problem.residuals(at), -chinchilla.HUBER, chinchilla.HUBER)
        predicted, slopes = form.predict(at, problem.points), chinchilla.slopes(at, problem.points)
        gradient = [np.sum(pull * slopes[name] * at[name] / predicted) for name in form.parameters]
        return 1e3 * float(problem.objective(at)), 1e3 * np.array(gradient)

    searched = np.log(list(start.values()))
    return np.exp(minimize(value, searched, jac=True, method="BFGS", options={"gtol": 1e-6}).x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resamples", type=int, default=4000)
    parser.add_argument("--scipy", type=int, default=40, help="resamples that scipy refits too")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    arguments = parser.parse_args()
    found = points()
    form = chinchilla.FORM
    started = time.perf_counter()
    fit = fit_form(form, found)
    searched = time.perf_counter()
    samples, counts = bootstrap(fit, arguments.resamples, 0, threads=arguments.threads)
    drawn = time.perf_counter()
    others = np.array([by_scipy(found, fit.parameters, row) for row in counts[: arguments.scipy]])
    ended = time.perf_counter()
    own, theirs = (drawn - searched) / arguments.resamples, (ended - drawn) / arguments.scipy
    better = [
        float(resampled(found, row).objective(parameter_columns(form, pair))[0])
        - float(resampled(found, row).objective(parameter_columns(form, other))[0])
        for pair, other, row in zip(samples[: arguments.scipy, None], others[:, None], counts, strict=False)
    ]
    print(f"fit from 32 starts      {searched - started:8.2f} s, converged: {fit.converged}")
    print(f"{arguments.resamples} refits             {drawn - searched:8.2f} s on {arguments.threads} threads")
    print(f"a refit by scipy / ours {theirs / own:8.1f}")
    print(f"objective, ours - scipy {max(better):8.1e} at most, {np.median(better):.1e} in the median")
    print(f"standard errors         {dict(zip(form.parameters, samples.std(axis=0, ddof=1).round(4), strict=True))}")


if __name__ == "__main__":
    main()
