"""Knowledge capacity: the bits of the biography world that nodes hold, by their parameters and by the bits they store.

Source: Physics of Language Models: Part 3.3, Knowledge Capacity Scaling Laws (arXiv 2404.05405). It reports that after
1000 exposures models hold about 2 bits of knowledge a parameter unless the world has fewer, that after 100 exposures
it is about 1, and that rounding weights to 8 bits after training costs next to nothing where 4 bits cost more than a
factor of two. It prints no formula for what lies between; this one is ours:

    K = (K_max^-s + (R N)^-s)^(-1/s) e^-delta,    delta = c (K_max / N)^p e^(-b / gamma)

K: bits that a node holds; K_max: bits of its world; N: parameters; b: stored bits per weight of the blocks' linears,
which is what quantization lowers. R: bits of knowledge a parameter; s: how sharp the bend is from one limit to the
other. delta is the damage that rounding does: it falls with the bits as the degradation of Scaling Laws for Precision
(arXiv 2411.04330) does, and grows with the bits that a parameter has to hold. Where the damage is as the variance of
rounding, 4^-b, gamma is 1 / ln 4 = 0.72. What is fitted is the share K / K_max, in which nodes that hold nothing count
as much as those that hold all. All parameters count in N, embeddings too.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING

import numpy as np
from pydantic import Field

from coppice.formatting import join_words
from coppice.laws.contracts import Advice, Law, Tables
from coppice.laws.engine.forms import Form, Parameter, Parameters, Reduction
from coppice.laws.engine.held_out import HoldOut, largest, leave_one_out, lowest_of_each
from coppice.laws.engine.inference import sample_interval
from coppice.laws.engine.points import Points, is_single
from coppice.laws.engine.search import Fit
from coppice.laws.options import LawOptions
from coppice.laws.points.quality import LOW_BIT_COMPUTE, METRICS, join_quality, list_steps, parent, step_options, traits
from coppice.laws.precision import retention

if TYPE_CHECKING:
    import pandas as pd

METRIC = "knowledge_bits_per_parameter"

SATURATED = 0.95  # of the world: from here on a node's size no longer shows
RULE = 2.0  # bits a parameter, after 1000 exposures [arXiv 2404.05405]
NEGLIGIBLE = 0.95  # of the dense model's bits: what still counts as no change
HALF = 0.5  # the paper's "more than a factor of two"

DENSE = "dense"

COLUMNS = {
    "run": str,
    "node": str,
    "method": str,
    "width": float,
    "parameters": float,
    "stored_bits": float,
    "bits": float,
    "knowledge": float,
    "world": float,
    "share": float,
    "bits_per_parameter": float,
    "bits_per_stored_bit": float,
}


class Options(LawOptions):
    """What the law of knowledge is fitted to."""

    evaluation: str | None = Field(
        default=None, description="The evaluation that measured; may be left out where one alone measured knowledge."
    )
    nodes: list[str] | None = Field(
        default=None,
        description="Patterns of the nodes; null: dense models, and nodes that quantization of weights alone made. "
        "Pruned and factorized ones have fewer parameters that were trained with more.",
    )
    keep: float = Field(
        default=0.95, gt=0, lt=1, description="Part of a dense model's bits that the recommended storage is to keep."
    )


PARAMETERS = {
    "R": Parameter(bounds=(1e-3, 100), start=(0.3, 5), logarithmic=True),
    "s": Parameter(bounds=(0.5, 20), start=(1, 8), logarithmic=True),
    "c": Parameter(bounds=(1e-9, 1e12), start=(1, 1e4), logarithmic=True),
    "p": Parameter(bounds=(0, 10), start=(0.5, 3)),
    "gamma": Parameter(bounds=(0.05, 50), start=(0.3, 2), logarithmic=True),
}


def capacity(parameters: Parameters, points: Points) -> np.ndarray:
    """R N, bits: [n], or [k, n] with parameters [k, 1]."""
    return parameters["R"] * points["parameters"]


def damage(parameters: Parameters, points: Points) -> np.ndarray:
    """delta, without unit: [n], or [k, n] with parameters [k, 1]."""
    return _damage_of_no_bits(parameters, points) * np.exp(-points["bits"] / parameters["gamma"])


def _damage_of_no_bits(parameters: Parameters, points: Points) -> np.ndarray:
    """c (K_max / N)^p."""
    return parameters["c"] * (points["world"] / points["parameters"]) ** parameters["p"]


def predict(parameters: Parameters, points: Points) -> np.ndarray:
    """K / K_max: [n], or [k, n] with parameters [k, 1]."""
    s = parameters["s"]
    held = (1 + (points["world"] / capacity(parameters, points)) ** s) ** (-1 / s)
    return held * np.exp(-damage(parameters, points))


def knowledge(parameters: Parameters, points: Points) -> np.ndarray:
    """K, bits: [n], or [k, n] with parameters [k, 1]. Never above K_max nor above R N."""
    return points["world"] * predict(parameters, points)


def reduce(points: Points) -> Reduction:
    """What one precision, one size, or nodes that hold all of their world do not identify, and the sentences."""
    fixed: dict[str, float] = {}
    notes = []
    if is_single(points["bits"]):
        fixed |= {"c": 0.0, "p": 0.0, "gamma": 1.0}
        notes.append("All nodes are stored at one precision, so the damage of rounding is not identified: c is 0.")
    elif is_single(points["world"] / points["parameters"]):
        fixed["p"] = 0.0
        notes.append("All nodes have one size for their world, so p is not identified: c stands for its factor too.")
    if np.all(points["share"] >= SATURATED):
        held = float(np.max(points["knowledge"] / points["parameters"]))
        notes.append(
            f"Every node holds at least {SATURATED:.0%} of its world, so R is not identified: all that is known is "
            f"that it is at least {held:.3g} bits a parameter. A larger world, or smaller models, would show it."
        )
    return fixed, notes


FORM = Form(PARAMETERS, predict, reduce, target="share")


def _by_all_stored_bits(parameters: Parameters, points: Points) -> np.ndarray:
    """The law with b the stored bits of the whole checkpoint by its parameters, embeddings and norms too."""
    return predict(parameters, points | {"bits": points["stored_bits"] / points["parameters"]})


def _capacity_by_bits(parameters: Parameters, points: Points) -> np.ndarray:
    """(K_max^-s + C^-s)^(-1/s) with C = R N (1 - e^(-b / gamma)): fewer bits make N smaller.

    So arXiv 2411.04330 has it of models that are trained at b bits; here they are rounded after training.
    """
    s = parameters["s"]
    held = capacity(parameters, points) * retention(points["bits"], parameters["gamma"])
    return (1 + (points["world"] / held) ** s) ** (-1 / s)


def _by_size_alone(parameters: Parameters, points: Points) -> np.ndarray:
    """The law without damage: storage has no part."""
    return predict(parameters | {"c": 0.0, "p": 0.0, "gamma": 1.0}, points)


def _reduce_capacity_by_bits(points: Points) -> Reduction:
    return ({"gamma": 0.05} if is_single(points["bits"]) else {}), []


def _only(*names: str) -> dict[str, Parameter]:
    return {name: PARAMETERS[name] for name in names}


# Comparators of ours.
RIVALS = {
    "all_stored_bits": Form(PARAMETERS, _by_all_stored_bits, reduce, target="share"),
    "capacity_by_bits": Form(_only("R", "s", "gamma"), _capacity_by_bits, _reduce_capacity_by_bits, target="share"),
    "size_alone": Form(_only("R", "s"), _by_size_alone, target="share"),
}


HELD_OUT: dict[str, HoldOut] = {
    "another_model": partial(leave_one_out, column="run", name="model"),
    "larger_model": partial(largest, column="parameters", name="size"),
    "fewer_bits": partial(lowest_of_each, column="bits", name="precision", by="run"),
}


def points(tables: Tables, options: Options) -> Points:
    """One row a node whose knowledge was measured.

    knowledge [n]: K, bits, which is negative for a node that does worse than chance. world [n]: K_max; share [n] =
    K / K_max, 0 for such a node, since what it could hold is not less than nothing. bits [n]: stored per weight of the
    blocks' linears, scales and zero points included; width [n]: the bits requested of the quantization, 0 for a
    dense model. A run is a model: its nodes share their training. Without a measurement of knowledge there is no row.
    """
    if METRIC not in set(tables["metrics"]["metric"]):
        return {name: np.empty(0, kind) for name, kind in COLUMNS.items()}
    nodes = tables["nodes"].set_index("node", drop=False)
    measured, most = (
        join_quality(tables, options.evaluation, name, options.nodes) for name in (METRIC, f"{METRIC}_max")
    )
    limits = most[["node", "value"]].rename(columns={"value": "most"})
    measured = measured.merge(limits, on="node").sort_values("node")
    if options.nodes is None:
        measured = measured[np.array([_is_stored_shorter(nodes, node) for node in measured["node"]], bool)]
    parameters, stored = (measured[name].to_numpy(dtype=float) for name in ("parameters", "stored_bits"))
    held, world = (measured[name].to_numpy(dtype=float) * parameters for name in ("value", "most"))
    return {
        "run": measured["model"].to_numpy(dtype=str),
        "node": measured["node"].to_numpy(dtype=str),
        "method": np.array([_method(nodes, node) for node in measured["node"]], str),
        "width": np.array([_width(nodes, node) for node in measured["node"]], float),
        "parameters": parameters,
        "stored_bits": stored,
        "bits": (measured["linear_bits"] / measured["linear_parameters"]).to_numpy(dtype=float),
        "knowledge": held,
        "world": world,
        "share": np.maximum(held, 0) / world,
        "bits_per_parameter": held / parameters,
        "bits_per_stored_bit": held / stored,
    }


def _is_stored_shorter(nodes: pd.DataFrame, node: str) -> bool:
    """Whether it is dense, or made by quantizing weights and nothing else."""
    weights_alone = not traits(nodes, node) & LOW_BIT_COMPUTE
    return weights_alone and all(nodes.at[step, "family"] == "quantize" for step in list_steps(nodes, node))


def _method(nodes: pd.DataFrame, node: str) -> str:
    return DENSE if parent(nodes, node) is None else str(nodes.at[node, "method"])


def _width(nodes: pd.DataFrame, node: str) -> float:
    """The bits requested of the node's step; 0 for a dense model, and for a step that has no such number."""
    bits = step_options(nodes, node).get("bits")
    return float(bits) if isinstance(bits, int) else 0.0


# What the points show without a law


def notes(points: Points) -> list[str]:
    """Sentences on the limits of what is stored, and on the paper's findings for 8 and 4 bits."""
    return [*_limits(points), *_finding(points, 8), *_finding(points, 4)]


def _limits(points: Points) -> list[str]:
    by_bit, by_parameter = points["bits_per_stored_bit"], points["bits_per_parameter"]
    notes = []
    if np.any(by_bit > 1):
        worst = int(np.argmax(by_bit))
        notes.append(
            f"{points['node'][worst]} seems to hold {by_bit[worst]:.3g} bits of knowledge for each bit that it stores, "
            "which is impossible: its knowledge, or its stored bits, are measured wrong."
        )
    worse = points["knowledge"] < 0
    if worse.any():
        notes.append(
            f"{worse.sum()} of {len(worse)} nodes do worse than one who knows nothing would: they count as holding "
            "nothing."
        )
    above = by_parameter > RULE
    if above.any():
        most = int(np.argmax(by_parameter))
        notes.append(
            f"{above.sum()} of {len(above)} nodes hold more than {RULE:g} bits a parameter, the most that the paper "
            f"expects after 1000 exposures, {points['node'][most]} the most ({by_parameter[most]:.3g})."
        )
    return notes


def _finding(points: Points, width: int) -> list[str]:
    """For each method that quantized to `width` bits, what its nodes keep of their dense models' knowledge."""
    dense = dict(zip(points["run"][_dense(points)], points["knowledge"][_dense(points)], strict=True))
    sentences = []
    for method in np.unique(points["method"][points["width"] == width]):
        rows = np.flatnonzero((points["method"] == method) & (points["width"] == width))
        shares = {
            str(points["node"][row]): points["knowledge"][row] / dense[points["run"][row]]
            for row in rows
            if points["run"][row] in dense
        }
        if shares:
            sentences.append(_finding_sentence(str(method), width, shares))
    return sentences


def _finding_sentence(method: str, width: int, shares: dict[str, float]) -> str:
    text = join_words([f"{share:.1%} ({node})" for node, share in shares.items()])
    if width == 8:
        paper, agree = "8 bits change next to nothing", sum(share >= NEGLIGIBLE for share in shares.values())
    else:
        paper, agree = "4 bits lose more than a factor of two", sum(share < HALF for share in shares.values())
    return (
        f"{method} at {width} bits keeps {text} of the dense model's knowledge. The paper reports of GPTQ that "
        f"{paper}: so it is for {agree} of {len(shares)} nodes here."
    )


def _dense(points: Points) -> np.ndarray:
    return points["method"] == DENSE


# Advice


def recommend(fit: Fit, samples: Parameters, points: Points, scales: dict[str, float], options: Options) -> Advice:
    """For each dense model the stored bits per weight at which it keeps options.keep of its knowledge.

    From K(b) = keep K(dense): delta(b) = delta(dense) - ln keep, so b = -gamma ln(delta(b) / (c (K_max / N)^p)).
    """
    missing: list[str] = [name for name in ("c", "p", "gamma") if name in fit.fixed or name in fit.unidentified]
    if missing:
        return [], [f"No precision is recommended, since the points do not identify {join_words(missing)}."]
    dense = {name: column[_dense(points)] for name, column in points.items()}
    bits = _bits_to_keep(fit.parameters, dense, options.keep)
    drawn = _bits_to_keep(samples, dense, options.keep)
    entries = []
    for row, model in enumerate(dense["run"]):
        low, high = sample_interval(drawn[:, row])
        between = "" if low is None else f" ({low:.2f} to {high:.2f})"
        entries.append(
            {
                "sentence": f"{model} keeps {options.keep:.0%} of its knowledge at {bits[row]:.2f}{between} stored "
                "bits per weight of its linears.",
                "model": str(model),
                "keep": options.keep,
                "bits": float(bits[row]),
                "low": low,
                "high": high,
            }
        )
    return entries, []


def _bits_to_keep(parameters: Parameters, points: Points, keep: float) -> np.ndarray:
    """b [n], or [k, n] with parameters [k, 1], at which nodes hold `keep` of what they hold now."""
    allowed = damage(parameters, points) - np.log(keep)
    return -parameters["gamma"] * np.log(allowed / _damage_of_no_bits(parameters, points))


LAW = Law(
    source={
        "title": "Physics of Language Models: Part 3.3, Knowledge Capacity Scaling Laws",
        "arxiv": "2404.05405",
        "equation": "K = (K_max^-s + (R N)^-s)^(-1/s) exp(-c (K_max / N)^p e^(-b / gamma)) (the form is ours)",
    },
    units={
        "share": "part of the world's bits",
        "bits": "stored bits per weight of the linears",
        "width": "bits",
        "parameters": "parameters",
        "stored_bits": "bits",
        "knowledge": "bits",
        "world": "bits",
        "bits_per_parameter": "bits per parameter",
        "bits_per_stored_bit": "bits per bit",
    },
    columns=COLUMNS,
    needs={
        "nodes": (
            "node",
            "parent",
            "model",
            "method",
            "family",
            "options",
            "traits",
            "parameters",
            "linear_parameters",
            "stored_bits",
            "linear_bits",
        ),
        "metrics": METRICS,
    },
    points_are="they are nodes whose knowledge of the biography world was measured (`knowledge: true` in a quality "
    "evaluation).",
    options=Options,
    points=points,
    axis=("bits", "stored bits per weight of the linears"),
    form=FORM,
    rivals=RIVALS,
    held_out=HELD_OUT,
    notes=notes,
    recommend=recommend,
)
