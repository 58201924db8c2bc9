"""The precision law: what quantizing a trained model costs, and what training at few bits costs; its rivals.

Source: Kumar et al., Scaling Laws for Precision (arXiv 2411.04330):

    L = A / N_eff^alpha + B / D^beta + E + delta_PTQ
    N_eff = N (1 - e^(-P_w / gamma_w)) (1 - e^(-P_a / gamma_a)) (1 - e^(-P_kv / gamma_kv))
    delta_PTQ = C_T D^gamma_D / N^gamma_N e^(-P_post / gamma_post)

N: parameters; D: tokens of pretraining; P_w, P_a, P_kv: bits of weights, activations and the cache of keys and values
in training; P_post: bits of a weight after post-training quantization. A study quantizes models that are trained
already, so its tables show delta_PTQ alone, and that is the law's form: the loss of a quantized node less that of its
dense root. FORM_TRAINING is the whole law, for points of models that were trained at several precisions.
"""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field, PositiveFloat

from coppice.laws import chinchilla
from coppice.laws.contracts import Law, Source, Tables
from coppice.laws.engine.forms import Form, Parameter, Parameters, Reduction, without
from coppice.laws.engine.held_out import HoldOut, leave_one_out, lowest_of_each
from coppice.laws.engine.points import Points, is_single, powers_of_a_thousand
from coppice.laws.points.quality import LOW_BIT_COMPUTE, METRICS, QualityOptions, join_quality, matches

if TYPE_CHECKING:
    pass

SOURCE: Source = {
    "title": "Scaling Laws for Precision",
    "arxiv": "2411.04330",
    "equation": "L(quantized) - L(dense) = C_T D^gamma_D / N^gamma_N e^(-P_post / gamma_post)",
}

COLUMNS = {
    "run": str,
    "model": str,
    "parameters": float,
    "tokens": float,
    "bits": float,
    "loss": float,
    "degradation": float,
}

# Stands in for an unknown number of pretraining tokens, since every point must have one.
_UNKNOWN_TOKENS = 1.0

# What else could have changed the loss, or where bits are not those of the weights.
_OTHER_TRAITS = frozenset({"masked", "factorized", "smaller", "compensated"}) | LOW_BIT_COMPUTE


class Options(QualityOptions):
    """What the precision law is fitted to."""

    method: str = Field(default="gptq", description="The quantization method whose nodes are the points.")
    pretraining_tokens: dict[str, PositiveFloat] = Field(
        default={},
        description="Model -> number of tokens that it was pretrained on, D. Unless all models of the points are "
        "named, the law is fitted without D.",
    )


_EXPONENT = Parameter(bounds=(-5, 5), start=(-0.5, 1))
_BITS = Parameter(bounds=(0.05, 50), start=(0.3, 4), logarithmic=True)

PARAMETERS = {
    "C_T": Parameter(bounds=(1e-12, 1e15), start=(0.01, 100), logarithmic=True),
    "gamma_D": _EXPONENT,
    "gamma_N": _EXPONENT,
    "gamma_post": _BITS,
}


def predict(parameters: Parameters, points: Points) -> np.ndarray:
    """delta_PTQ, nats per token, [n] or [k, n] with parameters [k, 1]. N and D are in the fit's units, P in bits."""
    return degradation(parameters, points, points["bits"])


def degradation(parameters: Parameters, points: Points, bits: np.ndarray) -> np.ndarray:
    """C_T D^gamma_D / N^gamma_N e^(-P / gamma_post) with P = `bits` [n]."""
    return (
        parameters["C_T"]
        * points["tokens"] ** parameters["gamma_D"]
        * points["parameters"] ** -parameters["gamma_N"]
        * np.exp(-bits / parameters["gamma_post"])
    )


def reduce(points: Points) -> Reduction:
    """The nested form that one size, one bit width, or unknown or dependent pretraining tokens leave, and why."""
    fixed, notes = {}, []
    if is_single(points["parameters"]):
        fixed["gamma_N"] = 0.0
        notes.append("There is one size, so gamma_N is not identified: it is fixed at 0 and C_T carries its factor.")
    reason = _why_without_tokens(points)
    if reason:
        fixed["gamma_D"] = 0.0
        notes.append(reason)
    if is_single(points["bits"]):
        fixed["gamma_post"] = 1.0
        notes.append(
            "There is one bit width, so gamma_post is not identified: it is fixed at 1 bit and C_T carries its factor."
        )
    return fixed, notes


def _why_without_tokens(points: Points) -> str | None:
    """The reason why D has no part, as a sentence; None where it has one."""
    tokens = points["tokens"]
    if is_single(tokens):
        return (
            "The points have one number of pretraining tokens (it counts as 1 unless the option pretraining_tokens "
            "names every model's), so gamma_D is not identified: it is fixed at 0 and C_T carries its factor."
        )
    if _follows(tokens, points["parameters"]):
        return (
            "The pretraining tokens are a power of the size in all models, so gamma_D and gamma_N cannot be separated: "
            "gamma_D is fixed at 0 and gamma_N stands for both."
        )
    return None


def _follows(values: np.ndarray, other: np.ndarray, gap: float = 0.05) -> bool:
    """Whether positive `values` [n] are, within a relative `gap`, a constant times a power of `other` [n]."""
    logarithms = np.log(values)
    design = np.column_stack([np.ones(len(other)), np.log(other)])
    coefficients = np.linalg.lstsq(design, logarithms, rcond=None)[0]
    return bool(np.max(np.abs(design @ coefficients - logarithms)) <= np.log(1 + gap))


FORM = Form(PARAMETERS, predict, reduce, target="degradation")


def _reduce_without_size(points: Points) -> Reduction:
    """As `reduce`, save that tokens which follow the size stand in for it."""
    fixed = {name: value for name, value in reduce(points)[0].items() if name not in ("gamma_D", "gamma_N")}
    return fixed | ({"gamma_D": 0.0} if is_single(points["tokens"]) else {}), []


# Comparators of ours: which of the law's three factors the points need.
RIVALS = {
    "without_tokens": without(FORM, "gamma_D"),
    "without_size": replace(without(FORM, "gamma_N"), reduce=_reduce_without_size),
    "bits_alone": without(without(FORM, "gamma_D"), "gamma_N"),
}

HELD_OUT: dict[str, HoldOut] = {
    "another_model": partial(leave_one_out, column="model", name="model"),
    "fewer_bits": partial(lowest_of_each, column="bits", name="bit width", by="model"),
}


def points(tables: Tables, options: Options) -> Points:
    """One row a node that options.method quantized and that nothing else changed.

    A node that was also pruned, factorized, made smaller, compensated or trained, or that computes with few bits of
    activations or cache, is no point. `bits` [n] are those stored for a weight of the blocks' linears, scales and zero
    points included, so that 4 bits in groups with their own scales count as more than 4. `parameters` [n] are all of
    the dense model's; `tokens` [n] those of its pretraining, 1 for all where the options do not name every model's;
    `degradation` [n] is the node's loss less the dense root's in the same measurement, in nats per token, which noise
    can take below zero. It is not a number where the root was not measured.
    """
    measured = join_quality(tables, options.evaluation, options.metric, None)
    losses = measured.set_index("node")["value"]
    quantized = measured[
        [
            row.method == options.method and matches(str(row.node), options.nodes) and _is_quantized_alone(row)
            for row in measured.itertuples()
        ]
    ].sort_values("node")
    known = options.pretraining_tokens
    models = quantized["model"]
    tokens = models.map(known) if set(models) <= set(known) else [_UNKNOWN_TOKENS] * len(models)
    return {
        "run": quantized["node"].to_numpy(dtype=str),
        "model": models.to_numpy(dtype=str),
        "parameters": quantized["dense_parameters"].to_numpy(dtype=float),
        "tokens": np.asarray(tokens, dtype=float),
        "bits": quantized["bits_per_linear_weight"].to_numpy(dtype=float),
        "loss": quantized["value"].to_numpy(dtype=float),
        "degradation": quantized["value"].to_numpy(dtype=float) - losses.reindex(models).to_numpy(dtype=float),
    }


def _is_quantized_alone(row: Any) -> bool:
    traits = set(row.traits)
    return "quantized" in traits and not traits & _OTHER_TRAITS and not row.path_recovery_tokens > 0


def notes(points: Points) -> list[str]:
    """A sentence where the data contradict the law's sign: what it predicts is always positive."""
    gains = int(np.sum(points["degradation"] <= 0))
    if not gains:
        return []
    return [
        f"{gains} of {len(points['degradation'])} quantized nodes lose nothing against the dense model, where this "
        "law, which is always positive, cannot follow."
    ]


# Training at few bits


# Of each tensor: the parameter, and the column of its bits.
PRECISIONS = {"gamma_w": "weight_bits", "gamma_a": "activation_bits", "gamma_kv": "cache_bits"}

TRAINING_PARAMETERS = chinchilla.PARAMETERS | dict.fromkeys(PRECISIONS, _BITS) | PARAMETERS


def effective_parameters(parameters: Parameters, points: Points) -> np.ndarray:
    """N_eff [n], or [k, n] with parameters [k, 1], in the unit of N; the bits [n] are the columns of PRECISIONS."""
    effective = points["parameters"]
    for name, column in PRECISIONS.items():
        effective = effective * retention(points[column], parameters[name])
    return effective


def retention(bits: Any, gamma: Any) -> Any:
    """1 - e^(-P / gamma): the part of the parameters that P `bits` leave in effect, for one kind of tensor."""
    return 1 - np.exp(-bits / gamma)


def predict_training(parameters: Parameters, points: Points) -> np.ndarray:
    """L of the whole law, nats per token, [n] or [k, n]; `post_bits` [n] is 16 and more where nothing was quantized."""
    return chinchilla.predict(
        parameters, points | {"parameters": effective_parameters(parameters, points)}
    ) + degradation(parameters, points, points["post_bits"])


def reduce_training(points: Points) -> Reduction:
    """The nested form that one precision of a kind of tensor leaves, and why."""
    fixed, notes = {}, []
    for name, column in PRECISIONS.items():
        if is_single(points[column]):
            fixed[name] = 1.0
            notes.append(
                f"There is one value of {column}, so {name} is not identified: it is fixed at 1 bit and A carries its "
                "factor."
            )
    if is_single(points["post_bits"]):
        fixed |= {"C_T": 0.0, "gamma_D": 0.0, "gamma_N": 0.0, "gamma_post": 1.0}
        notes.append(
            "There is one precision after training, so what quantizing costs is not identified and has no part."
        )
    return fixed, notes


FORM_TRAINING = Form(TRAINING_PARAMETERS, predict_training, reduce_training)


def optimal_training_bits(gamma: float) -> float:
    """Bits that make the most of a training compute proportional to N D P, with P_w = P_a = P_kv = P and one gamma.

    N_eff D = (N D P) (1 - e^-u)^3 / (gamma u) with u = P / gamma, so that 3 u e^-u = 1 - e^-u whatever the compute:
    u = -1/3 - W(-e^(-1/3) / 3), W the lower branch of Lambert's function, near 1.9038.
    """
    # scipy is slow to import, and reading a study reads a law's options.
    from scipy.special import lambertw

    return float(-1 / 3 - lambertw(-np.exp(-1 / 3) / 3, -1).real) * gamma


LAW = Law(
    source=SOURCE,
    units={
        "parameters": "parameters",
        "tokens": "tokens",
        "bits": "bits per weight",
        "loss": "nats per token",
        "degradation": "nats per token",
    },
    columns=COLUMNS,
    needs={
        "nodes": (
            "node",
            "model",
            "method",
            "traits",
            "dense_parameters",
            "bits_per_linear_weight",
            "path_recovery_tokens",
        ),
        "metrics": METRICS,
    },
    points_are="they are the nodes that the chosen method quantized, and nothing else changed, with the chosen metric.",
    options=Options,
    points=points,
    axis=("bits", "bits stored per weight of the linears"),
    form=FORM,
    rivals=RIVALS,
    held_out=HELD_OUT,
    scales=partial(powers_of_a_thousand, names=("parameters", "tokens")),
    notes=notes,
)
