from __future__ import annotations

import numpy as np
import pandas as pd
import pytest
from law_points import mesh, spread

from coppice.errors import UserError
from coppice.laws import precision, registry
from coppice.laws.engine.points import Points, select
from coppice.laws.engine.search import fit_form

TRUTH = {"C_T": 0.6, "gamma_D": 0.5, "gamma_N": 0.35, "gamma_post": 0.7}
TRAINING = {
    "A": 0.6,
    "B": 1.1,
    "E": 1.8,
    "alpha": 0.45,
    "beta": 0.4,
    "gamma_w": 2.6745,
    "gamma_a": 2.2,
    "gamma_kv": 0.96,
}
OPTIONS = precision.Options()


def grid(
    sizes: tuple[float, ...] = (0.03, 0.1, 0.3, 1.0),
    tokens: tuple[float, ...] = (1.0, 3.0, 10.0, 26.0),
    bits: tuple[float, ...] = (2.25, 3.25, 4.25, 6.25),
    noise: float = 0.0,
) -> Points:
    """One quantized node a combination; N and D in units of 1e9."""
    points = mesh(parameters=sizes, tokens=tokens, bits=bits)
    named = zip(points["parameters"], points["tokens"], strict=True)
    points["model"] = np.array([f"m{size:g}-{count:g}" for size, count in named])
    return points | {"degradation": precision.predict(TRUTH, points) * spread(points, noise)}


def trained(noise: float = 0.0, runs: int = 400) -> Points:
    """Models trained at all kinds of precision, some of them quantized afterwards."""
    generator = np.random.default_rng(0)
    points = {
        "run": np.arange(runs).astype(str),
        "parameters": np.exp(generator.uniform(np.log(0.02), np.log(5), runs)),
        "tokens": np.exp(generator.uniform(np.log(0.1), np.log(50), runs)),
        "weight_bits": generator.choice([2.0, 3, 4, 6, 8, 16], runs),
        "activation_bits": generator.choice([2.0, 3, 4, 6, 8, 16], runs),
        "cache_bits": generator.choice([1.0, 2, 3, 4, 8, 16], runs),
        "post_bits": generator.choice([2.0, 3, 4, 16], runs),
    }
    loss = precision.predict_training(TRUTH | TRAINING, points)
    return points | {"loss": loss * (1 + noise * generator.standard_normal(runs))}


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-4), (0.005, 0.1)])
def test_degradations_give_back_the_parameters(noise: float, tolerance: float) -> None:
    # T-F2
    found = fit_form(precision.FORM, grid(noise=noise), 8)
    assert found.converged
    assert found.unidentified == ()
    assert found.parameters == pytest.approx(TRUTH, rel=tolerance)


@pytest.mark.parametrize(("noise", "tolerance"), [(0.0, 1e-4), (0.005, 0.1)])
def test_losses_of_trained_models_give_back_the_whole_law(noise: float, tolerance: float) -> None:
    # T-F2
    found = fit_form(precision.FORM_TRAINING, trained(noise), 2)
    assert found.converged
    assert found.unidentified == ()
    assert found.parameters == pytest.approx(TRUTH | TRAINING, rel=tolerance)


def test_effective_parameters_by_bits() -> None:
    # T-F1
    bits = np.array([2.0, 3, 4, 6, 8, 16])
    kept = precision.retention(bits, 2.6745)
    assert kept == pytest.approx([0.527, 0.674, 0.776, 0.894, 0.950, 0.997], abs=5e-4)
    points = {"parameters": np.full(6, 3.0), "weight_bits": bits, "activation_bits": bits[::-1], "cache_bits": bits}
    gammas = {"gamma_w": 2.6745, "gamma_a": 2.6745, "gamma_kv": 0.5}
    expected = 3 * kept * kept[::-1] * (1 - np.exp(-2 * bits))
    assert precision.effective_parameters(gammas, points) == pytest.approx(expected)


def test_the_best_bits_of_training() -> None:
    # T-F1
    u = precision.optimal_training_bits(1.0)
    assert u == pytest.approx(1.9038, abs=5e-5)
    assert 3 * u * np.exp(-u) == pytest.approx(1 - np.exp(-u))
    assert precision.optimal_training_bits(2.5) == pytest.approx(2.5 * u)
    # The same from the law: at a fixed product of N, D and P no other number of bits has a lower least loss.
    bits = u * 2.5 * np.array([0.9, 1, 1.1])
    sizes = np.geomspace(0.01, 100, 4001)
    gammas = dict.fromkeys(precision.PRECISIONS, 2.5)
    parameters = TRUTH | TRAINING | gammas | {"C_T": 0.0}
    least = [
        precision.predict_training(
            parameters,
            {
                "parameters": sizes,
                "tokens": 40 / (sizes * width),
                **dict.fromkeys(precision.PRECISIONS.values(), width),
                "post_bits": 16.0,
            },
        ).min()
        for width in bits
    ]
    assert np.argmin(least) == 1


def test_the_whole_law_is_the_training_law_and_the_degradation() -> None:
    points = trained(runs=20)
    quantized = points | {"post_bits": np.full(20, 3.0)}
    untouched = points | {"post_bits": np.full(20, 1e4)}
    cost = precision.degradation(TRUTH, points, np.full(20, 3.0))
    assert (cost > 0).all()
    assert points["loss"].shape == (20,)
    parameters = TRUTH | TRAINING
    difference = precision.predict_training(parameters, quantized) - precision.predict_training(parameters, untouched)
    assert difference == pytest.approx(cost)
    effective = precision.effective_parameters(TRAINING, points)
    assert precision.predict_training(parameters, untouched) == pytest.approx(
        1.8 + 0.6 * effective**-0.45 + 1.1 * points["tokens"] ** -0.4
    )


def test_each_rival_predicts_by_its_formula() -> None:
    point = {"parameters": np.array([2.0]), "tokens": np.array([5.0]), "bits": np.array([3.0])}
    decay = np.exp(-3 / 0.7)
    expected = {
        "without_tokens": 0.6 * 2**-0.35 * decay,
        "without_size": 0.6 * 5**0.5 * decay,
        "bits_alone": 0.6 * decay,
    }
    for name, value in expected.items():
        assert precision.RIVALS[name].predict(TRUTH, point) == pytest.approx(value), name


@pytest.mark.parametrize(
    ("design", "fixed", "sentence"),
    [
        ({"sizes": (0.3,)}, {"gamma_N": 0.0}, "one size"),
        ({"tokens": (3.0,)}, {"gamma_D": 0.0}, "one number of pretraining tokens"),
        ({"tokens": (1.0,)}, {"gamma_D": 0.0}, "unless the option pretraining_tokens names"),
        ({"bits": (4.25,)}, {"gamma_post": 1.0}, "one bit width"),
    ],
)
def test_a_design_that_cannot_tell(
    design: dict[str, tuple[float, ...]], fixed: dict[str, float], sentence: str
) -> None:
    points = grid(**design)
    found = fit_form(precision.FORM, points, 4)
    assert found.fixed == fixed
    assert len(found.notes) == 1
    assert sentence in found.notes[0]
    assert found.unidentified == ()
    assert precision.predict(found.parameters, points) == pytest.approx(points["degradation"], rel=1e-4)
    for name, rival in precision.RIVALS.items():
        assert fit_form(rival, points, 4).unidentified == (), name


def test_tokens_that_follow_the_size_are_one_exponent() -> None:
    points = grid()
    diagonal = select(points, points["tokens"] == np.select([points["parameters"] < 0.2], [1.0], 10.0))
    diagonal = select(diagonal, (diagonal["parameters"] == 0.03) | (diagonal["parameters"] == 1))
    found = fit_form(precision.FORM, diagonal, 4)
    assert found.fixed == {"gamma_D": 0.0}
    assert "gamma_N stands for both" in found.notes[0]
    assert found.parameters["gamma_N"] == pytest.approx(0.35 - 0.5 * np.log(10) / np.log(1 / 0.03), rel=1e-4)
    assert precision.RIVALS["without_size"].reduce(diagonal) == ({}, [])


def test_too_few_points_are_named() -> None:
    points = select(grid(), np.array([0, 29, 36]))
    assert fit_form(precision.FORM, points, 4).unidentified


def test_held_out_models_and_bits() -> None:
    points = grid()
    assert precision.HELD_OUT["another_model"](points).shape == (16, 64)
    fewer = precision.HELD_OUT["fewer_bits"](points)
    assert set(points["bits"][fewer]) == {2.25}
    assert fewer.sum() == 16
    assert "three bit widths" in precision.HELD_OUT["fewer_bits"](grid(bits=(3.0, 4.0)))
    assert "three models" in precision.HELD_OUT["another_model"](grid(sizes=(1.0,), tokens=(1.0, 2.0)))


def tables() -> dict[str, pd.DataFrame]:
    rows = [
        ("a", "a", None, [], 32.0, None, 20.0),
        ("a/gptq-3", "a", "gptq", ["quantized"], 3.25, None, 30.0),
        ("a/gptq-8", "a", "gptq", ["quantized"], 8.25, 0, 19.0),
        ("a/rtn-3", "a", "rtn", ["quantized"], 3.25, None, 40.0),
        ("a/cut/gptq-3", "a", "gptq", ["quantized", "smaller"], 2.0, None, 60.0),
        ("a/eora", "a", "gptq", ["compensated", "quantized"], 3.5, None, 25.0),
        ("a/full/gptq-3", "a", "gptq", ["quantized"], 3.25, 1000, 25.0),
        ("b/gptq-3", "b", "gptq", ["quantized", "rotated"], 3.25, None, 30.0),
    ]
    names = ["node", "model", "method", "traits", "bits_per_linear_weight", "path_recovery_tokens", "perplexity"]
    nodes = pd.DataFrame(rows, columns=names)
    nodes["dense_parameters"] = nodes["model"].map({"a": 100, "b": 300})
    metrics = nodes[["node"]].assign(
        evaluation="text", metric="perplexity_token", value=nodes.pop("perplexity"), stderr=0.1, unit="perplexity"
    )
    return {"nodes": nodes, "metrics": metrics}


def test_points_are_nodes_that_were_quantized_and_nothing_else() -> None:
    found = precision.points(tables(), OPTIONS)
    assert list(found) == list(precision.COLUMNS)
    assert found["run"].tolist() == ["a/gptq-3", "a/gptq-8", "b/gptq-3"]
    assert found["parameters"].tolist() == [100, 100, 300]
    assert found["bits"].tolist() == [3.25, 8.25, 3.25]
    assert found["tokens"].tolist() == [1, 1, 1]
    assert found["loss"] == pytest.approx(np.log([30, 19, 30]))
    assert found["degradation"][:2] == pytest.approx(np.log([1.5, 0.95]))
    assert np.isnan(found["degradation"][2])  # b itself was not measured
    notes = precision.notes(select(found, np.arange(2)))
    assert notes[0].startswith("1 of 2 quantized nodes lose nothing")
    assert precision.notes(select(found, np.arange(1))) == []


def test_options_choose_the_points() -> None:
    named = precision.points(tables(), OPTIONS.model_copy(update={"pretraining_tokens": {"a": 5e9, "b": 7e9}}))
    assert named["tokens"].tolist() == [5e9, 5e9, 7e9]
    partly = precision.points(tables(), OPTIONS.model_copy(update={"pretraining_tokens": {"a": 5e9}}))
    assert partly["tokens"].tolist() == [1, 1, 1]
    alone = precision.points(tables(), OPTIONS.model_copy(update={"pretraining_tokens": {"a": 5e9}, "nodes": ["a/*"]}))
    assert alone["tokens"].tolist() == [5e9, 5e9]
    assert alone["degradation"] == pytest.approx(np.log([1.5, 0.95]))
    assert precision.points(tables(), OPTIONS.model_copy(update={"method": "rtn"}))["run"].tolist() == ["a/rtn-3"]
    assert precision.points(tables(), OPTIONS.model_copy(update={"method": "awq"}))["tokens"].shape == (0,)


def test_the_law_is_found_by_name() -> None:
    assert registry.load("precision").form is precision.FORM
    with pytest.raises(UserError, match="pretraining_tokens"):
        registry.validate_options("precision", {"pretraining_tokens": {"a": 0}})
