from __future__ import annotations

from pathlib import Path

import pytest
import torch
from manifests import provenance
from nodes import save_root, save_windows
from recoveries import curve, interruption, losses
from tiny import tiny_model, tiny_tokens
from torch import nn

from coppice.data.windows import load_windows
from coppice.errors import UserError
from coppice.methods.decompose.curing import paper_link, select
from coppice.methods.recover import heal
from coppice.methods.registry import method
from coppice.models.architectures.base import blocks
from coppice.models.checkpoint import load_model, read_manifest, save_checkpoint
from coppice.models.modules import (
    CURLinear,
    LowRankCorrectionLinear,
    LowRankLinear,
    QuantizedLinear,
    TensorTrainLinear,
)
from coppice.recovery import objective
from coppice.recovery.schedule import batch_schedule
from coppice.recovery.stage import Recovery
from coppice.recovery.stage import recover as recover_node

RECOVER = {"text": "a", "validation": "b", "tokens": 200, "length": 16, "batch_size": 4, "learning_rate": 1e-2}
OPTIONS = heal.Options(**RECOVER)
TOKENS = tiny_tokens(4, 12)


@torch.no_grad()
def cur(linear: nn.Linear, rank: int = 6) -> CURLinear:
    rows, columns = select(linear.weight.double().abs(), rank)
    made = CURLinear(linear.in_features, linear.out_features, rank)
    made.rows.weight.copy_(linear.weight[rows])
    made.link.weight.copy_(paper_link(linear.weight, rows, columns))
    made.columns.weight.copy_(linear.weight[:, columns])
    return made


def decomposed() -> nn.Module:
    """The dense root with rows, columns and links in the places of two linears of each block."""
    model = tiny_model()
    for block in blocks(model):
        block.self_attn.q_proj = cur(block.self_attn.q_proj)
        block.mlp.gate_proj = cur(block.mlp.gate_proj)
    return model


def trained_names(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def step(model, teacher, options=OPTIONS, steps=5) -> list[float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 1e-2, weight_decay=0.1)
    losses = []
    for _ in range(steps):
        loss = heal.loss(model, TOKENS, TOKENS, teacher, options)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def test_registered():
    assert (method("heal").family, method("heal").contract) == ("recover", "training")
    assert method("heal").incompatible_with.keys() == {"smaller", "rotated"}


def test_links_alone_train_and_the_loss_falls():
    model, teacher = heal.prepare(decomposed(), OPTIONS), tiny_model()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    wanted = {name: tensor.clone() for name, tensor in teacher.state_dict().items()}
    losses = step(model, teacher)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < 0.95 * losses[0]
    after = heal.finish(model, OPTIONS).state_dict()
    links = {name for name in before if ".link." in name}
    assert len(links) == 6
    for name, tensor in after.items():
        assert torch.equal(tensor, before[name]) != (name in links)
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in teacher.state_dict().items())
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_loss_is_that_of_the_paper():
    model, teacher = decomposed(), tiny_model()
    # Without the last norm, the last hidden state that the model reports is the last block's output.
    model.model.norm, teacher.model.norm = nn.Identity(), nn.Identity()
    labels = TOKENS.clone()
    labels[1, 7:] = -100
    ours = model(input_ids=TOKENS, output_hidden_states=True)
    theirs = teacher(input_ids=TOKENS, output_hidden_states=True)
    predicts = labels[:, 1:] != -100
    entropy = nn.functional.cross_entropy(ours.logits[:, :-1][predicts], labels[:, 1:][predicts])
    distances = [
        nn.functional.mse_loss(a[:, :-1][predicts], b[:, :-1][predicts])
        for a, b in zip(ours.hidden_states[1:], theirs.hidden_states[1:], strict=True)
    ]
    expected = (0.1 * entropy + 0.9 * sum(distances) / 3) * predicts.sum()
    actual = heal.loss(model, TOKENS, labels, teacher, OPTIONS)
    assert actual.item() == pytest.approx(expected.item(), rel=1e-5)


def test_loss_at_its_ends():
    model, teacher = decomposed(), tiny_model()
    distance, entropy = (heal.Options(**RECOVER, cross_entropy=weight) for weight in (0, 1))
    assert heal.loss(teacher, TOKENS, TOKENS, tiny_model(), distance).item() == 0
    assert heal.loss(model, TOKENS, TOKENS, teacher, distance) > 0
    likelihood = objective.summed_loss(model, TOKENS, TOKENS, "float32")
    assert heal.loss(model, TOKENS, TOKENS, teacher, entropy).item() == pytest.approx(likelihood.item(), rel=1e-6)


def mixed() -> nn.Module:
    """A CUR decomposition, low-rank factors, a tensor train, and a plain linear with a low-rank correction."""
    model = tiny_model()
    first, second, _ = blocks(model)
    first.self_attn.q_proj = cur(first.self_attn.q_proj)
    first.mlp.up_proj = LowRankLinear(32, 48, 4)
    second.mlp.up_proj = TensorTrainLinear((4, 8), (6, 8), (3,))
    second.mlp.gate_proj = LowRankCorrectionLinear(second.mlp.gate_proj, 2)
    return model


LINK = {"model.layers.0.self_attn.q_proj.link.weight"}
OTHERS = {f"model.layers.0.mlp.up_proj.{part}.weight" for part in ("first", "second")} | {
    f"model.layers.1.mlp.up_proj.sites.{site}.weight" for site in range(2)
}
SIDES = {f"model.layers.0.self_attn.q_proj.{part}.weight" for part in ("rows", "columns")}


@pytest.mark.parametrize(("parts", "healed"), [("links", LINK | OTHERS), ("factors", LINK | OTHERS | SIDES)])
def test_factors_of_linears_without_a_link_train(parts, healed):
    model = heal.prepare(mixed(), heal.Options(**RECOVER, parts=parts))
    assert trained_names(model) == healed


def test_bias_of_a_factorized_linear_stays():
    model = tiny_model("qwen2")
    blocks(model)[0].self_attn.q_proj = LowRankLinear(32, 32, 4, bias=True)
    names = trained_names(heal.prepare(model, OPTIONS))
    assert names == {f"model.layers.0.self_attn.q_proj.{part}.weight" for part in ("first", "second")}


def test_pruned_entries_of_a_factor_stay_zero():
    model = mixed()
    factor = blocks(model)[0].mlp.up_proj.first
    with torch.no_grad():
        factor.weight[:, ::2] = 0
    factor.masked = True
    step(heal.prepare(model, OPTIONS), tiny_model())
    assert not factor.weight[:, ::2].any()
    assert factor.weight[:, 1::2].all()


def test_nothing_to_heal():
    with pytest.raises(UserError, match="Nothing can be healed"):
        heal.prepare(tiny_model(), OPTIONS)
    model = tiny_model()
    made = cur(blocks(model)[0].self_attn.q_proj)
    made.link = QuantizedLinear(6, 6, 4, -1, True)
    blocks(model)[0].self_attn.q_proj = made
    with pytest.raises(UserError, match="before it is quantized"):
        heal.prepare(model, OPTIONS)


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    """A dense root, its decomposed child, and windows for both."""
    folder = tmp_path_factory.mktemp("place")
    dense = save_root(folder / "dense")
    made = provenance(node="tiny/cur", parent="tiny", traits=["factorized"])
    save_checkpoint(
        decomposed(), folder / "cur", folder / "dense-tokenizer", made, torch.float32, read_manifest(dense).dense
    )
    save_windows(folder / "tokens", dense, "recovery")
    save_windows(folder / "validation", dense, "evaluation")
    return folder


def recover(place: Path, output: Path, **options):
    inputs = {"parent": place / "cur", **{name: place / name for name in ("dense", "tokens", "validation")}}
    recovery = Recovery(
        **inputs,
        node="tiny/cur/heal",
        step={"name": "heal", "method": "heal", "options": RECOVER | options},
        state=output.with_name(f"{output.name}-state"),
        state_every=0.0,
        output=output,
    )
    return recover_node(recovery)


@pytest.fixture(scope="module")
def healed(place, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("healed") / "node"
    recover(place, output)
    return output


def test_stage_heals_the_links_alone(place, healed):
    parent, child = (load_model(folder).state_dict() for folder in (place / "cur", healed))
    for name, tensor in child.items():
        assert torch.equal(tensor, parent[name]) != (".link." in name)
    rows = curve(healed)
    assert rows[-1]["train_loss"] < rows[1]["train_loss"]
    assert read_manifest(healed).traits == ["factorized"]
    dense = objective.held_out_loss(load_model(place / "dense"), load_windows(place / "validation"), 4, "float32")
    assert rows[0]["dense_loss"] == pytest.approx(dense, rel=1e-5)


def test_first_step_reports_the_loss_of_a_target(place, healed):
    windows = load_windows(place / "tokens")
    order = batch_schedule((windows.documents >= 0).sum(axis=1), 4, 200, 0).order
    batch = objective.collate([objective.WindowData(windows, order.flatten())[position] for position in range(4)])
    tokens, labels = batch["input_ids"], batch["labels"]
    total = heal.loss(load_model(place / "cur"), tokens, labels, load_model(place / "dense"), OPTIONS).item()
    rows = curve(healed)
    assert rows[1]["train_loss"] == pytest.approx(total / int((labels[:, 1:] >= 0).sum()), rel=1e-5)


def test_micro_batches_and_checkpoints_change_nothing(place, healed, tmp_path):
    recover(place, tmp_path / "node", micro_batch_size=1, gradient_checkpointing=True)
    reference = load_model(healed).state_dict()
    for name, tensor in load_model(tmp_path / "node").state_dict().items():
        torch.testing.assert_close(tensor, reference[name], rtol=1e-3, atol=1e-4)


def test_interrupted_run_ends_as_if_undisturbed(place, healed, tmp_path):
    with interruption(after=2):
        recover(place, tmp_path / "node")
    recover(place, tmp_path / "node")
    assert losses(tmp_path / "node") == losses(healed)
    assert read_manifest(tmp_path / "node").fingerprint == read_manifest(healed).fingerprint
