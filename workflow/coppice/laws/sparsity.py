"""The sparsity law: the loss of a model with zeros among its weights, by its non-zero size, and a rival.

Source: Frantar et al., Scaling Laws for Sparsely-Connected Foundation Models (arXiv 2309.08520):

    L(S, N, D) = (a_S (1 - S)^b_S + c_S) N^-b_N + (a_D / D)^b_D + c

S: part of the weights that is zero; N: non-zero parameters; D: tokens trained on; L: loss in nats per token. The paper
trains from random weights and prunes on the way; a study prunes a trained model and lets it recover. Its D are then
the tokens of the recovery, and a_D and b_D describe the speed of a recovery, not of learning.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from coppice.laws import chinchilla
from coppice.laws.contracts import Law, Source, Tables
from coppice.laws.engine.forms import Form, Parameter, Parameters, Reduction
from coppice.laws.engine.held_out import HoldOut, highest_of_each, largest, later_tokens
from coppice.laws.engine.points import Points, is_single, points_from, powers_of_a_thousand
from coppice.laws.points.quality import LOW_BIT_COMPUTE
from coppice.laws.points.recoveries import CURVES, RecoveryOptions, join_recoveries

if TYPE_CHECKING:
    pass

SOURCE: Source = {
    "title": "Scaling Laws for Sparsely-Connected Foundation Models",
    "arxiv": "2309.08520",
    "equation": "L = (a_S (1 - S)^b_S + c_S) N^-b_N + (a_D / D)^b_D + c",
}

COLUMNS = {"run": str, "model": str, "parameters": float, "sparsity": float, "tokens": float, "loss": float}

# What else could have changed the loss, or makes stored parameters no count of connections.
_OTHER_TRAITS = frozenset({"factorized", "smaller", "quantized", "compensated"}) | LOW_BIT_COMPUTE


class Options(RecoveryOptions):
    """What the sparsity law is fitted to."""


_COEFFICIENT = Parameter(bounds=(0, 1e9), start=(0.05, 5))
_EXPONENT = Parameter(bounds=(0.01, 3), start=(0.1, 1.2), logarithmic=True)

PARAMETERS = {
    "a_S": _COEFFICIENT,
    "b_S": _EXPONENT,
    "c_S": _COEFFICIENT,
    "b_N": _EXPONENT,
    "a_D": Parameter(bounds=(1e-15, 1e15), start=(1e-4, 10), logarithmic=True),
    "b_D": _EXPONENT,
    "c": _COEFFICIENT,
}


def predict(parameters: Parameters, points: Points) -> np.ndarray:
    """L, nats per token, [n] or [k, n] with parameters [k, 1]. N and D are in the fit's units."""
    by_sparsity = parameters["a_S"] * (1 - points["sparsity"]) ** parameters["b_S"] + parameters["c_S"]
    return (
        by_sparsity * points["parameters"] ** -parameters["b_N"]
        + (parameters["a_D"] / points["tokens"]) ** parameters["b_D"]
        + parameters["c"]
    )


def reduce(points: Points) -> Reduction:
    """The nested form that one sparsity, one dense size, one non-zero size, or one number of tokens leaves, and why."""
    fixed: dict[str, float] = {}
    notes = []
    if is_single(1 - points["sparsity"]):
        fixed |= {"a_S": 0.0, "b_S": 1.0}
        notes.append("There is one sparsity, so a_S and b_S are not identified: c_S stands for a_S (1 - S)^b_S + c_S.")
    elif is_single(_dense_parameters(points)):
        fixed |= {"a_S": 0.0, "b_S": 1.0}
        notes.append(
            "There is one dense size, whose non-zero part alone varies, so the effects of zeros and of size "
            "cannot be separated: a_S is fixed at 0 and the term of N stands for both."
        )
    if is_single(points["parameters"]):
        fixed |= {"b_N": 1.0, "c_S": 0.0}
        notes.append(
            "There is one number of non-zero parameters, so b_N and c_S are not identified: b_N is fixed at 1 and c "
            "stands for c_S / N^b_N + c."
        )
    if is_single(points["tokens"]):
        fixed |= {"a_D": 0.0, "b_D": 1.0}
        notes.append(
            "There is one number of tokens, so a_D and b_D are not identified: c stands for (a_D / D)^b_D + c."
        )
    return fixed, notes


def _dense_parameters(points: Points) -> np.ndarray:
    """N / (1 - S), the parameters with the zeros."""
    return points["parameters"] / (1 - points["sparsity"])


FORM = Form(PARAMETERS, predict, reduce)

RIVALS = {
    # a_S = 0: zeros cost what the parameters that they replace were worth, and no more. A comparator of ours.
    "chinchilla_on_nonzero_parameters": Form(
        chinchilla.PARAMETERS, chinchilla.predict, chinchilla.reduce, slopes=chinchilla.slopes
    )
}


def _larger_model(points: Points) -> np.ndarray | str:
    """Holds out the largest dense size, at all of its sparsities."""
    return largest(points | {"dense_parameters": _dense_parameters(points)}, "dense_parameters", "dense size")


def _higher_sparsity(points: Points) -> np.ndarray | str:
    """Holds out the highest sparsity of each model; 1 / (1 - S), since a ratio to S = 0 has no value."""
    emptiness = 1 / (1 - points["sparsity"])
    return highest_of_each(points | {"emptiness": emptiness}, "emptiness", "sparsity level", "model")


HELD_OUT: dict[str, HoldOut] = {
    "larger_model": _larger_model,
    "higher_sparsity": _higher_sparsity,
    "later_tokens": later_tokens,
}


def points(tables: Tables, options: Options) -> Points:
    """One row a validation loss of a recovery of a model with zeros among its weights, or of a dense one (S = 0).

    A run is a node that `recoveries` chooses, whose parent is a dense root or masked, and which is not quantized,
    factorized, compensated or smaller. `sparsity` [n] is rho_nonzero, the part of ALL parameters that is zero,
    embeddings included, and `parameters` [n] the rest, so that N / (1 - S) is the dense size; not yet in units.
    """
    rows = join_recoveries(tables, options)
    chosen = [
        (parent == model or "masked" in before) and not _OTHER_TRAITS & set(after)
        for parent, model, before, after in zip(
            rows["parent"], rows["model"], rows["parent.traits"], rows["traits"], strict=True
        )
    ]
    rows = rows[np.array(chosen, bool)]
    return points_from(rows.assign(parameters=rows["nonzero_parameters"], sparsity=rows["rho_nonzero"]), COLUMNS)


LAW = Law(
    source=SOURCE,
    units={
        "parameters": "parameters",
        "sparsity": "part of the parameters",
        "tokens": "tokens",
        "loss": "nats per token",
    },
    columns=COLUMNS,
    needs={
        "nodes": (
            "node",
            "parent",
            "model",
            "method",
            "family",
            "traits",
            "nonzero_parameters",
            "rho_nonzero",
        ),
        "curves": CURVES,
    },
    points_are="they are the validation losses of recoveries, by the chosen method, of masked or dense models.",
    options=Options,
    points=points,
    axis=("tokens", "recovery tokens"),
    form=FORM,
    rivals=RIVALS,
    held_out=HELD_OUT,
    scales=partial(powers_of_a_thousand, names=("parameters", "tokens")),
)
