"""The compression law: the loss of a model that was pruned and then trained for a while.

Source: Compression Laws for Large Language Models (arXiv 2504.04342, first version):

    L = L0^alpha (1 + r)^beta (1 + 1 / (D + 1))^gamma

L0: loss of the dense model on the same text; r: part of the parameters removed; D: recovery tokens. The form is as
others cite it, and the paper may print another. Its unit of D is unknown too: here D is in millions of tokens, which
matters, since 1 is added to it. Losses in nats per token.

The logarithm of the form is linear in its exponents, so that with logarithmic residuals the fit is ordinary least
squares of ln L on ln L0, ln(1 + r) and ln(1 + 1 / (D + 1)), without a constant.
"""

from __future__ import annotations

from functools import partial
from typing import Literal

import numpy as np
from pydantic import Field

from coppice.laws import p2
from coppice.laws.contracts import Law
from coppice.laws.engine.forms import Form, Objective, Parameter, Parameters, Reduction, without
from coppice.laws.engine.held_out import highest_of_each, largest, later_tokens
from coppice.laws.engine.points import Points, is_single
from coppice.laws.options import Residuals
from coppice.laws.points.recoveries import RecoveryOptions

MILLION = 1e6


class Options(RecoveryOptions):
    """What the compression law is fitted to."""

    ratio: Literal["rho", "rho_blocks", "rho_nonzero"] = Field(
        default="rho",
        description="The column of the table `nodes` that is r: of all parameters, of those of the blocks, or with "
        "zeros counted as removed, as for masks.",
    )
    residuals: Residuals = "logarithmic"


def predict(parameters: Parameters, points: Points) -> np.ndarray:
    """L of the law, nats per token, [n] or [k, n] with parameters [k, 1]. D is in millions of tokens."""
    return (
        points["dense_loss"] ** parameters["alpha"]
        * (1 + points["rho"]) ** parameters["beta"]
        * (1 + 1 / (points["tokens"] + 1)) ** parameters["gamma"]
    )


def reduce(points: Points) -> Reduction:
    """Of the factors that are the same for all points one stands for their product; the others have exponent 0."""
    same = [name for name, what in _constant(points).items() if what]
    notes = [f"There is one {_WHAT[name]}, so {name} is not identified: it is fixed at 0." for name in same[1:]]
    if same:
        notes.insert(
            0,
            f"There is one {_WHAT[same[0]]}, so {same[0]} is the size of a constant factor, not how the loss "
            f"changes with the {_WHAT[same[0]]}.",
        )
    return dict.fromkeys(same[1:], 0.0), notes


_WHAT = {"alpha": "dense model", "beta": "pruning rate", "gamma": "token count"}


def _constant(points: Points) -> dict[str, bool]:
    """Whether the factor of each exponent is the same for all points."""
    return {
        "alpha": len(np.unique(points["model"])) == 1,
        "beta": is_single(points["rho"]),
        "gamma": is_single(points["tokens"]),
    }


def scales(points: Points) -> dict[str, float]:
    """D is in millions of tokens, whatever the points are."""
    return {"tokens": MILLION}


_EXPONENT = Parameter(bounds=(-50, 50), start=(-2, 2))

FORM = Form(
    dict.fromkeys(("alpha", "beta", "gamma"), _EXPONENT), predict, reduce, objective=Objective(residuals="logarithmic")
)

# A comparator of ours, under which training changes nothing.
RIVALS = {"without_recovery": without(FORM, "gamma")}

LAW = Law(
    source={
        "title": "Compression Laws for Large Language Models",
        "arxiv": "2504.04342",
        "equation": "L = L0^alpha (1 + r)^beta (1 + 1 / (D + 1))^gamma (as cited by others)",
    },
    units=p2.LAW.units,
    columns=p2.LAW.columns,
    needs=p2.LAW.needs,
    points_are=p2.LAW.points_are,
    options=Options,
    points=p2.points,
    axis=p2.LAW.axis,
    base=p2.LAW.base,
    form=FORM,
    rivals=RIVALS,
    held_out={
        "later_tokens": later_tokens,
        "larger_model": partial(largest, column="dense_parameters", name="dense size"),
        "higher_ratio": partial(highest_of_each, column="rho", name="pruning rate", by="model"),
    },
    scales=scales,
)
