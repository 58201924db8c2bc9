"""The pruning law: how a score falls with the part of the parameters removed, where nothing was trained afterwards.

Source: Sengupta et al. (arXiv 2504.04342, second version, whose law is for models pruned without recovery):

    score = L0 P0 (1 - r)^alpha

L0: score of the dense model by the same metric; r: part of the parameters removed; score: an accuracy, or
1 / ln(perplexity) for language modelling. P0 and alpha are shared by all models and methods of a fit. The law knows no
level of chance: it falls to 0 at r = 1, where an accuracy does not.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import Field

from coppice.formatting import join_words, number
from coppice.laws.contracts import Advice, Law, Tables
from coppice.laws.engine.forms import Form, Parameter, Parameters, Reduction
from coppice.laws.engine.held_out import highest_of_each, leave_one_out
from coppice.laws.engine.inference import sample_interval
from coppice.laws.engine.points import Points, is_single
from coppice.laws.engine.search import Fit
from coppice.laws.points.quality import METRICS, QualityOptions, choose_metric, join_quality, list_steps, matches

if TYPE_CHECKING:
    pass

# Metrics whose score is 1 / loss: `join_quality` gives the loss of a perplexity.
_LOSSES = ("perplexity_", "loss_")


class Options(QualityOptions):
    """What the pruning law is fitted to, and what it recommends."""

    kind: Literal["accuracy", "perplexity"] = Field(
        default="perplexity",
        description="The kind of metric that the score comes from, where the option `metric` names none; of a "
        "perplexity the score is 1 / ln(perplexity).",
    )
    ratio: Literal["rho", "rho_blocks", "rho_nonzero"] = Field(
        default="rho_nonzero",
        description="The column of the table `nodes` that is r; rho_nonzero counts masked weights as removed.",
    )
    method: str | None = Field(
        default=None,
        description="The pruning method whose nodes are points; of a node of several steps their methods, joined by +. "
        "null: all of them.",
    )
    nodes: list[str] | None = Field(
        default=None,
        description="Patterns of the nodes that are points, whatever made them; null: those that were pruned and "
        "nothing else.",
    )
    keep: float = Field(
        default=0.9,
        gt=0,
        lt=1,
        description="The law recommends the ratio at which this part of the dense score is left.",
    )


def predict(parameters: Parameters, points: Points) -> np.ndarray:
    """L0 P0 (1 - r)^alpha, in the unit of the score, [n] or [k, n] with parameters [k, 1]."""
    return points["dense_score"] * parameters["P0"] * (1 - points["ratio"]) ** parameters["alpha"]


def reduce(points: Points) -> Reduction:
    """With one ratio P0 absorbs (1 - r)^alpha, so that P0 = 1, the value at which r = 0 gives the dense score."""
    if not is_single(points["ratio"]):
        return {}, []
    return {"P0": 1.0}, [
        "There is one pruning ratio, so P0 is not identified: it is fixed at 1, where the law gives the dense score at "
        "ratio 0, and alpha is what this one ratio says."
    ]


def _exponential(parameters: Parameters, points: Points) -> np.ndarray:
    """L0 e^(-k r): a comparator of ours."""
    return points["dense_score"] * np.exp(-parameters["k"] * points["ratio"])


def _linear(parameters: Parameters, points: Points) -> np.ndarray:
    """L0 (1 - k r): a comparator of ours."""
    return points["dense_score"] * (1 - parameters["k"] * points["ratio"])


FORM = Form(
    {
        "P0": Parameter(bounds=(1e-6, 1e6), start=(0.5, 2), logarithmic=True),
        "alpha": Parameter(bounds=(-20, 20), start=(0, 3)),
    },
    predict,
    reduce,
    target="score",
)

_SLOPE = {"k": Parameter(bounds=(-20, 20), start=(0, 3))}

RIVALS = {
    "exponential": Form(_SLOPE, _exponential, target="score"),
    "linear": Form(_SLOPE, _linear, target="score"),
}


def points(tables: Tables, options: Options) -> Points:
    """One row a measured node that lost parameters: all of its steps prune, or options.nodes names it.

    A run is a dense model and a method at several ratios. The score of the dense model is NaN where it was not
    measured. Raises UserError as `join_quality` does.
    """
    nodes = tables["nodes"].set_index("node")
    # The dense models are read too, whatever the patterns are.
    measured = join_quality(tables, options.evaluation, options.metric, None, options.kind)
    _, metric = choose_metric(tables["metrics"], options.evaluation, options.metric, options.kind)
    measured["score"] = 1 / measured["value"] if metric.startswith(_LOSSES) else measured["value"]
    scores = measured.set_index("node")["score"]
    steps = {node: list_steps(nodes, node) for node in measured["node"]}
    methods = {node: "+".join(nodes.loc[steps[node], "method"]) for node in measured["node"]}

    def is_chosen(node: str) -> bool:
        pruned = options.nodes is not None or set(nodes.loc[steps[node], "family"]) == {"prune"}
        return pruned and matches(node, options.nodes) and options.method in (None, methods[node])

    selected = np.array([bool(steps[node]) and is_chosen(node) for node in measured["node"]], bool)
    rows = measured[selected & (measured[options.ratio] > 0).to_numpy()]
    method = [methods[node] for node in rows["node"]]
    return {
        "run": np.array([f"{model} {name}" for model, name in zip(rows["model"], method, strict=True)], str),
        "model": rows["model"].to_numpy(dtype=str),
        "method": np.array(method, str),
        "ratio": rows[options.ratio].to_numpy(dtype=float),
        "dense_score": scores.reindex(rows["model"]).to_numpy(dtype=float),
        "score": rows["score"].to_numpy(dtype=float),
    }


def recommend(fit: Fit, samples: Parameters, points: Points, scales: dict[str, float], options: Options) -> Advice:
    """The ratio that leaves the part options.keep of the dense score: r = 1 - (keep / P0)^(1 / alpha).

    `samples` are bootstrap parameters [k, 1], k = 0 for no interval.
    """
    keep = options.keep
    if fit.unidentified:
        return [], [f"No ratio is recommended, since the points do not identify {join_words(fit.unidentified)}."]
    if fit.parameters["alpha"] <= 0 or fit.parameters["P0"] <= keep:
        return [], [f"No ratio is recommended, since the fitted score does not fall to {keep:g} of the dense one."]
    ratio = float(_ratio_that_keeps(fit.parameters, keep))
    drawn = _ratio_that_keeps(samples, keep)
    low, high = sample_interval(drawn)
    smallest, largest = float(points["ratio"].min()), float(points["ratio"].max())
    between = "" if low is None else f" [{number(low)}, {number(high)}]"
    note = "" if smallest <= ratio <= largest else " This lies outside the ratios measured, so it is an extrapolation."
    return [
        {
            "keep": keep,
            "ratio": ratio,
            "low": low,
            "high": high,
            "smallest_ratio": smallest,
            "largest_ratio": largest,
            "sentence": f"Pruning a ratio of {number(ratio)}{between} leaves {keep:g} of the dense score.{note}",
        }
    ], []


def _ratio_that_keeps(parameters: Parameters, keep: float) -> np.ndarray:
    """r = 1 - (keep / P0)^(1 / alpha) within 0 and 1; 1 where the score does not fall with r."""
    falls = np.asarray(parameters["alpha"]) > 0
    left = (keep / np.asarray(parameters["P0"])) ** (1 / np.where(falls, parameters["alpha"], 1))
    return np.where(falls, np.clip(1 - left, 0, 1), 1)


LAW = Law(
    source={
        "title": "Pruning laws: the second version of Compression Laws for Large Language Models",
        "arxiv": "2504.04342",
        "equation": "score = L0 P0 (1 - r)^alpha",
    },
    units={"ratio": "ratio", "dense_score": "score of the metric", "score": "score of the metric"},
    columns={"run": str, "model": str, "method": str, "ratio": float, "dense_score": float, "score": float},
    needs={
        "nodes": ("node", "parent", "model", "method", "family", "rho", "rho_blocks", "rho_nonzero"),
        "metrics": METRICS,
    },
    points_are="they are the scores of nodes that were pruned and neither recovered nor compressed otherwise, whose "
    "dense model was measured by the same metric.",
    options=Options,
    points=points,
    axis=("ratio", "part of the parameters removed"),
    base="dense_score",
    form=FORM,
    rivals=RIVALS,
    held_out={
        "higher_ratio": partial(highest_of_each, column="ratio", name="pruning ratio", by="run"),
        "unseen_model": partial(leave_one_out, column="model", name="model"),
    },
    recommend=recommend,
)
