from __future__ import annotations

import argparse
import json
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from coppice.data.windows import save_windows, tokenize
from coppice.errors import UserError
from coppice.evaluation import connectivity, perplexity, stage
from coppice.models.architectures.base import blocks
from coppice.models.checkpoint import read_manifest
from coppice.models.modules import QuantizedLinear
from coppice.records.metrics import Metrics
from coppice.results.measurements import rows_of

from .conftest import WORLD, make_model, save

OPTIONS = {"points": 5, "barrier": 0.01, "similarity": 0.9}


@pytest.fixture(scope="module")
def windows(checkpoint):
    return tokenize(checkpoint, WORLD, "evaluation", 6, 64, pack=False)


@pytest.fixture(scope="module")
def stranger(tokenizer):
    """Another seed's model of the same shape."""
    return make_model(len(tokenizer), seed=1)


def permuted(model):
    """The same function: hidden units of one block's MLP in another order."""
    found = deepcopy(model)
    mlp = blocks(found)[0].mlp
    order = torch.randperm(24, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for linear in (mlp.gate_proj, mlp.up_proj):
            linear.weight.copy_(linear.weight[order])
        mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order])
    return found


def by_metric(rows):
    return {row["metric"]: row for row in rows}


def logits_of(model, windows):
    """[tokens, vocabulary], padding left out."""
    kept = torch.as_tensor(windows.documents) >= 0
    with torch.no_grad():
        return model(input_ids=torch.as_tensor(windows.tokens).long()).logits[kept].double()


def cka_by_kernels(x, y):
    """Linear CKA from the centred kernels K = X X^T [n, n], the definition's other form."""
    centre = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    first, second = (centre @ each @ each.T @ centre for each in (x, y))
    return (first * second).sum().item() / (first.norm() * second.norm()).item()


# Oracle: identical models: LMC = 0, CKA = 1.
def test_a_model_is_connected_to_itself(model, windows):
    found = by_metric(connectivity.measure(model, model, windows, "people", **OPTIONS))
    assert list(found) == ["mode_connectivity_people", "barrier_loss_people", "cka_people"]
    assert found["mode_connectivity_people"]["value"] == 0
    assert found["barrier_loss_people"]["value"] == pytest.approx(0, abs=1e-12)
    assert found["cka_people"]["value"] == pytest.approx(1, rel=1e-9)
    assert {row["regime"] for row in found.values()} == {"II-B"}


# Oracle: a copy with the hidden units of one MLP permuted: LMC < 0, CKA of the outputs = 1.
def test_a_permuted_copy_is_parted_by_a_barrier_and_computes_the_same(tokenizer, windows):
    model = make_model(len(tokenizer))
    with torch.no_grad():
        for name in ("gate_proj", "up_proj", "down_proj"):
            getattr(blocks(model)[0].mlp, name).weight.mul_(8)
    # The model's own predictions are the text, so that its error is next to nothing and any change of it a barrier.
    tokens = torch.as_tensor(windows.tokens[:, :24]).long()
    with torch.no_grad():
        for place in range(1, tokens.shape[1]):
            tokens[:, place] = model(input_ids=tokens[:, :place]).logits[:, -1].argmax(-1)
    own = replace(windows, tokens=tokens.numpy(), documents=np.zeros(tokens.shape, int))
    rows = connectivity.measure(model, permuted(model), own, "people", **OPTIONS)
    found, barrier, cka = rows
    assert found["errors"][0] == found["errors"][-1] == 0
    assert found["value"] < -0.05
    assert 0 < found["at"] < 1
    assert barrier["value"] > 0
    assert cka["value"] == pytest.approx(1, rel=1e-6)
    assert found["regime"] == "I"


# Oracle: quadratic loss (a linear model): LMC >= 0, and the barrier of the loss is 0.
@pytest.mark.parametrize("seed", range(4))
def test_a_linear_model_has_no_barrier(seed):
    generator = torch.Generator().manual_seed(seed)
    inputs, targets = torch.randn(40, 5, generator=generator), torch.randn(40, 1, generator=generator)
    ends = nn.Linear(5, 1), nn.Linear(5, 1)
    path = np.linspace(0, 1, 11)
    with torch.no_grad():
        for end in ends:
            end.weight.normal_(0, 1, generator=generator)
        losses = np.array(
            [(each(inputs) - targets).double().square().mean() for each in connectivity.interpolate(*ends, path)]
        )
    value, _ = connectivity.mode_connectivity(losses)
    assert value >= 0
    assert (losses - ((1 - path) * losses[0] + path * losses[-1])).max() == pytest.approx(0, abs=1e-6)


def test_mode_connectivity_is_the_largest_deviation_with_its_sign():
    assert connectivity.mode_connectivity(np.array([0.2, 0.5, 0.9, 0.3])) == (pytest.approx(-0.65), 2)
    assert connectivity.mode_connectivity(np.array([0.4, 0.1, 0.3, 0.4])) == (pytest.approx(0.3), 1)
    # The ends are equally far from their mean.
    assert connectivity.mode_connectivity(np.array([0.3, 0.25, 0.1])) == (pytest.approx(0.1), 2)
    assert connectivity.mode_connectivity(np.array([0.1, 0.25, 0.3])) == (pytest.approx(0.1), 0)


def test_the_path_begins_and_ends_at_the_models_and_leaves_them_alone(model, stranger):
    before = deepcopy(model.state_dict())
    states = [
        deepcopy(each.state_dict()) for each in connectivity.interpolate(model, stranger, np.array([0, 0.25, 1.0]))
    ]
    for name, first in model.state_dict().items():
        second = stranger.state_dict()[name]
        assert torch.equal(first, before[name])
        assert torch.equal(states[0][name], first)
        assert torch.equal(states[2][name], second)
        torch.testing.assert_close(states[1][name], 0.75 * first + 0.25 * second)
    assert states[1]["lm_head.weight"].data_ptr() == states[1]["model.embed_tokens.weight"].data_ptr()


def test_loss_is_that_of_the_perplexity_and_error_counts_misses(model, windows):
    loss, error = connectivity.loss_and_error(model, windows)
    (expected, _), _ = perplexity.measure(model, windows, "people")
    assert loss == pytest.approx(expected["value"], rel=1e-6)
    kept = windows.documents >= 0
    with torch.no_grad():
        best = model(input_ids=torch.as_tensor(windows.tokens).long()).logits.argmax(-1).numpy()
    scored = kept[:, 1:]
    assert not scored.all()
    assert error == pytest.approx((best[:, :-1] != windows.tokens[:, 1:])[scored].mean())


def test_similarity_is_the_cka_of_the_logits(model, stranger, windows):
    ours = connectivity.linear_cka(connectivity.outputs(model, stranger, windows))
    assert ours == pytest.approx(cka_by_kernels(logits_of(model, windows), logits_of(stranger, windows)), rel=1e-5)
    assert ours < 0.9


# Oracle: CKA is invariant to orthogonal maps, to scale and to shifts, and to how samples are cut into pieces.
def test_invariances_of_cka():
    generator = torch.Generator().manual_seed(0)
    x, y = (torch.randn(50, d, generator=generator, dtype=torch.float64) + 3 for d in (6, 4))
    y = y + x[:, :4]
    value = connectivity.linear_cka([(x, y)])
    assert value == pytest.approx(cka_by_kernels(x, y))
    assert 0 < value < 1
    q, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    assert connectivity.linear_cka([(x @ q, y)]) == pytest.approx(value)
    assert connectivity.linear_cka([(-7 * x, y + 100)]) == pytest.approx(value)
    assert connectivity.linear_cka([(x[:20], y[:20]), (x[20:], y[20:])]) == pytest.approx(value)
    assert connectivity.linear_cka([(y, x)]) == pytest.approx(value)
    # A map that is not orthogonal changes it.
    stretch = torch.diag(torch.tensor([10.0, 1, 1, 1, 1, 1], dtype=torch.float64))
    assert connectivity.linear_cka([(x @ stretch, y)]) != pytest.approx(value, rel=1e-2)


@pytest.mark.parametrize(
    ("mc", "cka", "expected"),
    [(-0.011, 1.0, "I"), (-0.011, 0.1, "I"), (-0.01, 0.9, "II-B"), (0.2, 0.89, "II-A"), (0.0, 0.95, "II-B")],
)
def test_regimes(mc, cka, expected):
    assert connectivity.classify(mc, cka, barrier=0.01, similarity=0.9) == expected


def test_what_cannot_be_interpolated_is_refused(model, tokenizer, windows):
    packed, narrow = deepcopy(model), make_model(len(tokenizer))
    mlp = blocks(packed)[0].mlp
    mlp.up_proj = QuantizedLinear(16, 24, 4, -1, True)
    with pytest.raises(UserError, match=r"as model.layers.0.mlp.up_proj.weight_packed is made of packed integers"):
        connectivity.measure(packed, packed, windows, "people", **OPTIONS)
    blocks(narrow)[1].mlp.up_proj = nn.Linear(16, 20, bias=False)
    with pytest.raises(UserError, match=r"up_proj.weight is \(24, 16\) in the one node and \(20, 16\) in the other"):
        connectivity.measure(model, narrow, windows, "people", **OPTIONS)
    short = deepcopy(model)
    short.model.layers = short.model.layers[:1]
    with pytest.raises(UserError, match=r"and missing in the other; measure nodes of one shape"):
        connectivity.measure(model, short, windows, "people", **OPTIONS)


def test_windows_beyond_the_context_are_refused(checkpoint, model):
    long = tokenize(checkpoint, WORLD, "evaluation", 1, 65)
    with pytest.raises(UserError, match="'people' has windows of 65 tokens, but the model's context ends at 64"):
        connectivity.measure(model, model, long, "people", **OPTIONS)


def test_the_stage_writes_metrics_with_the_regime(checkpoint, stranger, windows, tmp_path):
    save_windows(windows, tmp_path / "tokens")
    other = save(stranger, tmp_path / "other")
    evaluation = {"kind": "connectivity", "perplexity": {"people": {"text": "biographies"}}, **OPTIONS}
    parser = argparse.ArgumentParser()
    stage.add_arguments(parser)
    parser.add_argument("--device", default="cpu")
    words = ["--node", "tiny@1", "--model", checkpoint, "--name", "basin", "--evaluation", json.dumps(evaluation)]
    words += ["--tokens", f"people={tmp_path / 'tokens'}", "--output", tmp_path / "out"]
    with pytest.raises(UserError, match=r"compares two checkpoints; give the other one with `--other DIR`"):
        stage.run(parser.parse_args([str(word) for word in words]))
    stage.run(parser.parse_args([str(word) for word in [*words, "--other", other]]))
    report = json.loads((tmp_path / "out" / "metrics.json").read_text())
    assert report["other_fingerprint"] == read_manifest(other).fingerprint
    assert report["tokens_fingerprints"] == {"people": windows.manifest.fingerprint}
    found = by_metric(report["metrics"])
    row = found["mode_connectivity_people"]
    assert row["regime"] in connectivity.REGIMES
    assert row["other"] == "tiny"
    assert row["path"] == [0, 0.25, 0.5, 0.75, 1]
    assert len(row["errors"]) == len(found["barrier_loss_people"]["losses"]) == 5
    assert row["n"] == int((windows.documents[:, 1:] >= 0).sum())
    rows = rows_of(Metrics.read(tmp_path / "out" / "metrics.json"), "tiny@1", "basin")
    assert [entry["metric"] for entry in rows.metrics] == list(found)
    assert json.loads(rows.metrics[0]["details"])["regime"] == row["regime"]
    assert rows.costs == []
