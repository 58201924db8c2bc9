"""Task-stratified quantization: how an accuracy depends on size, bits, calibration and groups, one fit a kind of task.

Source: Zhou et al. (arXiv 2508.18609):

    -ln Acc_adj = A N^alpha (log2 B)^beta (log2 C_b)^gamma G^delta,    Acc_adj = (Acc - chance) / (1 - chance)

N: parameters of the model; B: bits of a code; C_b: size of the calibration set; G: weights that share a scale. The
paper fits each stratum of tasks (memorisation, application, reasoning) by itself, and leaves out 2 bits: give the law
once for each task, with its metric. Logarithmic residuals make the fit ordinary least squares on the logarithms.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Annotated

import numpy as np
from pydantic import Field

from coppice.laws.contracts import Law, Tables
from coppice.laws.engine.forms import Form, Objective, Parameter, Parameters, Reduction, without
from coppice.laws.engine.held_out import largest
from coppice.laws.engine.points import Points, is_single, powers_of_a_thousand, select
from coppice.laws.options import Residuals
from coppice.laws.points.multiple_choice import ITEMS, chance_accuracy
from coppice.laws.points.quality import (
    LOW_BIT_COMPUTE,
    METRICS,
    QualityOptions,
    choose_metric,
    join_quality,
    list_steps,
    step_options,
    traits,
)

if TYPE_CHECKING:
    import pandas as pd

# Where no size is known: log2 of it is 1, so that the factor of C_b is 1 under any exponent.
_UNKNOWN_SIZE = 2.0


class Options(QualityOptions):
    """What the law of quantization by kind of task is fitted to."""

    metric: str | None = Field(
        default=None,
        description="The accuracy of the task, as the table `metrics` names it (`<task>_acc`); may be left out where "
        "there is one alone.",
    )
    method: str | None = Field(default=None, description="The method that quantized the weights; null: any.")
    chance: float | None = Field(
        default=None,
        ge=0,
        lt=1,
        description="The accuracy of guessing; null: the mean over the task's items of 1 / number of choices.",
    )
    fewest_bits: float = Field(default=3, gt=1, description="Nodes of fewer bits are left out, as the paper does.")
    calibration_sizes: dict[str, Annotated[float, Field(gt=1)]] = Field(
        default={},
        description="Name of a calibration -> its size C_b, in windows or in tokens but the same for all, more than 1. "
        "Empty: the law goes without C_b; otherwise nodes of other calibrations, or of none, are left out.",
    )
    row: float | None = Field(
        default=None,
        gt=0,
        description="The G of nodes whose group is a whole row (group_size -1): inputs of a row; null: they are left "
        "out.",
    )
    residuals: Residuals = "logarithmic"


# Exponent -> the column that it belongs to, and what that column counts.
_FACTORS = {
    "alpha": ("parameters", "model size"),
    "beta": ("bits", "number of bits"),
    "gamma": ("calibration_size", "calibration size, or none is given"),
    "delta": ("group_size", "group size"),
}


def predict(parameters: Parameters, points: Points) -> np.ndarray:
    """-ln Acc_adj of the law, [n] or [k, n] with parameters [k, 1]. N is in the fit's unit."""
    return (
        parameters["A"]
        * points["parameters"] ** parameters["alpha"]
        * np.log2(points["bits"]) ** parameters["beta"]
        * np.log2(points["calibration_size"]) ** parameters["gamma"]
        * points["group_size"] ** parameters["delta"]
    )


def reduce(points: Points) -> Reduction:
    """A factor that is the same for all points is absorbed by A: its exponent is 0."""
    fixed, notes = {}, []
    for exponent, (column, what) in _FACTORS.items():
        if is_single(points[column]):
            fixed[exponent] = 0.0
            notes.append(
                f"There is one {what}, so {exponent} is not identified: it is fixed at 0 and A absorbs its factor."
            )
    return fixed, notes


PARAMETERS = {
    "A": Parameter(bounds=(1e-12, 1e12), start=(0.1, 10), logarithmic=True),
    **dict.fromkeys(_FACTORS, Parameter(bounds=(-20, 20), start=(-1.5, 0.5))),
}

FORM = Form(PARAMETERS, predict, reduce, target="negative_log_accuracy", objective=Objective(residuals="logarithmic"))

# Comparators of ours: which factors the points need.
RIVALS = {"without_group": without(FORM, "delta"), "without_size": without(FORM, "alpha")}


def points(tables: Tables, options: Options) -> Points:
    """One row a measured node whose steps quantize weights, with bits and groups, or prepare for it, and nothing else.

    A run is a node. -ln Acc_adj is NaN where the accuracy is not above chance, or is 1; a size is NaN where `Options`
    leaves the node out for it. Raises UserError as `join_quality` does, and where the accuracy of chance is not known.
    """
    nodes = tables["nodes"].set_index("node")
    measured = join_quality(tables, options.evaluation, options.metric, options.nodes, "accuracy")
    measured["step"] = [_weight_step(nodes, node) for node in measured["node"]]
    rows = measured[measured["step"].notna()]
    steps = nodes.loc[rows["step"].tolist()]
    chosen = [step_options(nodes, step) for step in rows["step"]]
    groups = [options.row if each["group_size"] == -1 else each["group_size"] for each in chosen]
    points = {
        "run": rows["node"].to_numpy(dtype=str),
        "model": rows["model"].to_numpy(dtype=str),
        "method": steps["method"].to_numpy(dtype=str),
        "parameters": rows["parameters"].to_numpy(dtype=float),
        "bits": np.array([each["bits"] for each in chosen], float),
        "calibration_size": _calibration_sizes(steps["calibration"], options.calibration_sizes),
        "group_size": np.array(groups, float),
        "negative_log_accuracy": negative_log_accuracy(rows["value"].to_numpy(dtype=float), _chance(tables, options)),
    }
    of_method = np.array([options.method in (None, name) for name in points["method"]], bool)
    return select(points, of_method & (points["bits"] >= options.fewest_bits))


def negative_log_accuracy(accuracy: np.ndarray, chance: float) -> np.ndarray:
    """-ln((Acc - chance) / (1 - chance)) of accuracies [n]; NaN where not chance < Acc < 1."""
    adjusted = (accuracy - chance) / (1 - chance)
    return -np.log(np.where((adjusted > 0) & (adjusted < 1), adjusted, np.nan))


def _weight_step(nodes: pd.DataFrame, node: str) -> str | None:
    """The last step of the node's path that quantized weights by bits and groups; None where the law says nothing."""
    steps = list_steps(nodes, node)
    if set(nodes.loc[steps, "family"]) != {"quantize"} or LOW_BIT_COMPUTE & traits(nodes, node):
        return None
    quantized = [step for step in steps if {"bits", "group_size"} <= step_options(nodes, step).keys()]
    return quantized[-1] if quantized else None


def _calibration_sizes(calibrations: pd.Series, sizes: dict[str, float]) -> np.ndarray:
    """C_b [n] of the calibrations' names; NaN for those without a size, unless there are no sizes at all."""
    if not sizes:
        return np.full(len(calibrations), _UNKNOWN_SIZE)
    return np.array([sizes.get(name, np.nan) for name in calibrations], float)


def _chance(tables: Tables, options: Options) -> float:
    """The accuracy of guessing: the option, or the mean over the items of the task of 1 / number of choices."""
    if options.chance is not None:
        return options.chance
    evaluation, metric = choose_metric(tables["metrics"], options.evaluation, options.metric, "accuracy")
    items = tables["items"]
    tasks = items.loc[items["evaluation"] == evaluation, "task"].unique()
    task = max((task for task in tasks if metric.startswith(f"{task}_")), key=len, default=None)
    return chance_accuracy(items, evaluation, task or metric.removesuffix("_acc"))


LAW = Law(
    source={
        "title": "Task-Stratified Knowledge Scaling Laws for Post-Training Quantized Large Language Models",
        "arxiv": "2508.18609",
        "equation": "-ln Acc_adj = A N^alpha (log2 B)^beta (log2 C_b)^gamma G^delta, "
        "Acc_adj = (Acc - chance) / (1 - chance)",
    },
    units={
        "parameters": "parameters",
        "bits": "bits",
        "calibration_size": "windows or tokens, as the option says",
        "group_size": "weights",
        "negative_log_accuracy": "nats",
    },
    columns={
        "run": str,
        "model": str,
        "method": str,
        "parameters": float,
        "bits": float,
        "calibration_size": float,
        "group_size": float,
        "negative_log_accuracy": float,
    },
    needs={
        "nodes": ("node", "parent", "model", "method", "family", "options", "traits", "calibration", "parameters"),
        "metrics": METRICS,
        "items": ITEMS,
    },
    points_are="they are the accuracies, above chance and below 1, of nodes whose weights were quantized by bits and "
    "groups, and that were neither pruned nor recovered.",
    options=Options,
    points=points,
    axis=("bits", "bits of a code"),
    form=FORM,
    rivals=RIVALS,
    held_out={"larger_model": partial(largest, column="parameters", name="model size")},
    scales=partial(powers_of_a_thousand, names=("parameters",)),
)
