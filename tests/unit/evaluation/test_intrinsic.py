"""Intrinsic metrics: the oracles of the method's dossier (section 9), and what is measured of a model."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from coppice.data.windows import save_windows, tokenize
from coppice.errors import UserError
from coppice.evaluation import intrinsic, stage
from coppice.evaluation.intrinsic import matrix_entropy, matrix_nuclear_norm, normalize
from coppice.models.checkpoint import read_manifest
from coppice.uncertainty import bootstrap_means, percentile_interval

from .conftest import WORLD


def random(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def rotation(width):
    return torch.linalg.qr(random(width, width, seed=1)).Q


def nuclear(rows):
    return torch.linalg.matrix_norm(rows, "nuc").item()


@pytest.mark.parametrize("rows", [torch.eye(12, dtype=torch.float64), rotation(12)], ids=["identity", "orthonormal"])
def test_orthonormal_rows_fill_the_space(rows):
    assert matrix_entropy(rows).item() == pytest.approx(math.log(12))
    assert 12 * matrix_nuclear_norm(torch.eye(12, dtype=torch.float64)).item() == pytest.approx(12)
    assert 12 * matrix_nuclear_norm(rows).item() == pytest.approx(nuclear(rows))


def test_rows_of_rank_one_fill_one_dimension():
    signs = torch.sign(random(30, 1)) * torch.sign(random(1, 8, seed=2))
    assert matrix_entropy(signs).item() == pytest.approx(0, abs=1e-12)
    # The proxy fails at low rank: sqrt(L d) is expected, the nuclear norm of unnormalised signs; columns say more.
    assert nuclear(signs) == pytest.approx(math.sqrt(30 * 8))
    unit = signs / math.sqrt(8)
    assert 30 * matrix_nuclear_norm(unit).item() == pytest.approx(math.sqrt(30 * 8))
    assert nuclear(unit) == pytest.approx(math.sqrt(30))


def test_entropy_survives_a_rotation_of_the_space_and_the_nuclear_norm_does_not():
    rows = normalize(random(20, 8) * torch.arange(1, 9))
    turned = rows @ rotation(8)
    assert matrix_entropy(turned).item() == pytest.approx(matrix_entropy(rows).item())
    assert abs(matrix_nuclear_norm(turned) - matrix_nuclear_norm(rows)).item() > 0.01


def test_scale_and_place_of_the_states_do_not_matter():
    states = random(20, 8)
    for changed in (7 * states, states + random(1, 8, seed=3), 1e-6 * states):
        rows = normalize(changed)
        assert torch.allclose(rows, normalize(states))
        assert matrix_entropy(rows).item() == pytest.approx(matrix_entropy(normalize(states)).item())
    rows = normalize(states)
    assert torch.allclose(rows.norm(dim=-1), torch.ones(20, dtype=torch.float64))
    assert matrix_entropy(5 * rows).item() == pytest.approx(matrix_entropy(rows).item())


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (9, 9)])
def test_both_gram_matrices_have_the_spectrum(shape):
    rows = normalize(random(*shape))
    values = torch.linalg.eigvalsh(rows.T @ rows / shape[0]).clamp(min=1e-300)
    assert matrix_entropy(rows).item() == pytest.approx(-(values * values.log()).sum().item())
    assert matrix_entropy(rows).exp().item() <= min(shape[0] - 1, shape[1]) + 1e-9


@pytest.mark.parametrize("shape", [(6, 20), (20, 6), (32, 32)])
def test_the_nuclear_norm_is_bounded_and_exact_for_orthogonal_columns(shape):
    length, width = shape
    rows = normalize(random(*shape))
    assert matrix_nuclear_norm(rows).item() <= math.sqrt(min(shape) / length) + 1e-12
    orthogonal = torch.zeros(length, width, dtype=torch.float64)
    orthogonal[torch.arange(length), torch.arange(length) % min(shape)] = 1
    assert length * matrix_nuclear_norm(orthogonal).item() == pytest.approx(nuclear(orthogonal))


def test_a_batch_is_its_texts():
    states = random(3, 10, 6)
    rows = normalize(states)
    for function in (matrix_entropy, matrix_nuclear_norm):
        assert torch.allclose(function(rows), torch.stack([function(normalize(one)) for one in states]))


# Measured models


@pytest.fixture(scope="module")
def windows(checkpoint):
    return tokenize(checkpoint, WORLD, "evaluation", 5, 48)


def measured(model, windows, **changes):
    rows = intrinsic.measure(model, windows, "people", **{"length": 20, "most": 64, **changes})
    return {row["metric"].removesuffix("_people"): row for row in rows}


def test_metrics_are_means_over_texts(model, windows):
    found = measured(model, windows)
    with torch.no_grad():
        hidden = model.model(torch.as_tensor(windows.tokens[:, :20]).long()).last_hidden_state.double()
    ranks, norms = [], []
    for one in hidden.numpy():
        rows = one - one.mean(0)
        rows /= np.linalg.norm(rows, axis=1, keepdims=True)
        values = np.linalg.svd(rows, compute_uv=False) ** 2 / 20
        values = values[values > 1e-14]
        ranks.append(np.exp(-(values * np.log(values)).sum()))
        norms.append(np.sort(np.linalg.norm(rows, axis=0))[::-1][:20].sum() / 20)
    rank = found["effective_rank"]
    assert rank["value"] == pytest.approx(np.mean(ranks), rel=1e-6)
    assert rank["stderr"] == pytest.approx(np.std(ranks, ddof=1) / math.sqrt(5), rel=1e-5)
    assert found["matrix_entropy"]["value"] == pytest.approx(np.mean(np.log(ranks)) / math.log(16), rel=1e-6)
    assert found["matrix_nuclear_norm"]["value"] == pytest.approx(np.mean(norms), rel=1e-6)
    assert all((row["n"], row["length"], row["dropped"], row["task"]) == (5, 20, 0, "people") for row in found.values())


def test_a_mean_has_the_interval_of_its_texts():
    values = np.random.default_rng(0).random(30)
    found = intrinsic.mean(values)
    ends = percentile_interval(bootstrap_means(values))
    assert (found["low"], found["high"]) == pytest.approx(ends)
    assert not {"low", "high"} & set(intrinsic.mean(values[:9]))


def test_the_difference_is_that_of_a_random_model_of_the_same_config(model, windows):
    fresh = intrinsic.randomly_initialize(model, seed=0)
    assert fresh.dtype == torch.float32
    before = torch.random.get_rng_state()
    again = intrinsic.randomly_initialize(model, seed=0)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(fresh.parameters(), again.parameters(), strict=True))
    assert not torch.equal(fresh.lm_head.weight, intrinsic.randomly_initialize(model, seed=1).lm_head.weight)
    untrained, found = measured(fresh, windows), measured(model, windows)
    expected = untrained["effective_rank"]["value"] - found["effective_rank"]["value"]
    assert found["diff_effective_rank"]["value"] == pytest.approx(expected)
    assert untrained["diff_effective_rank"]["value"] == pytest.approx(0, abs=1e-9)


def test_only_windows_that_are_long_enough_are_cut(model, windows):
    documents = windows.documents.copy()
    documents[1, 19:] = documents[3, 20:] = -1
    padded = replace(windows, documents=documents)
    assert measured(model, padded)["effective_rank"]["n"] == 4
    assert len(intrinsic.texts(padded, 20, 2)) == 2
    assert intrinsic.texts(padded, 20, 64).shape == (4, 20)
    with pytest.raises(UserError, match=r"No window of the protocol 'people' has 48 tokens; shorten the `length`"):
        measured(model, replace(windows, documents=np.full_like(documents, -1)), length=48)


def test_texts_without_a_spectrum_are_dropped_and_counted(model, windows, monkeypatch):
    hidden = intrinsic.hidden_states

    def broken(one, tokens):
        states = hidden(one, tokens)
        states[0] = states[0, 0]
        states[2, 3] = float("nan")
        return states

    whole = intrinsic.texts(windows, 20, 64)
    monkeypatch.setattr(intrinsic, "hidden_states", broken)
    found = measured(model, windows)
    assert found["effective_rank"]["dropped"] == 2
    assert found["effective_rank"]["n"] == 3
    assert math.isfinite(found["effective_rank"]["value"])
    assert len(whole) == 5
    monkeypatch.setattr(intrinsic, "hidden_states", lambda one, tokens: torch.zeros(5, 20, 16, dtype=torch.float64))
    rows = intrinsic.measure(model, windows, "people", length=20, most=64)
    with pytest.raises(UserError, match="'tiny' gives numbers that are not finite"):
        stage.refuse_infinite("tiny", rows, [])


def test_an_evaluation_measures_them(checkpoint, windows, tmp_path):
    save_windows(windows, tmp_path / "tokens")
    evaluation = {
        "kind": "quality",
        "perplexity": {"people": {"text": "biographies"}},
        "intrinsic": {"protocol": "people", "length": 20, "windows": 3},
    }
    metrics, _, _ = stage.measure_quality(
        checkpoint, read_manifest(checkpoint), evaluation, {"people": tmp_path / "tokens"}, "cpu"
    )
    names = [row["metric"] for row in metrics]
    assert names[2:] == [
        "matrix_entropy_people",
        "effective_rank_people",
        "diff_effective_rank_people",
        "matrix_nuclear_norm_people",
    ]
    assert {row["n"] for row in metrics[2:]} == {3}
