"""The P2 law of recovery training after pruning, its rivals, and the token count past which training pays little.

Source: P2 Law: Scaling Law for Post-Training After Model Pruning (arXiv 2411.10272), the form called L1:

    L(N0, D, rho, L0) = L0 + rho^-gamma N0^-delta (N_C / N0^alpha + D_C / D^beta + E)

N0: parameters of the dense model; D: recovery tokens; rho: part of the parameters removed; L0: loss of the dense model
on the same text; L: loss after D tokens. Losses in nats per token, N0 and D in the units recorded with the fit.
N_C, alpha and E enter only through N_C / N0^alpha + E, one number a size, so that they need three sizes.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from coppice.formatting import human_count
from coppice.laws.contracts import Advice, Law, Recommendation, Source, Tables
from coppice.laws.engine.forms import Form, Parameter, Parameters, Reduction, without
from coppice.laws.engine.held_out import HoldOut, highest_of_each, largest, later_tokens
from coppice.laws.engine.points import Points, is_single, points_from, powers_of_a_thousand
from coppice.laws.engine.search import Fit
from coppice.laws.points.recoveries import CURVES, RecoveryOptions, join_recoveries

if TYPE_CHECKING:
    import pandas as pd

SOURCE: Source = {
    "title": "P2 Law: Scaling Law for Post-Training After Model Pruning",
    "arxiv": "2411.10272",
    "equation": "L = L0 + rho^-gamma N0^-delta (N_C / N0^alpha + D_C / D^beta + E)",
}

COLUMNS = {
    "run": str,
    "model": str,
    "dense_parameters": float,
    "rho": float,
    "tokens": float,
    "loss": float,
    "dense_loss": float,
}


class Options(RecoveryOptions):
    """What the P2 law is fitted to, and what it recommends."""

    ratio: Literal["rho", "rho_blocks", "rho_nonzero", "rho_linears"] = Field(
        default="rho",
        description="What rho is a part of: all parameters, those of the blocks, all with zeros counted as removed "
        "(masks), or the weights of the blocks' linears with zeros counted as removed, which 2:4 halves in any model.",
    )
    gain: float = Field(
        default=0.01, gt=0, description="Nats per token: the law recommends the tokens past which doubling gains less."
    )


_COEFFICIENT = Parameter(bounds=(0, 1e9), start=(0.05, 5))
_EXPONENT = Parameter(bounds=(0.01, 2), start=(0.1, 1.2), logarithmic=True)

PARAMETERS = {
    "N_C": _COEFFICIENT,
    "D_C": Parameter(bounds=(1e-9, 1e9), start=(0.05, 50), logarithmic=True),
    "E": _COEFFICIENT,
    "alpha": _EXPONENT,
    "beta": _EXPONENT,
    "gamma": Parameter(bounds=(-5, 5), start=(-2.5, 0.5)),
    "delta": Parameter(bounds=(-3, 3), start=(-0.5, 1)),
}


def predict(parameters: Parameters, points: Points) -> np.ndarray:
    """L of the law, nats per token, [n] or [k, n] with parameters [k, 1]. N0 and D are in the fit's units."""
    return points["dense_loss"] + _excess(parameters, points)


def _excess(parameters: Parameters, points: Points) -> np.ndarray:
    """rho^-gamma N0^-delta (N_C / N0^alpha + D_C / D^beta + E)."""
    size, tokens = points["dense_parameters"], points["tokens"]
    inner = (
        parameters["N_C"] * size ** -parameters["alpha"]
        + parameters["D_C"] * tokens ** -parameters["beta"]
        + parameters["E"]
    )
    return _factor(parameters, points) * inner


def _factor(parameters: Parameters, points: Points) -> np.ndarray:
    """rho^-gamma N0^-delta."""
    return points["rho"] ** -parameters["gamma"] * points["dense_parameters"] ** -parameters["delta"]


def reduce(points: Points) -> Reduction:
    """The nested form that one pruning rate, or one dense size, leaves: what is fixed at which value, and why.

    With one rho its factor is absorbed by D_C, E and N_C: gamma = 0. With one N0 its factor is absorbed by D_C and E,
    and N_C / N0^alpha by E: delta = 0, N_C = 0, and alpha has no part left.
    """
    fixed, notes = {}, []
    if is_single(points["rho"]):
        fixed["gamma"] = 0.0
        notes.append(
            "There is one pruning rate, so gamma is not identified: it is fixed at 0 and D_C and E absorb its factor."
        )
    if is_single(points["dense_parameters"]):
        fixed |= {"delta": 0.0, "N_C": 0.0, "alpha": 1.0}
        notes.append(
            "There is one dense size, so delta, N_C and alpha are not identified: delta and N_C are fixed at 0, alpha "
            "has no part, E stands for N_C / N0^alpha + E, and the rival without delta is the law itself."
        )
    return fixed, notes


FORM = Form(PARAMETERS, predict, reduce)


def _without_dense_loss(parameters: Parameters, points: Points) -> np.ndarray:
    """rho^-gamma (N_C / N0^alpha + D_C / D^beta + E): a comparator of ours, which forgets the dense loss."""
    return _excess(parameters | {"delta": 0.0}, points)


def _chinchilla(parameters: Parameters, points: Points) -> np.ndarray:
    """E + A / N^alpha + B / D^beta (arXiv 2203.15556) on the pruned size N = (1 - rho) N0: a comparator of ours."""
    return (
        parameters["E"]
        + parameters["A"] * _pruned_size(points) ** -parameters["alpha"]
        + parameters["B"] * points["tokens"] ** -parameters["beta"]
    )


def _pruned_size(points: Points) -> np.ndarray:
    return (1 - points["rho"]) * points["dense_parameters"]


def _reduce_chinchilla(points: Points) -> Reduction:
    return ({"A": 0.0, "alpha": 1.0} if is_single(_pruned_size(points)) else {}), []


RIVALS = {
    "without_delta": without(FORM, "delta"),  # as a survey prints the law
    "without_dense_loss": replace(without(FORM, "delta"), predict=_without_dense_loss),
    "chinchilla_on_pruned_size": Form(
        {"A": _COEFFICIENT, "B": PARAMETERS["D_C"], "E": _COEFFICIENT, "alpha": _EXPONENT, "beta": _EXPONENT},
        _chinchilla,
        _reduce_chinchilla,
    ),
}

HELD_OUT: dict[str, HoldOut] = {
    "later_tokens": later_tokens,
    "larger_model": partial(largest, column="dense_parameters", name="dense size"),
    "higher_ratio": partial(highest_of_each, column="rho", name="pruning rate", by="model"),
}


def points(tables: Tables, options: Options) -> Points:
    """The points of the law: the losses of `recoveries` whose parent lost parameters (rho > 0).

    dense_parameters and tokens are numbers of parameters and tokens, not yet in units.
    """
    rows = join_recoveries(tables, options)
    rows["rho"] = _removed_part(rows) if options.ratio == "rho_linears" else rows[f"parent.{options.ratio}"]
    rows["dense_parameters"] = rows["dense.parameters"]
    return points_from(rows[rows["rho"] > 0], COLUMNS)


def _removed_part(rows: pd.DataFrame) -> pd.Series:
    """Part of the weights of the blocks' linears that the parent lost: gone, or zeros of a mask."""
    zeros = rows["parent.parameters"] - rows["parent.nonzero_parameters"]
    return 1 - (rows["parent.linear_parameters"] - zeros) / rows["dense.linear_parameters"]


scales = partial(powers_of_a_thousand, names=("dense_parameters", "tokens"))


def notes(points: Points) -> list[str]:
    """A sentence where the data contradict the law's sign: its excess over the dense loss is never negative."""
    below = int(np.sum(points["loss"] < points["dense_loss"]))
    if not below:
        return []
    return [
        f"{below} of {len(points['loss'])} points lie below the loss of the dense model, where this law cannot follow: "
        "recovery taught more than pruning cost."
    ]


def recommend(fit: Fit, samples: Parameters, points: Points, scales: dict[str, float], options: Options) -> Advice:
    """For each model and rho the tokens D past which another doubling gains less than options.gain nats per token.

    gain(D) = rho^-gamma N0^-delta D_C D^-beta (1 - 2^-beta), so D = (gain(1) / gain)^(1 / beta). `samples` are
    bootstrap parameters [k, 1], k = 0 for no interval. A number beyond what a float holds is None.
    """
    needed = [name for name in ("D_C", "beta", "gamma", "delta") if name in fit.unidentified]
    if needed:
        return [], [f"No token count is recommended, since the points do not identify {', '.join(needed)}."]
    model = np.unique(points["model"], return_inverse=True)[1]
    cases, first, case = np.unique(
        np.column_stack([model, points["rho"]]), axis=0, return_index=True, return_inverse=True
    )
    where = {name: column[first] for name, column in points.items()}
    tokens = tokens_for_gain(fit.parameters, where, options.gain) * scales["tokens"]
    drawn = tokens_for_gain(samples, where, options.gain) * scales["tokens"]
    # Interpolation between two infinite draws would be no number.
    low, high = (
        np.quantile(drawn, [0.025, 0.975], axis=0, method="nearest") if len(drawn) else np.full((2, len(cases)), np.nan)
    )
    measured = [points["tokens"][case == row] * scales["tokens"] for row in range(len(cases))]
    entries = [
        {
            "model": str(where["model"][row]),
            "dense_parameters": float(where["dense_parameters"][row] * scales["dense_parameters"]),
            "rho": float(where["rho"][row]),
            "gain": options.gain,
            "tokens": _finite(tokens[row]),
            "low": _finite(low[row]),
            "high": _finite(high[row]),
            "smallest_tokens": float(measured[row].min()),
            "largest_tokens": float(measured[row].max()),
            "note": _range_note(tokens[row], measured[row]),
        }
        for row in range(len(cases))
    ]
    return [entry | {"sentence": _sentence(entry, bool(len(drawn)))} for entry in entries], []


def _sentence(entry: Recommendation, drawn: bool) -> str:
    """A recommended number of recovery tokens, with its interval and its caveat."""
    between = f" [{human_count(entry['low'])}, {human_count(entry['high'])}]" if drawn else ""
    sentence = (
        f"{entry['model']} at rho {entry['rho']:.2f}: train on {human_count(entry['tokens'])} tokens{between}; beyond, "
        f"doubling them gains less than {entry['gain']:g} nats/token."
    )
    return f"{sentence} {entry['note']}" if entry["note"] else sentence


def tokens_for_gain(parameters: Parameters, points: Points, gain: float) -> np.ndarray:
    """D = (rho^-gamma N0^-delta D_C (1 - 2^-beta) / gain)^(1 / beta), in the fit's unit of tokens."""
    beta = parameters["beta"]
    first = _factor(parameters, points) * parameters["D_C"] * (1 - 2.0**-beta)
    with np.errstate(over="ignore"):
        return (first / gain) ** (1 / beta)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _range_note(tokens: float, measured: np.ndarray) -> str | None:
    """A sentence where the recommended tokens lie outside those measured."""
    if tokens > measured.max():
        return "This lies beyond the largest token count measured, so it is an extrapolation."
    if tokens < measured.min():
        return "This lies before the first token count measured: every doubling measured gains less."
    return None


LAW = Law(
    source=SOURCE,
    units={"loss": "nats per token", "dense_parameters": "parameters", "tokens": "tokens"},
    columns=COLUMNS,
    needs={
        "nodes": (
            *("node", "parent", "model", "method", "family"),
            *("parameters", "linear_parameters", "nonzero_parameters", "rho", "rho_blocks", "rho_nonzero"),
        ),
        "curves": CURVES,
    },
    points_are="they are the validation losses of recoveries, by the chosen method, of models that lost parameters.",
    options=Options,
    points=points,
    axis=("tokens", "recovery tokens"),
    base="dense_loss",
    form=FORM,
    rivals=RIVALS,
    held_out=HELD_OUT,
    scales=scales,
    notes=notes,
    recommend=recommend,
)
